# Who may do what. Written with jsonencode, so that tests read them without an account.
locals {
  s3_read  = ["s3:GetObject"]
  s3_write = ["s3:GetObject", "s3:PutObject", "s3:DeleteObject", "s3:AbortMultipartUpload", "s3:ListMultipartUploadParts"]
  s3_list  = ["s3:ListBucket", "s3:GetBucketLocation", "s3:ListBucketMultipartUploads"]

  # Workload -> bucket -> what it does there.
  bucket_access = {
    prepare = { data = "write" }
    train   = { data = "read", checkpoints = "write" }
    serve   = { checkpoints = "read", results = "write" }
    mlflow  = { artifacts = "write" }
  }
  database_of = { serve = "jobs", mlflow = "mlflow" }

  policies = {
    for workload, access in local.bucket_access : workload => jsonencode({
      Version = "2012-10-17"
      Statement = concat(
        [{
          Sid      = "List"
          Effect   = "Allow"
          Action   = local.s3_list
          Resource = [for bucket in keys(access) : module.buckets[bucket].arn]
        }],
        [for bucket, what in access : {
          Sid      = "${title(what)}${title(bucket)}"
          Effect   = "Allow"
          Action   = what == "write" ? local.s3_write : local.s3_read
          Resource = ["${module.buckets[bucket].arn}/*"]
        }],
        [for of_workload, database in local.database_of : {
          Sid      = "DatabasePassword"
          Effect   = "Allow"
          Action   = ["secretsmanager:GetSecretValue"]
          Resource = [module.databases[database].secret_arn]
        } if of_workload == workload],
      )
    })
  }
}
