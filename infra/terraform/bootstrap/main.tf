# Applied once per account, with its state on the laptop of whoever does it: the bucket that holds every other state.
data "aws_caller_identity" "current" {}

module "state" {
  source = "../modules/bucket"

  name              = "${var.name}-tfstate-${data.aws_caller_identity.current.account_id}"
  is_disposable     = false
  expire_after_days = {}
  old_versions_days = 365
}
