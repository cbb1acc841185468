"""The endless stream of samples that training draws from a dataset, by number: no state, no world size.

In : how many samples there are, or which of them belong to which group and the shares of the groups.
Out: `SampleOrder.index(n)`, where in the dataset sample number n of the stream lies.

Every sample of a group comes once before any comes again. With shares, the groups take turns so evenly that any stretch
of L draws holds each of two groups share * L times, give or take one, and each of more groups nearly so.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from sr_platform.errors import InputDataError

Indices = npt.NDArray[np.int64]

_ORDER_STREAM = 2
_FINEST_SHARE = 1_000_000
_SHARES_TOLERANCE = 1e-3


class SampleOrder:
    """The stream of one stage of training; every pass through a group is a permutation drawn from (seed, pass)."""

    def __init__(
        self,
        seed: int,
        num_samples: int,
        *,
        groups: Mapping[str, Indices] | None = None,
        mixture: Mapping[str, float] | None = None,
    ) -> None:
        """`groups` -> where in the dataset their samples lie; `mixture` -> their shares of the draws.

        Without a mixture every sample is drawn equally often, whatever its group.

        Raises:
            InputDataError: mixture and groups name different things, or the shares do not sum to 1.
        """
        self.seed, self.num_samples = seed, num_samples
        self._turns: list[_Turn] = []
        self._members: list[Indices] = []
        if mixture:
            self._members = _members(groups or {}, mixture)
            self._turns = _turns(seed, [mixture[name] for name in sorted(mixture)])

    def index(self, sample: int) -> int:
        """Where in the dataset sample number `sample` of the stream lies."""
        if not self._members:
            epoch, position = divmod(sample, self.num_samples)
            return int(_permutation((self.seed, _ORDER_STREAM, epoch), self.num_samples)[position])
        group, draw = self._group_and_draw(sample)
        members = self._members[group]
        epoch, position = divmod(draw, len(members))
        return int(members[_permutation((self.seed, _ORDER_STREAM, epoch, group), len(members))[position]])

    def _group_and_draw(self, sample: int) -> tuple[int, int]:
        """Whose turn it is, and how many turns that group had before."""
        for group, turn in enumerate(self._turns):
            before = turn.taken(sample)
            if turn.taken(sample + 1) > before:
                return group, before
            sample -= before
        return len(self._turns), sample


@dataclass(frozen=True)
class _Turn:
    """One group against all groups after it: it takes `share` of what they are offered, evenly spread."""

    share: Fraction
    offset: int

    def taken(self, offers: int) -> int:
        """How many of the first `offers` the group takes. Exact, because rounding would drift in a long run."""
        return (offers * self.share.numerator + self.offset) // self.share.denominator


def _turns(seed: int, shares: list[float]) -> list[_Turn]:
    """One turn less than shares: the last group takes what is left."""
    exact = [Fraction(share).limit_denominator(_FINEST_SHARE) for share in shares]
    turns = []
    for group in range(len(exact) - 1):
        share = exact[group] / sum(exact[group:])
        offset = np.random.default_rng([seed, _ORDER_STREAM, 0, group, 1]).integers(share.denominator)
        turns.append(_Turn(share, int(offset)))
    return turns


def _members(groups: Mapping[str, Indices], mixture: Mapping[str, float]) -> list[Indices]:
    held = {name for name, members in groups.items() if len(members)}
    if held != set(mixture) or min(mixture.values()) <= 0 or not _is_one(math.fsum(mixture.values())):
        raise InputDataError(
            f"mixture: shares are given for {_names(mixture)}, which sum to {math.fsum(mixture.values()):g}, and the "
            f"dataset holds {_names(held)}; every group needs a share above 0 and they sum to 1: prepare it again"
        )
    return [groups[name] for name in sorted(mixture)]


def _is_one(total: float) -> bool:
    return abs(total - 1) <= _SHARES_TOLERANCE


def _names(names: Mapping[str, float] | set[str]) -> str:
    return ", ".join(repr(name) for name in sorted(names)) or "no group"


@functools.lru_cache(maxsize=8)
def _permutation(entropy: tuple[int, ...], length: int) -> Indices:
    return np.random.default_rng(entropy).permutation(length)
