"""Keeps PGPASSFILE true: the password that AWS made, and makes anew every week, as libpq reads it for every connection.

    python infra/images/database_password.py [once]

In : PGHOST, PGPORT, PGUSER, PGPASSFILE, and DATABASE_SECRET, the ARN of a secret of RDS.
Out: the file, readable by this user alone, written again within five minutes of a new password.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError, ClientError

_LOOK_EVERY_S = 300
_RETRY_AFTER_S = 5


def pgpass_line(secret: str) -> str:
    """A line of the file for any database of the host. A colon or backslash in a field is escaped."""
    known = json.loads(secret)
    fields = [os.environ["PGHOST"], os.environ["PGPORT"], "*", known["username"], known["password"]]
    return ":".join(field if field == "*" else _escaped(str(field)) for field in fields) + "\n"


def write_password(client: object) -> bool:
    """Whether there was a new one to write."""
    secret = client.get_secret_value(SecretId=os.environ["DATABASE_SECRET"])["SecretString"]  # type: ignore[attr-defined]
    path, line = Path(os.environ["PGPASSFILE"]), pgpass_line(secret)
    if path.exists() and path.read_text() == line:
        return False
    # libpq must never meet half a file, and ignores one that others may read.
    new = path.with_suffix(".new")
    new.touch(mode=0o600)
    new.chmod(0o600)
    new.write_text(line)
    new.replace(path)
    return True


def _escaped(field: str) -> str:
    return field.replace("\\", "\\\\").replace(":", "\\:")


def main(once: bool) -> None:
    client = boto3.client("secretsmanager", region_name=os.environ["AWS_REGION"])
    while True:
        wait_s = _LOOK_EVERY_S
        try:
            if write_password(client):
                print("database_password: written", flush=True)
        except (BotoCoreError, ClientError) as error:
            # The file that is there stays good until the next change; without one, the pod is not ready yet.
            print(f"database_password: {type(error).__name__}; tried again in {_RETRY_AFTER_S} s", flush=True)
            wait_s = _RETRY_AFTER_S
        if once:
            return
        time.sleep(wait_s)


if __name__ == "__main__":
    main(once="once" in sys.argv[1:])
