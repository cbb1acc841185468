"""The multipart form of an upscale request: one picture, and fields named as the arguments of FaithDiffPipeline."""

from __future__ import annotations

import difflib
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import pydantic
from pydantic import Field
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request

from serve.problems import Problem
from sr_platform.config import StrictConfig

PICTURE_FIELDS = ("picture", "image")
_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 64 * 1024
_FORM_OVERHEAD_BYTES = 256 * 1024


class UpscaleRequest(StrictConfig):
    """What to do with the picture. Limits are those of the model's own request, which this process does not import."""

    scale: int = Field(default=4, ge=1, le=16)
    """Output size / input size; 1 restores at the same size."""
    prompt: str = Field(default="", max_length=4000)
    """Caption of the picture."""
    negative_prompt: str = Field(default="", max_length=4000)
    """What the picture should not look like."""
    num_inference_steps: int = Field(default=20, ge=1, le=200)
    """Denoising steps."""
    guidance_scale: float = Field(default=5.0, ge=0, le=30)
    """Weight of the prompt; 1 and below turns guidance off."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    """The same picture, fields and seed give the same result."""
    start_from: Literal["lq", "noise"] = "lq"
    """Start from the noised picture or from noise alone."""
    color_fix: Literal["adain", "wavelet", "none"] = "adain"
    """How the colours of the input are kept."""


async def read_form(request: Request, *, max_upload_bytes: int) -> tuple[bytes, UpscaleRequest]:
    """The uploaded file's bytes and the validated fields.

    Raises:
        Problem: 415 not multipart; 400 broken multipart; 413 too many bytes; 422 wrong, unknown or repeated fields.
    """
    content_type = request.headers.get("content-type", "")
    if content_type.split(";")[0].strip().lower() != "multipart/form-data":
        raise Problem(
            415, "not-multipart", f"request: content type is {content_type[:100]!r}; send multipart/form-data"
        )
    limited = Request(request.scope, _limited_receive(request, max_upload_bytes))
    try:
        async with limited.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES) as form:
            upload, fields = _the_picture(form), _validated(_text_fields(form))
            return await upload.read(), fields
    except ClientDisconnect as error:
        raise Problem(400, "broken-upload", "request: the upload broke off") from error


def form_schema() -> dict[str, Any]:
    """The form as OpenAPI describes it."""
    schema = UpscaleRequest.model_json_schema()
    picture = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP or TIFF"}
    schema["properties"] = {"picture": picture, **schema["properties"]}
    return {**schema, "required": ["picture"]}


def _limited_receive(request: Request, max_upload_bytes: int) -> Callable[[], Awaitable[Any]]:
    limit = max_upload_bytes + _FORM_OVERHEAD_BYTES
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise _too_many_bytes(max_upload_bytes)
    received = 0

    async def receive() -> Any:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_many_bytes(max_upload_bytes)
        return message

    return receive


def _too_many_bytes(max_upload_bytes: int) -> Problem:
    return Problem(
        413, "upload-too-large", f"request: at most {max_upload_bytes:,} bytes are allowed; send a smaller file"
    )


def _the_picture(form: FormData) -> UploadFile:
    files = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
    if len(files) == 1 and files[0][0] in PICTURE_FIELDS:
        return files[0][1]
    came = f"a file in field {files[0][0]!r}" if files else "no file"
    raise _invalid([("picture", f"got {came}; send the picture as a file in field 'picture'")])


def _text_fields(form: FormData) -> dict[str, str]:
    pairs = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
    names = [name for name, _ in pairs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise _invalid([(name, "given more than once; send it once") for name in repeated])
    return dict(pairs)


def _validated(fields: dict[str, str]) -> UpscaleRequest:
    try:
        return UpscaleRequest.model_validate(fields)
    except pydantic.ValidationError as error:
        raise _invalid([(str(e["loc"][0]), _reason(e)) for e in error.errors()]) from error


def _reason(error: Any) -> str:
    if error["type"] == "extra_forbidden":
        allowed = [*PICTURE_FIELDS, *UpscaleRequest.model_fields]
        close = difflib.get_close_matches(str(error["loc"][0]), allowed, n=1)
        return (
            f"no such field; did you mean {close[0]!r}?" if close else f"no such field; there are {', '.join(allowed)}"
        )
    came = repr(error["input"])
    came = came if len(came) <= 100 else f"{came[:100]}..."
    return f"got {came}; {error['msg'][0].lower()}{error['msg'][1:]}"


def _invalid(errors: list[tuple[str, str]]) -> Problem:
    return Problem(
        422,
        "invalid-fields",
        "; ".join(f"{field}: {reason}" for field, reason in errors),
        errors=[{"field": field, "detail": reason} for field, reason in errors],
    )
