"""Restores by the jobs of a running service: a bounded number of them wait or run there at once.

A job's Idempotency-Key derives from the picture's bytes and the settings. A run that was killed finds its jobs again,
whether they wait, run or are done, and none is done twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import logging
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipelines.restoration.model import Model
from pipelines.restoration.orders import Order
from pipelines.restoration.outcomes import Outcome, Publisher, Restored, failed
from pipelines.restoration.progress import Ledger, shown
from pipelines.restoration.reading import make_captioner, make_ingest, order_of, order_row, prompt_of, size_problem
from pipelines.restoration.recipe import RestoreConfig
from pipelines.restoration.service import Job, NoSuchJobError, PictureRefusedError, Service
from pipelines.stages.sample import Sample, read_table

log = logging.getLogger(__name__)

FIRST_POLL_S = 0.1
LONGEST_POLL_S = 5.0
_MAX_JOBS = 5
"""Of one picture: where the one that its key finds has failed before, or has expired, another is asked for."""
_WAITING = ("queued", "running")


class ServiceEngine:
    """Sends pictures, follows their jobs, fetches and publishes the results."""

    def __init__(self, cfg: RestoreConfig, ledger: Ledger) -> None:
        self._cfg, self._ledger = cfg, ledger
        self._publisher, self._ingest, self._captioner = Publisher(cfg), make_ingest(cfg), make_captioner(cfg)
        self._captioning = asyncio.Lock()

    async def run(self, service: Service, orders: Iterable[Order], outcomes: queue.SimpleQueue[Any]) -> None:
        """Puts an outcome for every order."""
        waiting = iter(orders)

        async def work() -> None:
            for order in waiting:
                outcome = await self._outcome(service, order)
                self._ledger.end(outcome.output, outcome.state == "failed", outcome.megapixels)
                outcomes.put(outcome)

        async with asyncio.TaskGroup() as group:
            for _ in range(self._cfg.service.max_in_flight):
                group.create_task(work())

    async def _outcome(self, service: Service, order: Order) -> Outcome:
        sample = await self._read(order)
        limits = self._cfg.limits
        problem = sample.problem or await asyncio.to_thread(
            size_problem, sample.data, limits, self._cfg.scale, limits.max_output_megapixels
        )
        if problem:
            return failed(order, problem)
        prompt = prompt_of(self._cfg, sample)
        if unchanged := await asyncio.to_thread(self._publisher.unchanged, order, sample, prompt):
            return unchanged
        return await self._restore(service, order, sample, prompt)

    async def _read(self, order: Order) -> Sample:
        table = await asyncio.to_thread(self._ingest, pa.Table.from_pylist([order_row(0, [order])]))
        if self._captioner is not None:
            # One at a time: a captioner may hold a model.
            async with self._captioning:
                table = await asyncio.to_thread(self._captioner, table)
        (sample,) = read_table(table)
        assert order_of(sample) == order
        return sample

    async def _restore(self, service: Service, order: Order, sample: Sample, prompt: str) -> Outcome:
        fields = {**self._cfg.request_fields(order.path, prompt), "priority": self._cfg.service.priority}
        problem = ""
        for number in range(_MAX_JOBS):
            key = job_key(sample.source_sha256, fields, number)
            try:
                job, was_there = await self._finished(service, order, sample, fields, key)
                if job["state"] == "done":
                    data = await service.result(job)
                    return await asyncio.to_thread(self._publish, order, sample, prompt, job, data)
            except PictureRefusedError as error:
                return failed(order, f"refused by the service: {error}")
            except NoSuchJobError as error:
                problem = f"job lost: {error}"
                continue
            problem = _problem_of(job)
            if not was_there:
                break
        return failed(order, problem)

    async def _finished(
        self, service: Service, order: Order, sample: Sample, fields: dict[str, Any], key: str
    ) -> tuple[Job, bool]:
        """The job of that key when it has ended, and whether it had before we asked."""
        name = PurePosixPath(order.path).name.encode("ascii", "replace").decode()
        job, is_replayed = await service.submit(sample.data, name, fields, idempotency_key=key)
        had_ended = is_replayed and job["state"] not in _WAITING
        for look in itertools.count():
            if job["state"] not in _WAITING:
                break
            await asyncio.sleep(min(LONGEST_POLL_S, FIRST_POLL_S * 1.5 ** min(look, 20)))
            job = await service.job(job["id"])
        return job, had_ended

    def _publish(self, order: Order, sample: Sample, prompt: str, job: Job, data: bytes) -> Outcome:
        size, result = job["input"], job["result"]
        restored = Restored(
            data,
            (size["width"], size["height"]),
            (result["width"], result["height"]),
            Model(self._cfg.endpoint, job["model_version"] or "", job["manifest_digest"]),
            (job["cost"] or {}).get("device_seconds", 0.0),
        )
        return self._publisher.publish(order, sample, prompt, restored)


def job_key(input_sha256: str, fields: dict[str, Any], number: int) -> str:
    """The Idempotency-Key of the `number`th job of a picture with these fields."""
    content = json.dumps([input_sha256, fields, number], sort_keys=True)
    return f"restore-{hashlib.sha256(content.encode()).hexdigest()}"


def restore_on_service(cfg: RestoreConfig, orders: Sequence[Order]) -> Iterator[Outcome]:
    """An outcome for every order, as they come; raises what ended the run before its time.

    The event loop has a thread of its own, so that whoever takes the outcomes may take time.
    """
    ledger, outcomes, errors = Ledger(), queue.SimpleQueue[Any](), list[BaseException]()

    async def run() -> None:
        async with Service(cfg.endpoint, cfg.service, ledger.notice) as service:
            await ServiceEngine(cfg, ledger).run(service, orders, outcomes)

    def thread() -> None:
        try:
            asyncio.run(run())
        except BaseExceptionGroup as group:
            errors.append(group.exceptions[0])
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that waits
            errors.append(error)
        finally:
            outcomes.put(None)

    worker = threading.Thread(target=thread, name="service", daemon=True)
    with shown(ledger.look, len(orders)):
        worker.start()
        while (outcome := outcomes.get()) is not None:
            yield outcome
        worker.join()
    if errors:
        raise errors[0]


def _problem_of(job: Job) -> str:
    problem = job.get("problem") or {}
    kind = str(problem.get("type", "")).rpartition(":")[2].replace("-", " ")
    return f"{kind or 'job ' + job['state']}: {problem.get('detail') or 'the service says no more'}"


def served_model(cfg: RestoreConfig) -> Model:
    """What the endpoint serves; an empty version where no replica is there to ask. Raises RequestError."""

    async def ask() -> tuple[str, str | None]:
        async with Service(cfg.endpoint, cfg.service) as service:
            return await service.model()

    return Model(cfg.endpoint, *asyncio.run(ask()))
