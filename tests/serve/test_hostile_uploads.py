"""Uploads that nobody sends by mistake: each is answered with a problem, soon, and the service is none the larger."""

from __future__ import annotations

import gc
import io
import socket
import struct
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from fake_worker import PatientRestorer, running_server
from PIL import Image

from serve.gateway import Gateway, GatewayConfig, build_api
from serve.images import PictureLimits
from serve.intake import IntakeConfig
from serve.jobs import JobStore
from serve.problems import MEDIA_TYPE
from sr_platform.storage import open_storage

Rng = np.random.Generator
CFG = GatewayConfig(
    limits=PictureLimits(max_upload_bytes=2 * 1024**2, max_input_px=4_000_000, max_output_px=4_000_000),
    intake=IntakeConfig(max_queued_megapixels=1.0, upload_timeout_s=2.0),
)
FORMATS = ("PNG", "JPEG", "WEBP", "TIFF")
LONGEST_S = 10.0


def _file(rng: Rng, file_format: str) -> bytes:
    pixels = rng.integers(0, 256, (int(rng.integers(1, 64)), int(rng.integers(1, 64)), 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, file_format)
    return buffer.getvalue()


def _any_file(rng: Rng) -> bytes:
    return _file(rng, FORMATS[rng.integers(len(FORMATS))])


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + _chunk(b"IEND", b"")


def truncated(rng: Rng) -> bytes:
    data = _any_file(rng)
    return data[: rng.integers(len(data))]


def scrambled(rng: Rng) -> bytes:
    data = bytearray(_any_file(rng))
    for place in rng.integers(0, len(data), int(rng.integers(1, 20))):
        data[place] = rng.integers(256)
    return bytes(data)


def bomb_of_pixels(rng: Rng) -> bytes:
    side = int(rng.integers(3000, 65_000))
    return _png(side, side, _chunk(b"IDAT", zlib.compress(b"\0" * 10_000)))


def bomb_of_rows(rng: Rng) -> bytes:
    return _png(10, 10, _chunk(b"IDAT", zlib.compress(b"\0" * int(rng.integers(10**6, 5 * 10**7)))))


def bomb_of_text(rng: Rng) -> bytes:
    text = b"Comment\0\0" + zlib.compress(b"x" * int(rng.integers(10**6, 5 * 10**7)))
    return _png(1, 1, _chunk(b"zTXt", text), _chunk(b"IDAT", zlib.compress(b"\0\0\0\0")))


def bomb_of_profile(rng: Rng) -> bytes:
    profile = b"icc\0\0" + zlib.compress(b"\0" * int(rng.integers(10**6, 5 * 10**7)))
    return _png(1, 1, _chunk(b"iCCP", profile), _chunk(b"IDAT", zlib.compress(b"\0\0\0\0")))


def polyglot(rng: Rng) -> bytes:
    tails = (b"PK\x03\x04" + b"\0" * 100, b"<script>alert(1)</script>", b"%PDF-1.7\n", b"#!/bin/sh\nrm -rf /\n")
    return _any_file(rng) + tails[rng.integers(len(tails))] * int(rng.integers(1, 100))


def other_kind(rng: Rng) -> bytes:
    kinds = (
        b"GIF89a" + b"\1\0\1\0\0\0\0;",
        b"BM" + b"\0" * 60,
        b"%PDF-1.7\n%%EOF",
        b"%!PS-Adobe-3.0 EPSF-3.0\n(/etc/passwd) run",
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"<!DOCTYPE x [<!ENTITY a SYSTEM 'http://169.254.169.254/'>]><x>&a;</x>",
        b"\x7fELF" + b"\0" * 100,
        b"\0" * int(rng.integers(1, 10_000)),
        b"",
    )
    return kinds[rng.integers(len(kinds))]


def endless_tiff(rng: Rng) -> bytes:
    """Its directories point at each other, or past the end."""
    entry = struct.pack("<HHII", int(rng.integers(1, 70_000)) % 65_536, int(rng.integers(0, 14)), 2**31, 8)
    return b"II*\0" + struct.pack("<IH", 8, 1) + entry + struct.pack("<I", int(rng.choice([8, 2**31, 26])))


def noise(rng: Rng) -> bytes:
    heads = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"II*\0", b"MM\0*", b"MM\0+")
    return heads[rng.integers(len(heads))] + rng.bytes(int(rng.integers(0, 5000)))


KINDS: tuple[Callable[[Rng], bytes], ...] = (
    truncated, scrambled, bomb_of_pixels, bomb_of_rows, bomb_of_text, bomb_of_profile, polyglot, other_kind,
    endless_tiff, noise,
)  # fmt: skip
NAMES = (
    "a.png",
    "../../etc/passwd",
    "/etc/passwd",
    "a\0b.png",
    "..\\..\\x",
    "x" * 3000,
    "\u202egnp.exe",
    "'; drop",
    "",
)


@pytest.fixture
def service(tmp_path: Any) -> Iterator[str]:
    store, storage = JobStore(f"sqlite:///{tmp_path}/jobs.db"), open_storage(tmp_path / "files")
    with running_server(build_api(Gateway(CFG, PatientRestorer(wait_s=0.0), store, storage))) as url:
        yield url
    names = storage.list("")
    assert all(name.split("/")[0] == "jobs" and name.split("/")[2] == "input" for name in names)


