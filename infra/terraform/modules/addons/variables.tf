variable "name" {
  description = "Prefix of the role."
  type        = string
}

variable "cluster_name" {
  description = "Cluster."
  type        = string
}

variable "node_group" {
  description = "Node group that the add-ons' pods run on; the add-ons wait for it."
  type        = string
}
