"""The S3 requests that storage is made of. Each asks once, and returns all it asked for or raises.

Retries are storage.py's: it alone knows how long to be patient. s3fs finds endpoint, region and credentials as boto
does (AWS_ENDPOINT_URL, AWS_PROFILE, ...). Only its session is used: its `exists` and `isfile` take an error for "no".
"""

from __future__ import annotations

import asyncio
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions
import botocore.parsers
import fsspec
from fsspec.asyn import sync
from s3fs.errors import translate_boto_error

from sr_platform.errors import RequestError

MAX_PUT_BYTES = 5 * 2**30
MAX_CONNECTIONS = 32
PAGE_KEYS = 1000
"""Names per request of a listing; S3 gives no more."""

REFUSED = (
    PermissionError,
    botocore.exceptions.ConfigParseError,
    botocore.exceptions.NoCredentialsError,
    botocore.exceptions.NoRegionError,
    botocore.exceptions.ParamValidationError,
    botocore.exceptions.PartialCredentialsError,
    botocore.exceptions.ProfileNotFound,
)
PASSING = (
    OSError,
    aiohttp.ClientError,
    botocore.exceptions.BotoCoreError,
    botocore.exceptions.ClientError,
    botocore.parsers.ResponseParserError,
)
_INVALID_RANGE = 416

T = TypeVar("T")


class ShortReadError(OSError):
    """Fewer bytes came than the answer itself promised."""


def read_range(path: str, start: int, end: int | None) -> bytes:
    """Bytes `start` to `end` (exclusive; None: to the end), fewer only where the object ends earlier."""
    return bytes(_run(lambda fs: _get(fs, path, start, end)))


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes | BaseException]:
    """`read_range` of each (path, start, end), all at the same time; what failed is returned as its error."""

    async def gather(fs: Any) -> list[bytes | BaseException]:
        requests = (_get(fs, path, start, end) for path, start, end in ranges)
        return await asyncio.gather(*requests, return_exceptions=True)

    return _run(gather)


def write(path: str, data: bytes) -> None:
    """One PUT: the object appears whole or not at all. Raises RequestError above the 5 GiB that S3 takes at once."""
    if len(data) > MAX_PUT_BYTES:
        raise RequestError(
            f"storage: {path} would have {len(data) / 2**30:.1f} GiB and S3 publishes at most "
            f"{MAX_PUT_BYTES / 2**30:.0f} GiB at once; make smaller shards"
        )
    _request("put_object", path, Body=data)


def begin_upload(path: str) -> str:
    """The id of an upload in parts, of which nothing shows before `finish_upload`."""
    return str(_request("create_multipart_upload", path)["UploadId"])


def write_part(path: str, upload: str, number: int, data: bytes) -> dict[str, Any]:
    """Part `number`, from 1, of at least 5 MiB unless it is the last; returns what `finish_upload` wants of it."""
    answer = _request("upload_part", path, UploadId=upload, PartNumber=number, Body=data)
    tags = {name: value for name, value in answer.items() if name == "ETag" or name.startswith("Checksum")}
    return {"PartNumber": number, **tags}


def finish_upload(path: str, upload: str, parts: Sequence[dict[str, Any]]) -> None:
    """The object appears, whole. Raises FileNotFoundError when the upload is unknown, as after it was finished."""
    _request("complete_multipart_upload", path, UploadId=upload, MultipartUpload={"Parts": list(parts)})


def abort_upload(path: str, upload: str) -> None:
    """Frees the room of an upload that will not be finished."""
    _request("abort_multipart_upload", path, UploadId=upload)


def size(path: str) -> int:
    """Raises FileNotFoundError when there is no such object."""
    return int(_request("head_object", path)["ContentLength"])


def delete(path: str) -> None:
    """An object that is not there is no error."""
    _request("delete_object", path)


def list_page(prefix: str, token: str) -> tuple[dict[str, tuple[int, str]], str]:
    """Path -> (bytes, ETag) of up to PAGE_KEYS objects whose paths start with `prefix`, and the next token or ""."""
    bucket, _, key = prefix.removeprefix("s3://").partition("/")
    more = {"ContinuationToken": token} if token else {}
    kwargs = {"Bucket": bucket, "Prefix": key, "MaxKeys": PAGE_KEYS, **more}
    page = _run(lambda fs: _call(fs, "list_objects_v2", **kwargs))
    # Consoles mark empty folders by objects whose names end in a slash.
    objects = [o for o in page.get("Contents", []) if not o["Key"].endswith("/")]
    held = {f"s3://{bucket}/{o['Key']}": (int(o["Size"]), str(o["ETag"])) for o in objects}
    return held, str(page["NextContinuationToken"]) if page.get("IsTruncated") else ""


async def _get(fs: Any, path: str, start: int, end: int | None) -> bytes:
    bucket, key = _bucket_and_key(path)
    # Always a range, even of the whole: the answer then says how long the object is.
    wanted = f"bytes={start}-{'' if end is None else end - 1}"
    try:
        answer = await _call(fs, "get_object", Bucket=bucket, Key=key, Range=wanted)
    except OSError as error:
        if _status(error) == _INVALID_RANGE:  # the object ends before `start`
            return b""
        raise
    async with answer["Body"] as body:
        data = bytes(await body.read())
    if "ContentRange" not in answer:  # a server that knows no ranges sends everything
        return data[start:end]
    total = int(answer["ContentRange"].rpartition("/")[2])
    expected = (total if end is None else min(end, total)) - start
    if len(data) != expected:
        raise ShortReadError(f"{len(data)} of {expected} bytes arrived")
    return data


def _request(method: str, path: str, **kwargs: Any) -> Any:
    bucket, key = _bucket_and_key(path)
    return _run(lambda fs: _call(fs, method, Bucket=bucket, Key=key, **kwargs))


async def _call(fs: Any, method: str, **kwargs: Any) -> Any:
    client = await fs.set_session()
    try:
        return await getattr(client, method)(**kwargs)
    except botocore.exceptions.ClientError as error:
        raise translate_boto_error(error) from error


def _run(call: Callable[[Any], Any]) -> Any:
    fs = filesystem(os.getpid())
    return sync(fs.loop, call, fs)


@functools.cache
def filesystem(process: int) -> Any:
    """The one s3fs of a process: its connections are shared by all threads, which fsspec would keep apart."""
    config = {
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "connect_timeout": 10,
        "read_timeout": 30,
        "max_pool_connections": MAX_CONNECTIONS,
    }
    return fsspec.filesystem("s3", config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)


def _bucket_and_key(path: str) -> tuple[str, str]:
    bucket, _, key = path.removeprefix("s3://").partition("/")
    return bucket, key


def _status(error: BaseException) -> int:
    response = getattr(error.__cause__, "response", None) or {}
    return int(response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
