output "cluster_name" {
  description = "EKS cluster."
  value       = module.cluster.name
}

output "configure_kubectl" {
  description = "Command that writes the kubeconfig."
  value       = "aws eks update-kubeconfig --region ${var.region} --name ${module.cluster.name}"
}

output "bucket_names" {
  description = "S3 buckets by purpose."
  value       = { for purpose, bucket in module.buckets : purpose => bucket.name }
}

output "repository_urls" {
  description = "ECR repositories by image."
  value       = module.registry.urls
}

output "databases" {
  description = "PostgreSQL by purpose: where, and the ARN of the secret that AWS made and rotates; the password itself is in no state."
  value       = { for purpose, database in module.databases : purpose => { host = database.host, port = database.port, database = database.database, secret_arn = database.secret_arn } }
}

output "role_arns" {
  description = "IAM roles of the workloads (EKS Pod Identity)."
  value       = merge({ for workload, role in module.roles : workload => role.arn }, { karpenter = module.karpenter.controller_role_arn })
}

output "karpenter" {
  description = "Values of Karpenter's chart."
  value       = { queue = module.karpenter.queue_name, node_instance_profile = module.karpenter.node_instance_profile }
}

output "node_pools_yaml" {
  description = "NodePools and EC2NodeClasses, as kubectl takes them."
  value       = local.node_pools_yaml
}

output "platform_env" {
  description = "What the Kubernetes overlay needs, a line KEY=value each; infra/scripts/render.sh writes them to platform.env."
  value       = join("", [for key, value in local.platform_env : "${key}=${value}\n"])
}

output "costs" {
  description = "USD a month of what always runs, and USD an hour if every pool were full, at list prices (instances.tf)."
  value       = local.costs
}

output "next_steps" {
  description = "What to type now."
  value       = "infra/scripts/platform.sh ${var.environment}"
}
