from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import closing

import pytest
from hammer import Hammer

from serve.job_tables import keys
from serve.jobs import JobStore, KeyLimits
from sr_platform.errors import RequestError

NOON = 20_000 * 86_400 + 43_200.0


@pytest.fixture
def store(database_url: str) -> Iterator[JobStore]:
    with closing(JobStore(database_url)) as opened:
        yield opened


def test_a_key_is_known_by_its_text_and_its_text_is_stored_nowhere(store: JobStore) -> None:
    limits = KeyLimits(requests_per_minute=60, megapixels_per_day=500)
    key, token = store.create_key("alice", limits=limits)
    assert re.fullmatch(r"fd_[0-9a-f]{16}_[0-9a-f]{64}", token)
    assert (key.name, key.limits, key.revoked_at) == ("alice", limits, None)
    assert store.key_of(token) == key
    assert store.list_keys() == [key]
    with store._reading() as transaction:
        stored = repr(transaction.execute(keys.select()).all())
    assert token.rpartition("_")[2] not in stored
    assert "secret" not in repr(key)


@pytest.mark.parametrize("change", [
    lambda token: token + "x", lambda token: token[:-1], lambda token: token.upper(), lambda token: "",
    lambda token: token.replace("fd_", "", 1), lambda token: "fd_", lambda token: f"fd_{'0' * 16}_{token[-64:]}",
    lambda token: "\xff\xfe", lambda token: token[:20], lambda token: token + "\0", lambda token: "fd_\0_x",
    lambda token: "fd_\u00e9_x", lambda token: "fd__" + token[-64:],
])  # fmt: skip
def test_any_other_text_is_no_key(store: JobStore, change: object) -> None:
    _, token = store.create_key("alice", limits=KeyLimits())
    assert store.key_of(change(token)) is None  # type: ignore[operator]


def test_a_revoked_key_is_refused_and_its_name_is_free_again(store: JobStore) -> None:
    old, old_token = store.create_key("alice", limits=KeyLimits())
    with pytest.raises(RequestError, match="a valid one named 'alice'"):
        store.create_key("alice", limits=KeyLimits())
    assert store.revoke("alice")
    assert not store.revoke("alice")
    assert not store.revoke("bob")
    assert store.key_of(old_token) is None
    new, new_token = store.create_key("alice", limits=KeyLimits())
    assert store.key_of(new_token) == new
    assert store.key_of(old_token) is None
    assert [key.id for key in store.list_keys()] == [old.id, new.id]


def test_a_rate_allows_a_burst_of_a_minute_and_then_one_at_a_time(store: JobStore) -> None:
    key, _ = store.create_key("alice", limits=KeyLimits(requests_per_minute=3))
    assert [store.take(key.id, 1.0, NOON).allowed for _ in range(4)] == [True, True, True, False]
    refused = store.take(key.id, 1.0, NOON)
    assert refused.retry_after_s == pytest.approx(20)
    assert "3 requests a minute" in refused.reason
    assert not store.take(key.id, 1.0, NOON + 19).allowed
    assert store.take(key.id, 1.0, NOON + 20).allowed
    assert not store.take(key.id, 1.0, NOON + 21).allowed
    assert not store.take(key.id, 1.0, NOON - 500).allowed, "a clock that was set back gives nothing"
    assert [store.take(key.id, 1.0, NOON + 3600).allowed for _ in range(4)] == [True, True, True, False]
    assert store.usage(key.id, NOON) == (7, 7.0), "what was refused is not counted"


def test_a_slow_rate_lets_one_request_through(store: JobStore) -> None:
    key, _ = store.create_key("alice", limits=KeyLimits(requests_per_minute=0.5))
    assert store.take(key.id, 1.0, NOON).allowed
    assert store.take(key.id, 1.0, NOON).retry_after_s == pytest.approx(120)
    assert store.take(key.id, 1.0, NOON + 120).allowed


def test_megapixels_are_counted_from_midnight_to_midnight(store: JobStore) -> None:
    key, _ = store.create_key("alice", limits=KeyLimits(megapixels_per_day=10))
    assert store.take(key.id, 6.0, NOON).allowed
    refused = store.take(key.id, 5.0, NOON + 60)
    assert not refused.allowed
    assert refused.retry_after_s == pytest.approx(43_200 - 60)
    assert "10 megapixels a day" in refused.reason
    assert store.take(key.id, 4.0, NOON + 60).allowed
    assert store.take(key.id, 10.0, NOON + 43_200).allowed
    too_large = store.take(key.id, 10.5, NOON + 2 * 86_400)
    assert not too_large.allowed
    assert "this result alone" in too_large.reason
    assert store.usage(key.id, NOON) == (2, 10.0)
    assert store.usage(key.id, NOON + 43_200) == (1, 10.0)
    assert store.total_usage() == {key.id: (3, 20.0)}


def test_what_one_limit_refuses_is_not_counted_against_the_other(store: JobStore) -> None:
    key, _ = store.create_key("alice", limits=KeyLimits(requests_per_minute=2, megapixels_per_day=10))
    assert not store.take(key.id, 11.0, NOON).allowed
    assert [store.take(key.id, 1.0, NOON).allowed for _ in range(3)] == [True, True, False]


def test_without_limits_everything_is_allowed_and_counted(store: JobStore) -> None:
    key, _ = store.create_key("alice", limits=KeyLimits())
    assert all(store.take(key.id, 100.0, NOON).allowed for _ in range(20))
    assert store.usage(key.id, NOON) == (20, 2000.0)
    assert store.usage("anybody", NOON) == (0, 0.0)


def test_limits_hold_over_processes(store: JobStore, database_url: str) -> None:
    key, _ = store.create_key("alice", limits=KeyLimits(megapixels_per_day=50))
    hammers = [Hammer(database_url, "take", key.id, "30") for _ in range(3)]
    midnight = -time.time() % 86_400
    assert sum(hammer.result() for hammer in hammers) == 50 or midnight < 120
    slow, _ = store.create_key("bob", limits=KeyLimits(requests_per_minute=12))
    started_s = time.monotonic()
    hammers = [Hammer(database_url, "take", slow.id, "10") for _ in range(3)]
    num_allowed = sum(hammer.result() for hammer in hammers)
    assert 12 <= num_allowed <= 12 + (time.monotonic() - started_s) / 5 + 1
