# Values that the provider's own validators accept.
mock_data "aws_iam_policy_document" {
  defaults = { json = "{\"Version\":\"2012-10-17\",\"Statement\":[]}" }
}
mock_data "aws_caller_identity" {
  defaults = { account_id = "123456789012" }
}
mock_data "aws_partition" {
  defaults = { partition = "aws" }
}
mock_resource "aws_iam_role" {
  defaults = { arn = "arn:aws:iam::123456789012:role/mock" }
}
mock_resource "aws_iam_policy" {
  defaults = { arn = "arn:aws:iam::123456789012:policy/mock" }
}
mock_resource "aws_sns_topic" {
  defaults = { arn = "arn:aws:sns:us-west-2:123456789012:mock" }
}
mock_resource "aws_sqs_queue" {
  defaults = { arn = "arn:aws:sqs:us-west-2:123456789012:mock", url = "https://sqs.us-west-2.amazonaws.com/123456789012/mock" }
}
mock_resource "aws_cloudwatch_log_group" {
  defaults = { arn = "arn:aws:logs:us-west-2:123456789012:log-group:mock" }
}
mock_resource "aws_kms_key" {
  defaults = { arn = "arn:aws:kms:us-west-2:123456789012:key/00000000-0000-0000-0000-000000000000" }
}
mock_resource "aws_eks_cluster" {
  defaults = {
    arn        = "arn:aws:eks:us-west-2:123456789012:cluster/mock"
    endpoint   = "https://mock.eks.amazonaws.com"
    vpc_config = { cluster_security_group_id = "sg-0123456789abcdef0" }
  }
}
mock_resource "aws_launch_template" {
  defaults = { id = "lt-0123456789abcdef0", latest_version = 1 }
}
mock_resource "aws_s3_bucket" {
  defaults = { arn = "arn:aws:s3:::mock" }
}
mock_resource "aws_db_instance" {
  defaults = {
    address            = "mock.rds.amazonaws.com"
    port               = 5432
    master_user_secret = [{ secret_arn = "arn:aws:secretsmanager:us-west-2:123456789012:secret:mock", secret_status = "active", kms_key_id = "mock" }]
  }
}
mock_resource "aws_fsx_lustre_file_system" {
  defaults = { id = "fs-0123456789abcdef0", arn = "arn:aws:fsx:us-west-2:123456789012:file-system/fs-0123456789abcdef0" }
}
