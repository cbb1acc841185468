from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any

import pytest
from hammer import RESULT, Hammer, new_job, pass_time

from serve.housekeeping import created_at
from serve.jobs import JobState, JobStore, KeyReused, Progress, new_job_id


@pytest.fixture
def store(database_url: str) -> Iterator[JobStore]:
    with closing(JobStore(database_url)) as opened:
        yield opened


def _finish(store: JobStore, job: Any, owner: str = "r") -> bool:
    done = {"result": RESULT, "model_version": "m/3", "manifest_digest": "sha256:a", "device_seconds": 2.5}
    return store.finish(job.id, owner, job.attempt, **done)


def _claim(store: JobStore, owner: str = "r", **settings: Any) -> list[Any]:
    return store.claim(owner, **{"lease_s": 1e6, "max_megapixels": 1e6, "max_jobs": 1, **settings})


def test_an_accepted_job_is_there_as_it_was_sent(store: JobStore, database_url: str) -> None:
    new = new_job(request={"prompt": "\u00e4 \u732b \U0001f408", "num_inference_steps": 7}, webhook_url="https://x.y/")
    job, is_new = store.submit(new)
    assert is_new
    assert (job.state, job.phase, job.step, job.num_steps, job.attempt) == (JobState.QUEUED, "queued", 0, 7, 0)
    told = {name: getattr(job, name) for name in vars(new)}
    assert told == {**vars(new), "submitted_at": job.submitted_at, "expires_at": job.expires_at}
    assert job.submitted_at == pytest.approx(time.time(), abs=5)
    assert job.expires_at - job.submitted_at == pytest.approx(3600)
    with closing(JobStore(database_url)) as other:
        assert other.get(job.id, None) == other.get(job.id, "anybody") == job
        assert other.watch([job.id, "unknown"]) == {job.id: job}
        assert other.find("anybody", "none") is None


def test_a_gateway_whose_clock_is_wrong_shortens_no_job(store: JobStore) -> None:
    job, _ = store.submit(new_job(submitted_at=1000.0, expires_at=1060.0))
    assert job.submitted_at == pytest.approx(time.time(), abs=5)
    assert job.expires_at - job.submitted_at == pytest.approx(60)


def test_one_idempotency_key_makes_one_job(store: JobStore) -> None:
    first, is_new = store.submit(new_job(idempotency_key="k"))
    again, is_new_again = store.submit(new_job(idempotency_key="k"))
    assert (is_new, is_new_again, again) == (True, False, first)
    assert store.find("anybody", "k") == first
    with pytest.raises(KeyReused):
        store.submit(new_job(idempotency_key="k", request_digest="e" * 64))
    assert store.submit(new_job(idempotency_key="k", key_id="other"))[1]
    assert store.submit(new_job())[1]
    assert store.submit(new_job())[1], "without a key every request makes a job"
    store.forget(first.id)
    assert store.submit(new_job(idempotency_key="k", request_digest="e" * 64))[1], "the first one has expired"


def test_processes_that_send_the_same_keys_make_each_job_once(store: JobStore, database_url: str) -> None:
    hammers = [Hammer(database_url, "submit", "40") for _ in range(4)]
    made = [hammer.result() for hammer in hammers]
    assert all(jobs.keys() == made[0].keys() for jobs in made)
    assert len(made[0]) == 40
    assert sum(sum(jobs.values()) for jobs in made) == 40
    assert store.backlog().num_queued == 40


def test_a_key_sees_its_jobs_and_no_others(store: JobStore) -> None:
    job, _ = store.submit(new_job(key_id="a"))
    assert store.get(job.id, "b") is None
    assert store.request_cancel(job.id, "b") is None
    assert store.list("b") == []
    assert store.get(job.id, "a") == job
    assert store.get("unknown", None) is None
    assert store.request_cancel("unknown", None) is None


