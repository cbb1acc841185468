"""The job database: one address, transactions for reading and for writing, and one clock.

SQLite, for the processes of one machine: write-ahead log, so that nobody who reads waits for one who writes, and
writers one after the other (BEGIN IMMEDIATE). PostgreSQL, for those of many machines: rows are locked one by one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, func, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from serve.job_tables import SCHEMA_VERSION, make_tables, version_of
from sr_platform.errors import ConfigError

_FORMS = "give sqlite:///folder/jobs.db or postgresql://user:password@host/database"
_WAIT_FOR_LOCK_S = 30.0
# So long a replica may not see a job, nor its owner that it is done. A look takes 5 microseconds, but whoever wakes up
# for it so often uses 3 % of a core.
_LOOK_EVERY_S = 0.003
_CHANNEL = "faithdiff"
# Whoever listens ends so long after it was told to, at most.
_LISTEN_S = 0.5
# Connections of a process are opened as they are needed; a server has a hundred of them for everybody, as a rule.
_POOL = {"pool_size": 4, "max_overflow": 12, "pool_timeout": 30.0}


class Database:
    """Tables are made when they are not there; any number of processes may come first.

    Raises:
        ConfigError: an address that cannot be used, or a database of a newer program.
    """

    def __init__(self, url: str) -> None:
        parsed = _parsed(url)
        self.name = parsed.render_as_string(hide_password=True)
        self._engine = _sqlite_engine(parsed) if parsed.get_backend_name() == "sqlite" else _postgres_engine(parsed)
        with self._reading() as transaction:
            is_ready = version_of(transaction) == SCHEMA_VERSION
        if not is_ready:
            with self._writing() as transaction:
                make_tables(transaction, database=self.name)

    def close(self) -> None:
        """Closes all connections. Whoever asks again opens new ones."""
        self._engine.dispose()

    def changes(self, ended: threading.Event) -> Iterator[None]:
        """Yields once, and again soon after every commit of whomsoever, until `ended`; several may be one."""
        pooled = self._engine.raw_connection()
        connection = pooled.driver_connection
        # It never goes back: it is closed with its end.
        pooled.detach()
        try:
            yield
            is_sqlite = self._engine.dialect.name == "sqlite"
            yield from (_sqlite_changes if is_sqlite else _postgres_changes)(connection, ended)
        finally:
            pooled.close()

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        """A transaction that waits for nobody."""
        with self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def _writing(self) -> Iterator[Connection]:
        """A transaction that is committed at the end of the block, or leaves nothing behind."""
        with self._engine.connect().execution_options(is_writing=True) as connection, connection.begin():
            yield connection
            if connection.dialect.name == "postgresql":
                connection.exec_driver_sql(f"NOTIFY {_CHANNEL}")


def now_of(transaction: Connection) -> float:
    """Seconds since the epoch. Leases of many machines are measured by one clock, that of the database."""
    if transaction.dialect.name == "sqlite":
        return time.time()
    return float(transaction.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())


def insert_of(transaction: Connection) -> Callable[..., Any]:
    """`insert` of the dialect, which knows ON CONFLICT."""
    return sqlite.insert if transaction.dialect.name == "sqlite" else postgresql.insert


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        # Without the text, which may hold a password.
        raise ConfigError(f"store: the address of the job database is no URL; {_FORMS}") from None
    if parsed.drivername in ("postgres", "postgresql"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.drivername not in ("sqlite", "sqlite+pysqlite", "postgresql+psycopg"):
        raise ConfigError(f"store: got a database of kind {parsed.drivername!r}; {_FORMS}")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ConfigError(f"store: got {url!r}, which is gone with its process; {_FORMS}")
    return parsed


def _sqlite_engine(url: URL) -> Engine:
    path = Path(url.database or "").expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"store: the folder of {path} cannot be made: {error.strerror}; give another") from error
    # Without an isolation level Python leaves transactions to us.
    connect_args = {"timeout": _WAIT_FOR_LOCK_S, "isolation_level": None, "check_same_thread": False}
    engine = create_engine(url.set(database=str(path)), connect_args=connect_args, **_POOL)
    event.listen(engine, "connect", _prepare_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA foreign_keys = ON")
    ends_s = time.monotonic() + _WAIT_FOR_LOCK_S
    while True:
        # The mode stays with the file; while it is being changed SQLite refuses everybody else at once.
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except connection.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > ends_s:
                raise
            time.sleep(0.01)
        else:
            assert mode == "wal", f"SQLite keeps a journal of kind {mode}"
            return


def _begin_sqlite(connection: Connection) -> None:
    is_writing = connection.get_execution_options().get("is_writing", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")


def _sqlite_changes(connection: Any, ended: threading.Event) -> Iterator[None]:
    """SQLite tells nobody, but whether another connection has committed is known without reading anything."""
    seen = None
    while not ended.wait(_LOOK_EVERY_S):
        version = connection.execute("PRAGMA data_version").fetchone()
        if version != seen:
            seen = version
            yield


def _postgres_changes(connection: Any, ended: threading.Event) -> Iterator[None]:
    connection.rollback()
    connection.autocommit = True
    connection.execute(f"LISTEN {_CHANNEL}")
    while not ended.is_set():
        if list(connection.notifies(timeout=_LISTEN_S, stop_after=1)):
            yield


def _postgres_engine(url: URL) -> Engine:
    milliseconds = int(_WAIT_FOR_LOCK_S * 1000)
    connect_args = {
        "connect_timeout": 10,
        "application_name": "faithdiff",
        # Nobody waits for ever: neither for a lock, nor for a server that a cable no longer leads to.
        "options": f"-c lock_timeout={milliseconds} -c statement_timeout={2 * milliseconds}",
        "tcp_user_timeout": milliseconds,
    }
    try:
        return create_engine(
            url,
            connect_args={name: value for name, value in connect_args.items() if name not in url.query},
            pool_pre_ping=True,
            **_POOL,
        )
    except ModuleNotFoundError as error:
        raise ConfigError("store: PostgreSQL needs psycopg; pip install 'faithdiff-platform[postgres]'") from error
