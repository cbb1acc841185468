#!/usr/bin/env bash
# up.sh ENVIRONMENT: from an empty account to a running platform. The same command again changes only what differs.
#
#   AUTO_APPROVE=yes   does not ask before it applies
#   ONLY_AWS=yes       stops before Kubernetes
set -euo pipefail
# shellcheck source=SCRIPTDIR/templates.sh
source "$(dirname "${BASH_SOURCE[0]}")/templates.sh"

environment="$(environment_of "${1:-}")"
root="${TERRAFORM_ROOT:-$infra_path/terraform}"
region="$(sed -n 's/^region *= *"\(.*\)"$/\1/p' "$root/envs/$environment.tfvars")"
approve=()
[[ "${AUTO_APPROVE:-}" == yes ]] && approve=(-auto-approve)

echo "up.sh: 1 of 3, the bucket of the states"
terraform -chdir="$root/bootstrap" init -input=false -lockfile=readonly >/dev/null
terraform -chdir="$root/bootstrap" apply -input=false "${approve[@]}" -var="region=$region"
bucket="$(terraform -chdir="$root/bootstrap" output -raw state_bucket)"

echo "up.sh: 2 of 3, $environment on AWS: about 20 minutes the first time"
terraform -chdir="$root" init -input=false -lockfile=readonly -reconfigure \
  -backend-config="envs/$environment.s3.tfbackend" -backend-config="bucket=$bucket" >/dev/null
terraform -chdir="$root" apply -input=false "${approve[@]}" -var-file="envs/$environment.tfvars"

[[ "${ONLY_AWS:-}" == yes ]] && exit 0
echo "up.sh: 3 of 3, Kubernetes"
"$(dirname "${BASH_SOURCE[0]}")/platform.sh" "$environment"
