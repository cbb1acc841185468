from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from hammer import Hammer, new_job, pass_time

from serve.jobs import JobStore, Webhook


@pytest.fixture
def store(database_url: str) -> Iterator[JobStore]:
    with closing(JobStore(database_url)) as opened:
        yield opened


def _ended(store: JobStore, num_jobs: int) -> list[str]:
    """Ids of jobs whose ends are to be told."""
    ids = [store.submit(new_job(webhook_url=f"https://hooks.example.com/{i}"))[0].id for i in range(num_jobs)]
    for job_id in ids:
        store.request_cancel(job_id, None)
    return ids


def test_replicas_are_those_that_have_reported_themselves_lately(store: JobStore) -> None:
    assert store.replicas() == []
    store.report_replica("b", {"megapixel_steps_per_s": 2.0, "tile_px": 512})
    store.report_replica("a", {"megapixel_steps_per_s": None})
    store.report_replica("b", {"megapixel_steps_per_s": 3.0, "tile_px": 512})
    assert store.replicas() == [{"megapixel_steps_per_s": None}, {"megapixel_steps_per_s": 3.0, "tile_px": 512}]
    assert len(store.replicas(time.time() + 20)) == 2
    assert store.replicas(time.time() + 60) == []
    store.withdraw_replica("a")
    assert len(store.replicas()) == 1


def test_a_lease_is_had_by_one_until_it_runs_out(store: JobStore) -> None:
    assert store.take_lease("house", "a", 300)
    assert not store.take_lease("house", "b", 60)
    assert store.take_lease("other", "b", 60)
    assert store.take_lease("house", "a", 100), "who has it may renew it"
    pass_time(store, 150)
    assert store.take_lease("house", "b", 60)
    assert not store.take_lease("house", "a", 60)


def test_of_many_processes_one_gets_the_lease(database_url: str) -> None:
    hammers = [Hammer(database_url, "lease", f"gateway-{i}") for i in range(5)]
    assert sum(hammer.result() for hammer in hammers) == 1


def test_the_end_of_a_job_is_told_by_one_gateway_at_a_time(store: JobStore) -> None:
    ids = _ended(store, 3)
    first, second = store.due_webhooks("a", 200, 2)
    assert [first.job_id, second.job_id] == ids[:2]
    assert (first.url, first.attempt) == ("https://hooks.example.com/0", 1)
    (third,) = store.due_webhooks("b", 6000, 10)
    assert third.job_id == ids[2]
    store.webhook_done(first.id)
    pass_time(store, 250)
    assert store.due_webhooks("b", 60, 10) == [Webhook(second.id, ids[1], second.url, 2)], "a is gone"
    store.webhook_done(third.id)


def test_a_webhook_that_was_not_heard_comes_again_in_time_or_never(store: JobStore) -> None:
    _ended(store, 2)
    first, second = store.due_webhooks("a", 60, 10)
    store.webhook_failed(first.id, time.time() + 200)
    store.webhook_failed(second.id, None)
    assert store.due_webhooks("a", 60, 10) == []
    pass_time(store, 250)
    assert store.due_webhooks("a", 60, 10) == [Webhook(first.id, first.job_id, first.url, 2)]


def test_webhooks_go_with_their_jobs(store: JobStore) -> None:
    (job_id,) = _ended(store, 1)
    store.forget(job_id)
    assert store.due_webhooks("a", 60, 10) == []
