output "id" {
  description = "File system."
  value       = aws_fsx_lustre_file_system.this.id
}

output "mount_name" {
  description = "Name to mount it by."
  value       = aws_fsx_lustre_file_system.this.mount_name
}

output "dns_name" {
  description = "Host to mount it from."
  value       = aws_fsx_lustre_file_system.this.dns_name
}
