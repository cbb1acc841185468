"""What the OpenAPI document says beyond the signatures: examples, headers, and every problem an endpoint answers."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, Field

from serve.form import UpscaleRequest, form_schema
from serve.job_json import PictureSize
from serve.problems import MEDIA_TYPE, Problem

Responses = dict[int | str, dict[str, Any]]

DESCRIPTION = """Faithful restoration and enlargement of pictures.

Small pictures: `POST /v1/upscale` and wait for the answer. All others: `POST /v1/jobs`, follow `events`, get `result`.
An accepted job ends, whatever happens to the machines; send an `Idempotency-Key` and a request that was repeated
makes one job. Every error is problem JSON (RFC 9457) whose `type` lasts; `Retry-After` says when to come again.
"""
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"

_PROBLEMS = {
    400: [Problem(400, "broken-upload", "request: the upload broke off")],
    401: [Problem(401, "unauthorized", "request: no key; send the header 'Authorization: Bearer <key>'")],
    403: [Problem(403, "local-only", "request: without keys this service answers only programs on its own machine")],
    404: [Problem(404, "no-such-job", "job: there is none of this id, or it has expired")],
    408: [Problem(408, "upload-too-slow", "request: it did not arrive within 120 s; send it again")],
    409: [
        Problem(409, "not-done", "job: it is running; come again when it is done"),
        Problem(409, "job-failed", "job: it failed: picture: the model refuses it"),
        Problem(409, "already-ended", "job: it is done and cannot be cancelled any more"),
    ],
    410: [Problem(410, "no-result", "job: its result was removed; send the picture again")],
    412: [Problem(412, "precondition-failed", 'result: If-Match is "1"; its ETag is "2"')],
    413: [
        Problem(413, "upload-too-large", "request: at most 33,554,432 bytes are allowed; send a smaller file"),
        Problem(413, "picture-too-large", "picture: 9000x9000 px; at most 25,000,000 pixels are allowed"),
        Problem(413, "result-too-large", "picture: 5000x5000 px at scale 4 makes 400,000,000 pixels"),
    ],
    415: [
        Problem(415, "not-multipart", "request: content type is 'image/png'; send multipart/form-data"),
        Problem(415, "unsupported-picture", "picture: the upload is not a picture this service reads"),
    ],
    416: [Problem(416, "range-not-satisfiable", "result: got range 'bytes=9-'; it has 9 bytes")],
    422: [
        Problem(
            422,
            "invalid-fields",
            "scale: got '0'; input should be greater than or equal to 1",
            errors=[{"field": "scale", "detail": "got '0'; input should be greater than or equal to 1"}],
        ),
        Problem(422, "unreadable-picture", "picture: it is damaged or incomplete; send a whole file"),
        Problem(422, "idempotency-key-reused", "job: this Idempotency-Key was sent with another picture or fields"),
    ],
    429: [Problem(429, "limit-reached", "key: 60 requests a minute are allowed; come again later")],
    500: [Problem(500, "internal-error", "the service failed on this request; its log says more")],
    503: [Problem(503, "queue-full", "queue: 2,000 megapixels wait already; come again later")],
    504: [Problem(504, "timed-out", "request: no result within 600 s; ask for fewer steps or pixels")],
}
_MEANINGS = {
    400: "The request is broken",
    401: "No key, or one that is not valid",
    403: "Not from this machine, and the service has no keys",
    404: "There is no such job, or it belongs to another key",
    408: "The upload took too long",
    409: "The job is in another state",
    410: "The result is gone",
    412: "It has another ETag",
    413: "Too many bytes or pixels",
    415: "Not multipart, or not a picture of a known format",
    416: "The range lies behind the end",
    422: "A field is wrong, or the picture is damaged",
    429: "The key has reached a limit; Retry-After says when to come again",
    500: "An error of the service",
    503: "No replica is free, or too much waits; Retry-After says when to come again",
    504: "The restoration took too long",
}
_GENERAL = (401, 403, 500)
_RETRY_AFTER = {"Retry-After": {"description": "Seconds", "schema": {"type": "integer", "minimum": 1}}}
LINEAGE_HEADERS = {
    "X-Model-Version": {"description": "Which model made it", "schema": {"type": "string"}},
    "X-Manifest-Digest": {"description": "What that model was trained on", "schema": {"type": "string"}},
}


class ProblemJson(BaseModel):
    """RFC 9457."""

    type: str = Field(examples=["urn:faithdiff:problem:invalid-fields"], description="Lasting; branch on it")
    title: str = Field(examples=["Invalid fields"])
    status: int = Field(examples=[422])
    detail: str = Field(description="What came, what is allowed, what to change")
    instance: str = Field(examples=["/v1/upscale"], description="Path of the request, or of the job that failed")
    errors: list[dict[str, str]] | None = Field(default=None, description="Every field that is wrong, and why")


def install_openapi(api: FastAPI) -> None:
    """Makes the document tell what is answered: problems instead of the framework's own validation errors."""
    document_of = api.openapi

    def document() -> dict[str, Any]:
        if api.openapi_schema is None:
            found = document_of()
            for operation in (o for path in found["paths"].values() for o in path.values()):
                if "application/json" in operation["responses"].get("422", {}).get("content", {}):
                    del operation["responses"]["422"]
            schemas = found.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            schemas[ProblemJson.__name__] = ProblemJson.model_json_schema()
        return api.openapi_schema or found

    api.openapi = document  # type: ignore[method-assign]


