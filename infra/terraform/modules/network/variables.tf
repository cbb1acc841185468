variable "name" {
  description = "Prefix of every name; also the value of the tag by which Karpenter finds the subnets."
  type        = string
}

variable "region" {
  description = "Region, for the names of endpoints."
  type        = string
}

variable "vpc_cidr" {
  description = "IPv4 block of the VPC."
  type        = string
}

variable "availability_zones" {
  description = "Zones, one public and one private subnet each."
  type        = list(string)
}

variable "single_nat_gateway" {
  description = "One NAT gateway for all zones instead of one a zone."
  type        = bool
}
