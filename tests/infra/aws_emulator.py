"""moto, plus the AWS calls that it lacks and the Terraform configuration needs.

    python aws_emulator.py      # prints its URL on loopback, and ends when its standard input does

AWS_ENDPOINT_URL with that URL is all that Terraform and the AWS CLI need. A process of its own, because moto's state
belongs to a process.
It answers what its author believed of AWS: it proves wiring, drift, order, validation and least privilege.
moto 5.2 has no EKS add-ons, access entries or pod identity associations, no placement groups and no budget
subscribers, and it leaves several fields out of what it has. Each class below adds one
service's part; every stored value lives on moto's own objects, so POST /moto-api/reset clears it.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import uuid
from typing import Any
from urllib.parse import unquote, urlparse

# Read when moto's IAM is imported: policies such as AmazonEKSClusterPolicy exist.
os.environ.setdefault("MOTO_IAM_LOAD_MANAGED_POLICIES", "true")

from moto.budgets.models import budgets_backends
from moto.budgets.responses import BudgetsResponse
from moto.core import DEFAULT_ACCOUNT_ID
from moto.core.responses import ActionResult, EmptyResult
from moto.ec2.models import ec2_backends
from moto.ec2.models.security_groups import SecurityGroupRule
from moto.ec2.responses import EC2Response
from moto.ec2.responses.launch_templates import LaunchTemplates
from moto.eks import urls as eks_urls
from moto.eks.models import Cluster, EKSBackend, eks_backends
from moto.eks.responses import EKSResponse
from moto.iam.access_control import IAMPolicyStatement, PermissionResult
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from moto.rds.models import DBInstance
from moto.rds.responses import RDSResponse

# What moto did before `install`.
_MOTO: dict[str, Any] = {}

JSON = tuple[int, dict[str, str], str]


def _reply(status: int, body: dict[str, Any]) -> JSON:
    return status, {"Content-Type": "application/json"}, json.dumps(body)


def _missing(what: str) -> JSON:
    status, headers, body = _reply(404, {"message": f"{what} not found"})
    return status, {**headers, "x-amzn-ErrorType": "ResourceNotFoundException"}, body


# --- EKS ---------------------------------------------------------------------------------------------------


def _finish_cluster(cluster: Cluster, backend: EKSBackend, request: dict[str, Any]) -> None:
    """Fill in what EKS answers and moto leaves out."""
    vpc = cluster.resources_vpc_config
    ec2 = ec2_backends[backend.account_id][backend.region_name]
    vpc_id = ec2.get_subnet(vpc["subnetIds"][0]).vpc_id
    group = ec2.create_security_group(f"eks-cluster-sg-{cluster.name}", "EKS created", vpc_id)
    public = vpc.get("endpointPublicAccess", True)
    vpc.update(
        vpcId=vpc_id,
        clusterSecurityGroupId=group.id,
        endpointPublicAccess=public,
        endpointPrivateAccess=vpc.get("endpointPrivateAccess", False),
        publicAccessCidrs=(vpc.get("publicAccessCidrs") or ["0.0.0.0/0"]) if public else [],
    )
    access = request.get("accessConfig") or {}
    cluster.access_config = {
        "authenticationMode": access.get("authenticationMode", "CONFIG_MAP"),
        "bootstrapClusterCreatorAdminPermissions": access.get("bootstrapClusterCreatorAdminPermissions", True),
    }
    cluster.upgrade_policy = request.get("upgradePolicy") or {"supportType": "EXTENDED"}
    cluster.compute_config, cluster.storage_config = request.get("computeConfig"), request.get("storageConfig")
    cluster.kubernetes_network_config = {
        "serviceIpv4Cidr": "172.20.0.0/16",
        "ipFamily": "ipv4",
        **(request.get("kubernetesNetworkConfig") or {}),
    }
    cluster.certificate_authority = {"data": "bW90bw=="}
    cluster.endpoint = os.environ.get("EMULATED_KUBERNETES_API", cluster.endpoint)
    cluster.addons, cluster.access_entries, cluster.pod_identities, cluster.updates = {}, {}, {}, {}


def _create_cluster(self: EKSResponse) -> ActionResult:
    result = _MOTO["create_cluster"](self)
    _finish_cluster(result.result["cluster"], self.eks_backend, json.loads(self.body))
    return result


def _delete_cluster(self: EKSResponse) -> ActionResult:
    cluster = self.eks_backend.clusters.get(self._get_param("name"))
    result = _MOTO["delete_cluster"](self)
    ec2 = ec2_backends[self.current_account][self.region]
    ec2.delete_security_group(group_id=cluster.resources_vpc_config["clusterSecurityGroupId"])
    return result


def _create_nodegroup(self: EKSResponse) -> ActionResult:
    result = _MOTO["create_nodegroup"](self)
    group, asked = result.result["nodegroup"], json.loads(self.body)
    group.remote_access = asked.get("remoteAccess")
    group.update_config = asked.get("updateConfig") or {"maxUnavailable": 1}
    group.node_repair_config = asked.get("nodeRepairConfig")
    group.version = asked.get("version") or self.eks_backend.clusters[group.cluster_name].version
    group.release_version = asked.get("releaseVersion") or f"{group.version}.0-20250101"
    if asked.get("launchTemplate"):
        group.disk_size = None
    return result


def _update(cluster: Cluster, kind: str) -> dict[str, Any]:
    update = {
        "id": str(uuid.uuid4()),
        "status": "Successful",
        "type": kind,
        "params": [],
        "createdAt": time.time(),
        "errors": [],
    }
    cluster.updates[update["id"]] = update
    return update


def _update_cluster_config(self: EKSResponse) -> ActionResult:
    asked = json.loads(self.body)
    cluster = self.eks_backend.describe_cluster(self._get_param("name"))
    cluster.resources_vpc_config.update(asked.get("resourcesVpcConfig") or {})
    cluster.logging = asked.get("logging") or cluster.logging
    cluster.access_config.update(asked.get("accessConfig") or {})
    cluster.upgrade_policy = asked.get("upgradePolicy") or cluster.upgrade_policy
    return ActionResult({"update": _update(cluster, "ConfigUpdate")})


def _update_nodegroup_config(self: EKSResponse) -> ActionResult:
    result = _MOTO["update_nodegroup_config"](self)
    cluster = self.eks_backend.clusters[self._get_param("name")]
    cluster.updates[result.result["update"]["id"]] = result.result["update"] | {"createdAt": time.time(), "params": []}
    return result


def _tagged(backend: EKSBackend, arn: str) -> dict[str, str]:
    for cluster in backend.clusters.values():
        if cluster.arn == arn:
            return cluster.tags
        for group in cluster.nodegroups.values():
            if group.arn == arn:
                return group.tags
        for item in [*cluster.addons.values(), *cluster.access_entries.values(), *cluster.pod_identities.values()]:
            if arn in (item.get("addonArn"), item.get("accessEntryArn"), item.get("associationArn")):
                return item["tags"]
    raise KeyError(arn)


def _tag(self: EKSBackend, resource_arn: str, tags: dict[str, str]) -> None:
    _tagged(self, resource_arn).update(tags)


def _untag(self: EKSBackend, resource_arn: str, tag_keys: list[str]) -> None:
    for key in [tag_keys] if isinstance(tag_keys, str) else tag_keys:
        _tagged(self, resource_arn).pop(key, None)


def eks_extra(request: Any, full_url: str, headers: Any) -> JSON:
    """Add-ons, access entries, access policies, pod identity associations and updates."""
    region = re.search(r"Credential=[^/]+/\d+/([^/]+)/", headers.get("Authorization", "")).group(1)
    backend = eks_backends[DEFAULT_ACCOUNT_ID][region]
    path = [unquote(p) for p in urlparse(request.url).path.strip("/").split("/")]
    body = json.loads(request.get_data() or b"{}")
    if path[0] == "addons":  # supported-versions
        name = request.args.get("addonName", "vpc-cni")
        version = {
            "addonVersion": "v1.0.0-eksbuild.1",
            "architecture": ["amd64"],
            "compatibilities": [
                {"clusterVersion": request.args.get("kubernetesVersion", "1.33"), "defaultVersion": True}
            ],
        }
        return _reply(200, {"addons": [{"addonName": name, "type": "networking", "addonVersions": [version]}]})
    cluster = backend.clusters.get(path[1])
    if cluster is None:
        return _missing(f"cluster {path[1]}")
    arn = f"arn:aws:eks:{region}:{DEFAULT_ACCOUNT_ID}"
    rest, now = path[3:], time.time()
    return {
        "addons": _addons,
        "access-entries": _access,
        "pod-identity-associations": _pod_identity,
        "updates": _updates,
        "node-groups": _node_versions,
    }[path[2]](request.method, rest, body, cluster, arn, now)


def _addons(method: str, rest: list[str], body: dict, cluster: Cluster, arn: str, now: float) -> JSON:
    if not rest and method == "GET":
        return _reply(200, {"addons": list(cluster.addons)})
    if not rest:
        name = body["addonName"]
        cluster.addons[name] = {
            "addonName": name,
            "clusterName": cluster.name,
            "status": "ACTIVE",
            "addonVersion": body.get("addonVersion", "v1.0.0-eksbuild.1"),
            "health": {"issues": []},
            "addonArn": f"{arn}:addon/{cluster.name}/{name}/{uuid.uuid4()}",
            "createdAt": now,
            "modifiedAt": now,
            "serviceAccountRoleArn": body.get("serviceAccountRoleArn"),
            "configurationValues": body.get("configurationValues"),
            "podIdentityAssociations": [],
            "tags": body.get("tags") or {},
        }
        return _reply(200, {"addon": cluster.addons[name]})
    addon = cluster.addons.get(rest[0])
    if addon is None:
        return _missing(f"add-on {rest[0]}")
    if method == "DELETE":
        del cluster.addons[rest[0]]
    if rest[-1] == "update":
        addon.update(
            {k: body[k] for k in ("addonVersion", "configurationValues", "serviceAccountRoleArn") if k in body}
        )
        return _reply(200, {"update": _update(cluster, "AddonUpdate")})
    return _reply(200, {"addon": addon})


def _access(method: str, rest: list[str], body: dict, cluster: Cluster, arn: str, now: float) -> JSON:
    if not rest and method == "GET":
        return _reply(200, {"accessEntries": list(cluster.access_entries)})
    if not rest:
        principal = body["principalArn"]
        cluster.access_entries[principal] = {
            "clusterName": cluster.name,
            "principalArn": principal,
            "kubernetesGroups": body.get("kubernetesGroups", []),
            "accessEntryArn": f"{arn}:access-entry/{cluster.name}/{uuid.uuid4()}",
            "createdAt": now,
            "modifiedAt": now,
            "tags": body.get("tags") or {},
            "username": body.get("username", principal),
            "type": body.get("type", "STANDARD"),
            "policies": {},
        }
        return _reply(200, {"accessEntry": cluster.access_entries[principal]})
    tail = "/".join(rest)
    principal, _, policy = tail.partition("/access-policies")
    entry = cluster.access_entries.get(principal)
    if entry is None:
        return _missing(f"access entry {principal}")
    if "/access-policies" not in tail:
        if method == "DELETE":
            del cluster.access_entries[principal]
        return _reply(200, {"accessEntry": {k: v for k, v in entry.items() if k != "policies"}})
    if method == "POST":
        made = {
            "policyArn": body["policyArn"],
            "accessScope": body["accessScope"],
            "associatedAt": now,
            "modifiedAt": now,
        }
        entry["policies"][body["policyArn"]] = made
    if method == "DELETE":
        entry["policies"].pop(policy.lstrip("/"), None)
    common = {"clusterName": cluster.name, "principalArn": principal}
    if method == "GET":
        return _reply(200, {**common, "associatedAccessPolicies": list(entry["policies"].values())})
    return _reply(200, {**common, "associatedAccessPolicy": entry["policies"].get(body.get("policyArn"))})


def _pod_identity(method: str, rest: list[str], body: dict, cluster: Cluster, arn: str, now: float) -> JSON:
    if not rest and method == "GET":
        return _reply(200, {"associations": list(cluster.pod_identities.values())})
    if not rest:
        key = "a-" + uuid.uuid4().hex[:17]
        cluster.pod_identities[key] = {
            "clusterName": cluster.name,
            "namespace": body["namespace"],
            "serviceAccount": body["serviceAccount"],
            "roleArn": body["roleArn"],
            "associationId": key,
            "tags": body.get("tags") or {},
            "associationArn": f"{arn}:podidentityassociation/{cluster.name}/{key}",
            "createdAt": now,
            "modifiedAt": now,
        }
        return _reply(200, {"association": cluster.pod_identities[key]})
    item = cluster.pod_identities.get(rest[0])
    if item is None:
        return _missing(f"association {rest[0]}")
    if method == "POST":
        item["roleArn"] = body.get("roleArn", item["roleArn"])
    if method == "DELETE":
        del cluster.pod_identities[rest[0]]
    return _reply(200, {"association": item})


def _updates(method: str, rest: list[str], body: dict, cluster: Cluster, arn: str, now: float) -> JSON:
    if not rest:
        cluster.version = body.get("version", cluster.version)
        return _reply(200, {"update": _update(cluster, "VersionUpdate")})
    return _reply(200, {"update": cluster.updates[rest[0]]})


def _node_versions(method: str, rest: list[str], body: dict, cluster: Cluster, arn: str, now: float) -> JSON:
    group = cluster.nodegroups[rest[0]]
    group.version = body.get("version", group.version)
    if body.get("launchTemplate"):
        group.launch_template.update(body["launchTemplate"])
    return _reply(200, {"update": _update(cluster, "VersionUpdate")})


# --- EC2: placement groups, and launch templates without their own tags in the data -------------------------


def _create_launch_template(self: LaunchTemplates) -> ActionResult:
    result = _MOTO["create_launch_template"](self)
    template = self.ec2_backend.launch_templates[result.result["LaunchTemplate"]["LaunchTemplateId"]]
    data = template.versions[0].data
    data["TagSpecifications"] = [t for t in data.get("TagSpecifications", []) if t["ResourceType"] != "launch-template"]
    return result


def _groups(self: EC2Response) -> dict[str, dict[str, Any]]:
    return self.ec2_backend.__dict__.setdefault("placement_groups", {})


def _create_placement_group(self: EC2Response) -> ActionResult:
    name = self._get_param("GroupName")
    tags = self._parse_tag_specification().get("placement-group", {})
    _groups(self)[name] = {
        "GroupName": name,
        "State": "available",
        "Strategy": self._get_param("Strategy", "cluster"),
        "GroupId": "pg-" + uuid.uuid4().hex[:17],
        "Tags": [{"Key": k, "Value": v} for k, v in tags.items()],
        "GroupArn": f"arn:aws:ec2:{self.region}:{self.current_account}:placement-group/{name}",
    }
    return ActionResult({"PlacementGroup": _groups(self)[name]})


def _describe_placement_groups(self: EC2Response) -> ActionResult:
    names = self._get_param("GroupNames", [])
    return ActionResult({"PlacementGroups": [g for n, g in _groups(self).items() if not names or n in names]})


def _delete_placement_group(self: EC2Response) -> ActionResult:
    _groups(self).pop(self._get_param("GroupName"), None)
    return EmptyResult()


# --- Budgets -----------------------------------------------------------------------------------------------


def _budget(self: BudgetsResponse, name: str) -> Any:
    return budgets_backends[self.current_account]["aws"].budgets[self.current_account][name]


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    keys = ("NotificationType", "ComparisonOperator", "Threshold", "ThresholdType")
    return all(a.get(k) == b.get(k) for k in keys)


def _describe_subscribers(self: BudgetsResponse) -> str:
    budget, wanted = _budget(self, self._get_param("BudgetName")), self._get_param("Notification")
    found = [n.subscribers for n in budget.notifications if _same(n.details, wanted)]
    return json.dumps({"Subscribers": found[0] if found else []})


def _budget_tags(self: BudgetsResponse) -> str:
    budget = _budget(self, self._get_param("ResourceARN").split("/")[-1])
    return json.dumps({"ResourceTags": budget.tags})


def _update_budget(self: BudgetsResponse) -> str:
    new = self._get_param("NewBudget")
    _budget(self, new["BudgetName"]).budget.update(new)
    return "{}"


def _create_budget(self: BudgetsResponse) -> str:
    answer = _MOTO["create_budget"](self)
    _budget(self, self._get_param("Budget")["BudgetName"]).tags = self._get_param("ResourceTags", [])
    return answer


# --- RDS ---------------------------------------------------------------------------------------------------


def _create_db_instance(self: RDSResponse) -> Any:
    result = _MOTO["create_db_instance"](self)
    database = self.backend.databases[self._get_param("DBInstanceIdentifier")]
    database.dbi_resource_id = "db-" + uuid.uuid4().hex[:26].upper()  # moto gives every instance the same
    database.performance_insights_enabled = self._get_bool_param("EnablePerformanceInsights", False)
    return result


def _describe_db_parameters(self: RDSResponse) -> ActionResult:
    group = self.backend.db_parameter_groups[self._get_param("DBParameterGroupName")]
    return ActionResult({"Parameters": [{**p, "Source": "user"} for p in group.parameters.values()]})


# --- IAM ---------------------------------------------------------------------------------------------------


def _is_action_permitted(self: IAMPolicyStatement, *args: Any, **kwargs: Any) -> PermissionResult:
    """moto reads no condition but those of trust policies; the emulator's traffic counts as TLS."""
    if self._statement.get("Condition") == {"Bool": {"aws:SecureTransport": "false"}}:
        return PermissionResult.NEUTRAL
    return _MOTO["is_action_permitted"](self, *args, **kwargs)


