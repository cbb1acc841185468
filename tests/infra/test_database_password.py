"""The password file beside a client of a database, from a secret as RDS makes it."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sr_platform.cluster import REPOSITORY_PATH

SCRIPT = REPOSITORY_PATH / "infra" / "images" / "database_password.py"


@pytest.fixture
def environment(aws: str, tmp_path: Path) -> dict[str, str]:
    return os.environ | {
        "AWS_ENDPOINT_URL": aws,
        "AWS_REGION": "us-west-2",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "PGHOST": "db.example.org",
        "PGPORT": "5432",
        "PGPASSFILE": str(tmp_path / "pgpass"),
    }


def once(environment: dict[str, str]) -> str:
    done = subprocess.run(
        [sys.executable, SCRIPT, "once"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_new_password_replaces_the_old_one_and_is_told_to_nobody(
    aws_client: Callable[..., Any], environment: dict[str, str]
) -> None:
    secrets = aws_client("secretsmanager")
    password = r"a:b\c%d"  # noqa: S105
    made = secrets.create_secret(Name="rds-jobs", SecretString=json.dumps({"username": "jobs", "password": password}))
    environment["DATABASE_SECRET"] = made["ARN"]
    assert once(environment) == "database_password: written\n"
    path = Path(environment["PGPASSFILE"])
    assert path.read_text() == "db.example.org:5432:*:jobs:a\\:b\\\\c%d\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert once(environment) == "", "nothing new, nothing written"

    secrets.put_secret_value(SecretId="rds-jobs", SecretString=json.dumps({"username": "jobs", "password": "second"}))
    assert once(environment) == "database_password: written\n"
    assert path.read_text().endswith(":second\n")
    assert sorted(p.name for p in path.parent.glob("pgpass*")) == ["pgpass"]


def test_while_aws_is_away_the_file_stays(aws_client: Callable[..., Any], environment: dict[str, str]) -> None:
    path = Path(environment["PGPASSFILE"])
    path.write_text("as it was")
    environment["DATABASE_SECRET"] = "arn:aws:secretsmanager:us-west-2:123456789012:secret:absent"  # noqa: S105
    assert "tried again in 5 s" in once(environment)
    assert path.read_text() == "as it was"
