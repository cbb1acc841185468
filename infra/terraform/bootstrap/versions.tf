terraform {
  required_version = ">= 1.10.0" # S3 locks state by itself from here on

  required_providers {
    aws = {
      source  = "hashicorp/aws"
      version = "~> 5.100"
    }
  }

}
