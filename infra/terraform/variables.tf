variable "name" {
  description = "Short name of the deployment; prefixes every resource and is the value of the tag Project."
  type        = string
  default     = "faithdiff"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,14}[a-z0-9]$", var.name))
    error_message = "name: got '${var.name}'; use 3 to 16 lower-case letters, digits and hyphens, starting with a letter."
  }
}

variable "environment" {
  description = "dev, staging or prod. prod keeps a standby of each database and refuses to delete databases and buckets that hold something."
  type        = string

  validation {
    condition     = contains(["dev", "staging", "prod"], var.environment)
    error_message = "environment: got '${var.environment}'; set dev, staging or prod."
  }
}

variable "region" {
  description = "AWS region, such as us-west-2."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region: got '${var.region}'; set a region such as us-west-2."
  }
}

variable "availability_zones" {
  description = "Two to six zones of the region, named by hand so that a new zone never replaces subnets. GPU types are not in every zone."
  type        = list(string)

  validation {
    condition     = length(var.availability_zones) >= 2 && length(var.availability_zones) <= 6 && length(distinct(var.availability_zones)) == length(var.availability_zones)
    error_message = "availability_zones: got ${length(var.availability_zones)} (${join(", ", var.availability_zones)}); name two to six different zones."
  }

  validation {
    condition     = alltrue([for zone in var.availability_zones : can(regex("^${var.region}[a-z]$", zone))])
    error_message = "availability_zones: got ${join(", ", var.availability_zones)}; every zone must lie in region ${var.region}."
  }
}

variable "vpc_cidr" {
  description = "IPv4 block of the VPC, /16 to /18: one /3 of it per zone for pods, which take an address each."
  type        = string
  default     = "10.40.0.0/16"

  validation {
    condition     = can(cidrhost(var.vpc_cidr, 0)) && can(regex("^[0-9.]+/1[678]$", var.vpc_cidr)) && try(cidrhost(var.vpc_cidr, 0) == split("/", var.vpc_cidr)[0], false)
    error_message = "vpc_cidr: got '${var.vpc_cidr}'; set the first address of an IPv4 block of /16, /17 or /18, such as 10.40.0.0/16."
  }
}

variable "single_nat_gateway" {
  description = "One NAT gateway for all zones (cheaper; its zone's outage cuts the others off) instead of one a zone."
  type        = bool
  default     = true
}

variable "kubernetes_version" {
  description = "Kubernetes minor version of EKS, such as 1.33. It rises one minor version at a time."
  type        = string
  default     = "1.33"

  validation {
    condition     = can(regex("^1\\.(3[2-9]|4[0-9])$", var.kubernetes_version))
    error_message = "kubernetes_version: got '${var.kubernetes_version}'; set a minor version of 1.32 or later, such as 1.33."
  }
}

variable "api_allowed_cidrs" {
  description = "IPv4 blocks that may reach the public Kubernetes endpoint. Empty means that there is only a private one."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for cidr in var.api_allowed_cidrs : can(cidrhost(cidr, 0)) && can(regex("^[0-9.]+/[0-9]+$", cidr))])
    error_message = "api_allowed_cidrs: got ${join(", ", var.api_allowed_cidrs)}; each must be an IPv4 block such as 203.0.113.0/24."
  }

  validation {
    condition     = alltrue([for cidr in var.api_allowed_cidrs : try(tonumber(split("/", cidr)[1]) >= 16, true)])
    error_message = "api_allowed_cidrs: got ${join(", ", var.api_allowed_cidrs)}; the endpoint is not opened to the world: name the networks that need it, /16 or smaller each."
  }
}

variable "admin_principal_arns" {
  description = "IAM roles and users that administer the cluster, through EKS access entries. Whoever applies is one already."
  type        = list(string)
  default     = []

  validation {
    condition     = alltrue([for arn in var.admin_principal_arns : can(regex("^arn:aws[a-z-]*:iam::[0-9]{12}:(role|user)/.+$", arn))])
    error_message = "admin_principal_arns: got ${join(", ", var.admin_principal_arns)}; each must be the ARN of an IAM role or user."
  }
}