def test_jobs_are_listed_newest_first_by_state_and_page(store: JobStore) -> None:
    jobs = [store.submit(new_job(key_id="a"))[0] for _ in range(5)]
    newest_first = [job.id for job in reversed(jobs)]
    assert [job.id for job in store.list("a")] == newest_first
    assert [job.id for job in store.list("a", limit=2)] == newest_first[:2]
    assert [job.id for job in store.list("a", limit=2, before=newest_first[1])] == newest_first[2:4]
    store.request_cancel(jobs[2].id, "a")
    assert [job.id for job in store.list("a", state=JobState.CANCELLED)] == [jobs[2].id]
    assert len(store.list("a", state=JobState.QUEUED)) == 4


def test_the_queue_is_ordered_by_priority_then_age(store: JobStore) -> None:
    slow, first, second, urgent = (store.submit(new_job(priority=priority))[0].id for priority in (1, 5, 5, 9))
    assert store.queue_position([slow, first, second, urgent, "x"]) == {urgent: 0, first: 1, second: 2, slow: 3}
    assert store.queue_position([second]) == {second: 2}
    assert [_claim(store)[0].id for _ in range(4)] == [urgent, first, second, slow]
    assert store.queue_position([urgent, slow]) == {}


def test_a_waiting_job_is_cancelled_at_once_and_a_running_one_is_flagged(store: JobStore) -> None:
    waiting, running = (store.submit(new_job(priority=priority, key_id="a"))[0] for priority in (1, 9))
    _claim(store)
    after = store.request_cancel(waiting.id, "a")
    assert after is not None
    assert (after.state, after.phase, after.cancel_requested) == (JobState.CANCELLED, "cancelled", True)
    assert store.request_cancel(waiting.id, "a") == after
    flagged = store.request_cancel(running.id, "a")
    assert flagged is not None
    assert (flagged.state, flagged.cancel_requested) == (JobState.RUNNING, True)
    assert store.heartbeat("r", [], 60).cancelled == {running.id}
    assert store.heartbeat("other", [], 60).cancelled == set()
    assert store.cancelled(running.id, "r", 1)
    assert store.get(running.id, None).state is JobState.CANCELLED  # type: ignore[union-attr]
    assert _claim(store) == []


