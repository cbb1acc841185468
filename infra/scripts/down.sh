#!/usr/bin/env bash
# down.sh ENVIRONMENT: takes everything away, in the order that leaves nothing behind.
#
# First what made Kubernetes order things from AWS by itself (nodes, disks, load balancers), then what Terraform made.
# prod refuses until deletion_protection is off and its buckets are empty: infra/README.md, "Tear down".
#   AUTO_APPROVE=yes   does not ask before it destroys
set -euo pipefail
# shellcheck source=SCRIPTDIR/templates.sh
source "$(dirname "${BASH_SOURCE[0]}")/templates.sh"

environment="$(environment_of "${1:-}")"
root="${TERRAFORM_ROOT:-$infra_path/terraform}"
value_of() { terraform -chdir="$root" output -raw platform_env | sed -n "s/^$1=//p"; }
cluster="$(value_of CLUSTER_NAME)"
[[ "$(value_of ENVIRONMENT)" == "$environment" ]] ||
  fail "Terraform is at '$(value_of ENVIRONMENT)', not at $environment; run terraform init for $environment first (infra/README.md)"
approve=()
if [[ "${AUTO_APPROVE:-}" == yes ]]; then
  approve=(-auto-approve)
else
  read -r -p "Type $cluster to delete everything in it: " answer
  [[ "$answer" == "$cluster" ]] || fail "got '$answer'; nothing was deleted"
fi
aws eks update-kubeconfig --region "$(value_of AWS_REGION)" --name "$cluster" --alias "$cluster" >/dev/null
remove() { kubectl --context "$cluster" delete --ignore-not-found --wait --timeout=15m "$@"; }

echo "down.sh: 1 of 3, what runs"
remove -n ray rayservices.ray.io --all
remove -n ray rayjobs.ray.io --all
remove -n ray rayclusters.ray.io --all
remove -n ray services --all
remove -n mlflow deployments.apps --all

echo "down.sh: 2 of 3, nodes, disks, operators"
remove nodepools.karpenter.sh --all
remove ec2nodeclasses.karpenter.k8s.aws --all
for release in prometheus/monitoring karpenter/kube-system kuberay-operator/kuberay-operator; do
  helm --kube-context "$cluster" uninstall "${release%/*}" --namespace "${release#*/}" --ignore-not-found --wait
done
remove -n monitoring persistentvolumeclaims --all

echo "down.sh: 3 of 3, AWS"
terraform -chdir="$root" destroy -input=false "${approve[@]}" -var-file="envs/$environment.tfvars"
