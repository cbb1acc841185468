from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy.exc

from serve.autoscaling import QueuedWork, wanted_replicas
from serve.jobs import JobStore, NewJob, new_job_id


def _submit(store: JobStore, megapixels: float, steps: int = 20) -> str:
    job_id, now_s = new_job_id(), time.time()
    store.submit(
        NewJob(
            id=job_id,
            key_id="anybody",
            idempotency_key=None,
            request_digest="0" * 64,
            request={},
            input_name=f"jobs/{job_id}/input",
            input_size_px=(10, 10),
            megapixels=megapixels,
            num_tiles=1,
            work=megapixels * steps,
            estimated_s=1.0,
            priority=5,
            webhook_url=None,
            trace_id="ab" * 16,
            expires_at=now_s + 600,
            submitted_at=now_s,
        )
    )
    return job_id


@pytest.fixture
def policy(store: JobStore, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> QueuedWork:
    monkeypatch.setattr("serve.autoscaling._LOOK_EVERY_S", 0.0)
    return QueuedWork(
        store_url=f"sqlite:///{tmp_path}/jobs.db", drain_s=10.0, megapixel_steps_per_s=4.0, megapixels_of_one=16.0
    )


def _wanted(policy: QueuedWork, *, open_requests: int = 0, now: int = 0) -> int:
    number, state = policy(SimpleNamespace(total_num_requests=open_requests, target_num_replicas=now))
    assert state == {}
    return number


def test_nothing_waits_and_nothing_is_wanted(policy: QueuedWork) -> None:
    assert _wanted(policy) == 0


def test_an_open_request_wants_a_replica(policy: QueuedWork) -> None:
    assert _wanted(policy, open_requests=3) == 1


def test_replicas_are_wanted_for_the_megapixels_that_wait(policy: QueuedWork, store: JobStore) -> None:
    """A replica that does 4 megapixel-steps in a second works 40 of them off in 10 seconds."""
    _submit(store, 1.0)
    assert _wanted(policy) == 1
    for _ in range(5):
        _submit(store, 1.0)
    assert _wanted(policy) == 3
    for _ in range(14):
        _submit(store, 1.0)
    assert _wanted(policy) == 10


def test_the_measured_rate_goes_before_the_assumed_one(policy: QueuedWork, store: JobStore) -> None:
    for _ in range(20):
        _submit(store, 1.0)
    store.report_replica("a", {"replica": "a", "megapixel_steps_per_s": 10.0})
    store.report_replica("b", {"replica": "b", "megapixel_steps_per_s": 30.0})
    store.report_replica("new", {"replica": "new", "megapixel_steps_per_s": None})
    assert _wanted(policy) == 2


def test_a_picture_that_is_spread_wants_several_replicas_and_a_small_one_never(
    policy: QueuedWork, store: JobStore
) -> None:
    _submit(store, 0.1, steps=100_000)
    assert _wanted(policy) == 1
    _submit(store, 40.0)
    assert _wanted(policy) == 4


def test_a_database_that_does_not_answer_leaves_the_number_as_it_is(
    policy: QueuedWork, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away(*_: Any) -> Any:
        raise sqlalchemy.exc.OperationalError("select", {}, Exception("away"))

    monkeypatch.setattr(JobStore, "backlog", away)
    with caplog.at_level(logging.ERROR):
        assert _wanted(policy, now=3) == 3
    assert "does not answer" in caplog.text


@pytest.mark.parametrize(("work", "most", "rate", "wanted"), [
    (0.0, 0, 1.0, 0), (0.0, 2, 1.0, 1), (100.0, 9, 1.0, 9), (100.0, 99, 1.0, 10), (101.0, 99, 1.0, 11),
])  # fmt: skip
def test_enough_to_work_off_what_waits_in_the_set_time(work: float, most: int, rate: float, wanted: int) -> None:
    assert wanted_replicas(work, most, rate, 10.0) == wanted
