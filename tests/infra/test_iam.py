"""Least privilege, tried out: the roles that Terraform makes against an AWS that enforces IAM.

Only what the roles need is applied here; test_terraform_apply.py (make soak) applies everything.
"""

from __future__ import annotations

import json
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError


@pytest.fixture(scope="module")
def stack(roles: Any) -> Any:
    roles.applied.result()
    return roles.stack


@pytest.fixture(scope="module")
def aws(roles: Any) -> str:
    return str(roles.aws)


@pytest.fixture(scope="module")
def buckets(stack: Any) -> dict[str, str]:
    """Those of the roles that were made; the account's number is the emulator's."""
    return {purpose: f"faithdiff-dev-{purpose}-123456789012" for purpose in ("data", "checkpoints")}


@pytest.fixture(scope="module")
def credentials(stack: Any, aws_client: Callable[..., Any], buckets: dict[str, str]) -> dict[str, dict[str, str]]:
    """Of each role, as its pods get them."""
    aws_client("s3").put_object(Bucket=buckets["data"], Key="shards/0.tar", Body=b"x")
    aws_client("s3").put_object(Bucket=buckets["checkpoints"], Key="runs/1/model", Body=b"x")
    return {
        role: aws_client("sts").assume_role(
            RoleArn=f"arn:aws:iam::123456789012:role/faithdiff-dev-{role}", RoleSessionName="pod"
        )["Credentials"]
        for role in ("prepare", "train")
    }


@contextmanager
def enforced(aws: str) -> Iterator[None]:
    """IAM counts inside the block."""

    def requests_without_iam(number: bytes) -> None:
        request = urllib.request.Request(f"{aws}/moto-api/reset-auth", data=number, method="POST")
        request.add_header("Content-Type", "text/plain")
        urllib.request.urlopen(request, timeout=30).close()

    requests_without_iam(b"0")
    try:
        yield
    finally:
        requests_without_iam(b"inf")


def test_a_second_plan_changes_nothing(stack: Any, roles: Any) -> None:
    assert stack.run("plan", "-detailed-exitcode", *roles.flags, allowed=(0, 2)).returncode == 0


@pytest.mark.parametrize(
    ("role", "allowed", "refused"),
    [
        (
            "prepare",
            ["read data", "write data", "list data"],
            ["read checkpoints", "write checkpoints", "list checkpoints"],
        ),
        (
            "train",
            ["read data", "list data", "read checkpoints", "write checkpoints"],
            ["write data", "delete data", "policy data", "policy checkpoints"],
        ),
    ],
)
def test_a_role_may_do_its_work_and_nothing_else(
    aws: str,
    aws_client: Callable[..., Any],
    buckets: dict[str, str],
    credentials: dict[str, dict[str, str]],
    role: str,
    allowed: list[str],
    refused: list[str],
) -> None:
    s3 = aws_client("s3", credentials[role])
    with enforced(aws):
        outcome = {what: is_allowed(s3, *what.split(), buckets=buckets) for what in [*allowed, *refused]}
    assert outcome == dict.fromkeys(allowed, True) | dict.fromkeys(refused, False)


def is_allowed(s3: Any, action: str, purpose: str, *, buckets: dict[str, str]) -> bool:
    bucket = buckets[purpose]
    key = {"data": "shards/0.tar", "checkpoints": "runs/1/model"}[purpose]
    calls: dict[str, Callable[[], Any]] = {
        "read": lambda: s3.get_object(Bucket=bucket, Key=key),
        "write": lambda: s3.put_object(Bucket=bucket, Key=f"{key}.new", Body=b"y"),
        "delete": lambda: s3.delete_object(Bucket=bucket, Key=key),
        "list": lambda: s3.list_objects_v2(Bucket=bucket),
        "policy": lambda: s3.delete_bucket_policy(Bucket=bucket),
    }
    try:
        calls[action]()
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("AccessDenied", "403"):
            raise
        return False
    return True


@contextmanager
def pod_identity_agent(credentials: dict[str, Any]) -> Iterator[str]:
    """The agent that EKS runs on every node: credentials for whoever holds the pod's token. Its URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Says nothing."""

        def do_GET(self) -> None:
            is_pod = self.headers.get("Authorization") == "the-pods-token"
            body = json.dumps(
                {
                    "AccessKeyId": credentials["AccessKeyId"],
                    "SecretAccessKey": credentials["SecretAccessKey"],
                    "Token": credentials["SessionToken"],
                    "Expiration": credentials["Expiration"].strftime("%Y-%m-%dT%H:%M:%SZ"),
                }
            ).encode()
            self.send_response(200 if is_pod else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1/credentials"
    server.shutdown()
    server.server_close()


def test_the_platforms_storage_finds_the_role_of_its_pod(
    aws: str,
    buckets: dict[str, str],
    credentials: dict[str, dict[str, str]],
    forgetful_s3: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """No key anywhere: sr_platform.storage reads with what the agent hands out, and may write where the role may."""
    from sr_platform.errors import RequestError
    from sr_platform.storage import open_storage

    (tmp_path / "token").write_text("the-pods-token")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    with enforced(aws), pod_identity_agent(credentials["train"]) as agent:
        monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", agent)
        monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "token"))
        monkeypatch.setenv("AWS_ENDPOINT_URL", aws)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-west-2")
        monkeypatch.setenv("HOME", str(tmp_path))
        forgetful_s3()
        assert open_storage(f"s3://{buckets['data']}").read_bytes("shards/0.tar") == b"x"
        open_storage(f"s3://{buckets['checkpoints']}").write_bytes_atomic("runs/2/model", b"y")
        with pytest.raises(RequestError, match="Access Denied"):
            open_storage(f"s3://{buckets['data']}").write_bytes_atomic("shards/1.tar", b"y")
