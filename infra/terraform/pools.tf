# Karpenter's NodePools and EC2NodeClasses, from the same variables as everything else: Terraform renders them, and
# infra/scripts/platform.sh applies them.
locals {
  pools = merge(
    { for name, pool in var.gpu_pools : name => merge(pool, { limits = { "nvidia.com/gpu" = tostring(pool.max_gpus) }, is_gpu = true }) },
    { cpu = merge(var.cpu_pool, { role = "prepare", zones = [], limits = { cpu = tostring(var.cpu_pool.max_vcpus) }, is_gpu = false }) },
  )

  node_classes = [for name, pool in local.pools : {
    apiVersion = "karpenter.k8s.aws/v1"
    kind       = "EC2NodeClass"
    metadata   = { name = name }
    spec = {
      instanceProfile            = "${local.full_name}-karpenter-node"
      amiSelectorTerms           = [{ alias = var.node_ami_alias }]
      subnetSelectorTerms        = [{ tags = { "karpenter.sh/discovery" = local.full_name } }]
      securityGroupSelectorTerms = [{ tags = { "aws:eks:cluster-name" = local.full_name } }]
      metadataOptions            = { httpTokens = "required", httpPutResponseHopLimit = 1 }
      instanceStorePolicy        = "RAID0"
      tags                       = local.tags
      blockDeviceMappings = [{
        deviceName = "/dev/xvda"
        ebs        = { volumeSize = "${pool.disk_gib}Gi", volumeType = "gp3", encrypted = true, iops = 4000, throughput = 250 }
      }]
    }
  }]

  node_pools = [for name, pool in local.pools : {
    apiVersion = "karpenter.sh/v1"
    kind       = "NodePool"
    metadata   = { name = name }
    spec = {
      limits = pool.limits
      # Only empty nodes go: a training or a replica is never moved to save money.
      disruption = { consolidationPolicy = "WhenEmpty", consolidateAfter = "5m", budgets = [{ nodes = "1" }] }
      template = {
        metadata = { labels = merge({ "faithdiff/role" = pool.role }, pool.is_gpu ? { "faithdiff/accelerator" = "nvidia" } : {}) }
        spec = {
          nodeClassRef           = { group = "karpenter.k8s.aws", kind = "EC2NodeClass", name = name }
          expireAfter            = "720h"
          terminationGracePeriod = "1h"
          taints                 = pool.is_gpu ? [{ key = "nvidia.com/gpu", value = "present", effect = "NoSchedule" }] : [{ key = "faithdiff/pool", value = "cpu", effect = "NoSchedule" }]
          requirements = concat(
            [
              { key = "karpenter.sh/capacity-type", operator = "In", values = pool.capacity_types },
              { key = "node.kubernetes.io/instance-type", operator = "In", values = pool.instance_types },
            ],
            [for zones in [pool.zones] : { key = "topology.kubernetes.io/zone", operator = "In", values = zones } if length(zones) > 0],
          )
        }
      }
    }
  }]

  node_pools_yaml = join("---\n", [for object in concat(local.node_classes, local.node_pools) : yamlencode(object)])
}
