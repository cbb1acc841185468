"""The one exception of `faithdiff` that callers branch on."""

from __future__ import annotations


class InputError(ValueError):
    """A picture, setting, preset or checkpoint that was given cannot be used; the message says what to change."""


class Cancelled(Exception):  # noqa: N818 - not an error: the caller asked for it
    """A restoration stopped because its callback said so; nothing is left running."""
