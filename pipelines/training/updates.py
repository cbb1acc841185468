"""Batches -> updates: what one Ray Train worker does from start to end of a stage.

Ray calls `train_loop_per_worker` on every rank, and again after a failure, perhaps with another number of ranks. What
it goes on from is the newest checkpoint in storage (sr_platform/checkpoints.py), whoever wrote it. The worker's current
directory is one of Ray's, so every path that comes in is absolute.
"""

from __future__ import annotations

import logging
import math
import time
import uuid
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn

import ray.train
import ray.train.torch
import torch
import torch.distributed

from faithdiff.loss import FaithDiffForTraining
from faithdiff.pipeline import FaithDiffPipeline
from pipelines.training.batch_split import BatchSplit
from pipelines.training.batches import Batch, CropConfig, MicroBatches, micro_batches
from pipelines.training.deepspeed_config import initialize, learning_rate_factor, set_learning_rate
from pipelines.training.export import find_checkpoint
from pipelines.training.guard import FiniteGuard
from pipelines.training.inputs import FrozenModels
from pipelines.training.leaving import Leaving, is_told_to_leave
from pipelines.training.memory_probe import fitting_micro_batch, random_inputs
from pipelines.training.metrics import Reporter
from pipelines.training.progress import Progress
from pipelines.training.result import write_model
from pipelines.training.stage_job import StageJob
from pipelines.training.start_model import DTYPES, load_model, trainable_module
from pipelines.training.throughput import flops_per_sample, measured_peak_flops
from pipelines.training.validation import Validation
from sr_platform.checkpoint_writer import CheckpointWriter
from sr_platform.checkpoints import open_checkpoint
from sr_platform.errors import ConfigError
from sr_platform.sample_reader import SampleReader
from sr_platform.train_state import TrainState

_ASK_EVERY_S = 5.0
"""Between two questions whether a node is about to go; spot nodes say so 30 to 120 s before."""

logger = logging.getLogger("pipelines.train")


def train_loop_per_worker(values: dict[str, Any]) -> dict[str, Any]:
    """Trains one stage and writes its model; what rank 0 returns is the result of the run.

    Returns:
        {"metrics": ..., "pending_log": ...}. Instead of metrics "left_after" an update, where a node is about to go and
        the stage must be started again; or an "error", where training stopped on all ranks alike, perhaps because the
        request was wrong: it would end the same way again, and Ray tries again after whatever is raised.
    """
    result: dict[str, Any] = {"pending_log": []}
    try:
        worker = Worker(StageJob.model_validate(values))
        try:
            result["metrics"] = worker.run()
            worker.write_model()
        finally:
            result["pending_log"] = worker.close()
    except Leaving as leaving:
        result["left_after"] = leaving.update
    except (FloatingPointError, ConfigError) as error:
        result |= {"error": str(error), "is_request_wrong": isinstance(error, ConfigError)}
    return result


