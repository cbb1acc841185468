"""One job per folder: marks of living, killed and frozen processes, in local folders and on a real S3 server."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sr_platform import ownership
from sr_platform.errors import InputDataError, RequestError, StorageError
from sr_platform.ownership import OWNER_NAME, Mark, owned
from sr_platform.storage import Storage, open_storage

JOB = """
import sys, time
from sr_platform import ownership
ownership.REFRESH_S, ownership._SETTLE_S = 0.2, 0.05
with ownership.owned(sys.argv[1]):
    print("mine", flush=True)
    time.sleep(100)
"""


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"REFRESH_S": 0.2, "WATCH_S": 1.0, "_LOOK_S": 0.05, "_SETTLE_S": 0.05}.items():
        monkeypatch.setattr(ownership, name, seconds)


@pytest.fixture(params=["local", "s3"])
def uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "out") if request.param == "local" else f"{request.getfixturevalue('s3_uri')}/out"


@pytest.fixture
def other_job() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Starts a process that owns a folder, and returns once it does."""
    running = []

    def start(uri: str) -> subprocess.Popen[str]:
        job = subprocess.Popen(
            [sys.executable, "-c", JOB, uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        running.append(job)
        assert job.stdout is not None
        assert job.stdout.readline() == "mine\n"
        return job

    yield start
    for job in running:
        job.kill()
        job.communicate()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process is on another machine than those it starts."""
    monkeypatch.setattr(ownership, "_machine", lambda: "another")


def mark_in(uri: str) -> Mark:
    return Mark.model_validate_json(open_storage(uri).read_bytes(OWNER_NAME))


def test_the_mark_names_its_process_stays_fresh_and_goes_with_the_block(uri: str) -> None:
    with owned(uri):
        first = mark_in(uri)
        assert (first.pid, first.host) == (os.getpid(), os.uname().nodename)
        time.sleep(0.6)
        assert mark_in(uri).refreshed > first.refreshed
    assert open_storage(uri).list() == []
    assert "ownership" not in [thread.name for thread in threading.enumerate()]


def test_an_error_in_the_block_takes_the_mark_along(tmp_path: Path) -> None:
    with pytest.raises(KeyError), owned(str(tmp_path)):
        raise KeyError
    assert not (tmp_path / OWNER_NAME).exists()


def test_a_second_job_on_the_same_machine_is_refused_at_once(tmp_path: Path, other_job) -> None:
    job = other_job(str(tmp_path))
    started_s = time.perf_counter()
    with (
        pytest.raises(
            RequestError,
            match=rf"job: {tmp_path} is worked on by process {job.pid} on \S+ since .*; wait until it is done, stop",
        ),
        owned(str(tmp_path)),
    ):
        pytest.fail("two jobs at once")
    assert time.perf_counter() - started_s < 0.5
    assert mark_in(str(tmp_path)).pid == job.pid


def test_a_second_job_on_another_machine_is_refused_once_it_has_seen_the_first_alive(
    uri: str, other_job, elsewhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    job = other_job(uri)
    with pytest.raises(RequestError, match=f"process {job.pid} on "), owned(uri):
        pytest.fail("two jobs at once")
    assert "looking for 1 s whether it lives" in caplog.text


def test_a_killed_job_is_followed_at_once_on_its_own_machine(tmp_path: Path, other_job) -> None:
    job = other_job(str(tmp_path))
    job.send_signal(signal.SIGKILL)
    # It has ended, and is a zombie until somebody asks for its status.
    os.waitid(os.P_PID, job.pid, os.WEXITED | os.WNOWAIT)
    started_s = time.perf_counter()
    with owned(str(tmp_path)):
        assert time.perf_counter() - started_s < 0.5
        assert mark_in(str(tmp_path)).pid == os.getpid()


def test_a_job_killed_with_its_machine_is_followed_when_its_mark_stays_as_it_is(
    uri: str, other_job, elsewhere: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    job = other_job(uri)
    job.kill()
    job.wait()
    started_s = time.perf_counter()
    with owned(uri):
        assert 0.9 < time.perf_counter() - started_s < 5
    assert f"process {job.pid} on {os.uname().nodename} since " in caplog.text
    assert "is gone; taking over" in caplog.text


def test_the_end_of_the_other_job_is_noticed_while_it_is_watched(tmp_path: Path, elsewhere: None, monkeypatch) -> None:
    monkeypatch.setattr(ownership, "WATCH_S", 60.0)
    (tmp_path / OWNER_NAME).write_text(ownership._new_mark().model_copy(update={"machine": "third"}).model_dump_json())
    threading.Timer(0.3, (tmp_path / OWNER_NAME).unlink).start()
    with owned(str(tmp_path)):
        assert mark_in(str(tmp_path)).machine == "another"


def test_a_number_that_belongs_to_another_process_by_now_proves_nothing(tmp_path: Path, caplog) -> None:
    mark = ownership._new_mark()
    reused = mark.model_copy(update={"process_started": mark.process_started - 100})
    (tmp_path / OWNER_NAME).write_text(reused.model_dump_json())
    with owned(str(tmp_path)):
        assert "is gone; taking over" in caplog.text


def test_a_frozen_job_ends_when_it_wakes_up_and_another_one_has_taken_over(
    tmp_path: Path, other_job, elsewhere
) -> None:
    job = other_job(str(tmp_path))
    job.send_signal(signal.SIGSTOP)
    with owned(str(tmp_path)):
        job.send_signal(signal.SIGCONT)
        assert job.wait(10) == 1
        assert "was taken over by process" in job.communicate()[1]
        assert mark_in(str(tmp_path)).pid == os.getpid()


def test_of_two_jobs_that_start_together_one_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "_SETTLE_S", 0.3)
    both, outcomes = threading.Barrier(2), []

    def start() -> None:
        both.wait()
        try:
            with owned(str(tmp_path)):
                outcomes.append("works")
                time.sleep(1.0)
        except RequestError:
            outcomes.append("refused")

    threads = [threading.Thread(target=start) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["refused", "works"]


def test_a_storage_that_fails_for_a_while_does_not_stop_the_job(tmp_path: Path, monkeypatch, caplog) -> None:
    with owned(str(tmp_path)):
        with monkeypatch.context() as patch:
            patch.setattr(Storage, "write_bytes_atomic", lambda *_: (_ for _ in ()).throw(StorageError("down")))
            time.sleep(0.5)
        before = mark_in(str(tmp_path)).refreshed
        time.sleep(0.5)
        assert mark_in(str(tmp_path)).refreshed > before
    assert "could not be refreshed: down" in caplog.text
    assert not (tmp_path / OWNER_NAME).exists()


def test_a_spoiled_s3_server_keeps_the_mark(faulty_s3_uri: str) -> None:
    with owned(f"{faulty_s3_uri}/out"):
        time.sleep(1.0)
    assert open_storage(f"{faulty_s3_uri}/out").list() == []


def test_what_is_no_mark_is_named(tmp_path: Path) -> None:
    (tmp_path / OWNER_NAME).write_text(json.dumps({"owner": "me"}))
    with pytest.raises(InputDataError, match=f"{OWNER_NAME} is no mark of a job; delete it"), owned(str(tmp_path)):
        pytest.fail("not ours")
