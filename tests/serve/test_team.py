from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest

from faithdiff import FaithDiffPipeline
from faithdiff.errors import InputError
from faithdiff.request import RestorationRequest
from serve.engine import Engine, EngineConfig
from serve.form import UpscaleRequest
from serve.peers import PeerServer
from serve.served_model import ModelInfo, ServedModel
from serve.team import Delivery, SharedPicture, Team, split

LQ = np.random.default_rng(5).integers(0, 256, (128, 160, 3), dtype=np.uint8)
WANTED = UpscaleRequest(scale=1, num_inference_steps=8, seed=3, prompt="A harbour at night.")
TILE_PX = 64
INFO = ModelInfo("nano", "nano", None, "cpu", "float32", 0.0, 0.0)


class Replicas:
    """Served models in this process, each with a pipeline and an engine of its own, and peers that can be lost."""

    def __init__(self, number: int) -> None:
        pipelines = [FaithDiffPipeline.from_pretrained("nano", model_version="nano") for _ in range(number)]
        self.models = [
            ServedModel(INFO, p, Engine(p, EngineConfig(memory_bytes=10**9)), TILE_PX, 1024) for p in pipelines
        ]
        self.peers = [
            LosablePeer(f"peer {i}", lambda model=model: model, idle_s=60.0) for i, model in enumerate(self.models)
        ]

    def restore(self, number: int, **settings: object) -> np.ndarray:
        """Of the picture by the first `number` replicas."""
        ticket = self.models[0].submit(LQ, WANTED, name="shared", peers=self.peers[1:number], **settings)
        return ticket.future.result(timeout=120).array


class LosablePeer(PeerServer):
    """Counts what it steps; dies when told to."""

    def __init__(self, name: str, model: Callable[[], ServedModel], *, idle_s: float) -> None:
        super().__init__(name, model, idle_s=idle_s)
        self.num_tiles, self.num_steps, self.dies_after_steps = 0, 0, 1000

    def step(self, picture: str, step: int, latents: np.ndarray, tiles: Sequence[int]) -> np.ndarray:
        if self.num_steps == self.dies_after_steps:
            raise ConnectionError("the node is gone")
        self.num_steps += 1
        self.num_tiles += len(tiles)
        return super().step(picture, step, latents, tiles)


@pytest.fixture(scope="module")
def replicas() -> Iterator[Replicas]:
    made = Replicas(4)
    yield made
    for model in made.models:
        model.engine.close()


@pytest.fixture(autouse=True)
def _fresh_peers(replicas: Replicas) -> None:
    for peer in replicas.peers:
        peer.num_tiles, peer.num_steps, peer.dies_after_steps = 0, 0, 1000


@pytest.fixture(scope="module")
def undisturbed(replicas: Replicas) -> np.ndarray:
    pipeline = replicas.models[0].pipeline
    request = RestorationRequest(**WANTED.restoration_fields(), tile_px=TILE_PX)
    restoration = pipeline.prepare(LQ, request)
    pipeline._denoise(restoration, None)
    return pipeline.finish(restoration).array


def _await(condition: Callable[[], bool]) -> None:
    ends_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < ends_s, "it did not come to pass"
        time.sleep(0.005)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_a_picture_is_the_same_to_the_bit_by_one_replica_and_by_several(
    replicas: Replicas, undisturbed: np.ndarray, number: int
) -> None:
    assert np.array_equal(replicas.restore(number), undisturbed)
    assert all(peer.num_tiles > 0 for peer in replicas.peers[1:number])
    _await(lambda: all(model.engine.load().entries == 0 for model in replicas.models))


def test_a_peer_that_is_lost_costs_its_tiles_of_that_step_and_not_the_picture(
    replicas: Replicas, undisturbed: np.ndarray
) -> None:
    replicas.peers[1].dies_after_steps = 1
    assert np.array_equal(replicas.restore(3), undisturbed)
    assert replicas.peers[1].num_steps == 1
    assert replicas.peers[2].num_steps >= 1
    _await(lambda: all(model.engine.load().entries == 0 for model in replicas.models))


def test_peers_that_cannot_join_are_done_without(replicas: Replicas, undisturbed: np.ndarray) -> None:
    away = PeerServer("changing its model", lambda: None, idle_s=60.0)
    ticket = replicas.models[0].submit(LQ, WANTED, name="shared", peers=[away])
    assert np.array_equal(ticket.future.result(timeout=120).array, undisturbed)


