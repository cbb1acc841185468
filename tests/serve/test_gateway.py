from __future__ import annotations

import asyncio
import logging
import re
import subprocess
import sys
import time
from dataclasses import asdict, replace
from io import BytesIO
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from faithdiff.errors import InputError
from faithdiff.picture_files import OutputOptions
from faithdiff.request import MAX_SCALE, ColorFix, RestorationRequest, StartFrom
from serve import images
from serve.estimate import Rates
from serve.form import UpscaleRequest
from serve.gateway import GatewayConfig, Unavailable
from serve.images import PictureLimits
from serve.intake import IntakeConfig
from serve.restorer import Busy

pytestmark = pytest.mark.anyio

JSON_TYPE = "application/json"
JSON = {"Content-Type": JSON_TYPE}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def _problem(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert {"type", "title", "status", "detail", "instance"} <= problem.keys()
    assert problem["status"] == status
    assert problem["detail"]
    return problem


async def test_a_picture_comes_back_as_png_of_exactly_scale_times_its_size(
    connect: Any, restorer: Any, picture: np.ndarray, png: bytes
) -> None:
    restorer.info = replace(restorer.info, version="faithdiff-nano/3", manifest_digest="sha256:abc")
    async with connect() as client:
        response = await client.post("/v1/upscale", files={"picture": ("a.png", png)}, data={"scale": "3"})
    assert response.status_code == 200
    assert response.headers["content-type"] == "image/png"
    assert response.headers["x-model-version"] == "faithdiff-nano/3"
    assert response.headers["x-manifest-digest"] == "sha256:abc"
    restored = np.asarray(Image.open(BytesIO(response.content)))
    assert np.array_equal(restored, picture.repeat(3, axis=0).repeat(3, axis=1))


async def test_every_field_reaches_the_restorer(connect: Any, restorer: Any, png: bytes) -> None:
    fields = {
        "scale": 2, "prompt": "A cat, \u65e5\u672c.", "negative_prompt": "blur", "num_inference_steps": 7,
        "guidance_scale": 2.5, "seed": 2**63 - 1, "start_from": "noise", "color_fix": "wavelet",
        "output_format": "jpeg", "output_quality": 70, "keep_metadata": False,
        "auto_prompt": False,
    }  # fmt: skip
    assert fields.keys() == UpscaleRequest.model_fields.keys()
    async with connect() as client:
        sent = {name: str(value) for name, value in fields.items()}
        response = await client.post("/v1/upscale", files={"picture": png}, data=sent)
    assert response.status_code == 200
    assert restorer.requests == [UpscaleRequest.model_validate(fields)]


async def test_without_fields_the_defaults_are_those_of_the_pipeline(connect: Any, restorer: Any, png: bytes) -> None:
    async with connect() as client:
        response = await client.post("/v1/upscale", files={"image": png})
    assert response.status_code == 200
    assert response.headers["x-manifest-digest"] == "none"
    pipeline = RestorationRequest()
    settings = restorer.requests[0].restoration_fields()
    assert settings == {name: getattr(pipeline, name) for name in settings}
    options = OutputOptions()
    assert restorer.requests[0].output_options() == options
    others = {"output_format", "output_quality", "keep_metadata", "auto_prompt"}
    assert UpscaleRequest.model_fields.keys() - settings.keys() == others


def test_the_form_allows_what_the_model_allows() -> None:
    schema = UpscaleRequest.model_json_schema()["properties"]
    assert schema["scale"]["maximum"] == MAX_SCALE
    assert schema["start_from"]["enum"] == list(get_args(StartFrom))
    assert schema["color_fix"]["enum"] == list(get_args(ColorFix))
    for name in ("num_inference_steps", "guidance_scale", "seed"):
        for bound in ("minimum", "maximum"):
            RestorationRequest(**{name: schema[name][bound]})


@pytest.mark.parametrize(("fields", "says"), [
    ({"scale": "0"}, "scale: got '0'; input should be greater than or equal to 1"),
    ({"scale": "17"}, "less than or equal to 16"),
    ({"scale": "2.5"}, "valid integer"),
    ({"scale": ""}, "scale: got ''"),
    ({"sclae": "2"}, "sclae: no such field; did you mean 'scale'?"),
    ({"url": "http://10.0.0.1/"}, "url: no such field"),
    ({"seed": "-1"}, "seed"),
    ({"seed": "9" * 30}, "seed"),
    ({"guidance_scale": "nan"}, "guidance_scale"),
    ({"guidance_scale": "inf"}, "guidance_scale"),
    ({"start_from": "hq"}, "'lq' or 'noise'"),
    ({"num_inference_steps": "0", "color_fix": "none!"}, "color_fix"),
    ({"prompt": "x" * 5000}, "at most 4000 characters"),
    ({"scale": ["2", "3"]}, "scale: given more than once"),
    ({"output_format": "gif"}, "'png', 'jpeg', 'webp' or 'tiff'"),
    ({"output_quality": "0"}, "output_quality"),
    ({"keep_metadata": "perhaps"}, "keep_metadata"),
    ({"prompt": "a\0b"}, "prompt"),
    ({"priority": "9"}, "priority: no such field"),
])  # fmt: skip
async def test_wrong_fields_are_named_all_at_once(
    connect: Any, restorer: Any, png: bytes, fields: dict[str, Any], says: str
) -> None:
    async with connect() as client:
        response = await client.post("/v1/upscale", files={"picture": png}, data=fields)
    problem = _problem(response, 422)
    assert says in problem["detail"]
    assert {error["field"] for error in problem["errors"]} == fields.keys()
    assert len(response.content) < 3000
    assert restorer.requests == []


async def test_a_request_without_a_picture_says_where_it_belongs(connect: Any, png: bytes) -> None:
    async with connect() as client:
        for sent in ({"files": {"scale": (None, "2")}}, {"files": {"file": png}}, {"files": {"picture": (None, "x")}}):
            problem = _problem(await client.post("/v1/upscale", **sent), 422)
            assert "send the picture as a file in field 'picture'" in problem["detail"]
        two = [("picture", ("a", png)), ("picture", ("b", png))]
        _problem(await client.post("/v1/upscale", files=two), 400)


async def test_a_body_that_is_not_multipart_is_refused(connect: Any, png: bytes) -> None:
    async with connect() as client:
        for content_type in ("image/png", "application/json", "application/x-www-form-urlencoded", ""):
            response = await client.post("/v1/upscale", content=png, headers={"content-type": content_type})
            assert "send multipart/form-data" in _problem(response, 415)["detail"]


@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=x"])
@pytest.mark.parametrize("body", [b"", b"garbage", b"--x\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\nhello"])
async def test_broken_multipart_is_a_problem(connect: Any, content_type: str, body: bytes) -> None:
    async with connect() as client:
        response = await client.post("/v1/upscale", content=body, headers={"content-type": content_type})
    assert response.status_code in {400, 422}
    _problem(response, response.status_code)


async def test_too_many_bytes_are_refused_whether_announced_or_not(connect: Any, png: bytes) -> None:
    cfg = GatewayConfig(limits=PictureLimits(max_upload_bytes=len(png) - 1))
    num_sent = 0

    async def endless() -> Any:
        nonlocal num_sent
        yield b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n'
        for _ in range(10_000):
            num_sent += 1
            yield b"\0" * 10_000

    async with connect(cfg) as client:
        _problem(await client.post("/v1/upscale", files={"picture": png}), 413)
        _problem(await client.post("/v1/upscale", files={"picture": b"\0" * 10**6}), 413)
        headers = {"content-type": "multipart/form-data; boundary=x"}
        _problem(await client.post("/v1/upscale", content=endless(), headers=headers), 413)
    assert num_sent < 100


@pytest.mark.parametrize(("content", "status"), [(b"hello", 415), (b"", 415), (None, 422)])
async def test_what_cannot_be_read_as_a_picture_is_a_problem(
    connect: Any, restorer: Any, png: bytes, content: bytes | None, status: int
) -> None:
    upload = png[: len(png) // 2] if content is None else content
    async with connect() as client:
        _problem(await client.post("/v1/upscale", files={"picture": upload}), status)
    assert restorer.requests == []


async def test_a_result_over_the_limit_is_refused_before_work_starts(connect: Any, restorer: Any, png: bytes) -> None:
    cfg = GatewayConfig(limits=PictureLimits(max_output_px=24 * 32 * 15))
    async with connect(cfg) as client:
        problem = _problem(await client.post("/v1/upscale", files={"picture": png}, data={"scale": "4"}), 413)
    assert "take a scale of at most 3" in problem["detail"]
    assert restorer.requests == []


@pytest.mark.parametrize(("error", "status", "says"), [
    (InputError("request: tile_px is 3"), 422, "tile_px is 3"),
    (Busy("restorer: 9 pictures are in hand already"), 503, "in hand already"),
    (Unavailable("restorer: ActorDiedError"), 503, "ActorDiedError"),
    (RuntimeError("secret path /srv/x"), 500, "its log says more"),
])  # fmt: skip
async def test_errors_of_the_restorer_become_problems(
    connect: Any, restorer: Any, png: bytes, error: Exception, status: int, says: str
) -> None:
    restorer.error = error
    async with connect() as client:
        response = await client.post("/v1/upscale", files={"picture": png})
    problem = _problem(response, status)
    assert says in problem["detail"]
    assert "secret" not in response.text
    assert ("retry-after" in response.headers) is (status == 503)


async def test_a_restoration_that_takes_too_long_is_stopped(connect: Any, restorer: Any, png: bytes) -> None:
    restorer.delay_s = 30.0
    async with connect(GatewayConfig(request_timeout_s=0.1)) as client:
        _problem(await client.post("/v1/upscale", files={"picture": png}), 504)
    assert restorer.num_cancelled == 1


async def test_health_and_readiness_are_different_things(connect: Any, store: Any, restorer: Any) -> None:
    async with connect() as client:
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        assert "no replica" in _problem(await client.get("/readyz"), 503)["detail"]
        assert (await client.get("/v1/models")).json() == {"models": []}
        store.report_replica("one", {"replica": "one", "version": "nano"})
        assert (await client.get("/readyz")).json() == {
            "status": "ready",
            "model_version": "nano",
            "has_captioner": False,
        }
        store.withdraw_replica("one")
        _problem(await client.get("/readyz"), 503)


async def test_a_service_that_starts_from_zero_is_ready_while_it_sleeps(connect: Any) -> None:
    async with connect(GatewayConfig(starts_from_zero=True)) as client:
        assert (await client.get("/readyz")).json() == {
            "status": "asleep",
            "model_version": None,
            "has_captioner": False,
        }


async def test_models_tells_versions_lineage_cold_start_and_replicas(connect: Any, store: Any, restorer: Any) -> None:
    for name, version in (("a", "faithdiff/1"), ("b", "faithdiff/2"), ("c", "faithdiff/2")):
        store.report_replica(name, {"replica": name, **asdict(restorer.info), "version": version, "entries": 3})
    async with connect() as client:
        models = (await client.get("/v1/models")).json()["models"]
    assert models[1] == {
        "model": "nano", "version": "faithdiff/2", "manifest_digest": None, "device": "cpu", "dtype": "float32",
        "download_s": 0.1, "load_s": 0.2, "compile_s": 0.0, "num_replicas": 2,
    }  # fmt: skip
    assert [model["num_replicas"] for model in models] == [1, 2]


async def test_a_result_that_no_replica_has_the_memory_for_is_refused_before_work_starts(
    connect: Any, store: Any, png: bytes
) -> None:
    for name, most in (("small", 0.001), ("large", 0.02)):
        store.report_replica(name, {"replica": name, "version": "nano", "max_megapixels": most})
    async with connect() as client:
        for path in ("/v1/upscale", "/v1/jobs", "/v1/estimate"):
            fits = await client.post(path, files={"picture": png}, data={"scale": "5"})
            assert fits.status_code < 300, fits.text
            problem = _problem(await client.post(path, files={"picture": png}, data={"scale": "6"}), 413)
            assert "192x144 px" in problem["detail"]
    assert (await asyncio.to_thread(store.backlog)).num_queued == 1


async def test_a_captioner_that_is_not_there_or_would_not_be_heard_is_no_field(connect: Any, png: bytes) -> None:
    async with connect() as client:
        answer = await client.post("/v1/upscale", files={"picture": png}, data={"auto_prompt": "true"})
        assert "no captioner" in _problem(answer, 422)["detail"]
    with_captioner = GatewayConfig(intake=IntakeConfig(has_captioner=True), starts_from_zero=True)
    async with connect(with_captioner) as client:
        assert (await client.get("/readyz")).json()["has_captioner"]
        fields = {"auto_prompt": "true", "prompt": "A cat."}
        answer = await client.post("/v1/upscale", files={"picture": png}, data=fields)
        assert "prompt is given as well" in _problem(answer, 422)["detail"]
        assert (
            await client.post("/v1/upscale", files={"picture": png}, data={"auto_prompt": "true"})
        ).status_code == 200


@pytest.mark.parametrize(("output_format", "media_type"), [
    ("png", "image/png"), ("jpeg", "image/jpeg"), ("webp", "image/webp"), ("tiff", "image/tiff"),
])  # fmt: skip
async def test_the_client_chooses_the_file_format(
    connect: Any, png: bytes, output_format: str, media_type: str
) -> None:
    async with connect() as client:
        fields = {"scale": "2", "output_format": output_format}
        answer = await client.post("/v1/upscale", files={"picture": png}, data=fields)
    assert answer.headers["content-type"] == media_type
    restored = Image.open(BytesIO(answer.content))
    assert (restored.format, restored.size) == (output_format.upper(), (64, 48))


async def test_an_estimate_is_the_same_for_a_picture_and_for_its_size(connect: Any, store: Any, png: bytes) -> None:
    cfg = GatewayConfig(rates=Rates(price_per_device_second=0.5, currency="EUR", megapixel_steps_per_s=2.0))
    async with connect(cfg) as client:
        by_form = await client.post("/v1/estimate", files={"picture": png}, data={"scale": "8"})
        by_json = await client.post("/v1/estimate", json={"width": 32, "height": 24, "scale": 8})
    megapixels = 32 * 24 * 64 / 1e6
    seconds = megapixels * 20 / 2.0
    assert by_form.json() == by_json.json() == {
        "input": {"width": 32, "height": 24}, "output": {"width": 256, "height": 192}, "megapixels": megapixels,
        "tiles": 1, "megapixel_steps": pytest.approx(megapixels * 20), "device_seconds": round(seconds, 3),
        "wait_seconds": 0.0, "price": pytest.approx(seconds * 0.5, abs=1e-6), "currency": "EUR",
    }  # fmt: skip


async def test_an_estimate_knows_how_fast_the_replicas_are_and_what_waits(connect: Any, store: Any, png: bytes) -> None:
    for owner in ("a", "b"):
        info = {"megapixel_steps_per_s": 0.5, "tile_px": 64, "tile_stride_fraction": 0.5}
        store.report_replica(owner, info)
    async with connect() as client:
        await client.post("/v1/jobs", files={"picture": png})
        found = (await client.post("/v1/estimate", json={"width": 32, "height": 24})).json()
    work = 32 * 24 * 16 / 1e6 * 20
    assert found["device_seconds"] == round(work / 0.5, 3)
    assert found["wait_seconds"] == round(work / (2 * 0.5), 3)
    assert found["tiles"] == 3 * 2


@pytest.mark.parametrize(("body", "says"), [
    ({}, "width"), ({"width": 0, "height": 1}, "width"), ({"width": "10", "height": 10}, "width"),
    ({"width": 10, "height": 10, "scale": "2"}, "scale"), ({"width": 10, "height": 10, "x": 1}, "no such field"),
    ([], "body"), ("x", "body"),
])  # fmt: skip
async def test_wrong_json_is_named(connect: Any, body: Any, says: str) -> None:
    async with connect() as client:
        assert says in _problem(await client.post("/v1/estimate", json=body), 422)["detail"]


async def test_an_estimate_refuses_what_the_service_would_refuse(connect: Any) -> None:
    cfg = GatewayConfig(limits=PictureLimits(max_input_px=1000, max_output_px=4000))
    async with connect(cfg) as client:
        _problem(await client.post("/v1/estimate", json={"width": 40, "height": 30}), 413)
        _problem(await client.post("/v1/estimate", json={"width": 30, "height": 30}), 413)
        answer = await client.post("/v1/estimate", json={"width": 30, "height": 30, "scale": 2})
        assert answer.status_code == 200
        _problem(await client.post("/v1/estimate", content=b"x" * 100_000, headers=JSON), 413)
        _problem(await client.post("/v1/estimate", content=b"{", headers=JSON), 422)
        _problem(await client.post("/v1/estimate", content=b"{}", headers={"Content-Type": "text/plain"}), 415)


async def test_an_upload_that_does_not_arrive_is_given_up(connect: Any) -> None:
    async def stuck() -> Any:
        yield b'--x\r\nContent-Disposition: form-data; name="picture"; filename="a"\r\n\r\n'
        await asyncio.sleep(30)

    cfg = GatewayConfig(intake=IntakeConfig(upload_timeout_s=0.1))
    async with connect(cfg) as client:
        for path, content_type in (("/v1/upscale", "multipart/form-data; boundary=x"), ("/v1/estimate", JSON_TYPE)):
            answer = await client.post(path, content=stuck(), headers={"Content-Type": content_type})
            assert _problem(answer, 408)["type"].endswith(":upload-too-slow")


async def test_only_so_many_pictures_are_in_memory_at_once(
    connect: Any, png: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most, read = 0, 0, images.read_picture

    def counted(*args: Any) -> Any:
        nonlocal now, most
        now += 1
        most = max(most, now)
        time.sleep(0.02)
        now -= 1
        return read(*args)

    monkeypatch.setattr(images, "read_picture", counted)
    async with connect(GatewayConfig(intake=IntakeConfig(max_pictures_at_once=2))) as client:
        answers = await asyncio.gather(*(client.post("/v1/upscale", files={"picture": png}) for _ in range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert most == 2


async def test_every_answer_carries_ids_and_security_headers(connect: Any, restorer: Any, png: bytes) -> None:
    async with connect() as client:
        answers = [
            await client.get("/healthz"),
            await client.get("/v1/jobs"),
            await client.get("/nowhere"),
            await client.put("/v1/jobs"),
            await client.post("/v1/upscale", files={"picture": png}),
        ]
        restorer.error = RuntimeError("broken")
        answers.append(await client.post("/v1/upscale", files={"picture": png}))
    assert [answer.status_code for answer in answers] == [200, 200, 404, 405, 200, 500]
    for answer in answers:
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["x-frame-options"] == "DENY"
        assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
        version, trace_id, span_id, flags = answer.headers["traceparent"].split("-")
        assert (version, len(trace_id), span_id, flags) == ("00", 32, answer.headers["x-request-id"], "01")
    assert len({answer.headers["x-request-id"] for answer in answers}) == len(answers)
    assert [answer.headers.get("cache-control") for answer in answers[1:2]] == ["no-store"]


@pytest.mark.parametrize("sent", [
    "", "x", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    "00-0AF7651916CD43DD8448EB211C80319C-b7ad6b7169203331-01",
])  # fmt: skip
async def test_what_is_no_traceparent_starts_a_trace(connect: Any, sent: str) -> None:
    async with connect() as client:
        answer = await client.get("/healthz", headers={"traceparent": sent})
    assert re.fullmatch("00-[0-9a-f]{32}-[0-9a-f]{16}-01", answer.headers["traceparent"])
    assert "0af7651916cd43dd" not in answer.headers["traceparent"]


async def test_requests_are_logged_with_their_ids_and_nothing_is_forged(
    connect: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "serve")
    async with connect() as client:
        await client.get("/a%0d%0aERROR: forged?token=hush")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "serve.envelope"]
    assert line.startswith("request: GET /a\\r\\nERROR: forged answered 404 in ")
    assert "hush" not in line


async def test_head_is_answered_where_get_is(connect: Any) -> None:
    async with connect(GatewayConfig(starts_from_zero=True)) as client:
        for path in ("/healthz", "/readyz"):
            answer = await client.head(path)
            assert (answer.status_code, answer.content) == (200, b"")


async def test_the_documentation_needs_no_other_host(connect: Any) -> None:
    async with connect() as client:
        docs = await client.get("/docs")
        assert docs.headers["content-security-policy"].startswith("default-src 'self';")
        assert "<script>" not in docs.text
        found = re.findall(r'(?:src|href)="([^"]+)"', docs.text)
        assert len(found) == 4
        for path in found:
            assert (await client.get(f"/{path}")).status_code == 200, path


async def test_metrics_are_there(connect: Any) -> None:
    async with connect() as client:
        await client.get("/healthz")
        text = (await client.get("/metrics")).text
    assert re.search(r'faithdiff_requests_total\{.*route="/healthz".*\} ', text)
    assert "faithdiff_store_up 1.0" in text


async def test_the_page_is_off_where_it_is_not_wanted(connect: Any) -> None:
    async with connect(GatewayConfig(page=False)) as client:
        _problem(await client.get("/"), 404)
        _problem(await client.get("/ui/app.js"), 404)


async def test_unknown_paths_and_methods_are_problems(connect: Any) -> None:
    async with connect() as client:
        _problem(await client.get("/v2/upscale"), 404)
        response = await client.get("/v1/upscale")
        _problem(response, 405)
        assert response.headers["allow"] == "POST"
        response = await client.put("/v1/jobs")
        _problem(response, 405)
        assert response.headers["allow"] == "GET, POST"
        _problem(await client.request("PURGE", "/"), 405)


async def test_the_openapi_document_describes_the_form(connect: Any) -> None:
    async with connect() as client:
        document = (await client.get("/openapi.json")).json()
    upscale = document["paths"]["/v1/upscale"]["post"]
    schema = upscale["requestBody"]["content"]["multipart/form-data"]["schema"]
    assert schema["properties"].keys() == {"picture", *UpscaleRequest.model_fields}
    assert schema["required"] == ["picture"]
    assert "image/png" in upscale["responses"]["200"]["content"]
    assert {"400", "413", "415", "422", "503", "504"} <= upscale["responses"].keys()


def test_a_gateway_imports_no_torch() -> None:
    code = "import sys, serve.gateway; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
