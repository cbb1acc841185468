#!/usr/bin/env bash
# platform.sh ENVIRONMENT: puts operators and the platform on the cluster that Terraform made. Safe to repeat.
#
#   IMAGE_TAG, MODEL   as in render.sh
set -euo pipefail
# shellcheck source=SCRIPTDIR/templates.sh
source "$(dirname "${BASH_SOURCE[0]}")/templates.sh"

environment="$(environment_of "${1:-}")"
root="${TERRAFORM_ROOT:-$infra_path/terraform}"
operators="$infra_path/kubernetes/operators"
# shellcheck source=SCRIPTDIR/../kubernetes/operators/versions.env
source "$operators/versions.env"

for program in terraform aws kubectl helm; do
  command -v "$program" >/dev/null || fail "$program is not installed; infra/README.md says which versions"
done
value_of() { terraform -chdir="$root" output -raw platform_env | sed -n "s/^$1=//p"; }
cluster="$(value_of CLUSTER_NAME)"
[[ "$(value_of ENVIRONMENT)" == "$environment" ]] ||
  fail "Terraform is at $(value_of ENVIRONMENT), not at $environment; run infra/scripts/up.sh $environment"
aws eks update-kubeconfig --region "$(value_of AWS_REGION)" --name "$cluster" --alias "$cluster" >/dev/null
kubectl() { command kubectl --context "$cluster" "$@"; }

# secret NAMESPACE NAME KEY: made once, with a random value that nobody needs to know.
secret() {
  kubectl -n "$1" get secret "$2" >/dev/null 2>&1 && return
  # Through a pipe: arguments of a program are for everybody on this machine to see.
  openssl rand -hex 32 | tr -d '\n' |
    kubectl -n "$1" create secret generic "$2" --from-file="$3=/dev/stdin" "${@:4}" --dry-run=client -o yaml |
    kubectl apply --server-side -f -
}

echo "platform.sh: namespaces and secrets"
kubectl apply --server-side -f "$infra_path/kubernetes/base/namespaces.yaml"
secret monitoring serving-metrics token
secret monitoring grafana-admin admin-password --from-literal=admin-user=admin
METRICS_TOKEN_SHA256="$(kubectl -n monitoring get secret serving-metrics -o jsonpath='{.data.token}' | base64 -d | sha256sum | cut -d' ' -f1)"
export METRICS_TOKEN_SHA256

echo "platform.sh: operators"
helm_install() { helm --kube-context "$cluster" upgrade --install --wait --timeout 10m "$@"; }
helm_install kuberay-operator kuberay-operator --repo https://ray-project.github.io/kuberay-helm \
  --namespace kuberay-operator --create-namespace --version "$KUBERAY_VERSION" --values "$operators/values/kuberay-operator.yaml"
helm_install karpenter oci://public.ecr.aws/karpenter/karpenter \
  --namespace kube-system --version "$KARPENTER_VERSION" --values "$operators/values/karpenter.yaml" \
  --set "settings.clusterName=$cluster" --set "settings.interruptionQueue=$(value_of KARPENTER_QUEUE)"
helm_install prometheus kube-prometheus-stack --repo https://prometheus-community.github.io/helm-charts \
  --namespace monitoring --version "$KUBE_PROMETHEUS_STACK_VERSION" --values "$operators/values/kube-prometheus-stack.yaml"

echo "platform.sh: the platform"
"$(dirname "${BASH_SOURCE[0]}")/render.sh" "$environment"
# Server-side: the schemas of RayCluster and its kin are longer than an annotation may be.
kubectl apply --server-side --force-conflicts -k "$infra_path/kubernetes/overlays/$environment"
echo "platform.sh: done. Look at it with: kubectl --context $cluster -n ray get rayservice,raycluster"
