module "network" {
  source = "./modules/network"

  name               = local.full_name
  region             = var.region
  vpc_cidr           = var.vpc_cidr
  availability_zones = var.availability_zones
  single_nat_gateway = var.single_nat_gateway
}

module "cluster" {
  source = "./modules/cluster"

  name                 = local.full_name
  kubernetes_version   = var.kubernetes_version
  subnet_ids           = module.network.private_subnet_ids
  api_allowed_cidrs    = var.api_allowed_cidrs
  admin_principal_arns = var.admin_principal_arns
}

module "system_nodes" {
  source = "./modules/node-group"

  name                      = "system"
  cluster_name              = module.cluster.name
  cluster_security_group_id = module.cluster.security_group_id
  kubernetes_version        = var.kubernetes_version
  node_role_arn             = module.cluster.node_role_arn
  subnet_ids                = module.network.private_subnet_ids
  instance_types            = local.system_nodes.instance_types
  min_size                  = local.system_nodes.min_size
  max_size                  = local.system_nodes.max_size
  disk_gib                  = local.system_nodes.disk_gib
  labels                    = { "faithdiff/role" = "system" }
  depends_on                = [module.cluster] # the network add-on comes before nodes
}

module "node_groups" {
  source   = "./modules/node-group"
  for_each = var.node_groups

  name                      = each.key
  cluster_name              = module.cluster.name
  cluster_security_group_id = module.cluster.security_group_id
  kubernetes_version        = var.kubernetes_version
  node_role_arn             = module.cluster.node_role_arn
  subnet_ids                = each.value.availability_zone == null ? module.network.private_subnet_ids : [module.network.private_subnet_ids_by_zone[each.value.availability_zone]]
  instance_types            = each.value.instance_types
  capacity_type             = each.value.capacity_type
  min_size                  = each.value.min_size
  max_size                  = each.value.max_size
  disk_gib                  = each.value.disk_gib
  is_gpu                    = anytrue([for type in each.value.instance_types : local.instance_types[type].gpus > 0])
  efa_interfaces            = each.value.efa_interfaces
  efa_security_group_id     = module.network.efa_security_group_id
  capacity_reservation      = each.value.capacity_reservation
  labels                    = { "faithdiff/role" = each.value.role }
  depends_on                = [module.cluster]
}

module "addons" {
  source = "./modules/addons"

  name         = local.full_name
  cluster_name = module.cluster.name
  node_group   = module.system_nodes.name
}

module "karpenter" {
  source = "./modules/karpenter"

  name           = "${local.full_name}-karpenter"
  region         = var.region
  account_id     = local.account_id
  cluster_name   = module.cluster.name
  cluster_arn    = module.cluster.arn
  node_role_arn  = module.cluster.node_role_arn
  node_role_name = module.cluster.node_role_name
}

module "buckets" {
  source   = "./modules/bucket"
  for_each = local.bucket_expiry

  name              = "${local.full_name}-${each.key}-${local.account_id}"
  is_disposable     = !local.is_prod
  expire_after_days = each.value
  old_versions_days = var.retention_days.old_versions
}

locals {
  # Prefix to days, by bucket. Registered models lie under runs/ of the checkpoints bucket, which never expires.
  bucket_expiry = {
    data        = {}
    artifacts   = {}
    checkpoints = { "trials/" = var.retention_days.trials }
    results     = { "" = var.retention_days.results }
  }
}

module "registry" {
  source = "./modules/registry"

  name           = local.full_name
  repositories   = ["train", "serve", "mlflow"]
  untagged_days  = var.retention_days.images
  is_disposable  = !local.is_prod
  images_to_keep = 30
}

module "databases" {
  source   = "./modules/database"
  for_each = local.databases

  name                     = "${local.full_name}-${each.key}"
  database                 = each.key
  instance_class           = var.database_class
  vpc_id                   = module.network.vpc_id
  vpc_cidr                 = var.vpc_cidr
  subnet_ids               = module.network.private_subnet_ids
  client_security_group_id = module.cluster.security_group_id
  backup_days              = var.database_backup_days
  is_disposable            = !local.is_prod
  alarm_topic_arn          = module.guardrails.topic_arn
}

module "roles" {
  source   = "./modules/workload-role"
  for_each = local.service_accounts

  name             = "${local.full_name}-${each.key}"
  cluster_name     = module.cluster.name
  service_accounts = each.value
  policy_json      = local.policies[each.key]
}

module "scratch" {
  source = "./modules/scratch-fsx"
  count  = var.enable_fsx ? 1 : 0

  name            = "${local.full_name}-scratch"
  subnet_id       = module.network.private_subnet_ids[0]
  vpc_id          = module.network.vpc_id
  vpc_cidr        = var.vpc_cidr
  data_bucket     = module.buckets["data"].name
  data_bucket_arn = module.buckets["data"].arn
}

module "guardrails" {
  source = "./modules/guardrails"

  name               = local.full_name
  account_id         = local.account_id
  project_tag        = var.name
  monthly_budget_usd = var.monthly_budget_usd
  alarm_emails       = var.alarm_emails
}
