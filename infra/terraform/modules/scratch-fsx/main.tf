resource "aws_security_group" "this" {
  name        = var.name
  description = "Lustre from the VPC"
  vpc_id      = var.vpc_id
  tags        = { Name = var.name }
}

resource "aws_vpc_security_group_ingress_rule" "this" {
  for_each          = { lustre = [988, 988], replies = [1018, 1023] }
  security_group_id = aws_security_group.this.id
  description       = "Lustre ${each.key}"
  cidr_ipv4         = var.vpc_cidr
  ip_protocol       = "tcp"
  from_port         = each.value[0]
  to_port           = each.value[1]
}

resource "aws_fsx_lustre_file_system" "this" {
  #checkov:skip=CKV_AWS_190:scratch that mirrors a bucket; encrypted with the account's key for FSx
  storage_capacity            = var.storage_gib
  subnet_ids                  = [var.subnet_id]
  security_group_ids          = [aws_security_group.this.id]
  deployment_type             = "PERSISTENT_2"
  per_unit_storage_throughput = 250
  data_compression_type       = "LZ4"
  tags                        = { Name = var.name }
}

resource "aws_fsx_data_repository_association" "this" {
  file_system_id       = aws_fsx_lustre_file_system.this.id
  data_repository_path = "s3://${var.data_bucket}"
  file_system_path     = "/data"
  s3 {
    auto_import_policy { events = ["NEW", "CHANGED", "DELETED"] }
  }
}
