from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from fake_worker import FakeWorker, PatientRestorer, running_server
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance

from serve.access import AccessConfig
from serve.gateway import Gateway, GatewayConfig, build_api
from serve.images import PictureLimits
from serve.intake import IntakeConfig
from serve.jobs import JobStore
from serve.problems import MEDIA_TYPE
from sr_platform.storage import open_storage

CFG = GatewayConfig(
    access=AccessConfig(mode="open"),
    limits=PictureLimits(max_output_px=200_000),
    intake=IntakeConfig(max_queued_megapixels=50, max_queued_megapixels_per_key=50),
)
OPERATIONS = (
    "post /v1/upscale", "post /v1/jobs", "get /v1/jobs", "get /v1/jobs/{job_id}", "delete /v1/jobs/{job_id}",
    "get /v1/jobs/{job_id}/events", "get /v1/jobs/{job_id}/result", "post /v1/estimate", "get /v1/usage",
    "get /v1/models", "get /healthz", "get /readyz",
)  # fmt: skip
HTTP_METHODS = ("get", "post", "delete", "put", "patch")


def _picture(size_px: tuple[int, int], file_format: str) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise(size_px, 50).save(buffer, file_format)
    return buffer.getvalue()


_SIDES = st.integers(1, 40)
PICTURES = st.builds(_picture, st.tuples(_SIDES, _SIDES), st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF"]))
schemathesis.openapi.format("binary", PICTURES | st.binary(max_size=200))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a whole service with a fake replica, behind a real server."""
    folder = tmp_path_factory.mktemp("service")
    store, storage = JobStore(f"sqlite:///{folder}/jobs.db"), open_storage(folder / "files")
    worker = FakeWorker(store, storage, step_s=0.0)
    worker.start()
    with running_server(build_api(Gateway(CFG, PatientRestorer(wait_s=0.0), store, storage))) as url:
        yield url
    worker.close()


@pytest.fixture(scope="module")
def api_schema(service: str) -> Any:
    return schemathesis.openapi.from_url(f"{service}/openapi.json")


def _fuzz(schema: Any, name: str, **how: Any) -> None:
    """Sends what the schema allows, and what it does not, and holds the answers to what it says of them."""
    method, path = name.split()

    @settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, **how)
    @given(case=schema[path][method].as_strategy(generation_mode=GenerationMode.POSITIVE))
    def valid(case: Any) -> None:
        # The schema cannot say what a whole picture is, or which hosts webhooks may go to.
        excluded = [positive_data_acceptance] if method == "post" else []
        case.call_and_validate(timeout=30, excluded_checks=excluded)

    @settings(deadline=None, suppress_health_check=list(HealthCheck), database=None, **how)
    @given(case=schema[path][method].as_strategy(generation_mode=GenerationMode.NEGATIVE))
    def invalid(case: Any) -> None:
        # In a form everything is text, so that nothing is of the wrong type for a prompt.
        excluded = [negative_data_rejection] if case.media_type == "multipart/form-data" else []
        case.call_and_validate(timeout=30, excluded_checks=excluded)

    valid()
    if method == "post":
        invalid()


@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_is_sent_the_answer_is_one_that_is_documented(api_schema: Any, name: str) -> None:
    _fuzz(api_schema, name, max_examples=20, derandomize=True)


@pytest.mark.soak
@pytest.mark.parametrize("name", OPERATIONS)
def test_whatever_is_sent_at_length_the_answer_is_one_that_is_documented(api_schema: Any, name: str) -> None:
    _fuzz(api_schema, name, max_examples=1000)


def test_answers_about_real_jobs_are_as_documented(api_schema: Any, service: str) -> None:
    states = set()
    picture = {"picture": _picture((8, 8), "PNG")}
    for prompt in ("", "fail", "cancel"):
        fields = {"prompt": prompt, "num_inference_steps": "3", "priority": "9", "scale": "2"}
        job = httpx.post(f"{service}/v1/jobs", files=picture, data=fields).json()
        if prompt == "cancel":
            httpx.delete(f"{service}{job['links']['cancel']}")
        lines = httpx.get(f"{service}{job['links']['events']}", timeout=30).text.splitlines()
        states.add([line for line in lines if line.startswith("event: ")][-1])
        for path in ("/v1/jobs/{job_id}", "/v1/jobs/{job_id}/events", "/v1/jobs/{job_id}/result"):
            api_schema[path]["get"].Case(path_parameters={"job_id": job["id"]}).call_and_validate()
        part = {"Range": "bytes=0-9"}
        api_schema[path]["get"].Case(path_parameters={"job_id": job["id"]}, headers=part).call_and_validate()
    assert {"event: done", "event: failed"} <= states
    for state in ("done", "failed", "cancelled"):
        api_schema["/v1/jobs"]["get"].Case(query={"state": state}).call_and_validate()


@pytest.fixture(scope="module")
def document(service: str) -> dict[str, Any]:
    return dict(httpx.get(f"{service}/openapi.json").json())


def _operations(document: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in document["paths"].items():
        for method in HTTP_METHODS:
            if method in item:
                yield f"{method} {path}", item[method]


def test_every_endpoint_of_the_contract_is_documented(document: dict[str, Any]) -> None:
    assert {name for name, _ in _operations(document)} == set(OPERATIONS)


def test_every_endpoint_says_what_it_does_and_every_problem_has_an_example(document: dict[str, Any]) -> None:
    for name, operation in _operations(document):
        assert operation["description"], name
        for status, response in operation["responses"].items():
            assert response["description"], (name, status)
            if int(status) >= 400:
                assert list(response["content"]) == [MEDIA_TYPE], (name, status)
                examples = response["content"][MEDIA_TYPE]["examples"]
                assert {example["value"]["status"] for example in examples.values()} == {int(status)}
        if int(max(operation["responses"])) in (429, 503):
            assert "Retry-After" in operation["responses"]["503"]["headers"]


def test_every_field_has_a_meaning_and_an_example(document: dict[str, Any]) -> None:
    forms = [
        body["schema"]
        for _, operation in _operations(document)
        for body in operation.get("requestBody", {}).get("content", {}).values()
    ]
    assert len(forms) == 4
    for schema in forms:
        for name, field in schema["properties"].items():
            assert field["description"], name
            assert name == "picture" or field["examples"], name
    for name in ("JobJson", "ResultJson", "EstimateJson", "CostJson", "EstimateAnswer"):
        for field, described in document["components"]["schemas"][name]["properties"].items():
            assert "$ref" in described or "examples" in described or "anyOf" in described, (name, field)


def test_examples_of_problems_read_like_problems(document: dict[str, Any]) -> None:
    text = str(document)
    assert re.search("urn:faithdiff:problem:idempotency-key-reused", text)
    assert "ProblemJson" in document["components"]["schemas"]
