"""The multipart form of a request: one picture, and fields named as the arguments of FaithDiffPipeline."""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import pydantic
from pydantic import Field
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request

from serve.problems import Problem
from sr_platform.config import StrictConfig

if TYPE_CHECKING:
    from faithdiff.picture_files import OutputOptions

PICTURE_FIELDS = ("picture", "image")
_MAX_FIELDS = 32
_MAX_FIELD_BYTES = 64 * 1024
_FORM_OVERHEAD_BYTES = 256 * 1024
_MAX_JSON_BYTES = 64 * 1024
# Databases do not store it.
_NO_NUL = r"^[^\x00]*$"
# Of no concern to the restoration itself.
_OTHER_FIELDS = ("output_format", "output_quality", "keep_metadata", "auto_prompt")


class UpscaleRequest(StrictConfig):
    """What to do with the picture. Limits are those of the model's own request, which this process does not import."""

    scale: int = Field(default=4, ge=1, le=16, examples=[2])
    """Output size / input size; 1 restores at the same size."""
    prompt: str = Field(default="", max_length=4000, pattern=_NO_NUL, examples=["A lighthouse on a rocky coast."])
    """Caption of the picture."""
    negative_prompt: str = Field(default="", max_length=4000, pattern=_NO_NUL, examples=["blurry, noisy"])
    """What the picture should not look like."""
    num_inference_steps: int = Field(default=20, ge=1, le=200, examples=[20])
    """Denoising steps."""
    guidance_scale: float = Field(default=5.0, ge=0, le=30, examples=[5.0])
    """Weight of the prompt; 1 and below turns guidance off."""
    seed: int = Field(default=0, ge=0, le=2**63 - 1, examples=[0])
    """The same picture, fields and seed give the same result."""
    start_from: Literal["lq", "noise"] = Field(default="lq", examples=["lq"])
    """Start from the noised picture or from noise alone."""
    color_fix: Literal["adain", "wavelet", "none"] = Field(default="adain", examples=["adain"])
    """How the colours of the input are kept."""
    output_format: Literal["png", "jpeg", "webp", "tiff"] = Field(default="png", examples=["png"])
    """File format of the result."""
    output_quality: int = Field(default=90, ge=1, le=100, examples=[90])
    """Quality of a JPEG or WebP; PNG and TIFF lose nothing whatever it is."""
    keep_metadata: bool = Field(default=True, examples=[True])
    """Keep EXIF data such as place and time of the shot; the colour profile is always kept."""
    auto_prompt: bool = Field(default=False, examples=[False])
    """Have the picture described by the service's captioner, where it has one; `prompt` must be empty then."""

    def restoration_fields(self) -> dict[str, Any]:
        """The settings of the restoration itself, as RestorationRequest takes them."""
        return self.model_dump(exclude=set(_OTHER_FIELDS))

    def output_options(self) -> OutputOptions:
        """How the restored picture is written."""
        from faithdiff.picture_files import OutputOptions

        return OutputOptions(format=self.output_format, quality=self.output_quality, keep_metadata=self.keep_metadata)


class JobRequest(UpscaleRequest):
    """What to do with the picture, how urgent it is, and who is told."""

    priority: int = Field(default=5, ge=0, le=9, examples=[5])
    """9 is served before 0."""
    webhook_url: str | None = Field(default=None, max_length=2000, examples=["https://hooks.example.com/faithdiff"])
    """Where the finished job is sent; only hosts that the service allows."""

    def upscale_request(self) -> UpscaleRequest:
        """Without what concerns the queue."""
        return UpscaleRequest(**self.model_dump(exclude={"priority", "webhook_url"}))


class SizedRequest(JobRequest):
    """What would be done with a picture of a given size."""

    width: int = Field(ge=1, le=65_535, examples=[640])
    """Width of the picture in pixels, upright."""
    height: int = Field(ge=1, le=65_535, examples=[480])
    """Height of the picture in pixels, upright."""


RequestT = TypeVar("RequestT", bound=UpscaleRequest)


