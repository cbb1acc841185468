#!/usr/bin/env bash
# job.sh ENVIRONMENT JOB [NAME=value ...]: starts infra/kubernetes/jobs/JOB.yaml on a cluster of its own.
#
#   job.sh dev train DATASET=faces RECIPE=train_sdxl_8xh100.yaml OUT=runs/faces-1
#
# Lines "#: NAME=value" of the job's file are its settings; sizes come from the overlay's jobs.env.
#   DRY_RUN=yes   prints the manifest instead
set -euo pipefail
# shellcheck source=SCRIPTDIR/templates.sh
source "$(dirname "${BASH_SOURCE[0]}")/templates.sh"

environment="$(environment_of "${1:-}")"
job="$infra_path/kubernetes/jobs/${2:-}.yaml"
[[ -n "${2:-}" && -f "$job" ]] ||
  fail "job: got '${2:-}'; give one of: $(cd "$infra_path/kubernetes/jobs" && echo *.yaml | sed 's/\.yaml//g')"
overlay="$infra_path/kubernetes/overlays/$environment"
[[ -f "$overlay/platform.env" ]] || fail "$overlay/platform.env is missing; run infra/scripts/render.sh $environment"

values="$(mktemp)"
trap 'rm -f "$values"' EXIT
{
  echo "JOB_NAME=$2-$(date -u +%Y%m%d-%H%M%S)"
  sed -n 's/^#: //p' "$job"
} >"$values"
for setting in "${@:3}"; do
  name="${setting%%=*}"
  if [[ "$setting" != *=* ]] || ! grep -q "^$name=" "$values" "$overlay/jobs.env"; then
    fail "setting: got '$setting'; give NAME=value with one of: $(cat "$values" "$overlay/jobs.env" | sed -n 's/^\([A-Z_]*\)=.*/\1/p' | tr '\n' ' ')"
  fi
  echo "$setting" >>"$values"
done
manifest="$(fill "$job" "$values" "$overlay/jobs.env" "$overlay/platform.env")"
if [[ "${DRY_RUN:-}" == yes ]]; then
  echo "$manifest"
else
  kubectl --context "$(sed -n 's/^CLUSTER_NAME=//p' "$overlay/platform.env")" create -f - <<<"$manifest"
fi
