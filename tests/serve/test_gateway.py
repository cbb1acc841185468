from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from faithdiff.errors import InputError
from faithdiff.request import MAX_SCALE, ColorFix, RestorationRequest, StartFrom
from serve.form import UpscaleRequest
from serve.gateway import GatewayConfig, Unavailable
from serve.images import PictureLimits
from serve.restorer import Busy

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def png(picture: np.ndarray, to_file: Callable[..., bytes]) -> bytes:
    return to_file(picture, "PNG")


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
    assert restorer.requests[0].model_dump() == {name: getattr(pipeline, name) for name in UpscaleRequest.model_fields}


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


async def test_health_and_readiness_are_different_things(connect: Any, restorer: Any) -> None:
    async with connect(GatewayConfig(ready_timeout_s=0.1)) as client:
        assert (await client.get("/readyz")).json() == {"status": "ready", "model_version": "nano"}
        restorer.delay_s = 30.0
        assert (await client.get("/healthz")).json() == {"status": "ok"}
        _problem(await client.get("/readyz"), 503)
        restorer.delay_s, restorer.error = 0.0, Unavailable("restorer: none is left")
        assert "none is left" in _problem(await client.get("/v1/models"), 503)["detail"]


async def test_models_tells_version_lineage_and_cold_start(connect: Any) -> None:
    async with connect() as client:
        (model,) = (await client.get("/v1/models")).json()["models"]
    assert model == {
        "model": "nano", "version": "nano", "manifest_digest": None, "device": "cpu", "dtype": "float32",
        "fetch_s": 0.1, "load_s": 0.2,
    }  # fmt: skip


async def test_unknown_paths_and_methods_are_problems(connect: Any) -> None:
    async with connect() as client:
        _problem(await client.get("/v2/upscale"), 404)
        response = await client.get("/v1/upscale")
        _problem(response, 405)
        assert response.headers["allow"] == "POST"


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
