variable "name" {
  description = "Prefix of every name."
  type        = string
}

variable "vpc_id" {
  description = "VPC."
  type        = string
}

variable "subnet_id" {
  description = "Subnet; the file system lies in one zone."
  type        = string
}

variable "vpc_cidr" {
  description = "Who may mount it."
  type        = string
}

variable "data_bucket" {
  description = "Bucket that it mirrors under /data."
  type        = string
}

variable "data_bucket_arn" {
  description = "The same, as ARN."
  type        = string
}

variable "storage_gib" {
  description = "Size; 1200 or a multiple of 2400."
  type        = number
  default     = 1200
}
