from __future__ import annotations

import asyncio
import io
import json
import logging
import logging.handlers
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

import pytest

from sr_platform.observability import bound_fields, configure_logging, log_fields, without_secrets

logger = logging.getLogger("serve.test_observability")


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., io.StringIO]]:
    """`log(form="json")`: what configure_logging() makes of the records of this test."""
    root, ours = logging.getLogger(), [logging.getLogger(n) for n in ("sr_platform", "faithdiff", "pipelines", "serve")]
    before = (root.handlers[:], root.level, [logger.level for logger in ours])
    stream = io.StringIO()

    def configure(level: int | str = logging.INFO, **kwargs: Any) -> io.StringIO:
        for handler in root.handlers[:]:
            root.removeHandler(handler)  # pytest's, which configure_logging would close
        monkeypatch.setattr(sys, "stderr", stream)
        configure_logging(level, **kwargs)
        return stream

    yield configure
    root.handlers[:], root.level = before[0], before[1]
    for one, level in zip(ours, before[2], strict=True):
        one.setLevel(level)


def lines_of(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_json_line_holds_time_level_logger_message_and_every_field(log: Callable[..., io.StringIO]) -> None:
    stream = log(form="json", fields={"replica": "Restorer#a1"})
    with log_fields(job_id="j1", trace_id="t1"):
        logger.info("step %d of %d", 3, 20, extra={"seconds": 0.5, "_made_by_ray": 1})
    logger.warning("afterwards")
    first, second = lines_of(stream)
    assert datetime.fromisoformat(first.pop("time")).utcoffset() is not None
    assert first == {
        "level": "INFO", "logger": "serve.test_observability", "message": "step 3 of 20", "replica": "Restorer#a1",
        "job_id": "j1", "trace_id": "t1", "seconds": 0.5,
    }  # fmt: skip
    assert "job_id" not in second


def test_a_line_for_people_ends_with_the_same_fields(log: Callable[..., io.StringIO]) -> None:
    stream = log(fields={"replica": "a1"})
    with log_fields(job_id="j1"):
        logger.info("done")
    logger.debug("not shown")
    logging.getLogger("some.library").info("not shown")
    assert stream.getvalue().endswith("INFO serve.test_observability: done [replica=a1 job_id=j1]\n")
    assert stream.getvalue().count("\n") == 1


def test_a_traceback_stays_within_its_json_line(log: Callable[..., io.StringIO]) -> None:
    stream = log(form="json")
    try:
        raise OSError("postgresql+psycopg://me:hunter2@db/jobs is away")
    except OSError:
        logger.exception("claims: failed")
    (line,) = lines_of(stream)
    assert "Traceback" in line["exception"]
    assert "hunter2" not in stream.getvalue()


def test_fields_nest_and_end_with_their_block() -> None:
    with log_fields(job_id="j1", key="k"):
        with log_fields(job_id="j2", key=None):
            assert bound_fields() == {"job_id": "j2"}
        assert bound_fields() == {"job_id": "j1", "key": "k"}
    assert bound_fields() == {}


def test_tasks_and_their_threads_have_the_fields_and_others_do_not_mix() -> None:
    seen: dict[str, Any] = {}

    def look(name: str) -> None:
        seen[name] = dict(bound_fields())

    async def one(name: str) -> None:
        with log_fields(job_id=name):
            await asyncio.sleep(0.01)
            await asyncio.to_thread(look, name)

    async def both() -> None:
        await asyncio.gather(one("a"), one("b"))

    asyncio.run(both())
    plain = threading.Thread(target=look, args=("plain",))
    plain.start()
    plain.join()
    assert seen == {"a": {"job_id": "a"}, "b": {"job_id": "b"}, "plain": {}}


SECRET = "s3cr3t-V4lue.9"  # noqa: S105


@pytest.mark.parametrize("text", [
    f"Authorization: Bearer {SECRET}",
    f"{{'authorization': 'bearer {SECRET}'}}",
    f"headers=[(b'authorization', b'Bearer {SECRET}')]",
    f"Authorization: Basic {SECRET}",
    f"postgresql+psycopg://faithdiff:{SECRET}@db.example.com:5432/jobs",
    f"https://user:{SECRET}@host/path and http://other/path",
    f"postgresql://u:p@ss/{SECRET}@db/jobs",
    f"redis://:{SECRET}@cache:6379",
    f"password={SECRET}",
    f"db_password: {SECRET}",
    f'{{"api_key": "{SECRET}", "size": 3}}',
    json.dumps({"message": json.dumps({"webhook_secret": SECRET})}),
    json.dumps(json.dumps(json.dumps({"token": SECRET}))),
    f"AWS_SECRET_ACCESS_KEY={SECRET}",
    f"https://bucket/x?X-Amz-Credential=id&X-Amz-Signature={SECRET}&X-Amz-Date=1",
    f"Cookie: {SECRET}",
    f"X-Api-Key: {SECRET}",
    f"--token {SECRET}".replace(" s", "=s"),
])  # fmt: skip
def test_a_secret_is_hidden(text: str) -> None:
    hidden = without_secrets(text)
    assert SECRET not in hidden
    assert "[hidden]" in hidden
    assert without_secrets(hidden) == hidden


@pytest.mark.parametrize("text", [
    "job 019a is done: 4 megapixels, 20 steps, 12.5 s",
    "http://127.0.0.1:8000/v1/jobs?limit=50",
    "s3://bucket/jobs/019a/result-1",
    "num_tokens: 77, tokenizer: clip",
    "the token is missing; send the header Authorization",
    "the bearer of this: nobody",
    "me@example.com wrote at 12:00",
])  # fmt: skip
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_json_stays_json_when_something_in_it_is_hidden(log: Callable[..., io.StringIO]) -> None:
    stream = log(form="json")
    logger.info("got %s", {"token": SECRET, "of": ["a", {"password": SECRET}]}, extra={"url": f"http://a:{SECRET}@b/"})
    logger.info('body {"secret": "%s"}', SECRET)
    assert len(lines_of(stream)) == 2
    assert SECRET not in stream.getvalue()


def test_the_logger_of_ray_serve_takes_the_same_form_on_stderr_and_in_its_file(log: Callable[..., io.StringIO]) -> None:
    of_serve, file, screen = logging.getLogger("ray.serve"), io.StringIO(), io.StringIO()
    handlers = [logging.StreamHandler(screen), logging.handlers.MemoryHandler(1, target=logging.StreamHandler(file))]
    before = (of_serve.handlers, of_serve.propagate, of_serve.level)
    try:
        of_serve.handlers, of_serve.propagate = handlers, False
        of_serve.setLevel(logging.INFO)
        log(form="json", fields={"replica": "a1"})
        with log_fields(trace_id="t1"):
            of_serve.info("POST /v1/jobs 202 Bearer %s", SECRET, extra={"log_to_stderr": True})
    finally:
        of_serve.handlers, of_serve.propagate = before[0], before[1]
        of_serve.setLevel(before[2])
    for stream in (screen, file):
        (line,) = lines_of(stream)
        assert (line["replica"], line["trace_id"]) == ("a1", "t1")
        assert SECRET not in line["message"]
        assert "log_to_stderr" not in line
