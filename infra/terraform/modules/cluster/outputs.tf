output "name" {
  description = "Name."
  value       = aws_eks_cluster.this.name
}

output "arn" {
  description = "ARN."
  value       = aws_eks_cluster.this.arn
}

output "endpoint" {
  description = "Kubernetes API."
  value       = aws_eks_cluster.this.endpoint
}

output "security_group_id" {
  description = "Security group that EKS puts on nodes."
  value       = aws_eks_cluster.this.vpc_config[0].cluster_security_group_id
}

output "node_role_arn" {
  description = "Role of nodes."
  value       = aws_iam_role.node.arn
}

output "node_role_name" {
  description = "Role of nodes, by name."
  value       = aws_iam_role.node.name
}