variable "node_ami_alias" {
  description = "Image of the nodes that Karpenter starts, pinned: al2023@vYYYYMMDD. Raise it with the Kubernetes version."
  type        = string
  default     = "al2023@v20250701"

  validation {
    condition     = can(regex("^al2023@v[0-9]{8}$", var.node_ami_alias))
    error_message = "node_ami_alias: got '${var.node_ami_alias}'; set a pinned release such as al2023@v20250701, never latest: nodes would be replaced unasked."
  }
}

variable "gpu_pools" {
  description = "Pools of GPU nodes, started by Karpenter when pods wait for them and ended when empty. role: train, serve or prepare; instance_types in any order, all of one pool hold the same kind of work; capacity_types: spot, on-demand or both (spot first, on-demand where there is none); max_gpus: ceiling of the pool; zones: empty for all."
  type = map(object({
    role           = string
    instance_types = list(string)
    capacity_types = optional(list(string), ["on-demand"])
    max_gpus       = number
    disk_gib       = optional(number, 200)
    zones          = optional(list(string), [])
  }))

  validation {
    condition     = alltrue([for name in keys(var.gpu_pools) : can(regex("^[a-z][a-z0-9-]{0,20}$", name))])
    error_message = "gpu_pools: got ${join(", ", keys(var.gpu_pools))}; a name has up to 21 lower-case letters, digits and hyphens."
  }
  validation {
    condition     = alltrue([for pool in values(var.gpu_pools) : contains(["train", "serve", "prepare"], pool.role)])
    error_message = "gpu_pools: role is one of ${join(", ", [for pool in values(var.gpu_pools) : pool.role])}; set train, serve or prepare."
  }
  validation {
    condition     = alltrue([for pool in values(var.gpu_pools) : length(pool.instance_types) > 0 && alltrue([for type in pool.instance_types : try(local.instance_types[type].gpus > 0, false)])])
    error_message = "gpu_pools: unknown instance types, or types without a GPU: ${join(", ", [for type in flatten([for pool in values(var.gpu_pools) : pool.instance_types]) : type if !try(local.instance_types[type].gpus > 0, false)])}; take one of ${join(", ", [for type, about in local.instance_types : type if about.gpus > 0])}, or add it to instances.tf."
  }
  validation {
    condition     = alltrue([for pool in values(var.gpu_pools) : length(pool.capacity_types) > 0 && alltrue([for type in pool.capacity_types : contains(["spot", "on-demand"], type)])])
    error_message = "gpu_pools: capacity_types holds ${join(", ", flatten([for pool in values(var.gpu_pools) : pool.capacity_types]))}; set spot, on-demand or both."
  }
  validation {
    condition     = alltrue([for pool in values(var.gpu_pools) : pool.max_gpus >= max(0, [for type in pool.instance_types : try(local.instance_types[type].gpus, 0)]...) && floor(pool.max_gpus) == pool.max_gpus])
    error_message = "gpu_pools: max_gpus of ${join(", ", [for name, pool in var.gpu_pools : "${name} is ${pool.max_gpus}"])}; it must be a whole number, and hold a node of each of its instance types."
  }
  validation {
    condition     = alltrue([for pool in values(var.gpu_pools) : pool.disk_gib >= 100 && pool.disk_gib <= 16000])
    error_message = "gpu_pools: disk_gib must lie between 100 (images alone take 30) and 16000."
  }
  validation {
    condition     = alltrue([for pool in values(var.gpu_pools) : alltrue([for zone in pool.zones : contains(var.availability_zones, zone)])])
    error_message = "gpu_pools: zones holds ${join(", ", flatten([for pool in values(var.gpu_pools) : pool.zones]))}; take zones of availability_zones: ${join(", ", var.availability_zones)}."
  }
}

