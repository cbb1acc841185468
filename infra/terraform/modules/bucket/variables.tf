variable "name" {
  description = "Name, unique in the world."
  type        = string
}

variable "is_disposable" {
  description = "Destroy it with what is in it."
  type        = bool
}

variable "expire_after_days" {
  description = "Days until objects expire, by prefix; \"\" is the whole bucket."
  type        = map(number)
}

variable "old_versions_days" {
  description = "Days that overwritten and deleted objects can still be had back."
  type        = number
}
