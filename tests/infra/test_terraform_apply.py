"""The whole configuration, applied for real to an AWS on loopback: made, no drift, changed in place, destroyed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

DEV = "-var-file=envs/dev.tfvars"
# What the second apply changes, over dev.tfvars: nothing of it may replace a resource.
CHANGES = """
kubernetes_version = "1.34"
monthly_budget_usd = 2500
alarm_emails       = ["ops@example.org", "ml@example.org"]
api_allowed_cidrs  = ["203.0.113.0/24", "198.51.100.0/24"]
retention_days     = { trials = 45 }
gpu_limit          = 24
node_groups = {
  reserved = { role = "train", instance_types = ["p5.48xlarge"], max_size = 1, efa_interfaces = 32, availability_zone = "us-west-2a" }
}
"""  # noqa: E501 - as in a tfvars file
FIRST = 'api_allowed_cidrs = ["203.0.113.0/24"]\nadmin_principal_arns = ["arn:aws:iam::123456789012:role/admin"]\n'
CHANGES += 'admin_principal_arns = ["arn:aws:iam::123456789012:role/admin"]\n'

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def stack(make_terraform: Callable[..., Any], aws: str) -> Any:
    """State bucket and stack as infra/scripts/up.sh makes them, with the state in the bucket."""
    bootstrap = make_terraform("bootstrap", aws)
    bootstrap.init()
    bootstrap.run("apply", "-auto-approve", "-input=false", "-no-color", "-var=region=us-west-2")
    made = make_terraform(".", aws)
    made.init("-backend-config=envs/dev.s3.tfbackend", f"-backend-config=bucket={bootstrap.outputs()['state_bucket']}")
    (made.folder / "first.tfvars").write_text(FIRST)
    (made.folder / "changes.tfvars").write_text(CHANGES)
    apply(made, "first.tfvars")
    return made


def apply(stack: Any, values: str) -> str:
    done = stack.run("apply", "-auto-approve", "-input=false", "-no-color", DEV, f"-var-file={values}")
    return str(done.stdout)


def drift(stack: Any, values: str) -> str:
    """What a plan would change; nothing when it says so."""
    arguments = ("-detailed-exitcode", "-input=false", "-no-color", DEV, f"-var-file={values}")
    done = stack.run("plan", *arguments, allowed=(0, 2))
    return "" if done.returncode == 0 else str(done.stdout)


def test_a_second_plan_changes_nothing(stack: Any) -> None:
    assert len(stack.run("state", "list").stdout.splitlines()) > 120
    assert drift(stack, "first.tfvars") == ""


def test_the_state_lies_in_the_bucket_and_holds_no_password(stack: Any, aws_client: Callable[..., Any]) -> None:
    bucket = next(b["Name"] for b in aws_client("s3").list_buckets()["Buckets"] if "tfstate" in b["Name"])
    state = aws_client("s3").get_object(Bucket=bucket, Key="dev/terraform.tfstate")["Body"].read().decode()
    resources = json.loads(state)["resources"]
    databases = [one for one in resources if one["type"] == "aws_db_instance"]
    assert databases
    for instance in (made["attributes"] for one in databases for made in one["instances"]):
        assert instance["manage_master_user_password"] is True
        assert not instance["password"]
        assert not instance.get("password_wo")
    assert not any(one["type"] in ("random_password", "aws_secretsmanager_secret_version") for one in resources)


def test_buckets_are_closed_versioned_encrypted_and_forget(stack: Any, aws_client: Callable[..., Any]) -> None:
    s3 = aws_client("s3")
    rules = {}
    for purpose, name in stack.outputs()["bucket_names"].items():
        assert all(s3.get_public_access_block(Bucket=name)["PublicAccessBlockConfiguration"].values())
        assert s3.get_bucket_versioning(Bucket=name)["Status"] == "Enabled"
        encryption = s3.get_bucket_encryption(Bucket=name)["ServerSideEncryptionConfiguration"]["Rules"][0]
        assert encryption["ApplyServerSideEncryptionByDefault"]["SSEAlgorithm"] == "aws:kms"
        found = s3.get_bucket_lifecycle_configuration(Bucket=name)["Rules"]
        rules[purpose] = {rule["ID"]: rule for rule in found}
        assert rules[purpose]["abort-unfinished-uploads"]["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] == 3
    assert rules["checkpoints"]["expire-trials"]["Filter"] == {"Prefix": "trials/"}
    assert rules["results"]["expire-everything"]["Expiration"]["Days"] == 7
    assert not [rule for rule in rules["data"] if rule.startswith("expire")]


def test_nodes_lie_in_three_private_zones(stack: Any, aws_client: Callable[..., Any]) -> None:
    group = aws_client("eks").describe_nodegroup(clusterName="faithdiff-dev", nodegroupName="system")["nodegroup"]
    subnets = aws_client("ec2").describe_subnets(SubnetIds=group["subnets"])["Subnets"]
    assert len({subnet["AvailabilityZone"] for subnet in subnets}) == 3
    assert not any(subnet["MapPublicIpOnLaunch"] for subnet in subnets)


def test_of_two_at_once_one_is_refused(stack: Any) -> None:
    """A lock in the bucket, as S3 keeps it."""
    arguments = ["-input=false", "-no-color", DEV, "-var-file=first.tfvars"]
    options: dict[str, Any] = {"cwd": stack.folder, "env": stack.env, "text": True, "stderr": subprocess.PIPE}
    options["stdout"] = subprocess.DEVNULL
    with (
        subprocess.Popen(["terraform", "plan", *arguments], **options) as first,
        subprocess.Popen(["terraform", "plan", *arguments], **options) as second,
    ):
        told = [process.communicate(timeout=300)[1] for process in (first, second)]
    assert sorted([first.returncode, second.returncode]) == [0, 1]
    assert "Error acquiring the state lock" in "".join(told)


def test_a_change_is_made_in_place(stack: Any, aws_client: Callable[..., Any]) -> None:
    before = aws_client("eks").describe_cluster(name="faithdiff-dev")["cluster"]
    told = apply(stack, "changes.tfvars")
    assert re.search(r"Apply complete! Resources: \d+ added, [1-9]\d* changed, 0 destroyed", told), re.findall(
        r"^.*(?:destroy|replace).*$", told, flags=re.MULTILINE
    )
    assert drift(stack, "changes.tfvars") == ""
    after = aws_client("eks").describe_cluster(name="faithdiff-dev")["cluster"]
    assert (before["version"], after["version"]) == ("1.33", "1.34")
    assert before["createdAt"] == after["createdAt"]
    reserved = aws_client("eks").describe_nodegroup(clusterName="faithdiff-dev", nodegroupName="reserved")["nodegroup"]
    assert reserved["amiType"] == "AL2023_x86_64_NVIDIA"
    assert [taint["key"] for taint in reserved["taints"]] == ["nvidia.com/gpu"]


def test_destroy_leaves_nothing(stack: Any, aws_client: Callable[..., Any]) -> None:
    # With something in the buckets: dev's go with their contents.
    bucket = stack.outputs()["bucket_names"]["data"]
    aws_client("s3").put_object(Bucket=bucket, Key="shards/0.tar", Body=b"x")
    stack.run("destroy", "-auto-approve", "-input=false", "-no-color", DEV, "-var-file=changes.tfvars")
    assert stack.run("state", "list").stdout == ""
    assert [b["Name"] for b in aws_client("s3").list_buckets()["Buckets"] if "tfstate" not in b["Name"]] == []
    assert aws_client("eks").list_clusters()["clusters"] == []
    assert aws_client("rds").describe_db_instances()["DBInstances"] == []
    assert [vpc for vpc in aws_client("ec2").describe_vpcs()["Vpcs"] if not vpc["IsDefault"]] == []
    assert [
        role["RoleName"] for role in aws_client("iam").list_roles()["Roles"] if "faithdiff" in role["RoleName"]
    ] == []
    assert aws_client("ecr").describe_repositories()["repositories"] == []
    assert aws_client("sqs").list_queues().get("QueueUrls", []) == []


def test_prod_refuses_to_lose_its_databases(make_terraform: Callable[..., Any], aws: str, tmp_path: Path) -> None:
    prod = make_terraform(".", aws)
    prod.local_state()
    prod.init()
    prod.run("apply", "-auto-approve", "-input=false", "-no-color", "-var-file=envs/prod.tfvars")
    arguments = ("-auto-approve", "-input=false", "-no-color", "-var-file=envs/prod.tfvars", "-target=module.databases")
    refused = prod.run("destroy", *arguments, allowed=(1,))
    assert "Cannot delete protected DB Instance" in refused.stderr
