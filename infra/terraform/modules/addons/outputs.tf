output "names" {
  description = "Add-ons."
  value       = sort([for addon in aws_eks_addon.this : addon.addon_name])
}
