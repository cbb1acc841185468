"""What a replica's device does next: pure arithmetic, without threads, clocks or tensors.

Every picture in hand is an entry. What it needs of the device comes in quanta: a pass of the network over tiles of one
shape, or a turn of its encoding or decoding, which ends at the next break (`faithdiff.breaks`). Between two quanta
anything may be chosen, so that a large picture holds up a small one by one quantum and by its share after that.

Shares follow weights: 2 ** (priority - 5) / sqrt(work). A picture with 64 times the work of another gets an eighth of
its share while both are there: the small one hardly waits, and the large one never starves.

The algorithm is weighted fair queueing (Demers, Keshav and Shenker 1989; Parekh and Gallager, A generalized processor
sharing approach to flow control, IEEE/ACM Transactions on Networking 1(3), 1993): an entry's start tag is what it has
had / its weight, and the one that would finish its next quantum at the earliest virtual time is served. No entry ever
falls behind its share by more than about one quantum. Our entries come and go and costs are known only afterwards, so
virtual time runs at 1 / the weights that compete, as the global pass of stride scheduling (Waldspurger and Weihl 1995),
newcomers start there, and a quantum is charged when it is over. Worst-case fairness (WF2Q) is left out on purpose: it
would hold a small picture back behind a whole tile of a large one as soon as it is a little ahead of its share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Shape = tuple[int, int, int]
"""Tile height and width in cells, and prompts per tile: tiles of equal shape share a pass."""

MIDDLE_PRIORITY = 5
_CELL_MEGAPIXELS = 64e-6
# Of the newest cost in what is expected of the next one.
_NEWEST = 0.3


@dataclass(frozen=True)
class Turn:
    """The device is this entry's until it reaches a break."""

    entry: int


@dataclass(frozen=True)
class Pass:
    """One pass of the network over tiles of one shape: pairs (entry, tile), those of the entry it is for first.

    `capacity` is how many tiles the pass has room for. With `is_alone` it is an entry's that gets no company.
    """

    shape: Shape
    tiles: tuple[tuple[int, int], ...]
    capacity: int
    is_alone: bool = False


Quantum = Turn | Pass


@dataclass
class _Entry:
    weight: float
    start: float
    shape: Shape | None = None
    tiles: list[int] = field(default_factory=list)
    wants_turn: bool = False
    is_alone: bool = False
    turn_cost: float = 0.0

    @property
    def is_waiting(self) -> bool:
        return self.wants_turn or bool(self.tiles)


