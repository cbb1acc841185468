terraform {
  required_version = ">= 1.10.0" # S3 locks state by itself from here on

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }

  # Key and region come from envs/<environment>.s3.tfbackend, the bucket from the root in bootstrap/.
  backend "s3" {}
}
