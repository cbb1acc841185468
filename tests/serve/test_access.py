from __future__ import annotations

import logging
from typing import Any

import pytest

from serve.access import AccessConfig
from serve.gateway import GatewayConfig
from serve.jobs import KeyLimits

pytestmark = pytest.mark.anyio

KEYS = GatewayConfig(access=AccessConfig(mode="keys"))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def _kind(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return str(answer.json()["type"]).rpartition(":")[2]


async def test_without_keys_only_this_machine_is_answered(connect: Any) -> None:
    for peer in ("127.0.0.1", "127.1.2.3", "::1"):
        async with connect(peer=peer) as client:
            assert (await client.get("/v1/jobs")).status_code == 200
    for peer in ("10.0.0.5", "192.168.1.7", "2001:db8::1", ""):
        async with connect(peer=peer) as client:
            for path in ("/v1/jobs", "/v1/usage", "/v1/models"):
                assert _kind(await client.get(path), 403) == "local-only"
            assert _kind(await client.post("/v1/upscale", content=b"x"), 403) == "local-only"
            assert (await client.get("/healthz")).status_code == 200


@pytest.mark.parametrize("headers", [
    {"X-Forwarded-For": "203.0.113.9"}, {"Forwarded": "for=203.0.113.9"}, {"Host": "rebound.example.com"},
    {"Origin": "https://evil.example.com"}, {"Origin": "null"}, {"Host": ""}, {"Host": "127.0.0.1.evil.com"},
])  # fmt: skip
async def test_proxies_and_browsers_on_this_machine_cannot_lend_out_its_openness(
    connect: Any, headers: dict[str, str]
) -> None:
    async with connect() as client:
        assert _kind(await client.get("/v1/jobs", headers=headers), 403) == "local-only"


async def test_the_services_own_page_is_let_in(connect: Any) -> None:
    async with connect() as client:
        for origin in ("http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"):
            headers = {"Origin": origin, "Host": origin.removeprefix("http://")}
            assert (await client.get("/v1/jobs", headers=headers)).status_code == 200


async def test_openness_has_to_be_asked_for_by_name(connect: Any) -> None:
    async with connect(GatewayConfig(access=AccessConfig(mode="open")), peer="10.0.0.5") as client:
        assert (await client.get("/v1/jobs", headers={"Host": "photos.example.com"})).status_code == 200


async def test_a_key_is_needed_and_must_be_valid(connect: Any, store: Any) -> None:
    _, token = store.create_key("archive", limits=KeyLimits())
    async with connect(KEYS, peer="10.0.0.5") as client:
        answer = await client.get("/v1/jobs")
        assert _kind(answer, 401) == "unauthorized"
        assert answer.headers["www-authenticate"] == 'Bearer realm="faithdiff"'
        for wrong in (
            "Bearer",
            "Bearer ",
            f"Basic {token}",
            token,
            f"Bearer {token}x",
            "Bearer \xff\xfe",
            "Bearer a b",
        ):
            sent = {"Authorization": wrong.encode("latin-1")}
            assert _kind(await client.get("/v1/jobs", headers=sent), 401) == "unauthorized", wrong
        for right in (f"Bearer {token}", f"bearer  {token}"):
            assert (await client.get("/v1/jobs", headers={"Authorization": right})).status_code == 200
        store.revoke("archive")
        revoked = await client.get("/v1/jobs", headers={"Authorization": f"Bearer {token}"})
        assert _kind(revoked, 401) == "unauthorized"
        assert "invalid_token" in revoked.headers["www-authenticate"]


async def test_jobs_of_other_keys_do_not_exist(connect: Any, store: Any, png: bytes) -> None:
    tokens = [store.create_key(name, limits=KeyLimits())[1] for name in ("a", "b")]
    async with connect(KEYS, key=tokens[0]) as mine, connect(KEYS, key=tokens[1]) as other:
        job = (await mine.post("/v1/jobs", files={"picture": png})).json()
        for path in (job["links"]["self"], job["links"]["events"], job["links"]["result"]):
            assert _kind(await other.get(path), 404) == "no-such-job"
        assert _kind(await other.delete(job["links"]["cancel"]), 404) == "no-such-job"
        assert (await other.get("/v1/jobs")).json()["jobs"] == []
        assert (await mine.get(job["links"]["self"])).json()["state"] == "queued"
        assert [found["id"] for found in (await mine.get("/v1/jobs")).json()["jobs"]] == [job["id"]]


async def test_the_same_idempotency_key_of_two_keys_makes_two_jobs(connect: Any, store: Any, png: bytes) -> None:
    tokens = [store.create_key(name, limits=KeyLimits())[1] for name in ("a", "b")]
    ids = set()
    for token in tokens:
        async with connect(KEYS, key=token) as client:
            sent = {"Idempotency-Key": "same"}
            ids.add((await client.post("/v1/jobs", files={"picture": png}, headers=sent)).json()["id"])
    assert len(ids) == 2


async def test_a_key_is_held_to_its_rate_and_told_when_to_come_again(connect: Any, store: Any, png: bytes) -> None:
    _, token = store.create_key("slow", limits=KeyLimits(requests_per_minute=2))
    async with connect(KEYS, key=token) as client:
        answers = [await client.post("/v1/jobs", files={"picture": png}) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [202, 202, 429]
        assert _kind(answers[2], 429) == "limit-reached"
        assert 1 <= int(answers[2].headers["retry-after"]) <= 60
        assert _kind(await client.post("/v1/upscale", files={"picture": png}), 429) == "limit-reached"
        assert (await client.get("/v1/jobs")).status_code == 200


async def test_a_key_is_held_to_its_megapixels_of_a_day(connect: Any, store: Any, png: bytes) -> None:
    megapixels = 32 * 24 * 16 / 1e6
    _, token = store.create_key("small", limits=KeyLimits(megapixels_per_day=1.5 * megapixels))
    async with connect(KEYS, key=token) as client:
        sent = {"Idempotency-Key": "one"}
        assert (await client.post("/v1/jobs", files={"picture": png}, headers=sent)).status_code == 202
        assert _kind(await client.post("/v1/jobs", files={"picture": png}), 429) == "limit-reached"
        # What was accepted is not counted again.
        again = await client.post("/v1/jobs", files={"picture": png}, headers=sent)
        assert (again.status_code, again.headers["idempotency-replayed"]) == (202, "true")
        usage = (await client.get("/v1/usage")).json()
    assert usage["key"] == "small"
    assert usage["today"]["megapixels"] == pytest.approx(megapixels)
    assert usage["today"]["requests"] == 1
    assert usage["limits"]["megapixels_per_day"] == pytest.approx(1.5 * megapixels)


async def test_no_key_reaches_the_log(connect: Any, store: Any, png: bytes, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    _, token = store.create_key("archive", limits=KeyLimits())
    async with connect(KEYS, key=token) as client:
        await client.post("/v1/jobs", files={"picture": png})
        await client.get("/v1/jobs/unknown")
        await client.post("/v1/upscale", files={"picture": b"broken"})
    async with connect(KEYS, key=token + "x") as client:
        await client.get("/v1/jobs")
    assert caplog.records
    assert token not in "\n".join(record.getMessage() + repr(vars(record)) for record in caplog.records)


async def test_other_origins_are_told_nothing_unless_they_are_allowed(connect: Any, store: Any) -> None:
    _, token = store.create_key("a", limits=KeyLimits())
    page = "https://photos.example.com"
    preflight = {
        "Origin": page,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "idempotency-key",
    }
    async with connect(KEYS, key=token) as client:
        answer = await client.get("/v1/jobs", headers={"Origin": page})
        assert "access-control-allow-origin" not in answer.headers
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        assert (await client.options("/v1/jobs", headers=preflight)).status_code == 405
    cfg = GatewayConfig(access=AccessConfig(mode="keys", allowed_origins=(page,)))
    async with connect(cfg, key=token) as client:
        assert (await client.get("/v1/jobs", headers={"Origin": page})).headers["access-control-allow-origin"] == page
        allowed = await client.options("/v1/jobs", headers=preflight)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == page
        other = await client.get("/v1/jobs", headers={"Origin": "https://evil.example.com"})
        assert "access-control-allow-origin" not in other.headers
