output "arn" {
  description = "Role."
  value       = aws_iam_role.this.arn
}
