"""Several replicas at one picture: each steps a share of its tiles, and only latents travel, once per step.

The replica that has the job keeps the canvas. Its peers encode the picture themselves and keep the features of the
tiles they step: these are gigabytes, where latents are a few megabytes. Every step, tiles are shared out by how fast
each has been; each tile has the same bits wherever it is stepped. A peer that is lost costs the tiles it was at: they
are stepped here, and the others go on. Pure; `serve.peers` has the peers that are replicas of Ray Serve.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

import numpy as np

if TYPE_CHECKING:
    from faithdiff.request import RestorationRequest

logger = logging.getLogger(__name__)

# Of the newest speed in what is expected of a member.
_NEWEST = 0.5


@dataclass(frozen=True)
class SharedPicture:
    """What a peer needs to take part: `lq` uint8 RGB [H, W, 3]. `name` is the same for all of a team."""

    name: str
    lq: np.ndarray
    request: RestorationRequest
    model_version: str
    priority: int


class Peer(Protocol):
    """Another replica. Every method waits for the answer, and may raise anything when the peer is lost."""

    @property
    def name(self) -> str: ...

    def join(self, picture: SharedPicture) -> None:
        """Encodes the picture and gets ready to step tiles of it."""

    def step(self, picture: str, step: int, latents: np.ndarray, tiles: Sequence[int]) -> np.ndarray:
        """Tiles [N, 4, h, w] after step `step` of a canvas [1, 4, H, W]."""

    def leave(self, picture: str) -> None:
        """Forgets the picture."""


@dataclass(frozen=True)
class Delivery:
    """Tiles that were away: `stepped` [N, 4, h, w], or None when they must be stepped here."""

    step: int
    tiles: tuple[int, ...]
    stepped: np.ndarray | None


@dataclass
class _Member:
    """`peer` is None for the replica that has the picture. `rate` in tiles per second; None before the first step."""

    peer: Peer | None
    rate: float | None = None


@dataclass
class _OwnShare:
    num_tiles: int = 0
    started_s: float = field(default_factory=time.monotonic)


class Team:
    """The peers of one picture. `start` invites them, and `share_out` uses those that are ready by then."""

    def __init__(self, picture: SharedPicture, peers: Sequence[Peer]) -> None:
        self._picture = picture
        self._invited = list(peers)
        self._lock = threading.Lock()
        self._own = _Member(None)
        self._members: list[_Member] = []
        self._own_share = _OwnShare()
        self._is_closed = False
        self._threads = ThreadPoolExecutor(max(1, len(peers)), thread_name_prefix=f"team of {picture.name}")

    @property
    def peer_names(self) -> list[str]:
        """Of those that take part now."""
        with self._lock:
            return [member.peer.name for member in self._members if member.peer is not None]

    def start(self) -> None:
        """Invites the peers; returns at once."""
        for peer in self._invited:
            self._threads.submit(self._join, peer)

    def share_out(
        self, step: int, latents: np.ndarray, tiles: Sequence[int], deliver: Callable[[Delivery], None]
    ) -> list[int]:
        """Sends the peers their share of `tiles` and returns those that stay here, at least one.

        `deliver` is called for every share that went away, from another thread, exactly once.
        """
        with self._lock:
            members = [self._own, *self._members]
            shares = split(tiles, [_rate_of(member, members) for member in members])
            for member, share in zip(members[1:], shares[1:], strict=True):
                if share:
                    self._threads.submit(self._step, member, step, latents, tuple(share), deliver)
        self._own_share = _OwnShare(len(shares[0]))
        return shares[0]

    def own_share_is_done(self) -> None:
        """The tiles that `share_out` has left here have been stepped."""
        share = self._own_share
        _learn(self._own, share.num_tiles, time.monotonic() - share.started_s)

    def close(self) -> None:
        """Lets the peers go; returns at once."""
        with self._lock:
            self._is_closed = True
            members, self._members = self._members, []
            for member in members:
                self._threads.submit(self._leave, member)
            self._threads.shutdown(wait=False)

    def _join(self, peer: Peer) -> None:
        try:
            peer.join(self._picture)
        except Exception as error:  # noqa: BLE001 - whatever it is, the picture is made without this peer
            logger.warning("team: %s does not take part in %s: %r", peer.name, self._picture.name, error)
            return
        with self._lock:
            if not self._is_closed:
                self._members.append(_Member(peer))
                return
        self._leave(_Member(peer))

    def _step(
        self,
        member: _Member,
        step: int,
        latents: np.ndarray,
        tiles: tuple[int, ...],
        deliver: Callable[[Delivery], None],
    ) -> None:
        assert member.peer is not None
        started_s = time.monotonic()
        stepped: np.ndarray | None = None
        try:
            stepped = member.peer.step(self._picture.name, step, latents, tiles)
            _learn(member, len(tiles), time.monotonic() - started_s)
        except Exception as error:  # noqa: BLE001 - a lost peer costs the tiles it was at, whatever it was lost to
            logger.warning("team: %s is lost to %s at step %d: %r", member.peer.name, self._picture.name, step, error)
            with self._lock:
                self._members = [other for other in self._members if other is not member]
        deliver(Delivery(step, tiles, stepped))
        if stepped is None:  # it may be there all the same, and hold memory
            self._leave(member)

    def _leave(self, member: _Member) -> None:
        assert member.peer is not None
        try:
            member.peer.leave(self._picture.name)
        except Exception as error:  # noqa: BLE001 - it forgets the picture by itself after a while
            logger.info("team: %s cannot be told that %s is over: %r", member.peer.name, self._picture.name, error)


def split(tiles: Sequence[int], rates: Sequence[float]) -> list[list[int]]:
    """Runs of `tiles` in their order, as long as `rates` are to each other; the first gets at least one tile."""
    assert rates
    assert all(rate > 0 for rate in rates)
    bounds, total, so_far = [0], sum(rates), 0.0
    for rate in rates:
        so_far += rate
        bounds.append(round(len(tiles) * so_far / total))
    bounds[-1] = len(tiles)
    bounds[1] = max(bounds[1], min(1, len(tiles)))
    bounds[2:] = [max(bound, bounds[1]) for bound in bounds[2:]]
    return [list(tiles[start:end]) for start, end in pairwise(bounds)]


def _rate_of(member: _Member, members: Sequence[_Member]) -> float:
    """A member that has not stepped yet is taken for an average one."""
    known = [other.rate for other in members if other.rate is not None]
    return member.rate or (sum(known) / len(known) if known else 1.0)


def _learn(member: _Member, num_tiles: int, seconds: float) -> None:
    rate = num_tiles / max(seconds, 1e-6)
    member.rate = rate if member.rate is None else member.rate + _NEWEST * (rate - member.rate)
