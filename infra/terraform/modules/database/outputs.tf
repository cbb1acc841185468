output "identifier" {
  description = "Identifier."
  value       = aws_db_instance.this.identifier
}

output "host" {
  description = "Host."
  value       = aws_db_instance.this.address
}

output "port" {
  description = "Port."
  value       = aws_db_instance.this.port
}

output "database" {
  description = "Database."
  value       = aws_db_instance.this.db_name
}

output "secret_arn" {
  description = "Secret with user and password; AWS makes and rotates it."
  value       = one(aws_db_instance.this.master_user_secret[*].secret_arn)
}