@asynccontextmanager
async def open_form(
    request: Request, fields: type[RequestT], *, max_upload_bytes: int, timeout_s: float
) -> AsyncIterator[tuple[UploadFile, RequestT]]:
    """The uploaded file, which lies on disk unless it is small, and the validated fields.

    Raises:
        Problem: 415 not multipart; 400 broken multipart; 408 too slow; 413 too many bytes; 422 wrong, unknown or
            repeated fields.
    """
    if content_type(request) != "multipart/form-data":
        came = request.headers.get("content-type", "")[:100]
        raise Problem(415, "not-multipart", f"request: content type is {came!r}; send multipart/form-data")
    form = await _received(request, max_upload_bytes, timeout_s)
    try:
        upload = _the_picture(form)
        if (upload.size or 0) > max_upload_bytes:
            raise _too_many_bytes(max_upload_bytes)
        yield upload, validated(fields, _text_fields(form))
    finally:
        await form.close()


async def read_json(request: Request, fields: type[RequestT], *, timeout_s: float) -> RequestT:
    """The validated fields of a small JSON object. Raises Problem as `open_form` does."""
    limited = Request(request.scope, _limited_receive(request, _MAX_JSON_BYTES, overhead_bytes=0))
    try:
        async with asyncio.timeout(timeout_s):
            body = await limited.body()
    except ClientDisconnect as error:
        raise Problem(400, "broken-upload", "request: the upload broke off") from error
    except TimeoutError as error:
        raise _too_slow(timeout_s) from error
    try:
        return fields.model_validate_json(body, strict=True)
    except pydantic.ValidationError as error:
        raise _invalid([(_path(e) or "body", _reason(fields, e)) for e in error.errors()]) from error


def content_type(request: Request) -> str:
    """The media type of the body without parameters, in lower case."""
    return request.headers.get("content-type", "").split(";")[0].strip().lower()


def form_schema(fields: type[UpscaleRequest]) -> dict[str, Any]:
    """The form as OpenAPI describes it."""
    schema = fields.model_json_schema()
    picture = {"type": "string", "format": "binary", "description": "JPEG, PNG, WebP or TIFF"}
    schema["properties"] = {"picture": picture, **schema["properties"]}
    return {**schema, "required": ["picture"]}


def validated(fields: type[RequestT], values: dict[str, Any]) -> RequestT:
    """`values` as `fields`. Raises Problem 422 that names everything wrong at once."""
    try:
        return fields.model_validate(values)
    except pydantic.ValidationError as error:
        raise _invalid([(_path(e), _reason(fields, e)) for e in error.errors()]) from error


async def _received(request: Request, max_upload_bytes: int, timeout_s: float) -> FormData:
    limited = Request(request.scope, _limited_receive(request, max_upload_bytes, _FORM_OVERHEAD_BYTES))
    try:
        async with asyncio.timeout(timeout_s):
            return await limited.form(max_files=1, max_fields=_MAX_FIELDS, max_part_size=_MAX_FIELD_BYTES)
    except ClientDisconnect as error:
        raise Problem(400, "broken-upload", "request: the upload broke off") from error
    except TimeoutError as error:
        raise _too_slow(timeout_s) from error


def _limited_receive(request: Request, max_bytes: int, overhead_bytes: int) -> Callable[[], Awaitable[Any]]:
    limit = max_bytes + overhead_bytes
    announced = request.headers.get("content-length", "0")
    if announced.isdigit() and int(announced) > limit:
        raise _too_many_bytes(max_bytes)
    received = 0

    async def receive() -> Any:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > limit:
            raise _too_many_bytes(max_bytes)
        return message

    return receive


def _too_many_bytes(max_bytes: int) -> Problem:
    return Problem(413, "upload-too-large", f"request: at most {max_bytes:,} bytes are allowed; send a smaller file")


def _too_slow(timeout_s: float) -> Problem:
    return Problem(408, "upload-too-slow", f"request: it did not arrive within {timeout_s:g} s; send it again")


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


def _path(error: Any) -> str:
    return ".".join(str(part) for part in error["loc"])


def _reason(fields: type[UpscaleRequest], error: Any) -> str:
    if error["type"] == "extra_forbidden":
        allowed = [*PICTURE_FIELDS, *fields.model_fields]
        close = difflib.get_close_matches(_path(error), allowed, n=1)
        return (
            f"no such field; did you mean {close[0]!r}?" if close else f"no such field; there are {', '.join(allowed)}"
        )
    came = repr(error["input"])
    came = came if len(came) <= 100 else f"{came[:100]}..."
    return f"got {came}; {error['msg'][0].lower()}{error['msg'][1:]}"


def _invalid(errors: Iterable[tuple[str, str]]) -> Problem:
    named = list(errors)
    return Problem(
        422,
        "invalid-fields",
        "; ".join(f"{field}: {reason}" for field, reason in named),
        errors=[{"field": field, "detail": reason} for field, reason in named],
    )
