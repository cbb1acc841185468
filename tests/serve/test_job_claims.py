from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from hammer import RESULT, Hammer, new_job, pass_time

from serve.jobs import JobState, JobStore, Progress


@pytest.fixture
def store(database_url: str) -> Iterator[JobStore]:
    with closing(JobStore(database_url)) as opened:
        yield opened


def _claim(store: JobStore, owner: str = "r", **settings: Any) -> list[Any]:
    return store.claim(owner, **{"lease_s": 1e6, "max_megapixels": 1e6, "max_jobs": 1, **settings})


def _finish(store: JobStore, job: Any, owner: str = "r", attempt: int | None = None) -> bool:
    done = {"result": RESULT, "model_version": "m/3", "manifest_digest": "sha256:a", "device_seconds": 2.5}
    return store.finish(job.id, owner, attempt or job.attempt, **done)


def _state(store: JobStore, job: Any) -> JobState:
    found = store.get(job.id, None)
    assert found is not None
    return found.state


def _lose(store: JobStore, owner: str = "dead") -> Any:
    """A job whose replica is not heard of any more."""
    (job,) = _claim(store, owner, lease_s=20)
    pass_time(store, 40)
    return job


def test_a_claimed_job_runs_and_is_done(store: JobStore) -> None:
    new, _ = store.submit(new_job())
    (job,) = _claim(store)
    assert (job.id, job.state, job.attempt, job.num_lost_attempts) == (new.id, JobState.RUNNING, 1, 0)
    assert new.submitted_at <= job.started_at
    assert _claim(store, "other") == []
    assert _finish(store, job)
    done = store.get(job.id, None)
    assert done is not None
    assert (done.state, done.phase, done.step, done.result) == (JobState.DONE, "done", 20, RESULT)
    assert (done.model_version, done.manifest_digest, done.device_seconds) == ("m/3", "sha256:a", 2.5)
    assert done.ended_at is not None
    assert done.ended_at >= job.started_at
    assert store.due_webhooks("g", 60, 10) == []


def test_progress_is_told_and_the_preview_stays_until_there_is_a_newer_one(store: JobStore) -> None:
    for _ in range(2):
        store.submit(new_job())
    first, second = _claim(store, max_jobs=2)
    told = [
        Progress(first.id, 1, "denoise", 3, 25, b"webp", 3),
        Progress(second.id, 1, "encode", 0, 20, None, 0),
    ]
    beat = store.heartbeat("r", told, 60)
    assert (beat.cancelled, beat.lost) == (set(), set())
    found = store.get(first.id, None)
    assert found is not None
    assert (found.phase, found.step, found.num_steps, found.preview, found.preview_step) == (
        "denoise", 3, 25, b"webp", 3,
    )  # fmt: skip
    store.heartbeat("r", [Progress(first.id, 1, "decode", 25, 25, None, 0)], 60)
    found = store.get(first.id, None)
    assert found is not None
    assert (found.phase, found.step, found.preview, found.preview_step) == ("decode", 25, b"webp", 3)
    _finish(store, first)
    assert store.get(first.id, None).preview is None  # type: ignore[union-attr]


def test_a_job_without_a_sign_of_life_is_taken_over_and_the_late_attempt_is_not_heard(store: JobStore) -> None:
    store.submit(new_job())
    lost = _lose(store)
    (job,) = _claim(store, "next")
    assert (job.id, job.attempt, job.num_lost_attempts, job.step) == (lost.id, 2, 1, 0)
    assert job.started_at == lost.started_at
    late = [Progress(lost.id, 1, "denoise", 9, 20, b"late", 9)]
    beat = store.heartbeat("dead", late, 60)
    assert (beat.lost, beat.cancelled) == ({lost.id}, set())
    assert not _finish(store, lost, "dead")
    assert not store.fail(lost.id, "dead", 1, {})
    assert not store.cancelled(lost.id, "dead", 1)
    assert not store.release(lost.id, "dead", 1)
    assert not _finish(store, job, "next", attempt=1)
    assert store.get(job.id, None) == job, "nothing of it was heard"
    assert _finish(store, job, "next")


def test_heartbeats_keep_a_job(store: JobStore) -> None:
    store.submit(new_job())
    (job,) = _claim(store, lease_s=400)
    for _ in range(6):
        pass_time(store, 100)
        assert store.heartbeat("r", [Progress(job.id, 1, "denoise", 1, 20, None, 0)], 400).lost == set()
        assert _claim(store, "other") == []
    pass_time(store, 500)
    assert len(_claim(store, "other")) == 1


