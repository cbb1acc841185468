"""A PostgreSQL server of its own for the tests, on loopback, with a password; gone when it is closed.

The programs of the server come with the package `postgresql` of Debian and Ubuntu. They refuse to run as root: then
they run as the user that the package has made, or as nobody.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import psycopg

_INSTALLED = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name), reverse=True)
_SETTINGS = "fsync = off\nunix_socket_directories = ''\nlisten_addresses = '127.0.0.1'\nmax_connections = 200\n"


class PostgresServer:
    """Started by its construction."""

    def __init__(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="faithdiff-postgres-"))
        self._password, self._num_databases = secrets.token_hex(8), 0
        self.port = _free_port()
        try:
            self._start()
        except BaseException:
            shutil.rmtree(self._folder)
            raise

    def new_database(self) -> str:
        """URL of an empty database."""
        self._num_databases += 1
        name = f"jobs_{self._num_databases}"
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def restart(self) -> None:
        """As after a crash: all connections break, what was not committed is gone."""
        self._run("pg_ctl", "restart", "-w", "-m", "immediate", "-l", "log", "-s")

    def close(self) -> None:
        self._run("pg_ctl", "stop", "-w", "-m", "immediate", "-s")
        shutil.rmtree(self._folder)

    def _start(self) -> None:
        password_path = self._folder / "password"
        password_path.write_text(self._password)
        if "user" in (account := _account()):
            for path in (self._folder, password_path):
                os.chown(path, account["user"], account["group"])
        arguments = ("--auth=scram-sha-256", "--username=tester", f"--pwfile={password_path}", "--locale=C.UTF-8")
        self._run("initdb", "--no-sync", "--encoding=UTF8", *arguments)
        with (self._folder / "data" / "postgresql.conf").open("a") as config:
            config.write(f"{_SETTINGS}port = {self.port}\n")
        self._run("pg_ctl", "start", "-w", "-l", "log", "-s")

    def _run(self, program: str, *arguments: str) -> None:
        # A server that is started keeps its output open: it must not be a pipe that somebody reads to the end.
        with (self._folder / "output").open("a") as output:
            done = subprocess.run(
                [_find(program), "-D", str(self._folder / "data"), *arguments],
                cwd=self._folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, check=False, timeout=120,
                **_account(),
            )  # fmt: skip
        assert done.returncode == 0, f"{program}: {(self._folder / 'output').read_text()}"

    def _url(self, database: str) -> str:
        return f"postgresql://tester:{self._password}@127.0.0.1:{self.port}/{database}"


def _find(program: str) -> str:
    folders = os.pathsep.join([*map(str, _INSTALLED), os.environ.get("PATH", "")])
    found = shutil.which(program, path=folders)
    assert found, f"{program} is not installed; apt-get install postgresql (make setup does it)"
    return found


def _account() -> dict[str, Any]:
    """Whom the server runs as; nothing where these tests do not run as root."""
    if os.geteuid() != 0:
        return {}
    names = {entry.pw_name: entry for entry in pwd.getpwall()}
    entry = names.get("postgres") or names["nobody"]
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])
