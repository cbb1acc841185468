"""Captions from a real HTTP endpoint on loopback, which fails in every way that endpoints do."""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import itertools
import json
import logging
import pickle
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
import ray.data
from PIL import Image

from faithdiff.caption_text import QUESTION, SYSTEM, SamplingSettings, clean_caption
from pipelines.stages import caption_endpoint
from pipelines.stages.caption import CaptionConfig, EndpointCaption, caption_stage, check_captioner
from pipelines.stages.caption_endpoint import (
    EMPTY_ATTEMPTS,
    OWN_FAILURES,
    Answer,
    CaptionEndpoint,
    EndpointConfig,
    EndpointDownError,
    request_seed,
)
from pipelines.stages.sample import Sample, read_table, to_table
from pipelines.stages.workers import WorkersConfig
from sr_platform.errors import RequestError

MODEL, KEY = "tiny-vision", "sk-Very.Secret+1"
SERVER_ERRORS = {"429", "500", "502", "503"}
REFUSALS = {"400", "401", "403", "404", "413", "422"}


class Endpoint(ThreadingHTTPServer):
    """Speaks chat completions: its answer is a function of picture and seed; `fault` says what goes wrong, and when."""

    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, port: int = 0, *, key: str = "", answer_s: float = 0.0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.key, self.answer_s = key, answer_s
        self.fault: Callable[[int, dict[str, Any]], str | None] = lambda times, body: None
        """(how often this very request came before, its body) -> what to do instead of an answer."""
        self.retry_after = ""
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        self.bodies: list[dict[str, Any]] = []
        self.num_answered = self.active = self.most_active = 0
        self.models_status = 200
        self.is_gone = False

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up on us is part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Endpoint

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self.is_let_in():
            self.reply(self.server.models_status, {"object": "list", "data": [{"id": "other"}, {"id": MODEL}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.is_gone or not self.is_let_in():
            self.close_connection = self.server.is_gone
            return
        with self.server.lock:
            self.server.active += 1
            self.server.most_active = max(self.server.active, self.server.most_active)
            self.server.times.append(time.monotonic())
            self.server.bodies.append(body)
            request = json.dumps(body)
            times, self.server.asked[request] = self.server.asked[request], self.server.asked[request] + 1
        try:
            time.sleep(self.server.answer_s)
            fault = self.server.fault(times, body)
            self.misbehave(fault) if fault else self.answer(words_of(body))
        finally:
            with self.server.lock:
                self.server.active -= 1

    def is_let_in(self) -> bool:
        came = self.headers.get("Authorization", "")
        if self.server.key and came != f"Bearer {self.server.key}":
            self.reply(401, {"error": {"message": f"Incorrect API key provided: {came}"}})
            return False
        return True

    def answer(self, text: str | None) -> None:
        with self.server.lock:
            self.server.num_answered += 1
        self.reply(200, {"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}]})

    def misbehave(self, fault: str) -> None:
        whole = json.dumps({"choices": [{"message": {"content": "half of"}}]}).encode()
        if fault in SERVER_ERRORS | REFUSALS:
            self.reply(int(fault), {"error": {"message": f"no luck, {self.headers.get('Authorization')}"}})
        elif fault == "silent":
            self.close_connection = True
        elif fault == "cut":
            self.send(200, whole[:20], length=len(whole))
            self.close_connection = True
        elif fault == "half json":
            self.send(200, whole[:20])
        elif fault == "page":
            self.send(200, b"<html>Bad gateway</html>")
        elif fault == "no choices":
            self.reply(200, {"choices": []})
        elif fault == "slow":
            time.sleep(0.8)
            self.answer("Too late for anybody.")
        else:
            self.answer(
                {
                    "empty": "",
                    "null": None,
                    "blank": " \n",
                    "dots": "...",
                    "half a pair": "The image shows a \ud83d cat.",
                }[fault]
            )

    def reply(self, status: int, content: Any) -> None:
        self.send(status, json.dumps(content).encode())

    def send(self, status: int, data: bytes, length: int | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length or len(data)))
        if self.server.retry_after:
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(data)


def words_of(body: dict[str, Any]) -> str:
    """What the endpoint says to a request."""
    shown = body["messages"][1]["content"][0]["image_url"]["url"]
    digest = hashlib.sha256(f"{shown} {body['seed']}".encode()).hexdigest()
    return f"The image features a {digest[:8]} in the {digest[8:16]}. It is {digest[16:24]}. Nothing else is seen."


def shown_picture(body: dict[str, Any]) -> np.ndarray:
    kind, data = body["messages"][1]["content"][0]["image_url"]["url"].split(",")
    assert kind == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def is_picture(body: dict[str, Any], picture: np.ndarray) -> bool:
    shown = shown_picture(body)
    return shown.shape == picture.shape and bool(np.abs(shown.astype(int) - picture).mean() < 4)


@contextmanager
def serving(**kwargs: Any) -> Iterator[Endpoint]:
    server = Endpoint(**kwargs)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        # For connections that are kept open: the end of the listening socket is not theirs.
        server.is_gone = True
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A running endpoint, and a client in this process that makes short pauses."""
    monkeypatch.setattr(caption_endpoint, "FIRST_WAIT_S", 0.01)
    monkeypatch.setattr(caption_endpoint, "LONGEST_WAIT_S", 0.05)
    monkeypatch.setattr(caption_endpoint, "CHECK_PATIENCE_S", 0.3)
    with serving() as server:
        yield server


def connect(server: Endpoint, *, model: str = MODEL, max_side_px: int = 672, **settings: Any) -> CaptionEndpoint:
    """A client of the server; `notices` of it keeps what it was told."""
    cfg = EndpointConfig(**{"base_url": server.base_url, "timeout_s": 5, "give_up_after_s": 20, **settings})
    notices: list[str] = []
    client = CaptionEndpoint(
        cfg,
        model=model,
        sampling=SamplingSettings(),
        max_side_px=max_side_px,
        clean=clean_caption,
        notify=notices.append,
    )
    client.notices = notices  # type: ignore[attr-defined]
    return client


@pytest.fixture
def pictures(make_picture: Callable[..., np.ndarray]) -> list[np.ndarray]:
    return [make_picture(32, 40, seed) for seed in range(8)]


KEYS = [f"k{index}" for index in range(8)]


def undisturbed(pictures: list[np.ndarray], *, seed: int = 0) -> list[Answer]:
    """What an endpoint without faults is made to say."""
    with serving() as server:
        return connect(server).ask(pictures, keys=KEYS[: len(pictures)], seed=seed)


def test_the_request_is_the_specified_prompt_with_the_picture_and_its_own_seed(
    endpoint: Endpoint, make_picture: Callable[..., np.ndarray]
) -> None:
    picture = make_picture(32, 40)
    (answer,) = connect(endpoint).ask([picture], keys=["k"], seed=3)
    (body,) = endpoint.bodies
    assert answer == Answer(clean_caption(words_of(body)))
    system, user = body.pop("messages")
    assert system == {"role": "system", "content": SYSTEM}
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert user["content"][1]["text"] == QUESTION
    seed = request_seed(3, "k", 0)
    assert 0 <= seed < 2**31
    assert body == {"model": MODEL, "temperature": 0.2, "top_p": 0.7, "max_tokens": 512, "seed": seed}


def test_the_picture_arrives_as_it_is_unless_it_is_larger_than_the_limit(
    endpoint: Endpoint, make_picture: Callable[..., np.ndarray]
) -> None:
    picture = make_picture(60, 90)
    for max_side_px in (90, 30):
        connect(endpoint, max_side_px=max_side_px).ask([picture], keys=["k"], seed=0)
    assert is_picture(endpoint.bodies[0], picture)
    assert shown_picture(endpoint.bodies[1]).shape == (20, 30, 3)


def test_captions_do_not_depend_on_how_many_are_asked_at_once(endpoint: Endpoint, pictures: list[np.ndarray]) -> None:
    answers = [connect(endpoint, max_in_flight=n).ask(pictures, keys=KEYS, seed=0) for n in (1, 3, 16)]
    assert answers[0] == answers[1] == answers[2]
    assert len({answer.caption for answer in answers[0]}) == 8
    assert connect(endpoint).ask(pictures[:1], keys=KEYS[:1], seed=1) != answers[0][:1]


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_requests_are_in_flight_than_allowed(endpoint: Endpoint, pictures: list[np.ndarray], most: int) -> None:
    endpoint.answer_s = 0.02
    endpoint.fault = lambda times, body: "500" if times == 0 else None
    connect(endpoint, max_in_flight=most).ask(pictures, keys=KEYS, seed=0)
    assert endpoint.most_active == most


PASSING = [*sorted(SERVER_ERRORS), "silent", "cut", "half json", "page", "no choices", "slow"]


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_by_itself_changes_no_caption(endpoint: Endpoint, pictures: list[np.ndarray], fault: str) -> None:
    endpoint.fault = lambda times, body: fault if times < 2 else None
    timeout_s = 0.4 if fault == "slow" else 5
    answers = connect(endpoint, timeout_s=timeout_s).ask(pictures[:3], keys=KEYS[:3], seed=0)
    assert answers == undisturbed(pictures[:3])
    assert min(endpoint.asked.values()) >= 3
    assert len(endpoint.asked) == 3


def test_every_failure_in_turn_changes_no_caption(endpoint: Endpoint, pictures: list[np.ndarray]) -> None:
    faults = itertools.cycle(PASSING)
    endpoint.fault = lambda times, body: next(faults) if times < 3 else None
    client = connect(endpoint, timeout_s=0.4, max_in_flight=3)
    assert client.ask(pictures, keys=KEYS, seed=0) == undisturbed(pictures)


def in_two_seconds() -> str:
    return format_datetime(datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=2), usegmt=True)


@pytest.mark.parametrize("retry_after", ["1", "date"])
def test_nobody_asks_before_the_endpoint_wants_to_be_asked(
    endpoint: Endpoint, pictures: list[np.ndarray], retry_after: str
) -> None:
    def busy_once(times: int, body: dict[str, Any]) -> str | None:
        endpoint.retry_after = in_two_seconds() if retry_after == "date" else retry_after
        return "429" if len(endpoint.times) == 1 else None

    endpoint.fault = busy_once
    connect(endpoint, max_in_flight=1).ask(pictures[:2], keys=KEYS[:2], seed=0)
    assert endpoint.times[1] - endpoint.times[0] > 0.95
    assert len(endpoint.times) == 3


def test_a_senseless_retry_after_is_no_obstacle(endpoint: Endpoint, pictures: list[np.ndarray]) -> None:
    endpoint.fault = lambda times, body: "503" if times == 0 else None
    for endpoint.retry_after in ("soon", "-5", "nan", "Thu, 01 Jan 1970 00:00:00 GMT"):
        assert connect(endpoint).ask(pictures[:1], keys=KEYS[:1], seed=0)[0].caption


def test_an_endpoint_that_goes_down_is_waited_for(
    endpoint: Endpoint, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(caption_endpoint, "FIRST_NOTICE_S", 0.1)
    with serving(answer_s=0.05) as first:
        first.fault = lambda times, body: "silent" if first.num_answered >= 3 else None
        port = first.server_address[1]
        client = connect(first, max_in_flight=2)
        answers: list[Answer] = []
        run = threading.Thread(target=lambda: answers.extend(client.ask(pictures, keys=KEYS, seed=0)))
        run.start()
        while first.num_answered < 3:
            time.sleep(0.01)
    time.sleep(0.8)
    assert run.is_alive(), "it must wait"
    with serving(port=port) as second:
        run.join(timeout=10)
    assert answers == undisturbed(pictures)
    assert 3 <= first.num_answered <= 4
    assert second.num_answered == 8 - first.num_answered, "what was answered is not asked again"
    notices = client.notices  # type: ignore[attr-defined]
    assert 3 <= len(notices) <= 6, "at growing intervals"
    assert all("no answer from" in notice and "waiting, for" in notice for notice in notices[:-1])
    assert "answers again after" in notices[-1]


def test_an_endpoint_that_stays_silent_ends_the_job(endpoint: Endpoint, pictures: list[np.ndarray]) -> None:
    endpoint.fault = lambda times, body: "503"
    started = time.monotonic()
    with pytest.raises(
        EndpointDownError,
        match=r"no answer from http://127.*/v1 for . s \(at last HTTP 503: .*no luck.*\); run the same command",
    ):
        connect(endpoint, give_up_after_s=0.4).ask(pictures, keys=KEYS, seed=0)
    assert 0.4 < time.monotonic() - started < 15
    assert issubclass(EndpointDownError, RuntimeError)


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_picture_that_is_refused_costs_itself_only(
    endpoint: Endpoint, pictures: list[np.ndarray], status: str
) -> None:
    endpoint.fault = lambda times, body: status if is_picture(body, pictures[1]) else None
    answers = connect(endpoint).ask(pictures[:3], keys=KEYS[:3], seed=0)
    assert [bool(answer.caption) for answer in answers] == [True, False, True]
    assert answers[1].refusal.startswith(f"HTTP {status}: ")
    assert list(endpoint.asked.values()) == [1, 1, 1]


@pytest.mark.parametrize("count", [1, 4])
def test_a_picture_that_the_endpoint_always_fails_on_is_refused_not_waited_for(
    endpoint: Endpoint, pictures: list[np.ndarray], count: int
) -> None:
    endpoint.fault = lambda times, body: "500" if is_picture(body, pictures[0]) else None
    answers = connect(endpoint).ask(pictures[:count], keys=KEYS[:count], seed=0)
    assert answers[0].refusal.startswith(f"{OWN_FAILURES} failures while others were answered: HTTP 500")
    assert all(answer.caption for answer in answers[1:])


@pytest.mark.parametrize(("status", "advice"), [("403", "api_key_env"), ("404", "correct caption.endpoint.base_url")])
def test_what_only_the_user_can_change_ends_the_job(
    endpoint: Endpoint, pictures: list[np.ndarray], status: str, advice: str
) -> None:
    endpoint.fault = lambda times, body: status
    with pytest.raises(RequestError, match=f"HTTP {status}.*{advice}"):
        connect(endpoint).ask(pictures, keys=KEYS, seed=0)


@pytest.mark.parametrize("nothing", ["empty", "null", "blank", "dots"])
def test_a_picture_about_which_nothing_was_said_is_asked_about_again(
    endpoint: Endpoint, pictures: list[np.ndarray], nothing: str
) -> None:
    first = request_seed(0, "k0", 0)
    endpoint.fault = lambda times, body: nothing if body["seed"] == first else None
    (answer,) = connect(endpoint).ask(pictures[:1], keys=["k0"], seed=0)
    assert [body["seed"] for body in endpoint.bodies] == [first, request_seed(0, "k0", 1)]
    assert answer.caption == clean_caption(words_of(endpoint.bodies[1]))


def test_a_picture_about_which_nothing_is_ever_said_has_no_caption(
    endpoint: Endpoint, pictures: list[np.ndarray]
) -> None:
    endpoint.fault = lambda times, body: "empty" if is_picture(body, pictures[0]) else None
    answers = connect(endpoint).ask(pictures[:2], keys=KEYS[:2], seed=0)
    assert answers[0] == Answer()
    assert answers[1].caption
    assert len({body["seed"] for body in endpoint.bodies}) == EMPTY_ATTEMPTS + 1


def test_half_a_character_is_replaced(endpoint: Endpoint, pictures: list[np.ndarray]) -> None:
    endpoint.fault = lambda times, body: "half a pair"
    (answer,) = connect(endpoint).ask(pictures[:1], keys=["k"], seed=0)
    assert answer == Answer("A ? cat.")


def test_the_key_comes_from_its_variable_and_is_never_repeated(
    endpoint: Endpoint, pictures: list[np.ndarray], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("CAPTION_KEY", f" {KEY}\n")
    endpoint.key = KEY
    client = connect(endpoint, api_key_env="CAPTION_KEY", give_up_after_s=0.3)
    client.check()
    endpoint.fault = lambda times, body: "400"
    (refused,) = client.ask(pictures[:1], keys=["k"], seed=0)
    assert "no luck, Bearer ***" in refused.refusal
    told = [repr(client), repr(client.cfg), refused.refusal]
    for fault in ("403", "404", "500", "silent"):
        endpoint.fault = lambda times, body, fault=fault: fault
        with pytest.raises((RequestError, EndpointDownError)) as caught:
            client.ask(pictures[:1], keys=["k"], seed=0)
        told += ["".join(traceback.format_exception(caught.value)), repr(pickle.dumps(caught.value))]
    monkeypatch.setenv("CAPTION_KEY", "Another+Secret")
    with pytest.raises(RequestError, match=r"HTTP 401.*put a valid key into CAPTION_KEY") as caught:
        client.check()
    told += [str(caught.value), caplog.text, *client.notices]  # type: ignore[attr-defined]
    assert not [text for text in told if KEY in text or "Another+Secret" in text]
    assert "HTTP Request: POST" in caplog.text, "the log was looked at"


@pytest.mark.parametrize(
    ("value", "came"), [(None, "nothing"), ("", "nothing"), ("a\nb", "unprintable"), ("\xfc", "unprintable")]
)
def test_a_key_that_cannot_be_sent_is_named_by_its_variable(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, value: str | None, came: str
) -> None:
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("CAPTION_KEY", value)
    with pytest.raises(RequestError, match=f"CAPTION_KEY that caption.endpoint.api_key_env names holds {came}"):
        connect(endpoint, api_key_env="CAPTION_KEY").check()


def test_a_healthy_endpoint_is_recognised_and_one_hiccup_forgiven(endpoint: Endpoint) -> None:
    connect(endpoint).check()
    endpoint.fault = lambda times, body: "503" if times == 1 else None
    connect(endpoint).check()
    assert [body["max_tokens"] for body in endpoint.bodies] == [512] * 3, "a limit that is too high is found out here"


def test_an_endpoint_that_cannot_be_used_is_named_before_any_work(endpoint: Endpoint) -> None:
    with pytest.raises(RequestError, match=r"serves other, tiny-vision; caption.model is 'llava'"):
        connect(endpoint, model="llava").check()
    endpoint.fault = lambda times, body: "400"
    with pytest.raises(RequestError, match=r"does not take our pictures \(HTTP 400: .*; serve a model that sees"):
        connect(endpoint).check()
    endpoint.models_status = 404
    with pytest.raises(RequestError, match=r"v1/models answered HTTP 404.*correct caption.endpoint.base_url"):
        connect(endpoint).check()
    endpoint.models_status = 500
    with pytest.raises(RequestError, match=r"start the endpoint or correct caption.endpoint.base_url"):
        connect(endpoint).check()
    with serving() as gone:
        client = connect(gone)
    with pytest.raises(RequestError, match=r"ConnectError.*start the endpoint"):
        client.check()


@pytest.mark.parametrize(
    "base_url", ["ftp://host/v1", "host:8000/v1", "http:///v1", "http://me:sk-1@host/v1", "http://host/v1?key=sk-1"]
)
def test_an_address_that_is_none_or_holds_a_key_is_refused_without_repeating_the_key(base_url: str) -> None:
    with pytest.raises(ValueError, match="give http://host:port/v1") as caught:
        EndpointConfig(base_url=base_url)
    assert "sk-1" not in caught.value.errors()[0]["msg"]  # type: ignore[attr-defined]


def test_a_slash_at_the_end_of_the_address_does_not_matter() -> None:
    assert EndpointConfig(base_url="http://host:8000/v1/").base_url == "http://host:8000/v1"


def stage_config(server: Endpoint, **settings: Any) -> CaptionConfig:
    return CaptionConfig(mode="endpoint", model=MODEL, endpoint=EndpointConfig(base_url=server.base_url, **settings))


def crops(make_crop: Callable[..., Any], make_picture: Callable[..., np.ndarray], shard: int) -> list[Sample]:
    """A shard: three crops to describe, one that has its caption, one that is lost already."""
    hq = [make_picture(32, 32, 10 * shard + index).tobytes() for index in range(3)]
    made = [make_crop(f"{shard}-{index}", shard=shard, hq=pixels) for index, pixels in enumerate(hq)]
    return [
        *made,
        make_crop(f"{shard}-3", shard=shard, caption="A quiet harbour."),
        make_crop(f"{shard}-4", shard=shard, problem="too flat: x", hq=b""),
    ]


def test_the_stage_asks_only_about_usable_crops_without_a_caption(
    endpoint: Endpoint, make_crop: Callable[..., Any], make_picture: Callable[..., np.ndarray]
) -> None:
    given = crops(make_crop, make_picture, 0)
    rows = read_table(EndpointCaption(stage_config(endpoint), seed=0)(to_table(given)))
    assert len(endpoint.bodies) == 3
    assert len({row.caption for row in rows[:3]}) == 3
    assert rows[3:] == given[3:]
    all_new = stage_config(endpoint).model_copy(update={"reuse_existing": False})
    rows = read_table(EndpointCaption(all_new, seed=0)(to_table(given)))
    assert len(endpoint.bodies) == 7
    assert rows[3].caption.startswith("A ")
    assert rows[3].caption != "A quiet harbour."


@pytest.mark.parametrize(
    ("fault", "problem"),
    [("400", "caption refused: HTTP 400: "), ("empty", "empty caption: the model said nothing, 4 times")],
)
def test_the_stage_sends_what_has_no_caption_to_quarantine(
    endpoint: Endpoint,
    make_crop: Callable[..., Any],
    make_picture: Callable[..., np.ndarray],
    fault: str,
    problem: str,
) -> None:
    lost = make_picture(32, 32, 1)
    endpoint.fault = lambda times, body: fault if is_picture(body, lost) else None
    table = to_table(crops(make_crop, make_picture, 0))
    rows = read_table(EndpointCaption(stage_config(endpoint), seed=0)(table))
    assert [row.problem.startswith(problem) for row in rows] == [False, True, False, False, False]
    assert [bool(row.caption) for row in rows] == [True, False, True, True, False]
    assert rows[1].hq == b""


def test_the_stage_is_checked_before_any_work(endpoint: Endpoint) -> None:
    check_captioner(stage_config(endpoint))
    with pytest.raises(RequestError, match=r"caption\.model is 'another'"):
        check_captioner(stage_config(endpoint).model_copy(update={"model": "another"}))


@pytest.mark.ray
def test_two_actors_get_the_captions_of_this_process_from_a_failing_endpoint(
    local_ray: None, endpoint: Endpoint, make_crop: Callable[..., Any], make_picture: Callable[..., np.ndarray]
) -> None:
    tables = [to_table(crops(make_crop, make_picture, shard)) for shard in range(3)]
    here = [row for t in tables for row in read_table(EndpointCaption(stage_config(endpoint), seed=0)(t))]
    faults = itertools.cycle(["500", "cut", "429", "page", "silent"])
    endpoint.asked.clear()
    endpoint.most_active = 0
    endpoint.fault = lambda times, body: next(faults) if times == 0 else None
    workers = WorkersConfig(num_cpus=0.5, caption_actors=2)
    ds = caption_stage(ray.data.from_arrow(tables), stage_config(endpoint, max_in_flight=2), workers, seed=0)
    rows = [Sample(**row) for row in ds.iter_rows()]
    assert sorted(rows, key=lambda row: row.key) == here
    assert 2 <= endpoint.most_active <= 4
    assert set(endpoint.asked.values()) == {2}


@pytest.mark.ray
def test_a_long_outage_does_not_look_like_a_pipeline_that_is_stuck(
    local_ray: None, endpoint: Endpoint, make_crop: Callable[..., Any]
) -> None:
    endpoint.retry_after = "2"
    endpoint.fault = lambda times, body: "503" if times == 0 else None
    ds = ray.data.from_arrow([to_table([make_crop("a")])])
    ds.context.execution_no_progress_timeout_s = 1.0
    ds = caption_stage(ds, stage_config(endpoint), WorkersConfig(num_cpus=0.5), seed=0)
    (row,) = ds.iter_rows()
    assert row["caption"].startswith("A ")
    assert endpoint.times[1] - endpoint.times[0] > 1.95
