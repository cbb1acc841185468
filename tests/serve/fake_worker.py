"""A replica without a model: claims jobs from a real JobStore and works them off, with steps and previews.

    python tests/serve/fake_worker.py 8000 [folder]     the whole service on loopback, page included, for looking at

Failures can be asked for: a prompt with the word "fail" makes a job fail half way.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from serve.jobs import Job, JobStore, Progress, ResultFile
from serve.problems import Problem
from serve.restorer import ModelInfo, RestoredPicture
from sr_platform.storage import Storage, open_storage

MODEL_VERSION, MANIFEST_DIGEST = "fake/1", "sha256:fa4e"
_MEDIA_TYPES = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp", "tiff": "image/tiff"}


class FakeWorker:
    """One job at a time in a thread of its own; `step_s` seconds for each step."""

    def __init__(
        self, store: JobStore, storage: Storage, *, owner: str = "fake-replica", step_s: float = 0.005
    ) -> None:
        self._store, self._storage, self._owner, self._step_s = store, storage, owner, step_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=owner, daemon=True)
        self.num_finished = 0

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=20)

    def report(self, rate: float = 50.0) -> None:
        """Tells the store what this replica serves, and how fast."""
        info = {"model": "fake", "version": MODEL_VERSION, "megapixel_steps_per_s": rate, "tile_px": 1024}
        self._store.report_replica(self._owner, {**info, "tile_stride_fraction": 0.5, "max_megapixels": 64.0})

    def work_off(self) -> int:
        """Works off all that waits, in the caller's thread; returns the number of jobs."""
        num_jobs = 0
        while jobs := self._store.claim(self._owner, lease_s=60.0, max_megapixels=1e6, max_jobs=1):
            self._work(jobs[0])
            num_jobs += 1
        return num_jobs

    def _run(self) -> None:
        while not self._stopping.is_set():
            self.report()
            if not self.work_off():
                self._stopping.wait(0.02)

    def _work(self, job: Job) -> None:
        started_s = time.monotonic()
        picture = ImageOps.exif_transpose(Image.open(io.BytesIO(self._storage.read_bytes(job.input_name))))
        num_steps = job.request["num_inference_steps"]
        for step in range(num_steps + 1):
            if step:
                time.sleep(self._step_s)
            preview = _preview(picture.convert("RGB"), step / num_steps)
            phase = "encode" if step == 0 else "denoise"
            progress = Progress(job.id, job.attempt, phase, step, num_steps, preview, step)
            beat = self._store.heartbeat(self._owner, [progress], 60.0)
            if job.id in beat.cancelled:
                self._store.cancelled(job.id, self._owner, job.attempt)
                return
            if "fail" in job.request["prompt"] and step >= num_steps / 2:
                problem = Problem(422, "refused-by-model", "picture: the model refuses it, as its prompt asks")
                self._store.fail(job.id, self._owner, job.attempt, problem.body(f"/v1/jobs/{job.id}"))
                return
        self._finish(job, _restored(picture, job.request), time.monotonic() - started_s)

    def _finish(self, job: Job, picture: Image.Image, seconds: float) -> None:
        file_format, buffer = job.request["output_format"], io.BytesIO()
        picture.convert("RGB").save(buffer, file_format.upper(), quality=job.request["output_quality"])
        data, name = buffer.getvalue(), f"jobs/{job.id}/result-{job.attempt}"
        self._storage.write_bytes_atomic(name, data)
        result = ResultFile(name, _MEDIA_TYPES[file_format], len(data), hashlib.sha256(data).hexdigest(), picture.size)
        self.num_finished += self._store.finish(
            job.id,
            self._owner,
            job.attempt,
            result=result,
            model_version=MODEL_VERSION,
            manifest_digest=MANIFEST_DIGEST,
            device_seconds=seconds,
        )


def _restored(picture: Image.Image, request: dict[str, Any]) -> Image.Image:
    size = (picture.width * request["scale"], picture.height * request["scale"])
    return picture.resize(size, Image.Resampling.LANCZOS).filter(ImageFilter.SHARPEN)


def _preview(picture: Image.Image, share: float) -> bytes:
    """Becomes clearer with every step."""
    small = picture.copy()
    small.thumbnail((256, 256))
    noise = Image.effect_noise(small.size, 96).convert("RGB")
    buffer = io.BytesIO()
    Image.blend(noise, small, share).save(buffer, "WEBP", quality=70)
    return buffer.getvalue()


class PatientRestorer:
    """Answers POST /v1/upscale like a replica that needs `wait_s` seconds."""

    def __init__(self, wait_s: float = 1.0) -> None:
        self._wait_s = wait_s

    info = ModelInfo("fake", MODEL_VERSION, MANIFEST_DIGEST, "cpu", "float32", 0.1, 0.2)

    async def restore(self, lq: np.ndarray, request: Any) -> RestoredPicture:
        await asyncio.sleep(self._wait_s)
        picture = _restored(Image.fromarray(lq), {"scale": request.scale})
        return RestoredPicture(np.asarray(picture), {}, self.info)

    async def describe(self) -> ModelInfo:
        return self.info


@contextmanager
def running_server(api: Any) -> Iterator[str]:
    """URL of a real HTTP server on loopback, in a thread, for as long as the block lasts."""
    import uvicorn

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(api, log_level="error", timeout_graceful_shutdown=2))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            ends_s = time.monotonic() + 20
            while not server.started:
                assert time.monotonic() < ends_s, "the server did not start"
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(timeout=10)


def main(port: int, folder: Path, step_s: float = 0.25) -> None:
    """The whole service with one fake replica, until interrupted."""
    import uvicorn

    from serve.gateway import Gateway, GatewayConfig, build_api

    folder.mkdir(parents=True, exist_ok=True)
    store, storage = JobStore(f"sqlite:///{folder}/jobs.db"), open_storage(folder / "files")
    worker = FakeWorker(store, storage, step_s=step_s)
    worker.start()
    api = build_api(Gateway(GatewayConfig(), PatientRestorer(), store, storage))
    uvicorn.run(api, host="127.0.0.1", port=port, log_level="info")
    worker.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2] if len(sys.argv) > 2 else tempfile.mkdtemp()))
