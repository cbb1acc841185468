"""The exception tree of the platform.

    Exception
    +-- ValueError
    |   +-- RequestError          the request was wrong: one line on stderr, exit status 2
    |       +-- ConfigError       a recipe or flag: unknown name, wrong type, out of range
    |       +-- InputDataError    a folder, picture, shard or manifest that cannot be used
    +-- RuntimeError
        +-- StorageError          storage still failed after its retries: exit status 1
        +-- TrackingError         the tracking server was away for longer than we wait: exit status 1

Every message reads *where: what came, what is allowed, what to change*.
"""

from __future__ import annotations


class RequestError(ValueError):
    """The request cannot be done as asked; the caller has to change something. Jobs exit with status 2."""


class ConfigError(RequestError):
    """A recipe or a flag is wrong."""


class InputDataError(RequestError):
    """A folder, picture, shard or manifest that was given cannot be used."""


class StorageError(RuntimeError):
    """Storage still failed after its retries."""


class TrackingError(RuntimeError):
    """The tracking server was away for longer than we wait for it."""
