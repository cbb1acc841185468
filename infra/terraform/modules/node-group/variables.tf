variable "name" {
  description = "Name within the cluster."
  type        = string
}

variable "cluster_name" {
  description = "Cluster."
  type        = string
}

variable "cluster_security_group_id" {
  description = "Security group that EKS puts on nodes."
  type        = string
}

variable "kubernetes_version" {
  description = "Minor version of the nodes; follows the control plane's."
  type        = string
}

variable "node_role_arn" {
  description = "Role of nodes."
  type        = string
}

variable "subnet_ids" {
  description = "Subnets; one only for EFA."
  type        = list(string)
}

variable "instance_types" {
  description = "Instance types, the first preferred."
  type        = list(string)
}

variable "capacity_type" {
  description = "ON_DEMAND, SPOT or CAPACITY_BLOCK."
  type        = string
  default     = "ON_DEMAND"
}

variable "min_size" {
  description = "Fewest nodes, and how many it starts with."
  type        = number
}

variable "max_size" {
  description = "Most nodes."
  type        = number
}

variable "disk_gib" {
  description = "Size of the root volume."
  type        = number
}

variable "is_gpu" {
  description = "NVIDIA image, GPU taint and label."
  type        = bool
  default     = false
}

variable "efa_interfaces" {
  description = "EFA network cards per node."
  type        = number
  default     = 0
}

variable "efa_security_group_id" {
  description = "Security group of EFA traffic; needed with efa_interfaces."
  type        = string
  default     = null
}

variable "capacity_reservation" {
  description = "Capacity reservation to use; needed with CAPACITY_BLOCK."
  type        = string
  default     = null
}

variable "labels" {
  description = "Kubernetes labels."
  type        = map(string)
  default     = {}
}