def test_a_job_its_replica_has_not_heard_of_is_not_kept_by_its_signs_of_life(store: JobStore) -> None:
    store.submit(new_job())
    (job,) = _claim(store, lease_s=50)  # the answer is lost on its way
    store.heartbeat("r", [], 60)
    pass_time(store, 100)
    assert [taken.id for taken in _claim(store, "other")] == [job.id]


def test_a_late_sign_of_life_keeps_what_nobody_has_taken(store: JobStore) -> None:
    store.submit(new_job())
    job = _lose(store, "r")
    assert store.heartbeat("r", [Progress(job.id, 1, "denoise", 1, 20, None, 0)], 60).lost == set()
    assert _claim(store, "other") == []


def test_an_end_is_heard_once_but_may_be_said_again(store: JobStore) -> None:
    store.submit(new_job(webhook_url="https://hooks.example.com/"))
    (job,) = _claim(store)
    assert _finish(store, job)
    ended = store.get(job.id, None)
    assert _finish(store, job), "the first answer may have been lost"
    assert not store.fail(job.id, "r", 1, {"type": "x"})
    assert not store.cancelled(job.id, "r", 1)
    assert not store.release(job.id, "r", 1)
    assert store.heartbeat("r", [Progress(job.id, 1, "denoise", 1, 20, None, 0)], 60).lost == {job.id}
    assert store.get(job.id, None) == ended
    assert len(store.due_webhooks("g", 60, 10)) == 1


def test_a_failure_is_told_with_its_problem(store: JobStore) -> None:
    store.submit(new_job())
    (job,) = _claim(store)
    assert store.fail(job.id, "r", 1, {"type": "urn:faithdiff:problem:x", "detail": "no"})
    found = store.get(job.id, None)
    assert found is not None
    assert (found.state, found.problem) == (JobState.FAILED, {"type": "urn:faithdiff:problem:x", "detail": "no"})


def test_a_job_given_back_keeps_its_place_and_is_not_counted_as_lost(store: JobStore) -> None:
    first, second = (store.submit(new_job())[0] for _ in range(2))
    for attempt in range(1, 8):
        (job,) = _claim(store)
        assert (job.id, job.attempt, job.num_lost_attempts) == (first.id, attempt, 0)
        assert store.release(job.id, "r", attempt)
        assert not store.release(job.id, "r", attempt)
        assert not _finish(store, job)
        assert store.queue_position([first.id, second.id]) == {first.id: 0, second.id: 1}
        assert store.get(first.id, None).phase == "queued"  # type: ignore[union-attr]


def test_a_job_given_back_that_was_to_be_cancelled_ends(store: JobStore) -> None:
    store.submit(new_job(webhook_url="https://hooks.example.com/"))
    (job,) = _claim(store)
    store.request_cancel(job.id, None)
    assert store.release(job.id, "r", 1)
    assert _state(store, job) is JobState.CANCELLED
    assert len(store.due_webhooks("g", 60, 10)) == 1


def test_a_job_that_was_to_be_cancelled_ends_with_its_lost_replica(store: JobStore) -> None:
    store.submit(new_job())
    (job,) = _claim(store, "dead", lease_s=100)
    store.request_cancel(job.id, None)
    assert _state(store, job) is JobState.RUNNING
    pass_time(store, 150)
    assert _claim(store) == []
    assert _state(store, job) is JobState.CANCELLED


def test_a_job_that_replicas_do_not_survive_is_failed(database_url: str) -> None:
    with closing(JobStore(database_url, max_lost_attempts=3)) as store:
        store.submit(new_job(webhook_url="https://hooks.example.com/"))
        (job,) = _claim(store)
        store.release(job.id, "r", 1)  # not a loss
        for num_lost in range(3):
            assert _lose(store).num_lost_attempts == num_lost
        assert _claim(store) == []
        found = store.get(job.id, None)
        assert found is not None
        assert (found.state, found.num_lost_attempts) == (JobState.FAILED, 3)
        assert found.problem is not None
        assert found.problem["type"] == "urn:faithdiff:problem:replicas-lost"
        assert found.problem["instance"] == f"/v1/jobs/{job.id}"
        assert "3 replicas were lost" in found.problem["detail"]
        assert not _finish(store, job, "dead", attempt=4)
        assert len(store.due_webhooks("g", 60, 10)) == 1


def test_jobs_of_lost_replicas_come_first(store: JobStore) -> None:
    store.submit(new_job(priority=3))
    lost = _lose(store)
    urgent, _ = store.submit(new_job(priority=9))
    assert [job.id for job in _claim(store, max_jobs=2)] == [lost.id, urgent.id]