def _upload(client: httpx.Client, rng: Rng) -> tuple[int, float]:
    """Status and seconds of one hostile upload."""
    kind, name = KINDS[rng.integers(len(KINDS))], NAMES[rng.integers(len(NAMES))]
    path = ("/v1/upscale", "/v1/jobs", "/v1/estimate")[rng.integers(3)]
    started_s = time.monotonic()
    answer = client.post(path, files={"picture": (name, kind(rng), "image/png")}, data={"num_inference_steps": "1"})
    if answer.status_code >= 300:
        assert answer.headers["content-type"] == MEDIA_TYPE, (kind, path)
        assert answer.json()["detail"]
    assert answer.status_code not in (500, 502, 504), (kind, path, answer.text)
    return answer.status_code, time.monotonic() - started_s


def _upload_many(url: str, num_uploads: int, seed: int) -> Counter[int]:
    statuses: Counter[int] = Counter()
    rng = np.random.default_rng(seed)
    with httpx.Client(base_url=url, timeout=60) as client:
        for _ in range(num_uploads):
            status, seconds = _upload(client, rng)
            statuses[status] += 1
            assert seconds < LONGEST_S
        assert client.get("/healthz").status_code == 200
    return statuses


def test_hostile_pictures_are_refused_and_nothing_falls_over(service: str) -> None:
    statuses = _upload_many(service, 60, seed=0)
    assert statuses[422] > 10
    assert statuses[415] > 1
    assert statuses[413] > 2
    assert statuses.keys() <= {200, 202, 413, 415, 422, 503}


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_thousands_of_hostile_pictures_leave_the_service_as_it_was(service: str) -> None:
    _upload_many(service, 300, seed=1)
    before = _memory_bytes()
    statuses = _upload_many(service, 2500, seed=2)
    assert statuses.keys() <= {200, 202, 413, 415, 422, 503}
    assert _memory_bytes() - before < 100 * 1024**2


def _memory_bytes() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


FORM = b"Content-Type: multipart/form-data; boundary=x\r\n"
HOST = b"Host: 127.0.0.1\r\n"


@pytest.mark.parametrize(("sent", "allowed"), [
    (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + FORM + b"Content-Length: 5\r\n\r\n--x--", {400, 422}),
    (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + FORM + b"Content-Length: 99999999999\r\n\r\n", {413}),
    (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + FORM + b"Content-Length: -1\r\n\r\n", {400}),
    (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + FORM + b"Content-Length: 100\r\n\r\n--x\r\n", {408}),
    (b"POST /v1/jobs HTTP/1.1\r\n" + HOST + FORM + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", {400}),
    (b"GET /v1/jobs HTTP/1.1\r\n" + HOST + b"X: " + b"a" * 200_000 + b"\r\n\r\n", {431}),
    (b"GET /v1/jobs HTTP/1.1\r\n" + HOST + b"X: y\r\n" * 20_000 + b"\r\n", {431}),
    (b"GET /v1/jobs?" + b"a" * 200_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n", {400, 414, 431}),
    (b"GET /v1/jobs HTTP/1.1\r\n" + HOST + b"Authorization: Bearer " + b"\xff" * 1000 + b"\r\n\r\n", {200}),
    (b"GET /v1/../../etc/passwd HTTP/1.1\r\n" + HOST + b"\r\n", {404}),
    (b"GET /ui/..%2f..%2f..%2fgateway.py HTTP/1.1\r\n" + HOST + b"\r\n", {404}),
    (b"GET /ui/../gateway.py HTTP/1.1\r\n" + HOST + b"\r\n", {404}),
    (b"GET /docs/files/..%2f__init__.py HTTP/1.1\r\n" + HOST + b"\r\n", {404}),
    (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", {400}),
])  # fmt: skip
def test_hostile_requests_get_an_error_of_theirs(service: str, sent: bytes, allowed: set[int]) -> None:
    parts = urlsplit(service)
    with socket.create_connection((str(parts.hostname), int(parts.port or 0)), timeout=LONGEST_S) as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR) if b"TTP" not in sent else None
        answer = connection.recv(4096)
    assert int(answer.split(b" ")[1]) in allowed, answer
    assert httpx.get(f"{service}/healthz").status_code == 200


@pytest.mark.parametrize("part", [
    b'Content-Disposition: form-data; name="picture"; filename="' + b"a" * 100_000 + b'"\r\n\r\nx',
    b"X: " + b"y" * 500_000 + b'\r\nContent-Disposition: form-data; name="scale"\r\n\r\n2',
    b'Content-Disposition: form-data; name="prompt"\r\n\r\n' + b"p" * 100_000,
    b"X: y\r\n" * 5000 + b'Content-Disposition: form-data; name="scale"\r\n\r\n2',
    b"Content-Disposition: form-data\r\n\r\nx",
    b'Content-Disposition: form-data; name="scale"\r\nContent-Type: text/plain; charset=utf-99\r\n\r\n2',
    b'Content-Disposition: form-data; name="_charset_"\r\n\r\nutf-7',
    b'Content-Disposition: form-data; name="scale"\r\n\r\n\xff\xfe\x00',
    b'Content-Type: multipart/mixed; boundary=y\r\nContent-Disposition: form-data; name="picture"\r\n\r\n--y\r\n--y--',
])  # fmt: skip
def test_hostile_forms_are_refused(service: str, part: bytes) -> None:
    body = b"--x\r\n" + part + b"\r\n--x--\r\n"
    for path in ("/v1/upscale", "/v1/jobs", "/v1/estimate"):
        headers = {"Content-Type": "multipart/form-data; boundary=x"}
        answer = httpx.post(f"{service}{path}", content=body, headers=headers)
        assert answer.status_code in (400, 413, 415, 422), answer.text
        assert answer.headers["content-type"] == MEDIA_TYPE


def test_a_thousand_fields_are_too_many(service: str) -> None:
    fields = [("seed", (None, "1"))] * 1000
    answer = httpx.post(f"{service}/v1/jobs", files=fields)
    assert answer.status_code == 400
    assert "fields" in answer.json()["detail"]
