"""Errors over HTTP as RFC 9457 problem JSON: `type, title, status, detail, instance`, for every error there is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Match

from serve.measurements import count_refusal

MEDIA_TYPE = "application/problem+json"
_TYPE = "urn:faithdiff:problem:"
_MAX_DETAIL_CHARACTERS = 2000


class Problem(Exception):  # noqa: N818 - the word of RFC 9457
    """A request that cannot be answered as asked. `kind` is a short lasting name for programs to branch on."""

    def __init__(
        self,
        status: int,
        kind: str,
        detail: str,
        *,
        errors: Sequence[Mapping[str, str]] = (),
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status, self.kind, self.detail = status, kind, detail
        self.errors = list(errors)
        self.retry_after_s = retry_after_s
        self.headers = dict(headers or {})

    def body(self, instance: str) -> dict[str, Any]:
        """The problem as JSON, for the request or the thing on path `instance`."""
        body: dict[str, Any] = {
            "type": f"{_TYPE}{self.kind}",
            "title": self.kind.replace("-", " ").capitalize(),
            "status": self.status,
            "detail": _shortened(self.detail),
            "instance": instance,
        }
        if self.errors:
            body["errors"] = [{name: _shortened(text) for name, text in error.items()} for error in self.errors]
        return body

    def response(self, instance: str) -> JSONResponse:
        """The problem as an answer to the request on path `instance`."""
        headers = dict(self.headers)
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after_s)))
        return JSONResponse(self.body(instance), self.status, headers, media_type=MEDIA_TYPE)


def internal_error() -> Problem:
    """What is told of an error that nobody foresaw: nothing of its text, which may name what is secret."""
    return Problem(500, "internal-error", "the service failed on this request; its log says more")


def install_handlers(api: FastAPI) -> None:
    """Makes every foreseen error of `api` a problem, unknown paths and methods included."""

    async def on_problem(request: Request, problem: Problem) -> JSONResponse:
        if problem.status in (429, 503):
            count_refusal(problem.kind)
        return problem.response(request.url.path)

    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        response = _from_http_error(error).response(request.url.path)
        response.headers.update(error.headers or {})
        if error.status_code == 405:
            response.headers["Allow"] = ", ".join(_methods_of(request))
        return response

    async def on_invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        errors = [{"field": ".".join(map(str, e["loc"][1:])), "detail": str(e["msg"])} for e in error.errors()]
        detail = "; ".join(f"{e['field']}: {e['detail']}" for e in errors)
        return Problem(422, "invalid-fields", detail, errors=errors).response(request.url.path)

    api.add_exception_handler(Problem, on_problem)  # type: ignore[arg-type]
    api.add_exception_handler(HTTPException, on_http_error)  # type: ignore[arg-type]
    api.add_exception_handler(RequestValidationError, on_invalid)  # type: ignore[arg-type]


def _methods_of(request: Request) -> list[str]:
    """Of all routes on the request's path; the framework tells those of the first alone."""
    found: set[str] = set()
    for method in ("DELETE", "GET", "HEAD", "POST"):
        scope = {**request.scope, "method": method}
        if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes):
            found.add(method)
    return sorted(found)


def _from_http_error(error: HTTPException) -> Problem:
    phrase = HTTPStatus(error.status_code).phrase
    return Problem(error.status_code, phrase.lower().replace(" ", "-"), str(error.detail))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_DETAIL_CHARACTERS else text[: _MAX_DETAIL_CHARACTERS - 3] + "..."
