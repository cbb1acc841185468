output "name" {
  description = "Name."
  value       = aws_s3_bucket.this.bucket
}

output "arn" {
  description = "ARN."
  value       = aws_s3_bucket.this.arn
}
