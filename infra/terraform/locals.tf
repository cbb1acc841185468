locals {
  full_name  = "${var.name}-${var.environment}"
  is_prod    = var.environment == "prod"
  account_id = data.aws_caller_identity.current.account_id

  tags = {
    Project     = var.name
    Environment = var.environment
    ManagedBy   = "terraform"
  }

  # The Ray heads, MLflow, Prometheus and the operators live here; a head asks for 2 CPUs and 8 GiB.
  system_nodes = {
    instance_types = ["m7i.xlarge", "m6i.xlarge"]
    min_size       = local.is_prod ? 4 : 3
    max_size       = 6
    disk_gib       = 100
  }

  # Service accounts of infra/kubernetes, by workload; each workload gets a role of its own.
  service_accounts = {
    prepare = [{ namespace = "ray", name = "prepare" }]
    train   = [{ namespace = "ray", name = "train" }]
    serve   = [{ namespace = "ray", name = "serve" }]
    mlflow  = [{ namespace = "mlflow", name = "mlflow" }]
  }

  databases = toset(["mlflow", "jobs"])

  gpu_ceiling = sum(concat(
    [for pool in values(var.gpu_pools) : pool.max_gpus],
    [for group in values(var.node_groups) : group.max_size * max(0, [for type in group.instance_types : try(local.instance_types[type].gpus, 0)]...)],
    [0],
  ))

  # Names that manifests and jobs use, besides those that render.sh adds.
  platform_env = {
    CLUSTER_NAME       = module.cluster.name
    ENVIRONMENT        = var.environment
    AWS_REGION         = var.region
    AWS_DEFAULT_REGION = var.region
    DATA_BUCKET        = module.buckets["data"].name
    ARTIFACTS_BUCKET   = module.buckets["artifacts"].name
    CHECKPOINTS_BUCKET = module.buckets["checkpoints"].name
    RESULTS_BUCKET     = module.buckets["results"].name
    MLFLOW_DB_HOST     = module.databases["mlflow"].host
    MLFLOW_DB_SECRET   = module.databases["mlflow"].secret_arn
    JOBS_DB_HOST       = module.databases["jobs"].host
    JOBS_DB_SECRET     = module.databases["jobs"].secret_arn
    TRAIN_REPOSITORY   = module.registry.urls["train"]
    SERVE_REPOSITORY   = module.registry.urls["serve"]
    MLFLOW_REPOSITORY  = module.registry.urls["mlflow"]
    KARPENTER_QUEUE    = module.karpenter.queue_name
    GPU_LIMIT          = tostring(var.gpu_limit)
    MONTHLY_BUDGET_USD = tostring(var.monthly_budget_usd)
  }
}

data "aws_caller_identity" "current" {}