class Scheduler:
    """Chooses quanta. Costs may have any one unit; the engine charges seconds of its device.

    `tiles_per_pass(shape)` is how many tiles of a shape a pass takes, whether or not there are as many.
    """

    def __init__(self, tiles_per_pass: Callable[[Shape], int]) -> None:
        self._tiles_per_pass = tiles_per_pass
        self._entries: dict[int, _Entry] = {}
        self._virtual_time = 0.0
        self._num_added = 0
        self._cost_per_megapixel = 0.0
        self._served: dict[int, float] = {}

    def add(self, work: float, priority: int = MIDDLE_PRIORITY) -> int:
        """A new entry of `work` megapixel-steps, which needs nothing yet; returns the number it goes by."""
        assert work > 0
        self._num_added += 1
        self._entries[self._num_added] = _Entry(weight(work, priority), self._virtual_time)
        return self._num_added

    def remove(self, entry: int) -> None:
        """The entry is done or cancelled: it is never chosen again. Removing it twice is no error."""
        self._entries.pop(entry, None)

    def want_turn(self, entry: int) -> None:
        """The entry waits for a turn of its own."""
        waiting = self._awakened(entry)
        waiting.wants_turn, waiting.tiles = True, []

    def want_tiles(self, entry: int, shape: Shape, tiles: Sequence[int], *, alone: bool = False) -> None:
        """The entry waits for passes over these tiles. Tiles that are on their way must not be among them."""
        waiting = self._awakened(entry)
        waiting.wants_turn, waiting.tiles, waiting.shape, waiting.is_alone = False, list(tiles), shape, alone

    def rest(self, entry: int) -> None:
        """The entry needs nothing for now."""
        if (resting := self._entries.get(entry)) is not None:
            resting.wants_turn, resting.tiles = False, []

    def next(self) -> Quantum | None:
        """What the device does next, which the entries then wait for no longer; None when nobody waits."""
        waiting = {number: entry for number, entry in self._entries.items() if entry.is_waiting}
        assert not self._served, "one quantum at a time: the last one was not charged"
        if not waiting:
            return None
        self._virtual_time = max(self._virtual_time, min(entry.start for entry in waiting.values()))
        chosen = min(waiting, key=lambda number: (self._finish(waiting[number]), number))
        if waiting[chosen].wants_turn:
            waiting[chosen].wants_turn = False
            quantum: Quantum = Turn(chosen)
        else:
            quantum = self._pass_for(chosen, waiting)
        self._served = {number: waiting[number].weight for number in entries_of(quantum)}
        return quantum

    def charge(self, quantum: Quantum, cost: float) -> None:
        """The quantum is over. Call it when its entries have said what they want next: they compete without a gap.

        A pass is charged to the entry it was for, whatever its company: they have filled rows that it would have had
        to fill with copies.
        """
        assert cost >= 0
        served = entries_of(quantum)[0]
        rivals = {number: entry.weight for number, entry in self._entries.items() if entry.is_waiting}
        self._virtual_time += cost / sum((rivals | {served: self._served[served]}).values())
        if (entry := self._entries.get(served)) is not None:
            entry.start += cost / entry.weight
            if isinstance(quantum, Turn):
                entry.turn_cost = cost
        if isinstance(quantum, Pass):
            self._learn(cost / (quantum.capacity * _megapixels(quantum.shape)))
        self._served = {}

    def _learn(self, cost_per_megapixel: float) -> None:
        newest = _NEWEST if self._cost_per_megapixel else 1.0
        self._cost_per_megapixel += newest * (cost_per_megapixel - self._cost_per_megapixel)

    def _awakened(self, number: int) -> _Entry:
        """Whoever needed nothing for a while has saved nothing up; whoever is being served was never away."""
        entry = self._entries[number]
        if not entry.is_waiting and number not in self._served:
            entry.start = max(entry.start, self._virtual_time)
        return entry

    def _finish(self, entry: _Entry) -> float:
        """The finish tag of the entry's next quantum, with the cost that is expected of it."""
        cost = entry.turn_cost
        if not entry.wants_turn:
            assert entry.shape is not None
            cost = self._cost_per_megapixel * self._capacity(entry) * _megapixels(entry.shape)
        return entry.start + cost / entry.weight

    def _capacity(self, entry: _Entry) -> int:
        assert entry.shape is not None
        return 1 if entry.is_alone else self._tiles_per_pass(entry.shape)

    def _pass_for(self, chosen: int, waiting: dict[int, _Entry]) -> Pass:
        first = waiting[chosen]
        assert first.shape is not None
        capacity = self._capacity(first)
        company = sorted(
            (number for number, entry in waiting.items() if number != chosen and self._may_join(entry, first)),
            key=lambda number: (waiting[number].start, number),
        )
        tiles: list[tuple[int, int]] = []
        for number in [chosen, *company]:
            entry, room = waiting[number], capacity - len(tiles)
            tiles += [(number, tile) for tile in entry.tiles[:room]]
            entry.tiles = entry.tiles[room:]
        return Pass(first.shape, tuple(tiles), capacity, first.is_alone)

    def _may_join(self, entry: _Entry, first: _Entry) -> bool:
        return bool(entry.tiles) and entry.shape == first.shape and not entry.is_alone and not first.is_alone


def entries_of(quantum: Quantum) -> list[int]:
    """Who takes part, the one that is charged first."""
    return [quantum.entry] if isinstance(quantum, Turn) else list(dict.fromkeys(number for number, _ in quantum.tiles))


def weight(work: float, priority: int) -> float:
    """The share of a picture of `work` megapixel-steps, relative to those of others."""
    return 2.0 ** (priority - MIDDLE_PRIORITY) / math.sqrt(work)


def _megapixels(shape: Shape) -> float:
    return shape[0] * shape[1] * _CELL_MEGAPIXELS
