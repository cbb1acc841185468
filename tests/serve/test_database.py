from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hammer import Hammer, new_job
from sqlalchemy.exc import OperationalError

from serve.job_tables import SCHEMA_VERSION, schema_version
from serve.jobs import JobStore
from sr_platform.errors import ConfigError


def test_processes_that_come_first_at_the_same_time_make_the_tables_once(database_url: str) -> None:
    hammers = [Hammer(database_url, "begin") for _ in range(6)]
    ids = {hammer.result() for hammer in hammers}
    with closing(JobStore(database_url)) as store:
        assert store.watch(list(ids)).keys() == ids
        assert len(ids) == 6


def test_a_database_of_a_newer_program_is_refused(database_url: str) -> None:
    with closing(JobStore(database_url)) as store, store._writing() as transaction:
        transaction.execute(schema_version.update().values(version=SCHEMA_VERSION + 1))
    with pytest.raises(
        ConfigError, match=rf"has tables of version {SCHEMA_VERSION + 1}.*update the program"
    ) as refused:
        JobStore(database_url)
    if "@" in database_url:
        assert database_url.split(":")[2].split("@")[0] not in str(refused.value)


def test_a_database_is_opened_again_as_it_is(database_url: str) -> None:
    with closing(JobStore(database_url)) as store:
        job, _ = store.submit(new_job())
    with closing(JobStore(database_url)) as store:
        assert store.get(job.id, None) == job


@pytest.mark.parametrize(("url", "says"), [
    ("mysql://me:hunter2@host/db", "kind 'mysql'"), ("sqlite://", "gone with its process"),
    ("sqlite:///:memory:", "gone with its process"), ("me:hunter2@host", "no URL"), ("", "no URL"),
])  # fmt: skip
def test_an_address_that_cannot_be_used_is_named_without_its_password(url: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        JobStore(url)
    assert "sqlite:///folder/jobs.db" in str(refused.value)
    assert "hunter2" not in str(refused.value)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be made"):
        JobStore(f"sqlite:///{tmp_path}/file/jobs.db")


def test_a_password_reaches_neither_the_name_nor_errors(postgres: Any) -> None:
    url = postgres.new_database()
    password = url.split(":")[2].split("@")[0]
    with closing(JobStore(url)) as store:
        assert password not in store.name
        assert "***" in store.name
    with pytest.raises(OperationalError) as refused:
        JobStore(url.replace(password, "wrong-word"))
    assert "wrong-word" not in str(refused.value)


def test_sqlite_keeps_a_write_ahead_log_so_that_readers_wait_for_nobody(tmp_path: Path) -> None:
    with closing(JobStore(f"sqlite:///{tmp_path}/jobs.db")) as store:
        job, _ = store.submit(new_job())
        with store._writing():
            assert store.get(job.id, None) == job
        with closing(sqlite3.connect(tmp_path / "jobs.db")) as connection:
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