def _replace(cls: type, **methods: Any) -> None:
    """Puts methods into a class of moto's, and keeps what was there."""
    for name, method in methods.items():
        _MOTO[name] = getattr(cls, name, None)
        setattr(cls, name, method)


def install() -> None:
    """Patch moto. Safe to call twice."""
    if _MOTO:
        return
    _replace(
        EKSResponse,
        create_cluster=_create_cluster,
        delete_cluster=_delete_cluster,
        create_nodegroup=_create_nodegroup,
        update_nodegroup_config=_update_nodegroup_config,
        update_cluster_config=_update_cluster_config,
    )
    _replace(EKSBackend, tag_resource=_tag, untag_resource=_untag, list_tags_for_resource=_tagged)
    _replace(LaunchTemplates, create_launch_template=_create_launch_template)
    _replace(
        EC2Response,
        create_placement_group=_create_placement_group,
        describe_placement_groups=_describe_placement_groups,
        delete_placement_group=_delete_placement_group,
    )
    _replace(
        BudgetsResponse,
        create_budget=_create_budget,
        describe_subscribers_for_notification=_describe_subscribers,
        update_budget=_update_budget,
    )
    # The name that EKS has, too: nobody calls what was there before.
    BudgetsResponse.list_tags_for_resource = _budget_tags
    _replace(RDSResponse, create_db_instance=_create_db_instance, describe_db_parameters=_describe_db_parameters)
    _replace(IAMPolicyStatement, is_action_permitted=_is_action_permitted)
    DBInstance.performance_insights_enabled = False
    SecurityGroupRule.description = property(lambda self: (self.source_group or self.ip_range).get("Description"))
    _route_eks()


def _route_eks() -> None:
    cluster = r"{0}/clusters/(?P<name>[^/]+)/"
    for part in ("addons", "access-entries", "pod-identity-associations", "updates"):
        eks_urls.url_paths[cluster + part + "$"] = eks_extra
        eks_urls.url_paths[cluster + part + "/(?P<tail>.+)$"] = eks_extra
    eks_urls.url_paths[cluster + "node-groups/(?P<nodegroupName>[^/]+)/update-version$"] = eks_extra
    eks_urls.url_paths[r"{0}/addons/supported-versions$"] = eks_extra


if __name__ == "__main__":
    install()
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    print("http://{}:{}".format(*server.get_host_and_port()), flush=True)
    # Ends with whoever holds the other end.
    sys.stdin.read()
    server.stop()