def problems(*statuses: int) -> Responses:
    """Responses of an endpoint that answers these problems, and those that every endpoint may answer."""
    return {status: _problem_response(status) for status in sorted({*statuses, *_GENERAL})}


def picture_responses(*statuses: int) -> Responses:
    """Responses for each of the successful `statuses`: a picture, with the model that made it."""
    kinds = ("image/png", "image/jpeg", "image/webp", "image/tiff")
    content = {kind: {"schema": {"type": "string", "format": "binary"}} for kind in kinds}
    meanings = {200: "The restored picture, exactly scale x the size", 206: "A part of it"}
    return {s: {"description": meanings[s], "content": content, "headers": LINEAGE_HEADERS} for s in statuses}


def form_body(fields: type[UpscaleRequest], *, sized: type[UpscaleRequest] | None = None) -> dict[str, Any]:
    """A request body for OpenAPI: the form, or else a JSON object of `sized`."""
    content: dict[str, Any] = {"multipart/form-data": {"schema": form_schema(fields)}}
    if sized is not None:
        content["application/json"] = {"schema": sized.model_json_schema()}
    return {"requestBody": {"required": True, "content": content}}


def _problem_response(status: int) -> dict[str, Any]:
    examples = {p.kind: {"value": p.body("/v1/jobs")} for p in _PROBLEMS[status]}
    schema = {"$ref": "#/components/schemas/ProblemJson"}
    response = {"description": _MEANINGS[status], "content": {MEDIA_TYPE: {"schema": schema, "examples": examples}}}
    return {**response, "headers": _RETRY_AFTER} if status in (429, 503) else response


class EstimateAnswer(BaseModel):
    """What a request would take and cost."""

    input: PictureSize
    output: PictureSize
    megapixels: float = Field(examples=[4.9152], description="Of the result")
    tiles: int = Field(examples=[12], description="In which the picture is restored")
    megapixel_steps: float = Field(examples=[98.304], description="The work: megapixels x denoising steps")
    device_seconds: float = Field(examples=[98.304], description="Of one device")
    wait_seconds: float = Field(examples=[12.5], description="Until what waits now is worked off")
    price: float = Field(examples=[0.08192])
    currency: str = Field(examples=["USD"], description="ISO 4217")


class HealthJson(BaseModel):
    """A sign of life."""

    status: str = Field(examples=["ok"])


class ReadyJson(BaseModel):
    """A model is loaded, or would be."""

    status: str = Field(examples=["ready"], description="ready, or asleep: the first job starts a replica")
    model_version: str | None = Field(examples=["faithdiff-nano/3"])
    has_captioner: bool = Field(examples=[False], description="Whether auto_prompt may be asked for")


class ModelsJson(BaseModel):
    """The models that are served, and what it took to load them."""

    models: list[dict[str, Any]]


class UsedJson(BaseModel):
    """Of one key, since midnight UTC."""

    requests: int = Field(examples=[12])
    megapixels: float = Field(examples=[58.9824], description="Of results")


class LimitsJson(BaseModel):
    """Of one key; null where there is no limit."""

    requests_per_minute: float | None = Field(examples=[60])
    megapixels_per_day: float | None = Field(examples=[10_000])


class UsageJson(BaseModel):
    """What a key has used, and what it may use."""

    key: str = Field(examples=["photo-archive"], description="Name of the key")
    today: UsedJson
    limits: LimitsJson


class SecretJson(BaseModel):
    """Of Standard Webhooks."""

    secret: str = Field(examples=["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"])
