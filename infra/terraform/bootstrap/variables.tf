variable "name" {
  description = "Short name of the deployments whose state is kept; the same as in the environments."
  type        = string
  default     = "faithdiff"

  validation {
    condition     = can(regex("^[a-z][a-z0-9-]{1,14}[a-z0-9]$", var.name))
    error_message = "name: got '${var.name}'; use 3 to 16 lower-case letters, digits and hyphens, starting with a letter."
  }
}

variable "region" {
  description = "AWS region of the bucket, such as us-west-2."
  type        = string

  validation {
    condition     = can(regex("^[a-z]{2}(-[a-z]+)+-[0-9]$", var.region))
    error_message = "region: got '${var.region}'; set a region such as us-west-2."
  }
}
