"""Replicas at each other's pictures: `PeerServer` answers the calls of a team, `Mailbox` carries them through Ray.

Ray Serve routes a request to whichever replica it likes, and a team needs a certain one. So every replica has a small
actor of its own beside it, which others find by name; latents go from object store to object store, past the actor.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import NonNegativeInt, PositiveFloat

from serve.assistance import Assistance
from serve.engine import Busy
from serve.jobs import Job, JobStore
from serve.served_model import ServedModel
from serve.team import Peer, SharedPicture
from sr_platform import cluster  # noqa: F401 - before ray: it sets the variables that Ray reads at import
from sr_platform.config import StrictConfig

import ray  # isort: skip
from ray.actor import ActorHandle  # isort: skip
from ray.exceptions import RayError  # isort: skip

logger = logging.getLogger(__name__)

_NAMESPACE = "faithdiff-peers"
_CALLS = ("join", "step", "leave")
_THREADS = 16


class SpreadConfig(StrictConfig):
    """When a picture is made by several replicas."""

    above_megapixels: PositiveFloat = 16.0
    """Results of more megapixels are spread over replicas that are there."""
    max_peers: NonNegativeInt = 3
    """Replicas that may join the one that has the job; 0 spreads nothing."""
    call_timeout_s: PositiveFloat = 120.0
    """A peer that takes longer for its share of a step is taken for lost."""
    idle_s: PositiveFloat = 300.0
    """A peer forgets a picture that it was not asked about for so long."""


@dataclass
class _Guest:
    assistance: Assistance
    used_s: float = field(default_factory=time.monotonic)


class PeerServer:
    """This replica as a peer of others. `model()` is what is served now. Calls may come from any thread."""

    def __init__(self, name: str, model: Callable[[], ServedModel | None], *, idle_s: float) -> None:
        self._name, self._model, self._idle_s = name, model, idle_s
        self._guests: dict[str, _Guest] = {}
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._name

    def join(self, picture: SharedPicture) -> None:
        """As `Peer.join`. Raises Busy, TooLarge, InputError."""
        self.forget_idle()
        if (model := self._model()) is None:
            raise Busy("peer: it is changing its model")
        assistance = model.engine.assist(picture)
        try:
            assistance.prepare()
        except BaseException:
            assistance.close()
            raise
        with self._lock:
            self._guests[picture.name] = _Guest(assistance)

    def step(self, picture: str, step: int, latents: np.ndarray, tiles: Sequence[int]) -> np.ndarray:
        """As `Peer.step`. Raises KeyError when the picture was forgotten."""
        with self._lock:
            guest = self._guests[picture]
            guest.used_s = time.monotonic()
        return guest.assistance.step(step, latents, tiles)

    def leave(self, picture: str) -> None:
        """As `Peer.leave`."""
        with self._lock:
            guest = self._guests.pop(picture, None)
        if guest is not None:
            guest.assistance.close()

    def forget_idle(self) -> None:
        """Lets go of pictures whose replica was not heard of for long: it is gone."""
        oldest_s = time.monotonic() - self._idle_s
        with self._lock:
            idle = [name for name, guest in self._guests.items() if guest.used_s < oldest_s]
        for name in idle:
            logger.info("peer: %s was not asked about for %g s and is forgotten", name, self._idle_s)
            self.leave(name)


class _Mailbox:
    """Calls wait here for the replica that answers them. An actor; the replica that made it is its life."""

    def __init__(self) -> None:
        self._calls: asyncio.Queue[tuple[int, str, list[Any]]] = asyncio.Queue()
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()

    async def call(self, method: str, arguments: list[Any]) -> Any:
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            await self._calls.put((number, method, arguments))
            return await answer
        finally:
            del self._answers[number]

    async def next_call(self) -> tuple[int, str, list[Any]]:
        return await self._calls.get()

    async def answer(self, number: int, outcome: Any) -> None:
        if (answer := self._answers.get(number)) is not None and not answer.done():
            answer.set_result(outcome)


class Mailbox:
    """The mailbox of this replica: `start` has `server` answer what arrives."""

    def __init__(self, server: PeerServer) -> None:
        self._server = server
        actor_class = ray.remote(num_cpus=0, max_concurrency=1000)(_Mailbox)
        self._actor: ActorHandle = actor_class.options(name=server.name, namespace=_NAMESPACE).remote()
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="peer")
        self._is_open = True

    def start(self) -> None:
        """Begins to answer, in threads."""
        threading.Thread(target=self._serve, name="mailbox", daemon=True).start()

    def close(self) -> None:
        """Answers nothing more; whoever waits is told that this peer is lost."""
        self._is_open = False
        self._threads.shutdown(wait=False, cancel_futures=True)
        ray.kill(self._actor)

    def _serve(self) -> None:
        while self._is_open:
            try:
                call = ray.get(self._actor.next_call.remote())
                self._threads.submit(self._answer, *call)
            except (RayError, RuntimeError):
                if self._is_open:
                    logger.exception(
                        "peer: the mailbox of %s is gone; it takes part in nothing more", self._server.name
                    )
                return

    def _answer(self, number: int, method: str, arguments: list[Any]) -> None:
        assert method in _CALLS
        try:
            fetched = [ray.get(value) if isinstance(value, ray.ObjectRef) else value for value in arguments]
            value = getattr(self._server, method)(*fetched)
            # A reference of our own: the actor never touches what it stands for.
            outcome: Any = [ray.put(value)] if isinstance(value, np.ndarray) else [value]
        except Exception as error:  # noqa: BLE001 - whatever it is, the other replica has to hear of it
            logger.warning("peer: %s of another replica's picture failed: %r", method, error)
            outcome = f"{type(error).__name__}: {error}"
        self._actor.answer.remote(number, outcome)


class RayPeer:
    """Another replica, through its mailbox."""

    def __init__(self, name: str, *, timeout_s: float) -> None:
        self._name, self._timeout_s = name, timeout_s
        self._actor: ActorHandle | None = None

    @property
    def name(self) -> str:
        return self._name

    def join(self, picture: SharedPicture) -> None:
        self._actor = ray.get_actor(self._name, namespace=_NAMESPACE)
        self._call("join", [ray.put(picture)])

    def step(self, picture: str, step: int, latents: np.ndarray, tiles: Sequence[int]) -> np.ndarray:
        stepped: np.ndarray = self._call("step", [picture, step, ray.put(latents), list(tiles)])
        return np.array(stepped)

    def leave(self, picture: str) -> None:
        self._call("leave", [picture])

    def _call(self, method: str, arguments: list[Any]) -> Any:
        assert self._actor is not None, "call before join"
        outcome = ray.get(self._actor.call.remote(method, arguments), timeout=self._timeout_s)
        if isinstance(outcome, str):
            raise RuntimeError(f"peer: {self._name}: {outcome}")
        (value,) = outcome
        return ray.get(value, timeout=self._timeout_s) if isinstance(value, ray.ObjectRef) else value


def find_peers(store: JobStore, job: Job, cfg: SpreadConfig, *, own: str, like: ServedModel) -> list[Peer]:
    """Replicas that may step tiles of `job`: of the same model and kind of device, the least busy first."""
    if not cfg.max_peers or job.megapixels <= cfg.above_megapixels:
        return []
    info = like.info
    # Another kind of device may round otherwise, and the picture must not tell how many replicas made it.
    wanted = {"version": info.version, "dtype": info.dtype, "device_name": device_name(like)}
    others = [
        replica
        for replica in store.replicas()
        if replica["replica"] != own and all(replica.get(name) == value for name, value in wanted.items())
    ]
    others.sort(key=lambda replica: (replica.get("entries", 0), replica["replica"]))
    return [RayPeer(replica["replica"], timeout_s=cfg.call_timeout_s) for replica in others[: cfg.max_peers]]


def device_name(model: ServedModel) -> str:
    """The kind of device, as exactly as the driver tells it."""
    import platform

    import torch

    if model.info.device == "cuda":
        return torch.cuda.get_device_name()
    return f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
