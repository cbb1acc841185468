output "vpc_id" {
  description = "VPC."
  value       = aws_vpc.this.id
}

output "private_subnet_ids" {
  description = "Private subnets, in the order of the zones."
  value       = [for zone in var.availability_zones : aws_subnet.private[zone].id]
}

output "private_subnet_ids_by_zone" {
  description = "Private subnet of each zone."
  value       = { for zone, subnet in aws_subnet.private : zone => subnet.id }
}

output "efa_security_group_id" {
  description = "Security group whose members may exchange EFA traffic."
  value       = aws_security_group.efa.id
}

output "interface_endpoints" {
  description = "AWS services reached inside the VPC, apart from S3."
  value       = local.interface_endpoints
}
