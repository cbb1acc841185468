locals {
  # With reserved capacity a forced placement group asks for what the reservation may not have.
  needs_placement = var.efa_interfaces > 0 && var.capacity_reservation == null
}

resource "aws_placement_group" "this" {
  count    = local.needs_placement ? 1 : 0
  name     = "${var.cluster_name}-${var.name}"
  strategy = "cluster"
}

resource "aws_launch_template" "this" {
  name                   = "${var.cluster_name}-${var.name}"
  update_default_version = true
  vpc_security_group_ids = var.efa_interfaces == 0 ? [var.cluster_security_group_id] : null

  block_device_mappings {
    device_name = "/dev/xvda"
    ebs {
      volume_size           = var.disk_gib
      volume_type           = "gp3"
      iops                  = 4000
      throughput            = 250
      encrypted             = true
      delete_on_termination = true
    }
  }

  # One hop: pods cannot take the node's role.
  metadata_options {
    http_endpoint               = "enabled"
    http_tokens                 = "required"
    http_put_response_hop_limit = 1
  }

  monitoring { enabled = true }

  dynamic "network_interfaces" {
    for_each = range(var.efa_interfaces)
    content {
      device_index          = network_interfaces.value == 0 ? 0 : 1
      network_card_index    = network_interfaces.value
      interface_type        = network_interfaces.value == 0 ? "efa" : "efa-only"
      security_groups       = [var.cluster_security_group_id, var.efa_security_group_id]
      delete_on_termination = true
    }
  }

  dynamic "placement" {
    for_each = aws_placement_group.this
    content { group_name = placement.value.name }
  }

  dynamic "capacity_reservation_specification" {
    for_each = var.capacity_reservation == null ? [] : [var.capacity_reservation]
    content {
      capacity_reservation_target { capacity_reservation_id = capacity_reservation_specification.value }
    }
  }

  dynamic "instance_market_options" {
    for_each = var.capacity_type == "CAPACITY_BLOCK" ? [1] : []
    content { market_type = "capacity-block" }
  }

  tag_specifications {
    resource_type = "instance"
    tags          = { Name = "${var.cluster_name}-${var.name}" }
  }
  tag_specifications {
    resource_type = "volume"
    tags          = { Name = "${var.cluster_name}-${var.name}" }
  }
}

resource "aws_eks_node_group" "this" {
  cluster_name    = var.cluster_name
  node_group_name = var.name
  node_role_arn   = var.node_role_arn
  subnet_ids      = var.subnet_ids
  version         = var.kubernetes_version
  instance_types  = var.instance_types
  capacity_type   = var.capacity_type
  ami_type        = var.is_gpu ? "AL2023_x86_64_NVIDIA" : "AL2023_x86_64_STANDARD"
  labels          = merge(var.labels, var.is_gpu ? { "faithdiff/accelerator" = "nvidia" } : {})

  scaling_config {
    min_size     = var.min_size
    desired_size = var.min_size
    max_size     = var.max_size
  }

  update_config { max_unavailable = 1 }
  node_repair_config { enabled = true }

  launch_template {
    id      = aws_launch_template.this.id
    version = aws_launch_template.this.latest_version
  }

  dynamic "taint" {
    for_each = var.is_gpu ? [1] : []
    content {
      key    = "nvidia.com/gpu"
      value  = "present"
      effect = "NO_SCHEDULE"
    }
  }

  lifecycle { ignore_changes = [scaling_config[0].desired_size] }
}
