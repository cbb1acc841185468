#!/usr/bin/env bash
# submit.sh ENVIRONMENT COMMAND...: runs a job on the cluster as it would run here, with the code that lies here.
#
#   submit.sh dev python pipelines/train.py train_nano.yaml --data s3://BUCKET/shards --out s3://BUCKET/runs/1
#
# `ray job submit` to the cluster "jobs" through a port-forward, with the runtime environment of sr_platform.cluster.
# Paths are those of the cluster: give s3:// URIs. Ctrl-C stops watching; the job goes on.
set -euo pipefail
# shellcheck source=SCRIPTDIR/templates.sh
source "$(dirname "${BASH_SOURCE[0]}")/templates.sh"

environment="$(environment_of "${1:-}")"
[[ $# -ge 2 ]] || fail "command: give one, such as python pipelines/prepare.py --help"
shift
python="${PYTHON:-$infra_path/../.venv/bin/python}"
port="${DASHBOARD_PORT:-18265}"
cluster="$(sed -n 's/^CLUSTER_NAME=//p' "$infra_path/kubernetes/overlays/$environment/platform.env")"

RAY_AUTH_TOKEN="$(kubectl --context "$cluster" -n ray get secret jobs -o jsonpath='{.data.auth_token}' | base64 -d)"
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token
kubectl --context "$cluster" -n ray port-forward service/jobs-head-svc "$port:8265" >/dev/null &
forward=$!
trap 'kill "$forward"' EXIT
for _ in $(seq 60); do
  (: <"/dev/tcp/127.0.0.1/$port") 2>/dev/null && break
  kill -0 "$forward" 2>/dev/null || fail "kubectl port-forward ended; is port $port free, and is the cluster there?"
  sleep 0.5
done
cd "$infra_path/.."
runtime_env="$(PYTHONPATH=platform "$python" -c 'import json; from sr_platform.cluster import submit_runtime_env; print(json.dumps(submit_runtime_env()))')"
unset RAY_ADDRESS
"$(dirname "$python")/ray" job submit --address "http://127.0.0.1:$port" --runtime-env-json "$runtime_env" -- "$@"