variable "cpu_pool" {
  description = "Nodes for preparation and evaluation on CPUs, started when pods wait for them and ended when empty. max_vcpus: ceiling of the pool."
  type = object({
    instance_types = optional(list(string), ["c7i.8xlarge", "m7i.8xlarge"])
    capacity_types = optional(list(string), ["spot", "on-demand"])
    max_vcpus      = optional(number, 128)
    disk_gib       = optional(number, 200)
  })
  default = {}

  validation {
    condition     = length(var.cpu_pool.instance_types) > 0 && alltrue([for type in var.cpu_pool.instance_types : try(local.instance_types[type].gpus == 0, false)])
    error_message = "cpu_pool: instance_types holds ${join(", ", var.cpu_pool.instance_types)}; take types without a GPU: ${join(", ", [for type, about in local.instance_types : type if about.gpus == 0])}, or add one to instances.tf."
  }
  validation {
    condition     = var.cpu_pool.max_vcpus >= max(0, [for type in var.cpu_pool.instance_types : try(local.instance_types[type].vcpus, 0)]...)
    error_message = "cpu_pool: max_vcpus is ${var.cpu_pool.max_vcpus}; it must hold a node of each of its instance types."
  }
  validation {
    condition     = length(var.cpu_pool.capacity_types) > 0 && alltrue([for type in var.cpu_pool.capacity_types : contains(["spot", "on-demand"], type)])
    error_message = "cpu_pool: capacity_types holds ${join(", ", var.cpu_pool.capacity_types)}; set spot, on-demand or both."
  }
}

variable "node_groups" {
  description = "Managed node groups for reserved capacity and EFA; everything else belongs into gpu_pools. capacity_type: ON_DEMAND, SPOT, or CAPACITY_BLOCK with the id of its capacity_reservation; efa_interfaces: network cards of an EFA group, which lies in one availability_zone."
  type = map(object({
    role                 = string
    instance_types       = list(string)
    capacity_type        = optional(string, "ON_DEMAND")
    min_size             = optional(number, 0)
    max_size             = number
    disk_gib             = optional(number, 500)
    availability_zone    = optional(string)
    efa_interfaces       = optional(number, 0)
    capacity_reservation = optional(string)
  }))
  default = {}

  validation {
    condition     = alltrue([for name in keys(var.node_groups) : can(regex("^[a-z][a-z0-9-]{0,20}$", name)) && name != "system"])
    error_message = "node_groups: got ${join(", ", keys(var.node_groups))}; a name has up to 21 lower-case letters, digits and hyphens, and is not 'system'."
  }
  validation {
    condition     = alltrue([for group in values(var.node_groups) : contains(["train", "serve", "prepare"], group.role)])
    error_message = "node_groups: role is one of ${join(", ", [for group in values(var.node_groups) : group.role])}; set train, serve or prepare."
  }
  validation {
    condition     = alltrue([for group in values(var.node_groups) : length(group.instance_types) > 0 && alltrue([for type in group.instance_types : contains(keys(local.instance_types), type)])])
    error_message = "node_groups: unknown instance types ${join(", ", [for type in flatten([for group in values(var.node_groups) : group.instance_types]) : type if !contains(keys(local.instance_types), type)])}; take one of ${join(", ", keys(local.instance_types))}, or add it to instances.tf."
  }
  validation {
    condition     = alltrue([for group in values(var.node_groups) : contains(["ON_DEMAND", "SPOT", "CAPACITY_BLOCK"], group.capacity_type)])
    error_message = "node_groups: capacity_type is one of ${join(", ", [for group in values(var.node_groups) : group.capacity_type])}; set ON_DEMAND, SPOT or CAPACITY_BLOCK."
  }
  validation {
    condition     = alltrue([for group in values(var.node_groups) : group.min_size >= 0 && group.max_size >= 1 && group.min_size <= group.max_size])
    error_message = "node_groups: ${join(", ", [for name, group in var.node_groups : "${name} has min_size ${group.min_size} and max_size ${group.max_size}"])}; set 0 <= min_size <= max_size, and max_size at least 1."
  }
  validation {
    condition     = alltrue([for group in values(var.node_groups) : group.availability_zone == null ? true : contains(var.availability_zones, group.availability_zone)])
    error_message = "node_groups: availability_zone must be one of availability_zones: ${join(", ", var.availability_zones)}."
  }
  validation {
    condition     = alltrue([for group in values(var.node_groups) : group.efa_interfaces == 0 || group.availability_zone != null])
    error_message = "node_groups: a group with efa_interfaces must name one availability_zone; EFA does not cross zones."
  }
  validation {
    condition     = alltrue([for group in values(var.node_groups) : (group.capacity_type == "CAPACITY_BLOCK") == (group.capacity_reservation != null)])
    error_message = "node_groups: capacity_reservation goes with capacity_type CAPACITY_BLOCK, and only with it."
  }
}

