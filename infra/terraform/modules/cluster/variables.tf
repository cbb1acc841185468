variable "name" {
  description = "Name of the cluster and prefix of its roles."
  type        = string
}

variable "kubernetes_version" {
  description = "Minor version, such as 1.33."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets of the control plane's interfaces."
  type        = list(string)
}

variable "api_allowed_cidrs" {
  description = "Blocks that reach the public endpoint; none means a private endpoint only."
  type        = list(string)
}

variable "admin_principal_arns" {
  description = "IAM principals that administer the cluster."
  type        = list(string)
}
