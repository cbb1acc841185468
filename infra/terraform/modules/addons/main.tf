data "aws_partition" "current" {}

data "aws_iam_policy_document" "trust" {
  statement {
    actions = ["sts:AssumeRole", "sts:TagSession"]
    principals {
      type        = "Service"
      identifiers = ["pods.eks.amazonaws.com"]
    }
  }
}

resource "aws_iam_role" "volumes" {
  name               = "${var.name}-ebs-csi"
  assume_role_policy = data.aws_iam_policy_document.trust.json
}

resource "aws_iam_role_policy_attachment" "volumes" {
  role       = aws_iam_role.volumes.name
  policy_arn = "arn:${data.aws_partition.current.partition}:iam::aws:policy/service-role/AmazonEBSCSIDriverPolicy"
}

resource "aws_eks_pod_identity_association" "volumes" {
  cluster_name    = var.cluster_name
  namespace       = "kube-system"
  service_account = "ebs-csi-controller-sa"
  role_arn        = aws_iam_role.volumes.arn
}

resource "aws_eks_addon" "this" {
  for_each                    = toset(["coredns", "aws-ebs-csi-driver", "metrics-server"])
  cluster_name                = var.cluster_name
  addon_name                  = each.key
  resolve_conflicts_on_create = "OVERWRITE"
  resolve_conflicts_on_update = "OVERWRITE"
  depends_on                  = [aws_eks_pod_identity_association.volumes]

  # Their pods need nodes to become healthy. depends_on for the whole module would defer its data sources whenever nodes
  # change, and an upgrade would then replace the role's policy.
  lifecycle {
    precondition {
      condition     = var.node_group != ""
      error_message = "node_group: name the group whose nodes the add-ons' pods run on."
    }
  }
}
