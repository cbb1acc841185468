variable "name" {
  description = "Prefix of every name."
  type        = string
}

variable "region" {
  description = "Region that the controller may act in."
  type        = string
}

variable "account_id" {
  description = "Account, for ARNs."
  type        = string
}

variable "cluster_name" {
  description = "Cluster."
  type        = string
}

variable "cluster_arn" {
  description = "Cluster."
  type        = string
}

variable "node_role_arn" {
  description = "Role that nodes get."
  type        = string
}

variable "node_role_name" {
  description = "The same, by name."
  type        = string
}
