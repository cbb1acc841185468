"""One way to an MLflow server: the client, which failures pass by themselves, and how long they are waited for.

MLflow's own retries last for minutes, inside a call, and cannot be set per client. They are switched off here, for
this process and unless the user has set MLFLOW_HTTP_REQUEST_MAX_RETRIES, because everybody who calls this module
waits and tries again in his own way. A password in an http(s) tracking URI is moved to the variables that MLflow
reads, so that no URI that is passed on, logged or printed holds it.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from sr_platform import s3
from sr_platform.errors import RequestError, StorageError, TrackingError

FIRST_WAIT_S = 1.0
LONGEST_WAIT_S = 30.0
START_PATIENCE_S = 20.0
"""At the start of a job: somebody is there to correct a wrong URI."""
PATIENCE_S = 600.0
"""Once work is done that would be lost."""

# What MLflow answers when it has understood a request and will never accept it. Everything else may pass: a proxy
# says 404 while its backend restarts, and credentials can be put right without the entries having been wrong.
_VERDICTS = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")
_PASSING_STATUSES = (401, 403, 404, 408, 425, 429)
_UNAUTHORISED = ("UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED", "PERMISSION_DENIED")
_UNAUTHORISED_STATUSES = (401, 403)
_PROBE_TIMEOUT_S = 5
_LONGEST_REASON = 300
_ADVICE = "start the server and run the same command again"
_ADVICE_AT_START = (
    "start the server, or unset MLFLOW_TRACKING_URI: a training then uses an SQLite file in its output folder"
)

ADVICE_ON_CREDENTIALS = (
    "give this process MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN; workers of a "
    "cluster need them in the environment of their nodes"
)

logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_client(uri: str) -> Any:
    """An MlflowClient for runs and registry. SQLite is opened, and its tables made, here; a server is not contacted."""
    # MLflow takes seconds to import, and a preset name needs none of it.
    from mlflow import MlflowClient

    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for given in (uri, os.environ.get("MLFLOW_TRACKING_URI", "")):
        parts = urlsplit(given)
        if _is_http(uri) and parts.password and without_credentials(given) == without_credentials(uri):
            _use_credentials(given)
    uri = without_credentials(uri) if _is_http(uri) else uri
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def hide_credentials() -> None:
    """Moves a server's password from MLFLOW_TRACKING_URI to the variables that MLflow reads.

    Processes that are started from now on inherit it, and no copy of the URI holds it.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI", "")
    if urlsplit(given).password and public_uri(given) != given:
        _use_credentials(given)
        os.environ["MLFLOW_TRACKING_URI"] = public_uri(given)


def _use_credentials(uri: str) -> None:
    parts = urlsplit(uri)
    os.environ["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username or "")
    os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")


def without_credentials(uri: str) -> str:
    """`uri` without user:password@. A server is reached with it all the same, as long as the environment has them."""
    parts = urlsplit(uri)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl() if "@" in parts.netloc else uri


def public_uri(uri: str) -> str:
    """What may be passed to workers and stored: a database needs its credentials, a server does not."""
    return without_credentials(uri) if _is_http(uri) else uri


def is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed later: the server or storage is away, not the request wrong."""
    import requests
    import sqlalchemy.exc
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code not in _VERDICTS
    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = int(error.response.status_code)
        return status >= 500 or status in _PASSING_STATUSES
    return isinstance(error, (*s3.PASSING, StorageError, sqlalchemy.exc.OperationalError))


def is_unauthorised(error: BaseException) -> bool:
    """Whether the server answers, but not to somebody with these credentials."""
    import requests
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code in _UNAUTHORISED
    response = error.response if isinstance(error, requests.HTTPError) else None
    return response is not None and response.status_code in _UNAUTHORISED_STATUSES


def is_missing(error: Any) -> bool:
    """Whether an MlflowException says that the run, model or version does not exist."""
    return bool(error.error_code == "RESOURCE_DOES_NOT_EXIST")


def reason(error: BaseException, uri: str) -> str:
    """The innermost cause in one line, without the password of `uri`: what MLflow wraps around it says less."""
    if is_passing(error):
        while (inner := error.__cause__ or error.__context__) is not None:
            error = inner
    text = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
    password = urlsplit(uri).password
    return text.replace(password, "***") if password else text


def waits_s() -> Iterator[float]:
    """1, 2, 4, ... seconds, at most 30, without end."""
    wait_s = FIRST_WAIT_S
    while True:
        yield wait_s
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def patiently(uri: str, call: Callable[[], T], patience_s: float = PATIENCE_S, advice: str = _ADVICE) -> T:
    """`call()`, again while the server of `uri` is away, for `patience_s` from the first failure on.

    Raises:
        TrackingError: it was still away then.
        What `call` raises, where waiting would not help.
    """
    give_up_s = float("inf")
    for wait_s in waits_s():
        try:
            answer = call()
        except Exception as error:
            if not is_passing(error):
                raise
            verb = "refuses" if is_unauthorised(error) else "does not answer"
            problem = f"tracking: {without_credentials(uri)} {verb}: {reason(error, uri)}"
            if is_unauthorised(error):
                advice = ADVICE_ON_CREDENTIALS
            if give_up_s == float("inf"):
                give_up_s = time.monotonic() + patience_s
                logger.warning("%s; waiting up to %.0f s", problem, patience_s)
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                raise TrackingError(f"{problem}; {advice}") from None
            time.sleep(min(wait_s, left_s))
        else:
            if give_up_s < float("inf"):
                logger.info("tracking: %s answers again", without_credentials(uri))
            return answer
    raise AssertionError("unreachable")


def at_start(uri: str, call: Callable[[Any], T]) -> T:
    """`call(client)` on a server that has to answer soon.

    Raises:
        RequestError: it did not within about START_PATIENCE_S, or `uri` is none that MLflow knows.
        What `call` raises besides MLflow's own errors.
    """
    from mlflow.exceptions import MlflowException

    try:
        return patiently(uri, lambda: call(_answering_client(uri)), START_PATIENCE_S, _ADVICE_AT_START)
    except TrackingError as error:
        raise RequestError(str(error)) from None
    except MlflowException as error:
        raise RequestError(
            f"tracking: {without_credentials(uri)} cannot be used: {reason(error, uri)}; "
            "set MLFLOW_TRACKING_URI to http://host:port or sqlite:////path/to/mlflow.db"
        ) from None


def _answering_client(uri: str) -> Any:
    client = open_client(uri)
    if _is_http(uri):
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        # Any answer will do. MLflow's calls would wait two minutes for a host that swallows what it is sent.
        host = get_default_host_creds(without_credentials(uri))
        http_request(host, "/health", "GET", timeout=_PROBE_TIMEOUT_S, max_retries=0, raise_on_status=False)
    return client


def _is_http(uri: str) -> bool:
    return urlsplit(uri).scheme in ("http", "https")
