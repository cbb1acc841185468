"""Programs that several processes run against one job database at the same time.

python tests/serve/hammer.py <what> <url> [argument ...]     prints what it has done as JSON
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import update

from serve.job_tables import jobs, leases
from serve.job_tables import webhooks as webhooks_table
from serve.jobs import JobStore, NewJob, Progress, ResultFile, new_job_id

RESULT = ResultFile("jobs/x/result-1", "image/png", 10, "0" * 64, (128, 96))

_TIMES = {
    jobs: ("submitted_at", "expires_at", "lease_until", "reserved_until"),
    leases: ("lease_until",),
    webhooks_table: ("due_at",),
}


def new_job(**changes: Any) -> NewJob:
    """A job that lasts an hour."""
    now_s, job_id = time.time(), changes.pop("id", None) or new_job_id()
    fields: dict[str, Any] = {
        "id": job_id, "key_id": "anybody", "idempotency_key": None, "request_digest": "d" * 64,
        "request": {"num_inference_steps": 20, "prompt": "A cat."}, "input_name": f"jobs/{job_id}/input",
        "input_size_px": (32, 24), "megapixels": 1.0, "num_tiles": 1, "work": 20.0, "estimated_s": 1.0, "priority": 5,
        "webhook_url": None, "trace_id": "a" * 32, "submitted_at": now_s, "expires_at": now_s + 3600,
    }  # fmt: skip
    return NewJob(**{**fields, **changes})


def pass_time(store: JobStore, seconds: float) -> None:
    """Everything in the database is so much older."""
    with store._writing() as transaction:
        for table, names in _TIMES.items():
            transaction.execute(update(table).values({name: table.c[name] - seconds for name in names}))


def submit(store: JobStore, num_keys: str) -> dict[str, bool]:
    """Every key once, in an order of its own; ids of jobs, and whether this process has made them."""
    keys = [f"key-{i}" for i in range(int(num_keys))]
    random.shuffle(keys)
    made = (store.submit(new_job(idempotency_key=key, webhook_url="https://hooks.example.com/")) for key in keys)
    return {job.id: is_new for job, is_new in made}


def work(store: JobStore, owner: str) -> list[str]:
    """Claims, goes on, gives back and finishes until nothing is left; ids of the jobs it has ended."""
    ended, dice, ends_s = [], random.Random(owner), time.monotonic() + 60  # noqa: S311
    while (backlog := store.backlog()).num_queued + backlog.num_running:
        assert time.monotonic() < ends_s
        for job in store.claim(owner, lease_s=60, max_megapixels=3.0, max_jobs=dice.randint(1, 4)):
            by = (job.id, owner, job.attempt)
            store.heartbeat(owner, [Progress(job.id, job.attempt, "denoise", 1, 20, b"preview", 1)], 60)
            if dice.random() < 0.2:
                assert store.release(*by)
            elif dice.random() < 0.2:
                ended += [job.id] * store.fail(*by, {"type": "urn:faithdiff:problem:test"})
            else:
                is_done = store.finish(
                    *by, result=RESULT, model_version="m/1", manifest_digest=None, device_seconds=1.0
                )
                ended += [job.id] * is_done
    return ended


def vanish(store: JobStore, owner: str) -> None:
    """Claims a job and is killed with it."""
    store.claim(owner, lease_s=0.5, max_megapixels=3.0, max_jobs=1)
    wait_for_the_end()


def write_and_wait(store: JobStore) -> None:
    """Has changed every job, and will be killed before it commits."""
    with store._writing() as transaction:
        transaction.execute(update(jobs).values(priority=0, state="failed"))
        wait_for_the_end()


def take(store: JobStore, key_id: str, num_requests: str) -> int:
    """Requests of one megapixel that were allowed."""
    return sum(store.take(key_id, 1.0).allowed for _ in range(int(num_requests)))


def lease(store: JobStore, owner: str) -> bool:
    return store.take_lease("house", owner, 60.0)


def webhooks(store: JobStore, owner: str) -> list[str]:
    """Ids of all that were due."""
    found: list[str] = []
    while due := store.due_webhooks(owner, 60.0, 3):
        found += [webhook.id for webhook in due]
    return found


def begin(store: JobStore) -> str:
    """Nothing but the opening of the store."""
    return store.submit(new_job())[0].id


def wait_for_the_end() -> None:
    print("ready", flush=True)
    time.sleep(60)


class Hammer:
    """`Hammer(url, "work", "a")` runs at once; `result()` waits for it."""

    def __init__(self, url: str, what: str, *arguments: str) -> None:
        command: Sequence[str] = [sys.executable, str(Path(__file__)), what, url, *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def result(self) -> Any:
        output, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 0, errors
        return json.loads(output)

    def kill_when_ready(self) -> None:
        """With SIGKILL."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"
        self.process.kill()
        self.process.communicate()


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](JobStore(sys.argv[2]), *sys.argv[3:])))
