# What the configuration makes of good variables, without an account: terraform test
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
  gpu_pools = {
    serve = { role = "serve", instance_types = ["g6e.2xlarge"], capacity_types = ["spot", "on-demand"], max_gpus = 4 }
    train = { role = "train", instance_types = ["g6e.12xlarge"], max_gpus = 8, zones = ["us-west-2a"] }
  }
}

run "dev" {
  command = plan
  assert {
    condition     = join(" ", keys(output.role_arns)) == "karpenter mlflow prepare serve train"
    error_message = "a role for each workload"
  }
  assert {
    condition     = !strcontains(local.policies.train, "secretsmanager") && !strcontains(local.policies.prepare, "secretsmanager")
    error_message = "training and preparation read no password"
  }
  assert {
    condition     = alltrue([for policy in values(local.policies) : !strcontains(policy, "\"s3:*\"") && !strcontains(policy, "\"Resource\":\"*\"")])
    error_message = "no wildcard in a workload's policy"
  }
  assert {
    condition     = join(" ", [for pool in local.node_pools : pool.metadata.name]) == "cpu serve train"
    error_message = "a NodePool per pool"
  }
  assert {
    condition     = strcontains(output.node_pools_yaml, "\"replicas\"") == false
    error_message = "no pool keeps nodes that nobody asked for"
  }
  assert {
    condition     = length([for need in local.node_pools[2].spec.template.spec.requirements : need if need.key == "topology.kubernetes.io/zone" && join(" ", need.values) == "us-west-2a"]) == 1
    error_message = "training stays in its zone"
  }
  assert {
    condition     = length([for need in local.node_pools[1].spec.template.spec.requirements : need if need.key == "karpenter.sh/capacity-type" && contains(need.values, "on-demand") && contains(need.values, "spot")]) == 1
    error_message = "serving falls back to on-demand"
  }
  assert {
    condition     = alltrue([for database in module.databases : database.secret_arn != null])
    error_message = "AWS makes the passwords"
  }
  assert {
    condition     = local.database_copies == 2 && local.num_nat_gateways == 1
    error_message = "no standby, one NAT gateway"
  }
}

run "prod_keeps_a_standby_and_a_nat_gateway_per_zone" {
  command = plan
  variables {
    environment        = "prod"
    single_nat_gateway = false
  }
  assert {
    condition     = local.database_copies == 4 && local.num_nat_gateways == 3 && local.system_nodes.min_size == 4
    error_message = "standby databases, NAT in each zone, four system nodes"
  }
}

# The emulator has no FSx: this is the only test of the module.
run "scratch_file_system_when_asked_for" {
  command = plan
  variables {
    enable_fsx = true
  }
  assert {
    condition     = length(module.scratch) == 1 && output.costs.monthly_idle_usd.fsx == 252
    error_message = "made, and counted"
  }
}

run "reserved_capacity_comes_as_a_group" {
  command = plan
  variables {
    node_groups = {
      block = { role = "train", instance_types = ["p5.48xlarge"], capacity_type = "CAPACITY_BLOCK", capacity_reservation = "cr-0123456789abcdef0", max_size = 1, availability_zone = "us-west-2a", efa_interfaces = 32 }
    }
    gpu_limit = 20
  }
  assert {
    condition     = module.node_groups["block"].ami_type == "AL2023_x86_64_NVIDIA"
    error_message = "an image with drivers"
  }
  assert {
    condition     = local.gpu_ceiling == 20
    error_message = "its GPUs count"
  }
}

run "a_budget_below_what_always_runs_is_told" {
  command = plan
  variables {
    monthly_budget_usd = 10
  }
  expect_failures = [check.budget_holds_what_always_runs]
}
