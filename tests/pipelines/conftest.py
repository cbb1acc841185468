"""Pictures and samples for the tests of the data stages; a group of processes for those of training."""

from __future__ import annotations

import inspect
import io
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Listener, wait
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


def picture_pixels(height_px: int, width_px: int, seed: int = 0) -> np.ndarray:
    """A smooth coloured picture with some structure everywhere."""
    y, x = np.mgrid[0:height_px, 0:width_px]
    periods = np.random.default_rng(seed).uniform(6, 20, (3, 2))
    waves = [127 + 100 * np.sin(x / a) * np.cos(y / b) for a, b in periods]
    return np.stack(waves, axis=-1).astype(np.uint8)


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., np.ndarray]:
    """`make_picture(height_px, width_px, seed=0)` -> uint8 RGB."""
    return picture_pixels


@pytest.fixture(scope="session")
def picture_file() -> Callable[..., bytes]:
    """`picture_file(height_px, width_px, seed=0)` -> the bytes of a PNG."""

    def make(height_px: int, width_px: int, seed: int = 0) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(picture_pixels(height_px, width_px, seed)).save(buffer, "PNG")
        return buffer.getvalue()

    return make


@pytest.fixture
def picture_folder(tmp_path: Path, picture_file: Callable[..., bytes]) -> Path:
    """Five good pictures in two folders, one with a caption beside it, and four that cannot be used."""
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for index in range(4):
        (folder / f"red_house_{index}.png").write_bytes(picture_file(70 + 32 * index, 100, index))
    (folder / "deep" / "0.png").write_bytes(picture_file(64, 64, 9))
    (folder / "deep" / "0.txt").write_text("A quiet\nharbour.")
    (folder / "truncated.png").write_bytes(picture_file(80, 80)[:600])
    (folder / "small.png").write_bytes(picture_file(40, 100))
    (folder / "zero.jpg").write_bytes(b"")
    Image.new("RGB", (90, 90), "gray").save(folder / "flat.png")
    (folder / "notes.md").write_text("not a picture")
    return folder


@pytest.fixture
def make_crop() -> Callable[..., Any]:
    """`make_crop(key="k", **fields)` -> a Sample after the crop stage, 32x32 px."""
    from pipelines.stages.sample import Sample

    def make(key: str = "k", **fields: Any) -> Sample:
        hq = picture_pixels(32, 32).tobytes()
        given = {"shard": 0, "num_pictures": 1, "source": "a.png", "height_px": 32, "width_px": 32, "hq": hq, **fields}
        return Sample(key=key, **given)

    return make


class Ranks:
    """Processes of one gloo group that wait for work; `ranks(function, *args)` runs it on all and gives their results.

    The function must be one of a test file's own, by name, and its result must survive pickling.
    """

    def __init__(self, num_ranks: int, folder: Path) -> None:
        self.folder, self.num_ranks = folder, num_ranks
        program = Path(__file__).with_name("gloo_rank.py")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with Listener(str(folder / "socket")) as listener:
            self.processes = [
                subprocess.Popen(
                    [sys.executable, str(program), listener.address, str(rank), str(num_ranks), str(folder / "store")],
                    env=environment,
                    stdout=(folder / f"rank{rank}.log").open("w"),
                    stderr=subprocess.STDOUT,
                )
                for rank in range(num_ranks)
            ]
            self.connections = [listener.accept() for _ in range(num_ranks)]

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """The results by rank. A failure ends the group: its other ranks wait for the one that failed."""
        for connection in self.connections:
            connection.send_bytes(pickle.dumps((inspect.getfile(function), function.__name__, args)))
        results, waiting = dict[int, Any](), list(self.connections)
        while waiting:
            for connection in wait(waiting):
                rank, is_good, answer = pickle.loads(connection.recv_bytes())  # noqa: S301
                if not is_good:
                    self.close()
                    pytest.fail(f"rank {rank} (logs in {self.folder}):\n{answer}")
                results[rank] = answer
                waiting.remove(connection)
        return [results[rank] for rank in range(self.num_ranks)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="session")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """`two_ranks(function, *args)` -> what the function returned in each of two processes of one gloo group."""
    ranks = Ranks(2, tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()