class Worker:
    """One rank: its share of the model, of the data and of every update."""

    def __init__(self, job: StageJob) -> None:
        cfg, context = job.train, ray.train.get_context()
        self.job, self.cfg, self.stage = job, cfg, job.config
        self.rank, self.world_size = context.get_world_rank(), context.get_world_size()
        self.device = ray.train.torch.get_device()
        if cfg.use_gpu:
            torch.set_float32_matmul_precision("high")
        # Stages see other crops and other noise of the same pictures.
        self.seed = zlib.crc32(f"{cfg.seed} {job.stage}".encode())
        pipeline = load_model(job.model, cfg.architecture)
        module = trainable_module(pipeline, cfg, job.stage)
        self.validation = self._validation(pipeline)
        self.frozen = FrozenModels(
            pipeline,
            device=self.device,
            dtype=DTYPES[cfg.precision],
            seed=self.seed,
            noise_offset=cfg.noise_offset,
            stored=job.stored,
        )
        self.split = self._split(module)
        self.data = self._data()
        self.reporter = self._reporter(module)
        self.engine = initialize(module, cfg, self.stage, self.split)
        self.guard = FiniteGuard(self.engine, loss_scale_floor=cfg.loss_scale.floor)
        self.state = TrainState(
            self.engine, average_decay=cfg.average_decay, average_every_updates=cfg.average_every_updates
        )
        self.writer = self._writer()
        self.ask_every_updates = 1

    def _split(self, module: FaithDiffForTraining) -> BatchSplit:
        cfg, group = self.cfg, self._samples_together
        largest = cfg.max_micro_batch
        if cfg.probe_memory:
            largest = fitting_micro_batch(
                module, cfg, device=self.device, world_size=self.world_size, multiple_of=group
            )
        return BatchSplit.derive(cfg.global_batch, self.world_size, largest, multiple_of=group)

    @property
    def _samples_together(self) -> int:
        return self.cfg.attention_group if self.cfg.alignment_attention == "batch" else 1

    def _data(self) -> MicroBatches:
        cfg = self.cfg
        return MicroBatches(
            SampleReader(cfg.data, cfg.data_cache),
            self.split,
            rank=self.rank,
            seed=self.seed,
            crop=CropConfig(size_px=cfg.size_px, caption_dropout=cfg.caption_dropout),
            reads=self.job.stored.reads,
            mixture={} if cfg.mixture == "proportional" else None,
        )

    def _validation(self, pipeline: FaithDiffPipeline) -> Validation | None:
        cfg = self.cfg.validation
        if cfg.num_pictures == 0:
            return None
        reader, uri = SampleReader(cfg.data or self.cfg.data), f"{self.cfg.out}/validation/{self.job.stage}"
        return Validation(cfg, uri, reader, pipeline, rank=self.rank, world_size=self.world_size)

    def _reporter(self, module: FaithDiffForTraining) -> Reporter | None:
        if self.rank != 0:
            return None
        cpu = torch.device("cpu")
        inputs = random_inputs(module, self._samples_together, size_px=self.cfg.size_px, device=cpu)
        peak_flops = measured_peak_flops(self.device, DTYPES[self.cfg.precision])
        return Reporter(self.job, self.split, flops_per_sample(module, inputs), peak_flops)

    def _writer(self) -> CheckpointWriter:
        cfg = self.cfg
        return CheckpointWriter(
            self.job.checkpoints,
            rank=self.rank,
            world_size=self.world_size,
            attempt=_shared_name(),
            keep=cfg.keep_checkpoints,
            keep_every_updates=cfg.keep_every_updates,
        )

    @property
    def _last(self) -> int:
        return self.cfg.last_update(self.job.stage)

    def run(self) -> dict[str, float]:
        """Every update from the last checkpoint to the end of the stage; returns the last metrics."""
        first, last, cfg = self._restore(), self._last, self.cfg
        batches = micro_batches(self.data, first, last, num_workers=cfg.data_workers, pin_memory=cfg.use_gpu)
        progress = self._progress()
        for update in range(first + 1, last + 1):
            self._update(update, batches, progress)
            is_checkpoint = update % cfg.checkpoint_every_updates == 0 or update == last
            is_validation = self._is_validation_due(update)
            is_leaving = update < last and update % self.ask_every_updates == 0 and is_told_to_leave()
            if is_checkpoint or is_validation or is_leaving or update % cfg.log_every_updates == 0:
                self._look(update, progress)
                if is_leaving:
                    self._leave(update)
                if is_validation:
                    self._validate(update)
                if is_checkpoint:
                    self._save(update)
                progress = self._progress()
        self.writer.wait()
        return self.reporter.latest if self.reporter else {}

    def _leave(self, update: int) -> NoReturn:
        """A validation that is due waits for the next start: first of all the checkpoint must count."""
        self._save(update)
        self.writer.wait()
        raise Leaving(update)

    def _is_validation_due(self, update: int) -> bool:
        return self.validation is not None and self.validation.is_due(update, self._last)

    def _progress(self) -> Progress:
        return Progress(self.split, self.frozen.num_train_timesteps)

    def _update(self, update: int, batches: Iterator[Batch], progress: Progress) -> None:
        """One optimiser update; DeepSpeed itself asks the device once, for the norm of the gradient."""
        stage = self.stage
        factor = learning_rate_factor(update - 1, warmup_updates=stage.warmup_updates, num_updates=stage.num_updates)
        set_learning_rate(self.engine, factor)
        for _ in range(self.split.accumulation):
            asked_s = time.monotonic()
            batch = next(batches)
            progress.data_wait_s += time.monotonic() - asked_s
            inputs = self.frozen.encode(batch)
            losses = self.engine(inputs.latents, inputs.draws, inputs.conditions)
            weights = batch.weights.to(losses.device, non_blocking=True)
            loss = (losses * weights).sum() * self.split.loss_scale
            self.engine.backward(self.guard.poisoned(loss))
            self.engine.step()
            progress.add(losses.detach(), inputs.draws.timesteps, weights)
        self.guard.updated(update)
        self.state.average_step(update)

    def _look(self, update: int, progress: Progress) -> None:
        """Metrics of the updates since the last look, after a check that every one of them was finite.

        Raises:
            FloatingPointError: some loss or gradient was not; on all ranks alike, and no weight has taken it in.
        """
        look, skipped = progress.look(), self.guard.check()
        if skipped:
            self._stop(skipped[0], look.losses[skipped[0] - update - 1])
        self.ask_every_updates = max(1, round(_ASK_EVERY_S * len(look.losses) / look.seconds))
        if self.reporter is not None:
            self.reporter.look(update, look, self.engine)

    def _stop(self, update: int, loss: float) -> NoReturn:
        what = f"the loss of update {update} of stage {self.job.stage} is {loss:g}"
        if math.isfinite(loss):
            what = f"a gradient of update {update} of stage {self.job.stage} is not finite"
        keys = ", ".join(self.data.keys_of_update(update - 1))
        raise FloatingPointError(f"train: {what}; no weight has taken it in. Samples of the update: {keys}")

    def _save(self, update: int) -> None:
        """Hands a copy of this rank's state to the writer, which works in the background."""
        started_s = time.monotonic()
        # The copy before must be written first, or two of them would fill the memory.
        self.writer.wait()
        meta = {**self.job.lineage, "account": self.reporter.state()} if self.reporter else {}
        self.writer.save(update, self.state.snapshot(), meta)
        if self.reporter is not None:
            self.reporter.checkpoint(update, time.monotonic() - started_s)

    def _restore(self) -> int:
        """The number of updates done: those of the stage's newest checkpoint, of the one to resume from, or 0."""
        uris = [self._newest_checkpoint() if self.rank == 0 else ""]
        # A process of a lost attempt may still commit one: all ranks take the one that rank 0 has seen.
        torch.distributed.broadcast_object_list(uris, src=0)
        if not uris[0]:
            return 0
        found = find_checkpoint(uris[0])
        assert found is not None
        self.state.load(found)
        if self.reporter is not None:
            self.reporter.restore(found.meta["account"])
        logger.info("stage %s goes on after update %d", self.job.stage, found.update)
        if found.meta["account"]["validated"] < found.update and self._is_validation_due(found.update):
            self._validate(found.update)
        return found.update

    def _newest_checkpoint(self) -> str:
        """URI of what to go on from; "" for a start from nothing."""
        found = open_checkpoint(self.job.checkpoints)
        if found is None and self.job.resume_from is not None:
            found = find_checkpoint(self.job.resume_from)
        return found.uri if found is not None else ""

    def _validate(self, update: int) -> None:
        """Restores the fixed pictures with the weights of now, on all ranks together."""
        assert self.validation is not None
        result = self.validation.run(update, self.engine.module)
        if self.reporter is not None:
            self.reporter.validation(update, result.metrics, result.pictures)

    def write_model(self) -> None:
        """Rank 0 publishes the trained model, from the last checkpoint."""
        if self.reporter is not None:
            reader = open_checkpoint(self.job.checkpoints)
            assert reader is not None
            write_model(self.job, reader, self.reporter.latest)

    def close(self) -> list[dict[str, Any]]:
        """Returns what the tracking server has not taken yet."""
        try:
            self.writer.close()
        finally:
            pending = self.reporter.close() if self.reporter is not None else []
        return pending


def _shared_name() -> str:
    """A name of this attempt that all ranks agree on."""
    names = [uuid.uuid4().hex[:8]]
    torch.distributed.broadcast_object_list(names, src=0)
    return names[0]