def test_a_shared_picture_that_is_cancelled_leaves_nothing_behind(replicas: Replicas) -> None:
    endless = WANTED.model_copy(update={"num_inference_steps": 200})
    ticket = replicas.models[0].submit(LQ, endless, name="endless", peers=replicas.peers[1:3])
    try:
        _await(lambda: sorted(ticket.shared_with()) == ["peer 1", "peer 2"])
        _await(lambda: replicas.peers[1].num_tiles > 0 and replicas.peers[2].num_tiles > 0)
    finally:
        ticket.cancel()
    _await(lambda: all(model.engine.load().entries == 0 for model in replicas.models))


def test_a_peer_steps_its_own_pictures_meanwhile(replicas: Replicas, undisturbed: np.ndarray) -> None:
    small = LQ[:64, :64]
    alone = replicas.models[1].submit(small, WANTED, name="own").future.result(timeout=120).array
    tickets = [replicas.models[1].submit(small, WANTED, name=f"own {i}") for i in range(3)]
    assert np.array_equal(replicas.restore(2), undisturbed)
    assert all(np.array_equal(ticket.future.result(timeout=120).array, alone) for ticket in tickets)


def test_a_peer_of_another_model_does_not_join(replicas: Replicas) -> None:
    request = replicas.models[1].request(WANTED)
    with pytest.raises(InputError, match="this is model nano, not nano/2"):
        replicas.peers[1].join(SharedPicture("other", LQ, request, "nano/2", 5))
    assert replicas.models[1].engine.load().entries == 0


def test_a_peer_forgets_a_picture_whose_replica_is_gone(replicas: Replicas) -> None:
    peer = PeerServer("forgetful", lambda: replicas.models[1], idle_s=0.05)
    peer.join(SharedPicture("orphan", LQ, replicas.models[1].request(WANTED), "nano", 5))
    assert replicas.models[1].engine.load().entries == 1
    time.sleep(0.1)
    peer.forget_idle()
    assert replicas.models[1].engine.load().entries == 0
    with pytest.raises(KeyError):
        peer.step("orphan", 0, np.zeros((1, 4, 16, 20), np.float32), [0])


def test_tiles_are_split_as_members_are_fast() -> None:
    tiles = list(range(12))
    assert split(tiles, [1.0]) == [tiles]
    assert [len(share) for share in split(tiles, [1.0, 1.0, 2.0])] == [3, 3, 6]
    assert [tile for share in split(tiles, [1.0, 5.0, 0.1]) for tile in share] == tiles
    assert split(tiles, [1e-6, 1.0])[0] == [0], "whoever has the picture steps one tile at least"
    assert split([4], [1e-6, 1.0, 1.0]) == [[4], [], []]
    assert split([], [1.0, 1.0]) == [[], []]


class _TimedPeer:
    """Takes `tile_s` for each tile."""

    def __init__(self, name: str, tile_s: float) -> None:
        self.name, self._tile_s = name, tile_s

    def join(self, picture: SharedPicture) -> None: ...

    def step(self, picture: str, step: int, latents: np.ndarray, tiles: Sequence[int]) -> np.ndarray:
        time.sleep(self._tile_s * len(tiles))
        return np.zeros((len(tiles), 4, 8, 8), np.float32)

    def leave(self, picture: str) -> None: ...


def test_faster_members_come_to_have_more_tiles(replicas: Replicas) -> None:
    picture = SharedPicture("timed", LQ, replicas.models[0].request(WANTED), "nano", 5)
    team = Team(picture, [_TimedPeer("slow", 0.03), _TimedPeer("fast", 0.003)])
    team.start()
    _await(lambda: len(team.peer_names) == 2)
    shares: dict[int, int] = {}
    for step in range(4):
        delivered, arrived = [], threading.Semaphore(0)

        def deliver(
            delivery: Delivery, into: list[Delivery] = delivered, arrived: threading.Semaphore = arrived
        ) -> None:
            into.append(delivery)
            arrived.release()

        kept = team.share_out(step, np.zeros((1, 4, 8, 8), np.float32), list(range(30)), deliver)
        time.sleep(0.003 * len(kept))
        team.own_share_is_done()
        for _ in range(2):
            assert arrived.acquire(timeout=20)
        assert sorted([*kept, *(tile for delivery in delivered for tile in delivery.tiles)]) == list(range(30))
        shares = {delivery.tiles[0]: len(delivery.tiles) for delivery in delivered}
    team.close()
    slow, fast = (shares[first] for first in sorted(shares))
    assert fast > 2 * slow
