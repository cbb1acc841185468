"""The operator's command for bearer keys: who may use the service, and how much.

    python -m serve.keys create --name alice --requests-per-minute 60 --megapixels-per-day 500
    python -m serve.keys list
    python -m serve.keys revoke --name alice

The job database is given with --store-url, before or after the command; the default is that of the gateway.
A key is printed when it is made and never again: only its digest is stored. Its user sends it with every request, as
`Authorization: Bearer <key>`. Keys are asked for where the gateway has access.mode: keys.

Every command explains its flags with --help. Passwords need not stand in the URL: PostgreSQL reads PGPASSWORD and
~/.pgpass.
"""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from datetime import UTC, datetime

from pydantic import Field, PositiveFloat
from sqlalchemy.exc import DBAPIError

from serve.jobs import ApiKey, JobStore, KeyLimits
from sr_platform.config import StrictConfig, load_config, run_job
from sr_platform.errors import ConfigError, RequestError

_URL_FLAGS = ("--store-url", "--store_url")


class ListConfig(StrictConfig):
    """Shows all keys there were ever, with their limits and what was counted of them."""

    store_url: str = "sqlite:///out/serve/jobs.db"
    """The job database of the gateways: their setting store_url."""


class RevokeConfig(ListConfig):
    """Makes a key invalid, at once and for good. Its jobs go on; its name may be given to a new key."""

    name: str
    """Of the key, as it was given to create."""


class CreateConfig(ListConfig):
    """Makes a key and prints it, alone, on standard output."""

    name: str = Field(pattern=r"^[A-Za-z0-9](?:[A-Za-z0-9 ._@-]{0,98}[A-Za-z0-9])?\Z")
    """Whose key it is; letters, digits and . _ @ - and blanks inside. Only one valid key has it."""
    requests_per_minute: PositiveFloat | None = None
    """Pictures that may be sent in a minute; without it, any number."""
    megapixels_per_day: PositiveFloat | None = None
    """Megapixels of results that may be asked for from midnight to midnight UTC; without it, any number."""


_COMMANDS: dict[str, type[ListConfig]] = {"create": CreateConfig, "list": ListConfig, "revoke": RevokeConfig}


def main(argv: Sequence[str]) -> None:
    """Runs one command.

    Raises:
        RequestError: the command or a flag is wrong, there is no such key, or the database does not answer.
    """
    command, flags = _split(argv)
    if command in ("-h", "--help"):
        print(__doc__)
        return
    if command not in _COMMANDS:
        near = difflib.get_close_matches(command, _COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"give one of {', '.join(_COMMANDS)}; --help explains them"
        raise ConfigError(f"keys: {f'no command {command!r}' if command else 'no command'}; {advice}")
    cfg = load_config(
        _COMMANDS[command],
        flags,
        job=f"keys {command}",
        description=(_COMMANDS[command].__doc__ or "").strip(),
        recipe=False,
        prog=f"python -m serve.keys {command}",
    )
    try:
        with closing(JobStore(cfg.store_url)) as store:
            _run(cfg, store)
    except DBAPIError as error:
        reason = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else type(error.orig).__name__
        raise RequestError(f"keys: the job database does not answer: {reason}; check --store-url") from None


def _split(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The command and its flags; the address of the database may stand before the command."""
    before: list[str] = []
    rest = list(argv)
    while rest and rest[0].split("=")[0] in _URL_FLAGS:
        size = 1 if "=" in rest[0] else 2
        before, rest = before + rest[:size], rest[size:]
    return (rest[0], before + rest[1:]) if rest else ("", before)


def _run(cfg: ListConfig, store: JobStore) -> None:
    if isinstance(cfg, CreateConfig):
        limits = KeyLimits(cfg.requests_per_minute, cfg.megapixels_per_day)
        _, token = store.create_key(cfg.name, limits=limits)
        print(token)
        print(f"keys: this is the key of {cfg.name}; it is not shown again", file=sys.stderr)
    elif isinstance(cfg, RevokeConfig):
        if not store.revoke(cfg.name):
            raise RequestError(f"keys: no valid key is named {cfg.name!r}; list shows all")
        print(f"keys: the key of {cfg.name} is revoked", file=sys.stderr)
    else:
        print(table(store))


def table(store: JobStore) -> str:
    """All keys, a line each."""
    totals, now_s = store.total_usage(), time.time()
    head = ("name", "id", "state", "created", "requests/min", "megapixels/day", "today: requests", "megapixels",
            "ever: requests", "megapixels")  # fmt: skip
    lines = [head]
    for key in store.list_keys():
        today, ever = store.usage(key.id, now_s), totals.get(key.id, (0, 0.0))
        used = (str(today[0]), f"{today[1]:,.1f}", str(ever[0]), f"{ever[1]:,.1f}")
        lines.append((key.name, key.id, _state(key), _date(key.created_at), *_limits(key), *used))
    if len(lines) == 1:
        return "no keys yet; create makes one"
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    padded = [[text.ljust(width) for text, width in zip(line, widths, strict=True)] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _state(key: ApiKey) -> str:
    return "valid" if key.revoked_at is None else f"revoked {_date(key.revoked_at)}"


def _limits(key: ApiKey) -> tuple[str, str]:
    limits = (key.limits.requests_per_minute, key.limits.megapixels_per_day)
    per_minute, per_day = ("any" if limit is None else f"{limit:g}" for limit in limits)
    return per_minute, per_day


def _date(time_s: float) -> str:
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d")


if __name__ == "__main__":
    run_job(main)