def test_claims_keep_to_the_room_of_the_replica(store: JobStore) -> None:
    sizes = (1.0, 5.0, 2.0, 0.5, 4.0)
    ids = [store.submit(new_job(megapixels=megapixels))[0].id for megapixels in sizes]
    assert [job.id for job in _claim(store, max_megapixels=4.0, max_jobs=4)] == [ids[0], ids[2], ids[3]]
    assert _claim(store, max_megapixels=3.9) == []
    assert [job.id for job in _claim(store, "large", max_megapixels=9.0, max_jobs=4)] == [ids[1], ids[4]]


def test_a_large_job_blocks_nobody_until_it_has_waited_long_enough_and_then_one_replica_makes_room(
    database_url: str,
) -> None:
    with closing(JobStore(database_url, patience_s=300)) as store:
        small = [store.submit(new_job(megapixels=2.0))[0]]
        assert [job.id for job in _claim(store, "a", max_megapixels=10.0)] == [small[0].id]
        assert _claim(store, "b", max_megapixels=10.0) == []
        large, _ = store.submit(new_job(megapixels=9.0))
        later = [store.submit(new_job(megapixels=2.0))[0].id for _ in range(4)]
        urgent, _ = store.submit(new_job(megapixels=2.0, priority=9))
        assert [job.id for job in _claim(store, "a", max_megapixels=8.0)] == [urgent.id]
        assert [job.id for job in _claim(store, "a", max_megapixels=6.0)] == [later[0]], "it is passed over"
        pass_time(store, 350)
        assert _claim(store, "a", max_megapixels=4.0) == [], "a keeps its room for it"
        assert [job.id for job in _claim(store, "b", max_megapixels=8.0)] == [later[1]], "b need not, too"
        assert [job.id for job in _claim(store, "tiny", max_megapixels=2.0)] == [later[2]], "it never fits there"
        more_urgent, _ = store.submit(new_job(megapixels=2.0, priority=9))
        assert [job.id for job in _claim(store, "a", max_megapixels=4.0)] == [more_urgent.id]
        assert [job.id for job in _claim(store, "a", max_megapixels=9.0)] == [large.id]
        assert [job.id for job in _claim(store, "a", max_megapixels=4.0)] == [later[3]]


def test_room_kept_by_a_replica_that_is_gone_is_kept_by_another(database_url: str) -> None:
    with closing(JobStore(database_url, patience_s=0.0)) as store:
        for owner in ("a", "b"):
            store.submit(new_job(megapixels=2.0))
            assert len(_claim(store, owner, max_megapixels=10.0)) == 1
        store.submit(new_job(megapixels=9.0, priority=1))
        waiting, _ = store.submit(new_job(megapixels=2.0, priority=0))
        pass_time(store, 10)
        assert _claim(store, "a", max_megapixels=8.0, lease_s=200) == []
        assert [job.id for job in _claim(store, "b", max_megapixels=8.0)] == [waiting.id]
        store.submit(new_job(megapixels=2.0, priority=0))
        pass_time(store, 250)
        assert _claim(store, "b", max_megapixels=6.0) == []


def test_a_job_that_fits_nowhere_any_more_blocks_nobody(database_url: str) -> None:
    with closing(JobStore(database_url, patience_s=0.0)) as store:
        store.submit(new_job(megapixels=2.0))
        (job,) = _claim(store, max_megapixels=10.0)
        store.submit(new_job(megapixels=9.0))
        small, _ = store.submit(new_job(megapixels=2.0))
        pass_time(store, 10)
        assert _claim(store, max_megapixels=6.0) == [], "room is kept for the large one"
        assert _finish(store, job)
        assert [job.id for job in _claim(store, max_megapixels=7.0)] == [small.id], "more room there is not"


def test_many_replicas_at_once_end_every_job_once(store: JobStore, database_url: str) -> None:
    new = [new_job(priority=i % 3, megapixels=1 + i % 3, webhook_url="https://hooks.example.com/") for i in range(60)]
    ids = [store.submit(one)[0].id for one in new]
    killed = [Hammer(database_url, "vanish", f"dead-{i}") for i in range(2)]
    for hammer in killed:
        hammer.kill_when_ready()
    hammers = [Hammer(database_url, "work", f"replica-{i}") for i in range(4)]
    ended = Counter(job_id for hammer in hammers for job_id in hammer.result())
    assert ended == Counter(ids)
    found = store.watch(ids)
    assert {job.state for job in found.values()} == {JobState.DONE, JobState.FAILED}
    assert sum(job.num_lost_attempts for job in found.values()) == 2
    tellers = [Hammer(database_url, "webhooks", f"gateway-{i}") for i in range(3)]
    told = [webhook_id for teller in tellers for webhook_id in teller.result()]
    assert len(told) == len(set(told)) == 60
