# What the stack knows of instance types: sizes decide what fits, prices feed the cost outputs and infra/README.md.
# Prices are on-demand list prices in USD per hour for us-west-2, entered by hand: compare them with the price list.
locals {
  instance_types = {
    "m6i.xlarge"    = { vcpus = 4, memory_gib = 16, gpus = 0, usd_per_hour = 0.192 }
    "m7i.xlarge"    = { vcpus = 4, memory_gib = 16, gpus = 0, usd_per_hour = 0.2016 }
    "m7i.2xlarge"   = { vcpus = 8, memory_gib = 32, gpus = 0, usd_per_hour = 0.4032 }
    "m7i.8xlarge"   = { vcpus = 32, memory_gib = 128, gpus = 0, usd_per_hour = 1.6128 }
    "c7i.8xlarge"   = { vcpus = 32, memory_gib = 64, gpus = 0, usd_per_hour = 1.428 }
    "g5.2xlarge"    = { vcpus = 8, memory_gib = 32, gpus = 1, usd_per_hour = 1.212 }   # A10G 24 GB
    "g6.2xlarge"    = { vcpus = 8, memory_gib = 32, gpus = 1, usd_per_hour = 0.9776 }  # L4 24 GB
    "g6.4xlarge"    = { vcpus = 16, memory_gib = 64, gpus = 1, usd_per_hour = 1.3232 } # L4 24 GB
    "g6e.2xlarge"   = { vcpus = 8, memory_gib = 64, gpus = 1, usd_per_hour = 2.2421 }  # L40S 48 GB
    "g6e.4xlarge"   = { vcpus = 16, memory_gib = 128, gpus = 1, usd_per_hour = 3.0042 }
    "g6e.12xlarge"  = { vcpus = 48, memory_gib = 384, gpus = 4, usd_per_hour = 10.4926 }
    "g6e.48xlarge"  = { vcpus = 192, memory_gib = 1536, gpus = 8, usd_per_hour = 30.1312 }
    "p4d.24xlarge"  = { vcpus = 96, memory_gib = 1152, gpus = 8, usd_per_hour = 21.9576 } # A100 40 GB
    "p5.48xlarge"   = { vcpus = 192, memory_gib = 2048, gpus = 8, usd_per_hour = 55.04 }  # H100 80 GB
    "p5en.48xlarge" = { vcpus = 192, memory_gib = 2048, gpus = 8, usd_per_hour = 63.296 } # H200 141 GB
  }

  database_usd_per_hour = {
    "db.t4g.small"  = 0.032
    "db.t4g.medium" = 0.065
    "db.m7g.large"  = 0.168
    "db.m7g.xlarge" = 0.337
  }

  # Of what is not an instance.
  usd = {
    cluster_per_hour            = 0.10
    nat_gateway_per_hour        = 0.045
    interface_endpoint_per_hour = 0.01
    gp3_per_gib_month           = 0.08
    database_gib_month          = 0.115
    s3_per_tib_month            = 23.55
    fsx_per_gib_month           = 0.21
    kms_key_per_month           = 1.0
  }

  hours_per_month = 730
}
