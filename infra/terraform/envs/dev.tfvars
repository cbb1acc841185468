# One person or a small team: training and serving on L40S and L4, everything that can be ended is ended.
environment        = "dev"
region             = "us-west-2"
availability_zones = ["us-west-2a", "us-west-2b", "us-west-2c"]
vpc_cidr           = "10.40.0.0/16"
single_nat_gateway = true
monthly_budget_usd = 1500
alarm_emails       = ["ops@example.org"]
gpu_limit          = 16

gpu_pools = {
  serve = {
    role           = "serve"
    instance_types = ["g6e.2xlarge", "g6e.4xlarge"]
    capacity_types = ["spot", "on-demand"]
    max_gpus       = 4
  }
  train = {
    role           = "train"
    instance_types = ["g6e.12xlarge"]
    capacity_types = ["spot", "on-demand"]
    max_gpus       = 8
    disk_gib       = 500
    zones          = ["us-west-2a"] # one zone: gradients between zones cost money and time
  }
}
