"""Keys, what each of them may use, and what it has used. Of a key only the digest of its secret is stored.

A key reads fd_<id>_<secret>. The secret has 256 random bits, so that one SHA-256 is enough to store it safely.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass

from sqlalchemy import Connection, Row, func, select, update
from sqlalchemy.exc import IntegrityError

from serve.database import Database, insert_of, now_of
from serve.job_tables import keys, usage
from sr_platform.errors import RequestError

_PREFIX = "fd"
_DAY_S = 86_400
_NOBODYS_DIGEST = hashlib.sha256(secrets.token_bytes(32)).hexdigest()


@dataclass(frozen=True)
class KeyLimits:
    """What a key may ask for; None is no limit."""

    requests_per_minute: float | None = None
    megapixels_per_day: float | None = None
    """Of results, from midnight to midnight UTC."""


@dataclass(frozen=True)
class ApiKey:
    """A key without its secret. `revoked_at` is None while it is valid; times in seconds since the epoch."""

    id: str
    name: str
    limits: KeyLimits
    created_at: float
    revoked_at: float | None


@dataclass(frozen=True)
class Verdict:
    """Whether a request is allowed; if not, why, and after how long it would be."""

    allowed: bool
    reason: str = ""
    retry_after_s: float = 0.0


class KeyRecords(Database):
    """Keys and their usage."""

    def create_key(self, name: str, *, limits: KeyLimits) -> tuple[ApiKey, str]:
        """A new key, and the text that its user sends. The text is stored nowhere.

        Raises:
            RequestError: another key of that name is valid.
        """
        key_id, secret = secrets.token_hex(8), secrets.token_hex(32)
        row = {"id": key_id, "name": name, "secret_sha256": _digest(secret), **vars(limits)}
        try:
            with self._writing() as transaction:
                created_at = now_of(transaction)
                transaction.execute(keys.insert().values(**row, created_at=created_at))
        except IntegrityError:
            raise RequestError(f"key: there is a valid one named {name!r}; revoke it, or take another name") from None
        return ApiKey(key_id, name, limits, created_at, None), f"{_PREFIX}_{key_id}_{secret}"

    def revoke(self, name: str) -> bool:
        """From now on the key of that name is refused; False when none is valid."""
        with self._writing() as transaction:
            statement = update(keys).where(keys.c.name == name, keys.c.revoked_at.is_(None))
            return bool(transaction.execute(statement.values(revoked_at=now_of(transaction))).rowcount)

    def list_keys(self) -> list[ApiKey]:
        """All there were ever, by name, the newest last."""
        with self._reading() as transaction:
            return [_key_of(row) for row in transaction.execute(select(keys).order_by(keys.c.name, keys.c.created_at))]

    def key_of(self, token: str) -> ApiKey | None:
        """The valid key that `token` is the text of. How long a wrong one takes tells nothing about it."""
        prefix, _, rest = token.partition("_")
        key_id, _, secret = rest.partition("_")
        if prefix != _PREFIX or not key_id.isascii() or not key_id.isalnum():
            return None
        with self._reading() as transaction:
            row = transaction.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
        expected = _NOBODYS_DIGEST if row is None else row.secret_sha256
        is_right = hmac.compare_digest(_digest(secret), expected)
        return _key_of(row) if row is not None and is_right and row.revoked_at is None else None

    def take(self, key_id: str, megapixels: float, now_s: float | None = None) -> Verdict:
        """Counts a request of so many megapixels, if the limits of the key allow it; otherwise counts nothing.

        The rate is that of a bucket: so many requests at once as a minute allows, then one at a time.
        """
        with self._writing() as transaction:
            now_s = now_of(transaction) if now_s is None else now_s
            key = transaction.execute(select(keys).where(keys.c.id == key_id).with_for_update()).one_or_none()
            if key is None:
                return Verdict(True)
            day = int(now_s // _DAY_S)
            used = _used(transaction, key_id, day)[1]
            allowance = _allowance(key, now_s)
            verdict = _by_day(key, used, megapixels, now_s) or _by_rate(key, allowance)
            if verdict is not None:
                return verdict
            left = None if allowance is None else allowance - 1
            transaction.execute(update(keys).where(keys.c.id == key_id).values(allowance=left, allowance_at=now_s))
            _count(transaction, key_id, day, megapixels)
            return Verdict(True)

    def usage(self, key_id: str, now_s: float | None = None) -> tuple[int, float]:
        """Requests and megapixels that were counted today, UTC."""
        with self._reading() as transaction:
            now_s = now_of(transaction) if now_s is None else now_s
            return _used(transaction, key_id, int(now_s // _DAY_S))

    def total_usage(self) -> dict[str, tuple[int, float]]:
        """Requests and megapixels of every key that was used, from its beginning, by its id."""
        sums = func.sum(usage.c.num_requests), func.sum(usage.c.megapixels)
        with self._reading() as transaction:
            rows = transaction.execute(select(usage.c.key_id, *sums).group_by(usage.c.key_id)).all()
        return {key_id: (int(num_requests), float(megapixels)) for key_id, num_requests, megapixels in rows}


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _key_of(row: Row[tuple[object, ...]]) -> ApiKey:
    limits = KeyLimits(row.requests_per_minute, row.megapixels_per_day)
    return ApiKey(row.id, row.name, limits, row.created_at, row.revoked_at)


def _used(transaction: Connection, key_id: str, day: int) -> tuple[int, float]:
    statement = select(usage.c.num_requests, usage.c.megapixels).where(usage.c.key_id == key_id, usage.c.day == day)
    row = transaction.execute(statement).one_or_none()
    return (0, 0.0) if row is None else (row.num_requests, row.megapixels)


def _allowance(key: Row[tuple[object, ...]], now_s: float) -> float | None:
    """Requests that may be sent at once; None without a limit."""
    rate = key.requests_per_minute
    if rate is None:
        return None
    full = max(1.0, rate)
    if key.allowance is None:
        return full
    # A clock that was set back takes nothing away.
    return float(min(full, key.allowance + max(0.0, now_s - key.allowance_at) * rate / 60))


def _by_rate(key: Row[tuple[object, ...]], allowance: float | None) -> Verdict | None:
    if allowance is None or allowance >= 1 - 1e-9:
        return None
    rate = key.requests_per_minute
    return Verdict(False, f"it may send {rate:g} requests a minute; send this one later", (1 - allowance) * 60 / rate)


def _by_day(key: Row[tuple[object, ...]], used: float, megapixels: float, now_s: float) -> Verdict | None:
    limit = key.megapixels_per_day
    if limit is None or used + megapixels <= limit:
        return None
    until_midnight_s = _DAY_S - now_s % _DAY_S
    if megapixels > limit:
        reason = f"it may ask for {limit:g} megapixels a day, and this result alone has {megapixels:g}"
    else:
        reason = (
            f"it may ask for {limit:g} megapixels a day, and {used:g} were asked for; send {megapixels:g} more after "
            "midnight UTC"
        )
    return Verdict(False, reason, until_midnight_s)


def _count(transaction: Connection, key_id: str, day: int, megapixels: float) -> None:
    statement = insert_of(transaction)(usage).values(key_id=key_id, day=day, num_requests=1, megapixels=megapixels)
    transaction.execute(
        statement.on_conflict_do_update(
            index_elements=[usage.c.key_id, usage.c.day],
            set_={
                "num_requests": usage.c.num_requests + 1,
                "megapixels": usage.c.megapixels + statement.excluded.megapixels,
            },
        )
    )