def test_a_job_whose_replica_is_gone_is_cancelled_at_once(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    _claim(store, lease_s=10)
    pass_time(store, 20)
    after = store.request_cancel(job.id, None)
    assert after is not None
    assert after.state is JobState.CANCELLED
    assert not store.cancelled(job.id, "r", 2)


def test_what_has_ended_cannot_be_cancelled(store: JobStore) -> None:
    store.submit(new_job())
    (job,) = _claim(store)
    assert _finish(store, job)
    assert store.request_cancel(job.id, None) == store.get(job.id, None)
    assert store.get(job.id, None).state is JobState.DONE  # type: ignore[union-attr]


def test_the_backlog_is_what_has_not_ended(store: JobStore) -> None:
    assert vars(store.backlog()) == {
        "num_queued": 0, "num_running": 0, "megapixels": 0.0, "work": 0.0, "oldest_queued_s": 0.0,
    }  # fmt: skip
    for priority, key_id, megapixels in ((9, "a", 2.0), (5, "a", 1.0), (5, "b", 4.0), (1, "b", 8.0)):
        store.submit(new_job(priority=priority, key_id=key_id, megapixels=megapixels, work=20 * megapixels))
    pass_time(store, 50)
    (running,) = _claim(store)
    store.heartbeat("r", [Progress(running.id, 1, "denoise", 15, 20, None, 0)], 60)
    backlog = store.backlog()
    assert (backlog.num_queued, backlog.num_running, backlog.megapixels) == (3, 1, 15.0)
    assert backlog.work == pytest.approx(2.0 * 5 + 20 * 13)
    assert 50 <= backlog.oldest_queued_s < 70
    assert (store.backlog("a").num_queued, store.backlog("a").megapixels) == (1, 3.0)
    assert (store.backlog("b").num_queued, store.backlog("b").num_running) == (2, 0)
    _finish(store, running)
    assert store.backlog().megapixels == 13.0


def test_a_job_expires_when_it_has_ended_and_stays_its_time_from_then_on(store: JobStore) -> None:
    now_s = time.time()
    store.submit(new_job(submitted_at=now_s, expires_at=now_s + 200))
    (job,) = _claim(store)
    pass_time(store, 250)
    assert store.expired() == []
    assert store.end_overdue() == 0, "somebody works on it"
    assert _finish(store, job)
    assert store.expired() == []
    pass_time(store, 250)
    (expired,) = store.expired()
    assert (expired.id, expired.state) == (job.id, JobState.DONE)
    store.forget(job.id)
    assert store.expired() == []
    assert store.get(job.id, None) is None


def test_a_job_nobody_works_off_in_its_time_fails_and_is_told(store: JobStore) -> None:
    now_s = time.time()
    times: dict[str, Any] = {"submitted_at": now_s, "expires_at": now_s + 200, "webhook_url": "https://x.example.com/"}
    lost_id, waiting_id = (store.submit(new_job(priority=priority, **times))[0].id for priority in (9, 1))
    lasting, _ = store.submit(new_job(priority=0))
    (lost,) = _claim(store, "dead", lease_s=50)
    assert store.end_overdue() == 0
    pass_time(store, 250)
    assert store.expired() == []
    assert store.end_overdue(limit=1) == 1
    assert store.end_overdue() == 1
    assert not _finish(store, lost, "dead")
    found = store.watch([lost_id, waiting_id, lasting.id])
    assert {job.id for job in found.values() if job.state is JobState.FAILED} == {lost_id, waiting_id}
    assert found[waiting_id].problem is not None
    assert found[waiting_id].problem["type"] == "urn:faithdiff:problem:waited-too-long"
    assert {webhook.job_id for webhook in store.due_webhooks("g", 60, 10)} == {lost_id, waiting_id}
    pass_time(store, 250)
    assert {job.id for job in store.expired()} == {lost_id, waiting_id}
    assert len(store.expired(limit=1)) == 1
    assert [job.id for job in _claim(store, max_jobs=9)] == [lasting.id]


def test_ids_sort_by_the_time_they_were_made() -> None:
    ids = [new_job_id() for _ in range(20_000)]
    assert ids == sorted(set(ids))
    parsed = uuid.UUID(ids[-1])
    assert (parsed.version, parsed.variant) == (7, uuid.RFC_4122)
    assert created_at(ids[-1]) == pytest.approx(time.time(), abs=1)


def test_a_job_can_be_changed_for_the_eye(store: JobStore) -> None:
    job, _ = store.submit(new_job())
    assert replace(job, state=JobState.EXPIRED).id == job.id


def test_a_process_killed_in_the_middle_of_a_change_leaves_nothing_behind(store: JobStore, database_url: str) -> None:
    before = [store.submit(new_job())[0] for _ in range(3)]
    Hammer(database_url, "write_and_wait").kill_when_ready()
    assert store.watch([job.id for job in before]) == {job.id: job for job in before}
    started_s = time.monotonic()
    assert store.submit(new_job())[1]
    assert len(_claim(store, max_jobs=9)) == 4
    assert time.monotonic() - started_s < 20, "its locks went with it"


def test_a_database_server_that_crashes_loses_nothing_it_has_confirmed(postgres: Any) -> None:
    with closing(JobStore(postgres.new_database())) as store:
        jobs = [store.submit(new_job())[0] for _ in range(3)]
        (running,) = _claim(store)
        postgres.restart()
        assert len(store.watch([job.id for job in jobs])) == 3, "connections that broke are replaced"
        assert _finish(store, running)
        assert store.backlog().num_queued == 2
