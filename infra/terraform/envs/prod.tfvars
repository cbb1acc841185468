# Training on H100, serving on L40S with on-demand fallback, standby databases, a NAT gateway in each zone.
environment          = "prod"
region               = "us-west-2"
availability_zones   = ["us-west-2a", "us-west-2b", "us-west-2c"]
vpc_cidr             = "10.44.0.0/16"
single_nat_gateway   = false
monthly_budget_usd   = 20000
alarm_emails         = ["ops@example.org"]
gpu_limit            = 40
database_class       = "db.m7g.large"
database_backup_days = 14
retention_days       = { trials = 60, results = 7, old_versions = 60, images = 14 }

gpu_pools = {
  serve = {
    role           = "serve"
    instance_types = ["g6e.2xlarge", "g6e.4xlarge"]
    capacity_types = ["spot", "on-demand"]
    max_gpus       = 16
  }
  train = {
    role           = "train"
    instance_types = ["p5.48xlarge"]
    capacity_types = ["on-demand"]
    max_gpus       = 16
    disk_gib       = 1000
    zones          = ["us-west-2b"]
  }
  caption = {
    role           = "prepare"
    instance_types = ["g6e.2xlarge", "g6e.4xlarge"]
    capacity_types = ["spot", "on-demand"]
    max_gpus       = 8
  }
}
cpu_pool = { max_vcpus = 512 }
