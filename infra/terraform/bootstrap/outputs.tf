output "state_bucket" {
  description = "Bucket of the states, for terraform init -backend-config=bucket=..."
  value       = module.state.name
}
