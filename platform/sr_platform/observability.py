"""Logs of jobs and replicas: one line per event, time first, to stderr; never a secret."""

from __future__ import annotations

import logging
import sys

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def configure_logging(level: int = logging.INFO) -> None:
    """Sends our own log records to stderr at `level`, leaving the loggers of libraries at warnings."""
    logging.basicConfig(stream=sys.stderr, format=_FORMAT, level=logging.WARNING, force=True)
    for name in ("sr_platform", "faithdiff", "pipelines", "serve"):
        logging.getLogger(name).setLevel(level)
