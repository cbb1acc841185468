variable "name" {
  description = "Prefix of the role."
  type        = string
}

variable "cluster_name" {
  description = "Cluster."
  type        = string
}
