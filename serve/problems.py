"""Errors over HTTP as RFC 9457 problem JSON: `type, title, status, detail, instance`, for every error there is."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

MEDIA_TYPE = "application/problem+json"
_MAX_DETAIL_CHARACTERS = 2000

logger = logging.getLogger(__name__)


class Problem(Exception):  # noqa: N818 - the word of RFC 9457
    """A request that cannot be answered as asked. `kind` is a short lasting name for programs to branch on."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, str]] = (),
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.errors = list(errors)
        self.retry_after_s = retry_after_s

    def response(self, instance: str) -> JSONResponse:
        """The problem as an answer to the request on path `instance`."""
        body: dict[str, Any] = {
            "type": f"urn:faithdiff:problem:{self.kind}",
            "title": self.kind.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": _shortened(self.detail),
            "instance": instance,
        }
        if self.errors:
            body["errors"] = [{name: _shortened(text) for name, text in error.items()} for error in self.errors]
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        return JSONResponse(body, self.status, headers, media_type=MEDIA_TYPE)


def install_handlers(api: FastAPI) -> None:
    """Makes every error of `api`, foreseen or not, a problem; what nobody foresaw is logged and its text kept back."""

    async def on_problem(request: Request, problem: Problem) -> JSONResponse:
        return problem.response(request.url.path)

    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = _from_http_error(error).response(request.url.path)
        response.headers.update(error.headers or {})
        return response

    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [{"field": ".".join(map(str, e["loc"][1:])), "detail": str(e["msg"])} for e in error.errors()]
        detail = "; ".join(f"{e['field']}: {e['detail']}" for e in errors)
        return Problem(422, "invalid-fields", detail, errors=errors).response(request.url.path)

    async def on_failure(request: Request, error: Exception) -> JSONResponse:
        logger.error("serve: %s %s failed", request.method, request.url.path, exc_info=error)
        problem = Problem(500, "internal-error", "the service failed on this request; its log says more")
        return problem.response(request.url.path)

    api.add_exception_handler(Problem, on_problem)  # type: ignore[arg-type]
    api.add_exception_handler(HTTPException, on_http_error)  # type: ignore[arg-type]
    api.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]
    api.add_exception_handler(Exception, on_failure)


def _from_http_error(error: HTTPException) -> Problem:
    phrase = HTTPStatus(error.status_code).phrase
    return Problem(error.status_code, phrase.lower().replace(" ", "-"), str(error.detail))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_DETAIL_CHARACTERS else text[: _MAX_DETAIL_CHARACTERS - 3] + "..."
