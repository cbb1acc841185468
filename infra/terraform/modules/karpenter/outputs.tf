output "controller_role_arn" {
  description = "Role of the controller."
  value       = aws_iam_role.controller.arn
}

output "queue_name" {
  description = "Queue of interruption notices."
  value       = aws_sqs_queue.this.name
}

output "node_instance_profile" {
  description = "Instance profile of nodes."
  value       = aws_iam_instance_profile.node.name
}
