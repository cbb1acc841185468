variable "name" {
  description = "Prefix of every name."
  type        = string
}

variable "account_id" {
  description = "Account, for the key's policy."
  type        = string
}

variable "project_tag" {
  description = "Value of the tag Project that the budget counts."
  type        = string
}

variable "monthly_budget_usd" {
  description = "Budget."
  type        = number
}

variable "alarm_emails" {
  description = "Who gets the mails."
  type        = list(string)
}
