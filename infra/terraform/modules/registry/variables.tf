variable "name" {
  description = "Prefix of the repositories."
  type        = string
}

variable "repositories" {
  description = "Images."
  type        = list(string)
}

variable "untagged_days" {
  description = "Days until untagged images go."
  type        = number
}

variable "images_to_keep" {
  description = "How many images each repository keeps."
  type        = number
}

variable "is_disposable" {
  description = "Destroy repositories with their images."
  type        = bool
}
