from __future__ import annotations

import subprocess
import sys
from contextlib import closing
from typing import Any

import pytest

from serve import keys
from serve.gateway import GatewayConfig
from serve.jobs import JobStore, KeyLimits
from sr_platform.errors import ConfigError, RequestError


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "serve.keys", *arguments], capture_output=True, text=True, check=False)


def test_an_operator_makes_shows_and_revokes_a_key(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    made = _run(
        "--store-url", database_url, "create", "--name", "alice", "--requests-per-minute", "60",
        "--megapixels-per-day", "500",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    token = made.stdout.strip()
    assert token not in made.stderr
    with closing(JobStore(database_url)) as store:
        key = store.key_of(token)
        assert key is not None
        assert (key.name, key.limits) == ("alice", KeyLimits(60, 500))
        store.take(key.id, 2.5)
        keys.main(["list", "--store-url", database_url])
        head, line = capsys.readouterr().out.splitlines()
        assert head.split()[:4] == ["name", "id", "state", "created"]
        assert line.split()[:3] == ["alice", key.id, "valid"]
        assert line.split()[4:] == ["60", "500", "1", "2.5", "1", "2.5"]
        assert token.rpartition("_")[2] not in line
        keys.main([f"--store-url={database_url}", "revoke", "--name", "alice"])
        assert store.key_of(token) is None
    keys.main(["--store-url", database_url, "list"])
    assert "revoked 20" in capsys.readouterr().out


def test_a_key_without_limits_may_do_anything(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["create", "--store-url", database_url, "--name", "Bob B"])
    with closing(JobStore(database_url)) as store:
        key = store.key_of(capsys.readouterr().out.strip())
        assert key is not None
        assert key.limits == KeyLimits()
        assert keys.table(store).splitlines()[1].split()[5:7] == ["any", "any"]


def test_without_keys_the_list_says_so(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["list", "--store-url", database_url])
    assert capsys.readouterr().out == "no keys yet; create makes one\n"


@pytest.mark.parametrize(("arguments", "says"), [
    ((), "no command; give one of create, list, revoke"), (("crate",), "did you mean create?"),
    (("create",), "--name"), (("create", "--name", ""), "name"), (("create", "--name", "a\n"), "name"),
    (("create", "--name", "a", "--requests-per-minute", "0"), "greater than 0"),
    (("create", "--name", "a", "--megapixels-per-day", "many"), "megapixels-per-day"),
    (("revoke", "--name", "nobody"), "no valid key is named 'nobody'"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(arguments: tuple[str, ...], says: str, database_url: str) -> None:
    if arguments and arguments[0] in ("create", "list", "revoke"):
        arguments += ("--store-url", database_url)
    with pytest.raises(RequestError) as refused:
        keys.main(arguments)
    assert says in str(refused.value)


def test_a_name_is_given_once(database_url: str) -> None:
    create = ["create", "--name", "alice", "--store-url", database_url]
    keys.main(create)
    with pytest.raises(RequestError, match="revoke it, or take another name"):
        keys.main(create)


def test_a_database_that_does_not_answer_is_told_without_its_password() -> None:
    done = _run("list", "--store-url", "postgresql://me:hunter2@127.0.0.1:1/jobs")
    assert done.returncode == 2
    assert done.stderr.startswith("keys: the job database does not answer: ")
    assert done.stderr.count("\n") == 1
    assert "hunter2" not in done.stderr


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    keys.main(["--help"])
    assert "python -m serve.keys create --name alice" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stopped:
        keys.main(["create", "--help"])
    assert not stopped.value.code
    told = capsys.readouterr().out
    assert "python -m serve.keys create" in told
    assert "--megapixels-per-day" in told


def test_the_default_database_is_that_of_the_gateway() -> None:
    assert keys.ListConfig().store_url == GatewayConfig().store_url


def test_an_unknown_kind_of_database_is_refused() -> None:
    url: Any = "mysql://host/db"
    with pytest.raises(ConfigError, match="postgresql://"):
        keys.main(["list", "--store-url", url])
