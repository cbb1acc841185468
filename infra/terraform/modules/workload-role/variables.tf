variable "name" {
  description = "Name of the role."
  type        = string
}

variable "cluster_name" {
  description = "Cluster."
  type        = string
}

variable "service_accounts" {
  description = "Kubernetes service accounts whose pods get the role."
  type        = list(object({ namespace = string, name = string }))
}

variable "policy_json" {
  description = "What they may do, an IAM policy."
  type        = string
}