variable "gpu_limit" {
  description = "Upper bound of all GPUs that pools and groups could ever run at once: a typo cannot order more. Also the quota of the namespace ray."
  type        = number
  default     = 16

  validation {
    condition     = local.gpu_ceiling <= var.gpu_limit
    error_message = "gpu_limit: pools and groups could grow to ${local.gpu_ceiling} GPUs, over gpu_limit ${var.gpu_limit}; lower max_gpus or max_size, or raise gpu_limit."
  }
}

variable "retention_days" {
  description = "Days until objects expire: trials (everything under trials/ of the checkpoints bucket), results (restored pictures), old_versions (what was overwritten or deleted, in every bucket), images (untagged, in the registry)."
  type = object({
    trials       = optional(number, 30)
    results      = optional(number, 7)
    old_versions = optional(number, 30)
    images       = optional(number, 7)
  })
  default = {}

  validation {
    condition     = alltrue([for days in values(var.retention_days) : days >= 1 && floor(days) == days])
    error_message = "retention_days: got ${jsonencode(var.retention_days)}; each must be a whole number of days, at least 1."
  }
}

variable "database_class" {
  description = "Instance class of the two PostgreSQL databases (MLflow's and the serving jobs'), such as db.t4g.small."
  type        = string
  default     = "db.t4g.small"

  validation {
    condition     = contains(keys(local.database_usd_per_hour), var.database_class)
    error_message = "database_class: got '${var.database_class}'; take one of ${join(", ", keys(local.database_usd_per_hour))}, or add it to instances.tf."
  }
}

variable "database_backup_days" {
  description = "Days that automatic backups of the databases are kept, 1 to 35: how far back a point-in-time restore reaches."
  type        = number
  default     = 7

  validation {
    condition     = var.database_backup_days >= 1 && var.database_backup_days <= 35
    error_message = "database_backup_days: got ${var.database_backup_days}; set 1 to 35."
  }
}

variable "monthly_budget_usd" {
  description = "Monthly budget; mails at 50, 80 and 100 % of it, and when the forecast passes 110 %."
  type        = number

  validation {
    condition     = var.monthly_budget_usd > 0
    error_message = "monthly_budget_usd: got ${var.monthly_budget_usd}; set more than 0."
  }
}

variable "alarm_emails" {
  description = "Addresses that get mails of the budget and of alarms; each has to confirm once. None means that nobody is told."
  type        = list(string)

  validation {
    condition     = length(var.alarm_emails) > 0 && alltrue([for email in var.alarm_emails : can(regex("^[^@ ]+@[^@ ]+\\.[^@ ]+$", email))])
    error_message = "alarm_emails: got '${join(", ", var.alarm_emails)}'; name at least one address, such as ops@example.org."
  }
}

variable "enable_fsx" {
  description = "Make an FSx for Lustre scratch file system that mirrors the data bucket: for many nodes that read the same shards."
  type        = bool
  default     = false
}
