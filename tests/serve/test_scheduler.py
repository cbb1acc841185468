"""The scheduler in a simulated replica: every quantum takes the seconds it is said to, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.scheduler import Pass, Scheduler, Turn, entries_of, weight

SECONDS_PER_MEGAPIXEL = 0.1


@dataclass
class Picture:
    """What one picture needs: turns of so many seconds, then steps over its tiles."""

    num_tiles: int
    num_steps: int
    tile_px: int = 1024
    turns_s: Sequence[float] = ()
    priority: int = 5
    arrives_s: float = 0.0
    entry: int = 0
    turns_done: int = 0
    steps_done: int = 0
    pending: list[int] = field(default_factory=list)
    device_s: float = 0.0
    done_s: float = math.nan

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.tile_px // 8, self.tile_px // 8, 2)

    @property
    def work(self) -> float:
        return self.num_tiles * self.num_steps * self.tile_px**2 / 1e6

    @property
    def is_done(self) -> bool:
        return self.turns_done == len(self.turns_s) and self.steps_done == self.num_steps


@dataclass
class Replica:
    """A device that does one quantum after the other. A pass costs its full capacity, as a padded one does."""

    tiles_per_pass: int = 1
    now_s: float = 0.0
    served: list[tuple[float, tuple[int, ...]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.scheduler = Scheduler(lambda shape: self.tiles_per_pass)

    def run(self, pictures: Sequence[Picture], *, until_s: float = math.inf) -> None:
        """Until all pictures are done or the time is up. Asserts that the device is never idle while one waits."""
        coming = sorted(pictures, key=lambda picture: picture.arrives_s)
        here: dict[int, Picture] = {}
        while (coming or here) and self.now_s < until_s:
            while coming and coming[0].arrives_s <= self.now_s:
                self.admit(coming.pop(0), here)
            if not here:
                self.now_s = coming[0].arrives_s
                continue
            self.serve(here)
        if not coming and not here:
            assert self.scheduler.next() is None

    def serve(self, here: dict[int, Picture]) -> None:
        """One quantum."""
        quantum = self.scheduler.next()
        assert quantum is not None, "idle though a picture waits"
        cost_s = self._cost_s(quantum, here)
        self.now_s += cost_s
        self.served.append((cost_s, tuple(entries_of(quantum))))
        self._apply(quantum, cost_s, here)

    def admit(self, picture: Picture, here: dict[int, Picture]) -> None:
        picture.entry = self.scheduler.add(picture.work, picture.priority)
        here[picture.entry] = picture
        self._want(picture)

    def _want(self, picture: Picture) -> None:
        if picture.turns_done < len(picture.turns_s):
            self.scheduler.want_turn(picture.entry)
            return
        picture.pending = picture.pending or list(range(picture.num_tiles))
        self.scheduler.want_tiles(picture.entry, picture.shape, picture.pending)

    def _cost_s(self, quantum: Turn | Pass, here: dict[int, Picture]) -> float:
        if isinstance(quantum, Turn):
            picture = here[quantum.entry]
            return picture.turns_s[picture.turns_done]
        return quantum.capacity * quantum.shape[0] * quantum.shape[1] * 64e-6 * SECONDS_PER_MEGAPIXEL

    def _apply(self, quantum: Turn | Pass, cost_s: float, here: dict[int, Picture]) -> None:
        if isinstance(quantum, Turn):
            here[quantum.entry].turns_done += 1
        else:
            for entry, tile in quantum.tiles:
                here[entry].pending.remove(tile)
        here[entries_of(quantum)[0]].device_s += cost_s
        finished = []
        for entry in entries_of(quantum):
            picture = here[entry]
            if isinstance(quantum, Pass) and not picture.pending:
                picture.steps_done += 1
            if picture.is_done:
                finished.append(picture)
            else:
                self._want(picture)
        self.scheduler.charge(quantum, cost_s)
        for picture in finished:
            picture.done_s = self.now_s
            self.scheduler.remove(picture.entry)
            del here[picture.entry]


def latency_s(picture: Picture) -> float:
    return picture.done_s - picture.arrives_s


pictures = st.builds(
    Picture,
    num_tiles=st.integers(1, 12),
    num_steps=st.integers(1, 6),
    tile_px=st.sampled_from([256, 512, 1024]),
    turns_s=st.lists(st.floats(0.001, 0.2), max_size=4),
    priority=st.integers(0, 9),
    arrives_s=st.floats(0, 3),
)


@given(st.lists(pictures, min_size=1, max_size=8), st.sampled_from([1, 2, 8]))
@settings(max_examples=150, deadline=None)
def test_the_device_never_idles_while_somebody_waits_and_every_picture_ends(crowd, tiles_per_pass):
    replica = Replica(tiles_per_pass)
    replica.run(crowd)
    assert all(picture.is_done for picture in crowd)
    assert sum(cost_s for cost_s, _ in replica.served) == pytest.approx(sum(picture.device_s for picture in crowd))


competing = st.tuples(st.sampled_from([256, 512, 1024]), st.integers(1, 400), st.integers(0, 9))


@given(st.lists(competing, min_size=2, max_size=8))
@settings(max_examples=100, deadline=None)
def test_nobody_falls_behind_its_share_by_more_than_the_longest_quantum(crowd):
    """Pictures that compete all the time: whatever moment is looked at, each has had its share of the device."""
    competitors = [Picture(1, 10**9, tile_px, priority=priority) for tile_px, _, priority in crowd]
    replica = Replica()
    weights = {}
    for picture, (_, work, priority) in zip(competitors, crowd, strict=True):
        picture.entry = replica.scheduler.add(work, priority)
        weights[picture.entry] = weight(work, priority)
        replica._want(picture)
    here = {picture.entry: picture for picture in competitors}
    longest_s = SECONDS_PER_MEGAPIXEL * max(picture.tile_px for picture in competitors) ** 2 / 1e6
    for _ in range(300):
        replica.serve(here)
        for picture in competitors:
            due_s = replica.now_s * weights[picture.entry] / sum(weights.values())
            assert picture.device_s > due_s - 1.01 * longest_s


@pytest.mark.parametrize("tiles_per_pass", [1, 4])
@pytest.mark.parametrize("arrives_s", [0.0, 0.05, 7.31, 60.0])
def test_one_tile_behind_sixty_four_takes_at_most_twice_as_long(arrives_s, tiles_per_pass):
    alone, behind = (Picture(1, 20, turns_s=(0.1, 0.1), arrives_s=arrives_s) for _ in range(2))
    Replica(tiles_per_pass).run([alone])
    large = Picture(64, 20, turns_s=(0.1,) * 64)
    Replica(tiles_per_pass).run([large, behind])
    assert latency_s(behind) <= 2 * latency_s(alone)


@given(st.integers(64, 256), st.integers(4, 20), st.floats(0, 300), st.floats(0.001, 0.2))
@settings(max_examples=60, deadline=None)
def test_whenever_it_comes_a_tile_behind_many_takes_at_most_twice_as_long(num_tiles, num_steps, arrives_s, turn_s):
    alone, behind = (Picture(1, num_steps, turns_s=(turn_s,) * 2, arrives_s=arrives_s) for _ in range(2))
    Replica().run([alone])
    Replica().run([Picture(num_tiles, 20), behind])
    assert latency_s(behind) <= 2 * latency_s(alone)


@given(st.lists(pictures, min_size=2, max_size=8), st.data())
@settings(max_examples=100, deadline=None)
def test_cancelled_pictures_get_nothing_more_and_the_others_end(crowd, data):
    replica, here = Replica(4), {}
    for picture in crowd:
        replica.admit(picture, here)
    while here:
        if len(here) > 1 and data.draw(st.integers(0, 9)) == 0:
            gone = here.pop(data.draw(st.sampled_from(sorted(here))))
            replica.scheduler.remove(gone.entry)
        replica.serve(here)
    assert replica.scheduler.next() is None


def test_a_picture_much_smaller_than_a_tile_waits_for_one_tile_of_the_large_one():
    large = Picture(64, 20)
    small = Picture(1, 20, tile_px=256, turns_s=(0.01,), arrives_s=3.333)
    Replica().run([large, small])
    tile_s, own_s = 0.1 * 1.048576, 0.01 + 20 * 0.1 * 0.065536
    assert latency_s(small) <= tile_s + 1.1 * own_s


def test_many_small_pictures_share_what_is_theirs_and_the_large_one_goes_on():
    large, crowd = Picture(64, 20), [Picture(1, 20, arrives_s=1.0) for _ in range(8)]
    replica = Replica()
    replica.run([large, *crowd], until_s=11.0)
    assert large.device_s >= 1 + 0.9 * 10 / (1 + 8 * 8)
    crowd_s = 8 * 20 * 0.1048576
    assert sum(picture.device_s for picture in crowd) >= 0.9 * 10 * 64 / 65
    assert max(p.device_s for p in crowd) - min(p.device_s for p in crowd) <= 0.11
    assert crowd_s > 10, "they compete all the time"


@pytest.mark.parametrize("tiles_per_pass", [1, 4])
def test_a_stream_of_small_pictures_without_end_does_not_starve_a_large_one(tiles_per_pass):
    """A new picture of a single pass comes as soon as one is done."""
    replica, large = Replica(tiles_per_pass), Picture(64, 10)
    here: dict[int, Picture] = {}
    replica.admit(large, here)
    for _ in range(1000):
        replica.admit(Picture(1, 1, tile_px=1016), here)
        while len(here) > 1:
            replica.serve(here)
    assert large.device_s >= 0.9 * replica.now_s / (1 + math.sqrt(640))


def test_higher_priority_has_the_larger_share():
    low, high = Picture(8, 50, priority=5), Picture(8, 50, priority=7)
    replica = Replica()
    replica.run([low, high], until_s=10)
    assert high.device_s == pytest.approx(4 * low.device_s, rel=0.1)


def test_tiles_of_several_pictures_share_a_pass_and_company_costs_nothing():
    replica = Replica(tiles_per_pass=4)
    crowd = [Picture(1, 5) for _ in range(4)]
    replica.run(crowd)
    assert len(replica.served) == 5
    assert [len(entries) for _, entries in replica.served] == [4] * 5


def test_tiles_of_another_shape_never_share_a_pass():
    scheduler = Scheduler(lambda shape: 8)
    first, second = scheduler.add(1.0), scheduler.add(1.0)
    scheduler.want_tiles(first, (16, 16, 2), [0, 1])
    scheduler.want_tiles(second, (16, 16, 1), [0])
    assert scheduler.next() == Pass((16, 16, 2), ((first, 0), (first, 1)), 8)


def test_a_picture_that_is_to_be_alone_gets_one_tile_at_a_time_and_no_company():
    scheduler = Scheduler(lambda shape: 8)
    first, second = scheduler.add(1.0), scheduler.add(1.0)
    scheduler.want_tiles(first, (16, 16, 2), [0, 1], alone=True)
    scheduler.want_tiles(second, (16, 16, 2), [0])
    passes = []
    for _ in range(3):
        passes.append(scheduler.next())
        scheduler.charge(passes[-1], 1.0)
    assert sorted(quantum.tiles for quantum in passes) == [((first, 0),), ((first, 1),), ((second, 0),)]


def test_what_is_removed_is_never_chosen_again_even_while_it_runs():
    scheduler = Scheduler(lambda shape: 1)
    first, second = scheduler.add(1.0), scheduler.add(1.0)
    scheduler.want_tiles(first, (8, 8, 2), [0, 1, 2])
    scheduler.want_turn(second)
    quantum = scheduler.next()
    scheduler.remove(first)
    scheduler.remove(first)
    scheduler.charge(quantum, 1.0)
    rest = scheduler.next()
    if rest is not None:
        assert rest == Turn(second)
        scheduler.charge(rest, 1.0)
    assert scheduler.next() is None


def test_who_rests_saves_nothing_up():
    """Both have the same weight; one was away while the other worked, and gets half from then on, not more."""
    scheduler = Scheduler(lambda shape: 1)
    busy, away = scheduler.add(1.0), scheduler.add(1.0)
    for _ in range(50):
        scheduler.want_tiles(busy, (8, 8, 2), [0])
        scheduler.charge(scheduler.next(), 1.0)
    served = []
    for _ in range(20):
        scheduler.want_tiles(busy, (8, 8, 2), [0])
        scheduler.want_tiles(away, (8, 8, 2), [0])
        quantum = scheduler.next()
        served.append(entries_of(quantum)[0])
        scheduler.charge(quantum, 1.0)
    assert abs(served.count(busy) - served.count(away)) <= 2
