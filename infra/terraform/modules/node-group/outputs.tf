output "name" {
  description = "Name."
  value       = aws_eks_node_group.this.node_group_name
}

output "ami_type" {
  description = "Image type."
  value       = aws_eks_node_group.this.ami_type
}
