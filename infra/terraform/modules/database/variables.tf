variable "name" {
  description = "Identifier of the instance."
  type        = string
}

variable "database" {
  description = "Name of the database and of its owner."
  type        = string
}

variable "instance_class" {
  description = "Class, such as db.t4g.small."
  type        = string
}

variable "vpc_id" {
  description = "VPC."
  type        = string
}

variable "vpc_cidr" {
  description = "Where the database may answer to."
  type        = string
}

variable "subnet_ids" {
  description = "Private subnets in two zones or more."
  type        = list(string)
}

variable "client_security_group_id" {
  description = "Whose members may connect."
  type        = string
}

variable "backup_days" {
  description = "Days of automatic backups."
  type        = number
}

variable "is_disposable" {
  description = "No standby, no deletion protection, no last snapshot."
  type        = bool
}

variable "alarm_topic_arn" {
  description = "Who is told when the disk fills."
  type        = string
}
