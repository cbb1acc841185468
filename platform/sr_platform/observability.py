"""Logs of jobs and replicas: one line per event, to stderr, for people or as JSON; never a secret.

    configure_logging()               2026-05-04 12:00:01,123 INFO serve.claims: job 17 is done
    configure_logging(form="json")    {"time": "2026-05-04T12:00:01.123Z", "level": "INFO", "logger": ...}

What is bound with `log_fields(job_id=...)` is in every line that is logged in the block, in the functions and tasks
that it calls as well; of threads, those of `asyncio.to_thread` have it, others bind for themselves.
"""

from __future__ import annotations

import json
import logging
import logging.handlers
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any, Literal

from sr_platform.config import StrictConfig

_OUR_LOGGERS = ("sr_platform", "faithdiff", "pipelines", "serve")
# Ray Serve gives its logger handlers of its own in every replica, and lets nothing of it through to the root.
_SERVE_LOGGER = "ray.serve"
_TEXT_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}
# With those of Ray Serve that steer its handlers.
_NOT_FIELDS = _OF_EVERY_RECORD | {"log_to_stderr", "serve_access_log", "skip_context_filter"}
_NOTHING_BOUND: Mapping[str, Any] = MappingProxyType({})
_bound: ContextVar[Mapping[str, Any]] = ContextVar("log_fields", default=_NOTHING_BOUND)

_HIDDEN = "[hidden]"
# A quote may be escaped, since JSON in a message is quoted once more by the line around it.
_QUOTE = r"(?:b?\\*[\"'])?"
_TELLTALE = (
    r"[\w.-]*(?:passw(?:or)?d|secret|token|api[_-]?key|access[_-]?key|signature|credential|authorization|cookie)"
)
_NOT_HIDDEN_YET = r"(?!\[hidden\]|bearer |basic )"
_SECRETS = (
    (re.compile(r"\b(bearer|basic)\s+[\w.~+/=-]{6,}", re.IGNORECASE), rf"\1 {_HIDDEN}"),
    (re.compile(r"([a-z][\w+.-]*://[^\s:/@\"']*):[^\s\"'\\]+@", re.IGNORECASE), rf"\1:{_HIDDEN}@"),
    (
        re.compile(rf"(\b{_TELLTALE}{_QUOTE}\s*[=:]\s*{_QUOTE}){_NOT_HIDDEN_YET}[^\s\"'\\,;&)}}\]]+", re.IGNORECASE),
        rf"\1{_HIDDEN}",
    ),
)


class LogConfig(StrictConfig):
    """Where people read logs, lines; where programs do, JSON."""

    form: Literal["text", "json"] = "text"
    """Lines for people, or one JSON object per line."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Of our own loggers; those of libraries stay at WARNING. DEBUG shows every denoising step."""


def configure_logging(
    level: int | str = logging.INFO,
    *,
    form: Literal["text", "json"] = "text",
    fields: Mapping[str, Any] = _NOTHING_BOUND,
) -> None:
    """Sends our own log records to stderr at `level`, leaving the loggers of libraries at warnings.

    `fields` are in every line, as which replica it comes from. In a replica of Ray Serve its own lines, on stderr and
    in its files, take the same form.
    """
    formatter: logging.Formatter = _JsonFormatter(fields) if form == "json" else _TextFormatter(fields)
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, force=True)
    handlers = [*logging.getLogger().handlers, *logging.getLogger(_SERVE_LOGGER).handlers]
    for handler in handlers:
        target = handler.target if isinstance(handler, logging.handlers.MemoryHandler) else handler
        if target is not None:
            target.setFormatter(formatter)
    for name in _OUR_LOGGERS:
        logging.getLogger(name).setLevel(level)


@contextmanager
def log_fields(**fields: Any) -> Iterator[None]:
    """Adds fields to every line of the block; a field that is bound already is replaced, None takes it out."""
    bound = {name: value for name, value in {**_bound.get(), **fields}.items() if value is not None}
    token = _bound.set(bound)
    try:
        yield
    finally:
        _bound.reset(token)


def bound_fields() -> Mapping[str, Any]:
    """What is bound here, to be bound again in another thread or process."""
    return _bound.get()


def without_secrets(text: str) -> str:
    """`text` with bearer tokens, passwords in URLs, and values after words like "token=" hidden; rather too many."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


class _TextFormatter(logging.Formatter):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__(_TEXT_FORMAT)
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        fields = " ".join(f"{name}={value}" for name, value in _fields_of(record, self._fields).items())
        return f"{line} [{fields}]" if fields else line


class _JsonFormatter(logging.Formatter):
    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = fields

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": time.replace("+00:00", "Z"), "level": record.levelname, "logger": record.name}
        line |= {"message": record.getMessage(), **_fields_of(record, self._fields)}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return without_secrets(json.dumps(line, default=str))


def _fields_of(record: logging.LogRecord, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Of the process, of what is bound, and of the call itself (`extra=`), the last of which win."""
    # Ray gives every record of a process something of its own, which begins with an underscore.
    extra = {name: value for name, value in vars(record).items() if name not in _NOT_FIELDS and name[0] != "_"}
    return {**fields, **_bound.get(), **extra}
