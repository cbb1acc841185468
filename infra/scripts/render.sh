#!/usr/bin/env bash
# render.sh ENVIRONMENT: writes what the overlay of the environment lacks, from Terraform's outputs. Changes nothing else.
#
#   IMAGE_TAG             tag of the three images (default: the commit)
#   MODEL                 what is served (default: models:/faithdiff-sdxl@champion)
#   CERTIFICATE_ARN       certificate of the load balancer, where the overlay has the component internal-endpoint
#   METRICS_TOKEN_SHA256  SHA-256 of the token that Prometheus sends (platform.sh knows it)
set -euo pipefail
# shellcheck source=SCRIPTDIR/templates.sh
source "$(dirname "${BASH_SOURCE[0]}")/templates.sh"

environment="$(environment_of "${1:-}")"
overlay="$infra_path/kubernetes/overlays/$environment"
tag="${IMAGE_TAG:-$(git -C "$infra_path" rev-parse --short=12 HEAD)}"
terraform() { command terraform -chdir="${TERRAFORM_ROOT:-$infra_path/terraform}" "$@"; }
if [[ -z "${CERTIFICATE_ARN:-}" ]] && grep -q '^components:.*internal-endpoint' "$overlay/kustomization.yaml"; then
  fail "CERTIFICATE_ARN: set it to a certificate in ACM, or take internal-endpoint out of $overlay/kustomization.yaml"
fi

new="$(mktemp -d)"
trap 'rm -rf "$new"' EXIT
{
  terraform output -raw platform_env
  for image in TRAIN SERVE MLFLOW; do
    echo "${image}_IMAGE=$(terraform output -raw platform_env | sed -n "s/^${image}_REPOSITORY=//p"):$tag"
  done
  echo "MODEL=${MODEL:-models:/faithdiff-sdxl@champion}"
  echo "MLFLOW_TRACKING_URI=http://mlflow.mlflow.svc"
  echo "METRICS_TOKEN_SHA256=${METRICS_TOKEN_SHA256:?set it to the SHA-256 of the token that Prometheus sends}"
  echo "CERTIFICATE_ARN=${CERTIFICATE_ARN:-}"
} >"$new/platform.env"
terraform output -raw node_pools_yaml >"$new/node-pools.yaml"
fill "$overlay/serve.template.yaml" "$new/platform.env" >"$new/serve.yaml"
{
  printf 'apiVersion: monitoring.coreos.com/v1\nkind: PrometheusRule\nmetadata:\n  name: faithdiff\n  namespace: ray\nspec:\n  groups:\n'
  for rules in alerts.yaml cluster-alerts.yaml; do
    fill "$infra_path/dashboards/$rules" "$new/platform.env" | sed -e '/^groups:$/d' -e 's/^\(.\)/  \1/'
  done
} >"$new/alerts.yaml"
# All four or none: an overlay never holds half of two deployments.
mv "$new"/*.yaml "$new/platform.env" "$overlay/"
echo "render.sh: $overlay holds platform.env, node-pools.yaml, serve.yaml and alerts.yaml of $environment, images $tag"
