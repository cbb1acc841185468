# A failing case for every validation block. A run breaks one block each of several variables: all are told at once.
mock_provider "aws" {
  source          = "./tests/mocks"
  override_during = plan
}

variables {
  environment        = "dev"
  region             = "us-west-2"
  availability_zones = ["us-west-2a", "us-west-2b", "us-west-2c"]
  monthly_budget_usd = 1500
  alarm_emails       = ["ops@example.org"]
  gpu_pools          = { serve = { role = "serve", instance_types = ["g6e.2xlarge"], max_gpus = 4 } }
}

run "first_of_each" {
  command = plan
  variables {
    name                 = "Faith_Diff"
    environment          = "production"
    vpc_cidr             = "10.40.0.0/24"
    kubernetes_version   = "1.20"
    api_allowed_cidrs    = ["office"]
    admin_principal_arns = ["admin"]
    node_ami_alias       = "al2023@latest"
    gpu_pools            = { "Serve" = { role = "serve", instance_types = ["g6e.2xlarge"], max_gpus = 4 } }
    cpu_pool             = { instance_types = ["p5.48xlarge"], max_vcpus = 512 }
    node_groups          = { system = { role = "train", instance_types = ["p5.48xlarge"], max_size = 1 } }
    retention_days       = { results = 0 }
    database_class       = "db.x9.enormous"
    database_backup_days = 0
    monthly_budget_usd   = 0
    alarm_emails         = []
  }
  expect_failures = [
    var.name, var.environment, var.vpc_cidr, var.kubernetes_version, var.api_allowed_cidrs,
    var.admin_principal_arns, var.node_ami_alias, var.gpu_pools, var.cpu_pool, var.node_groups, var.retention_days,
    var.database_class, var.database_backup_days, var.monthly_budget_usd, var.alarm_emails,
  ]
}

# What other variables refer to stands alone: they are not looked at while it is wrong.
run "no_region" {
  command = plan
  variables {
    region = "the west"
  }
  expect_failures = [var.region]
}

run "one_zone" {
  command = plan
  variables {
    availability_zones = ["us-west-2a"]
  }
  expect_failures = [var.availability_zones]
}

run "a_zone_elsewhere" {
  command = plan
  variables {
    availability_zones = ["us-west-2a", "eu-west-1b"]
  }
  expect_failures = [var.availability_zones]
}

run "an_open_endpoint_and_an_unknown_role" {
  command = plan
  variables {
    api_allowed_cidrs = ["0.0.0.0/0"]
    gpu_pools         = { serve = { role = "serving", instance_types = ["g6e.2xlarge"], max_gpus = 4 } }
    cpu_pool          = { max_vcpus = 8 }
    node_groups       = { big = { role = "training", instance_types = ["p5.48xlarge"], max_size = 1 } }
  }
  expect_failures = [var.api_allowed_cidrs, var.gpu_pools, var.cpu_pool, var.node_groups]
}

run "unknown_instance_family" {
  command = plan
  variables {
    gpu_pools   = { serve = { role = "serve", instance_types = ["z9.huge"], max_gpus = 4 } }
    cpu_pool    = { capacity_types = ["cheap"] }
    node_groups = { big = { role = "train", instance_types = ["z9.huge"], max_size = 1 } }
  }
  expect_failures = [var.gpu_pools, var.cpu_pool, var.node_groups]
}

run "unknown_kind_of_capacity" {
  command = plan
  variables {
    gpu_pools   = { serve = { role = "serve", instance_types = ["g6e.2xlarge"], capacity_types = ["reserved"], max_gpus = 4 } }
    node_groups = { big = { role = "train", instance_types = ["p5.48xlarge"], capacity_type = "RESERVED", max_size = 1 } }
  }
  expect_failures = [var.gpu_pools, var.node_groups]
}

run "fewer_gpus_than_a_node_has_and_min_above_max" {
  command = plan
  variables {
    gpu_pools   = { train = { role = "train", instance_types = ["p5.48xlarge"], max_gpus = 4 } }
    node_groups = { big = { role = "train", instance_types = ["p5.48xlarge"], min_size = 3, max_size = 1 } }
  }
  expect_failures = [var.gpu_pools, var.node_groups]
}

run "a_disk_without_room_for_images_and_a_zone_that_is_not_used" {
  command = plan
  variables {
    gpu_pools   = { serve = { role = "serve", instance_types = ["g6e.2xlarge"], max_gpus = 4, disk_gib = 20 } }
    node_groups = { big = { role = "train", instance_types = ["p5.48xlarge"], max_size = 1, availability_zone = "us-west-2f" } }
  }
  expect_failures = [var.gpu_pools, var.node_groups]
}

run "a_pool_in_a_zone_that_is_not_used_and_efa_across_zones" {
  command = plan
  variables {
    gpu_pools   = { serve = { role = "serve", instance_types = ["g6e.2xlarge"], max_gpus = 4, zones = ["us-west-2f"] } }
    node_groups = { big = { role = "train", instance_types = ["p5.48xlarge"], max_size = 1, efa_interfaces = 32 } }
  }
  expect_failures = [var.gpu_pools, var.node_groups]
}

run "a_capacity_block_without_its_reservation" {
  command = plan
  variables {
    node_groups = { big = { role = "train", instance_types = ["p5.48xlarge"], capacity_type = "CAPACITY_BLOCK", max_size = 1 } }
  }
  expect_failures = [var.node_groups]
}

run "more_gpus_than_the_limit" {
  command = plan
  variables {
    gpu_limit = 3
  }
  expect_failures = [var.gpu_limit]
}
