# What runs always, and what could run: list prices (instances.tf) times the variables.
locals {
  num_nat_gateways       = var.single_nat_gateway ? 1 : length(var.availability_zones)
  num_interface_adapters = length(module.network.interface_endpoints) * length(var.availability_zones)
  database_copies        = length(local.databases) * (local.is_prod ? 2 : 1)

  monthly_cost_usd = {
    cluster             = local.usd.cluster_per_hour * local.hours_per_month
    system_nodes        = local.system_nodes.min_size * (local.instance_types[local.system_nodes.instance_types[0]].usd_per_hour * local.hours_per_month + local.system_nodes.disk_gib * local.usd.gp3_per_gib_month)
    nat_gateways        = local.num_nat_gateways * local.usd.nat_gateway_per_hour * local.hours_per_month
    interface_endpoints = local.num_interface_adapters * local.usd.interface_endpoint_per_hour * local.hours_per_month
    databases           = local.database_copies * (local.database_usd_per_hour[var.database_class] * local.hours_per_month + 20 * local.usd.database_gib_month)
    keys                = 2 * local.usd.kms_key_per_month
    fsx                 = var.enable_fsx ? 1200 * local.usd.fsx_per_gib_month : 0
    reserved_groups     = sum(concat([0], [for group in values(var.node_groups) : group.min_size * max(0, [for type in group.instance_types : local.instance_types[type].usd_per_hour]...) * local.hours_per_month]))
  }
  monthly_idle_usd = sum(values(local.monthly_cost_usd))

  # On demand, at the dearest price per GPU of the pool's types; spot costs less.
  hourly_ceiling_usd = merge(
    { for name, pool in var.gpu_pools : name => pool.max_gpus * max(0, [for type in pool.instance_types : local.instance_types[type].usd_per_hour / local.instance_types[type].gpus]...) },
    { cpu = var.cpu_pool.max_vcpus * max(0, [for type in var.cpu_pool.instance_types : local.instance_types[type].usd_per_hour / local.instance_types[type].vcpus]...) },
    { for name, group in var.node_groups : name => group.max_size * max(0, [for type in group.instance_types : local.instance_types[type].usd_per_hour]...) },
  )

  costs = {
    monthly_idle_usd   = { for part, usd in merge(local.monthly_cost_usd, { total = local.monthly_idle_usd }) : part => floor(usd * 100 + 0.5) / 100 }
    hourly_ceiling_usd = { for part, usd in merge(local.hourly_ceiling_usd, { total = sum(values(local.hourly_ceiling_usd)) }) : part => floor(usd * 100 + 0.5) / 100 }
  }
}

check "budget_holds_what_always_runs" {
  assert {
    condition     = local.monthly_idle_usd <= var.monthly_budget_usd
    error_message = "What always runs costs about ${ceil(local.monthly_idle_usd)} USD a month, over monthly_budget_usd ${var.monthly_budget_usd}; raise it, or the mails come every month."
  }
}
