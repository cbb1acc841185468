from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from serve.jobs import JobStore
from serve.peers import Mailbox, RayPeer, SpreadConfig, device_name, find_peers
from serve.served_model import ModelInfo, ServedModel
from serve.team import SharedPicture

INFO = ModelInfo("nano", "nano/3", None, "cpu", "float32", 0.0, 0.0)
SERVED: Any = ServedModel(INFO, None, None, 64, 1024)  # type: ignore[arg-type]


def _report(store: JobStore, name: str, **settings: Any) -> None:
    about = {"replica": name, "version": "nano/3", "dtype": "float32", "device_name": device_name(SERVED), "entries": 0}
    store.report_replica(name, {**about, **settings})


def _found(store: JobStore, megapixels: float = 20.0, **settings: Any) -> list[str]:
    cfg = SpreadConfig.model_validate({"max_peers": 2, **settings})
    job: Any = type("Job", (), {"megapixels": megapixels})()
    return [peer.name for peer in find_peers(store, job, cfg, own="self", like=SERVED)]


def test_the_least_busy_replicas_of_the_same_kind_are_asked(store: JobStore) -> None:
    for name, entries in (("self", 0), ("busy", 9), ("idle", 0), ("calm", 1)):
        _report(store, name, entries=entries)
    _report(store, "other version", version="nano/2")
    _report(store, "other precision", dtype="float16")
    _report(store, "other device", device_name="another GPU")
    assert _found(store) == ["idle", "calm"]
    assert _found(store, max_peers=5) == ["idle", "calm", "busy"]


def test_small_pictures_are_not_spread_and_spreading_can_be_turned_off(store: JobStore) -> None:
    _report(store, "idle")
    assert _found(store, megapixels=16.0) == []
    assert _found(store, megapixels=16.1) == ["idle"]
    assert _found(store, max_peers=0) == []


class FakeServer:
    """What a mailbox calls; the picture named "broken" cannot be stepped."""

    name = "peer-of-test"

    def __init__(self) -> None:
        self.joined: list[SharedPicture] = []
        self.left: list[str] = []

    def join(self, picture: SharedPicture) -> None:
        self.joined.append(picture)

    def step(self, picture: str, step: int, latents: np.ndarray, tiles: list[int]) -> np.ndarray:
        if picture == "broken":
            raise FloatingPointError("a tile is not finite")
        return np.stack([latents[0] * step + tile for tile in tiles])

    def leave(self, picture: str) -> None:
        self.left.append(picture)


@pytest.fixture
def server(local_ray: None) -> Iterator[FakeServer]:
    made = FakeServer()
    mailbox = Mailbox(made)  # type: ignore[arg-type]
    mailbox.start()
    yield made
    mailbox.close()


@pytest.mark.ray
def test_calls_travel_through_the_mailbox_and_failures_come_back_as_such(server: FakeServer) -> None:
    peer = RayPeer(server.name, timeout_s=30.0)
    lq = np.zeros((8, 8, 3), np.uint8)
    peer.join(SharedPicture("one", lq, None, "nano/3", 5))  # type: ignore[arg-type]
    assert [picture.name for picture in server.joined] == ["one"]
    latents = np.full((1, 4, 64, 512), 2.0, np.float32)  # more than travels inside a message
    stepped = peer.step("one", 3, latents, [5, 7])
    assert stepped.shape == (2, 4, 64, 512)
    assert (stepped[0] == 11).all()
    assert (stepped[1] == 13).all()
    with pytest.raises(RuntimeError, match="FloatingPointError: a tile is not finite"):
        peer.step("broken", 0, latents, [0])
    peer.leave("one")
    assert server.left == ["one"]


@pytest.mark.ray
def test_a_replica_that_is_gone_is_no_peer(local_ray: None, server: FakeServer) -> None:
    with pytest.raises(ValueError, match="Failed to look up"):
        RayPeer("nobody", timeout_s=5.0).join(replace(SharedPicture("one", np.zeros(1), None, "nano/3", 5)))  # type: ignore[arg-type]
