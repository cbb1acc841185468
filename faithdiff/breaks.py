"""Points at which a long computation on the device may pause, so that others get their turn on it.

Encoding and decoding a large picture call `take_break()` between bands and between tiles. Outside of `breaks` that does
nothing. A callback given to `breaks` may wait as long as it likes and may raise, which ends the computation there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

Between = Callable[[], None]


def _go_on() -> None:
    """No break is wanted."""


_between: ContextVar[Between] = ContextVar("between", default=_go_on)


def take_break() -> None:
    """Calls what `breaks` was given. No model is in another precision than its own and nothing is half written."""
    _between.get()()


@contextmanager
def breaks(between: Between) -> Iterator[None]:
    """Computations of this thread inside the block call `between` wherever they can pause."""
    token = _between.set(between)
    try:
        yield
    finally:
        _between.reset(token)


@contextmanager
def no_breaks() -> Iterator[None]:
    """For what must not be left half done, such as work with a model that is in another precision for a while."""
    with breaks(_go_on):
        yield
