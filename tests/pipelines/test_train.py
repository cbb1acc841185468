"""Both stages for real: on one worker in this process, and on two Ray workers of which one is killed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from faithdiff import FaithDiffPipeline
from faithdiff.errors import InputError
from pipelines import train as job
from pipelines.training.recipe import Stage, TrainConfig
from sr_platform.config import load_config
from sr_platform.errors import ConfigError
from sr_platform.tracking import Tracking

TINY = ["--size-px", "32", "--global-batch", "4", "--align.num-updates", "8", "--unified.num-updates", "2"]
TINY += ["--align.warmup-updates", "1", "--unified.warmup-updates", "0", "--log-every-updates", "1"]


def config(*flags: str) -> TrainConfig:
    return load_config(TrainConfig, ["train_nano.yaml", *TINY, *flags], job="train")


@pytest.fixture(scope="module")
def alone(
    lone_process_group: None, tmp_path_factory: pytest.TempPathFactory, prepared_dataset: str
) -> Iterator[Callable[..., Any]]:
    """`alone(stage, *flags)` trains one stage with one worker in this process: (metrics, model folder, losses)."""
    from mlflow import MlflowClient
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.training.updates import StageJob, train_loop_per_worker

    folder = tmp_path_factory.mktemp("alone")
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = Tracking.open(default_path=folder, experiment="alone")

    def run(stage: Stage, *flags: str) -> tuple[dict[str, float], Path, list[float]]:
        run_id = runs.start(stage, params={}, tags={})
        cfg = config("--data", prepared_dataset, "--num-workers", "1", *flags)
        stage_job = StageJob(
            train=cfg,
            stage=stage,
            model=cfg.model,
            model_out=folder / run_id,
            model_version="test",
            tracking_uri=runs.uri,
            run_id=run_id,
        )
        trainer = TorchTrainer(
            train_loop_per_worker,
            train_loop_config=stage_job.model_dump(mode="json"),
            scaling_config=ScalingConfig(num_workers=0),
        )
        metrics: dict[str, float] = trainer.fit().return_value
        history = MlflowClient(runs.uri).get_metric_history(run_id, "train/loss")
        return metrics, stage_job.model_out, [m.value for m in sorted(history, key=lambda m: m.step)]

    yield run
    patch.undo()
    torch.set_num_threads(threads)


def changed_parts(before: FaithDiffPipeline, after: FaithDiffPipeline) -> set[str]:
    """Which of encoder, alignment, unet, vae and text have other weights."""
    changed = set()
    for component in ("lq_encoder", "unet", "vae", "text_encoder", "text_encoder_2"):
        old = getattr(before, component).state_dict()
        for name, tensor in getattr(after, component).state_dict().items():
            if not torch.equal(tensor, old[name]):
                changed.add("alignment" if name.startswith("alignment.") else component)
    return changed


@pytest.mark.ray
def test_the_micro_batch_changes_nothing_and_stage_one_trains_the_alignment_module_alone(alone, rel_error) -> None:
    _, whole_path, whole = alone("align", "--max-micro-batch", "4", "--max-updates", "3")
    _, split_path, split = alone("align", "--max-micro-batch", "1", "--max-updates", "3")
    assert len(whole) == 3
    assert split == pytest.approx(whole, rel=1e-5)
    start, trained = FaithDiffPipeline.from_pretrained("nano"), FaithDiffPipeline.from_pretrained(whole_path)
    assert changed_parts(start, trained) == {"alignment"}
    other = FaithDiffPipeline.from_pretrained(split_path).unet.alignment.state_dict()
    # One update is sign-like for parameters whose gradient is rounding noise, so weights agree to the learning rate.
    assert all(
        (tensor - other[name]).abs().max() < 1e-3 for name, tensor in trained.unet.alignment.state_dict().items()
    )


@pytest.mark.ray
def test_stage_two_trains_everything_but_vae_and_text_and_can_export_the_average(alone) -> None:
    flags = ["--export", "averaged", "--gradient-checkpointing", "--unified.num-updates", "3"]
    metrics, path, losses = alone("unified", *flags)
    start, trained = FaithDiffPipeline.from_pretrained("nano"), FaithDiffPipeline.from_pretrained(path)
    assert changed_parts(start, trained) == {"lq_encoder", "alignment", "unet"}
    assert trained.model_version == "test"
    assert metrics["train/loss"] == losses[-1]
    assert metrics["train/lr"] == pytest.approx(3e-4 * 0.25)  # half a cosine, two thirds walked
    assert metrics["train/grad_norm"] > 0


@pytest.mark.ray
def test_in_bf16_an_update_at_learning_rate_zero_exports_the_start_bit_for_bit(alone) -> None:
    metrics, path, _ = alone("unified", "--precision", "bf16", "--unified.warmup-updates", "1", "--max-updates", "1")
    assert metrics["train/lr"] == 0
    assert metrics["train/grad_norm"] > 0
    start, trained = FaithDiffPipeline.from_pretrained("nano"), FaithDiffPipeline.from_pretrained(path)
    assert changed_parts(start, trained) == set()


@pytest.mark.ray
def test_a_loss_that_is_not_finite_ends_the_run_and_names_update_and_samples(alone, monkeypatch) -> None:
    from faithdiff import loss

    def spoiled(seed: int, samples: Any, *args: Any, **kwargs: Any) -> loss.NoiseDraws:
        draws = loss.noise_for(seed, samples, *args, **kwargs)
        return loss.NoiseDraws(draws.timesteps, draws.noise * (float("nan") if 4 in samples else 1), draws.noise)

    monkeypatch.setattr("pipelines.training.inputs.noise_for", spoiled)
    with pytest.raises(FloatingPointError, match=r"update 2 of stage align is nan .*Samples of the update: s\d-\d, "):
        alone("align", "--max-updates", "3")


def kill_one_worker_after(checkpoint: Path, killed: list[int]) -> None:
    """SIGKILLs one training worker of this process's Ray once Ray has committed `checkpoint`."""
    committed = checkpoint.parent / "checkpoint_manager_snapshot.json"
    while not committed.exists() or checkpoint.name not in committed.read_text():
        time.sleep(0.05)
    for process in psutil.Process().children(recursive=True):
        if "RayTrainWorker" in " ".join(process.cmdline()):
            process.kill()
            killed.append(process.pid)
            return


@pytest.mark.ray
@pytest.mark.slow
def test_two_workers_of_which_one_is_killed_end_like_one_undisturbed_worker(
    local_ray, alone, prepared_dataset: str, tmp_path: Path, monkeypatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    flags = ["--data", prepared_dataset, "--out", str(tmp_path), "--checkpoint-every-updates", "2"]
    killed: list[int] = []
    checkpoint = tmp_path / "checkpoints" / "align" / "update_00000002"
    killer = threading.Thread(target=kill_one_worker_after, args=(checkpoint, killed), daemon=True)
    killer.start()
    result = job.train(config(*flags, "--registered-model", "tiny"))
    killer.join(timeout=5)
    assert killed

    _, model_path, losses = alone("align")
    client = MlflowClient(result.tracking_uri)
    runs = {run.info.run_name: run for run in client.search_runs([client.get_run(result.run_id).info.experiment_id])}
    assert runs["align"].data.tags["mlflow.parentRunId"] == runs["unified"].data.tags["mlflow.parentRunId"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    history = client.get_metric_history(runs["align"].info.run_id, "train/loss")
    assert [m.step for m in history].count(1) == 1, "it started from scratch instead of its checkpoint"
    curve = {m.step: m.value for m in history}
    assert [curve[step] for step in range(1, 9)] == pytest.approx(losses, rel=1e-4)
    expected = FaithDiffPipeline.from_pretrained(model_path).unet.alignment.state_dict()
    actual = FaithDiffPipeline.from_pretrained(tmp_path / "models" / "align").unet.alignment.state_dict()
    assert max((tensor - expected[name]).abs().max().item() for name, tensor in actual.items()) < 2e-3

    version = client.get_model_version_by_alias("tiny", "candidate")
    assert f"models:/tiny/{version.version}" == result.model_uri
    assert version.tags["manifest_digest"] == runs["align"].data.tags["manifest_digest"]
    assert version.tags["recipe_digest"] == runs["align"].data.tags["recipe_digest"]
    assert client.get_run(result.run_id).data.params["align.num_updates"] == "8"
    assert result.model_path == tmp_path / "models" / "unified"
    card = (result.model_path / "README.md").read_text()
    assert "align (8 updates), then unified (2 updates)" in card
    artifact = client.get_run(result.run_id).info.artifact_uri.removeprefix("file://")
    assert (Path(artifact) / "model" / "README.md").read_text() == card
    assert "align (8 updates), crops" in (tmp_path / "models" / "align" / "README.md").read_text()

    again = job.train(config(*flags, "--registered-model", "tiny"))
    assert (again.model_uri, again.run_id, again.metrics) == (result.model_uri, result.run_id, {})
    with pytest.raises(ConfigError, match="another recipe"):
        job.train(config(*flags, "--seed", "1"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{tmp}/nowhere"], "does not exist"),
        (["--model", "nanno"], "neither a folder nor a preset"),
        (["--model", "{tmp}"], "no model_index.json"),
        (["--model", "models:/nano"], "models:/name@alias"),
        (["--num-workers", "3"], "not divisible by num_workers"),
        (["--num-workers", "0"], "num_workers: got 0"),
        (["--stage", "third"], "third"),
        (["--export", "averaged", "--average-decay", "0"], "needs average_decay"),
        (["--align.warmup-updates", "8"], "warmup_updates must be below"),
        (["--out", "{tmp}/file"], "is a file"),
        (["--alias", "v3"], "alias"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_starts_or_is_written(
    flags: list[str], message: str, prepared_dataset: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "out"
    given = [flag.replace("{tmp}", str(tmp_path)) for flag in flags]
    with pytest.raises((ConfigError, InputError, ValueError), match=message) as refusal:
        job.main(["train_nano.yaml", *TINY, "--data", prepared_dataset, "--out", str(out), *given])
    assert "\n" not in str(refusal.value)
    assert not out.exists()


def test_a_missing_or_truncated_shard_is_found_before_anything_starts(prepared_dataset: str, tmp_path: Path) -> None:
    import shutil

    data = tmp_path / "data"
    shutil.copytree(prepared_dataset, data)
    shard = data / "shards" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"1 of 2 shards .* first shards/train-000001.tar"):
        job.check_request(config("--data", str(data), "--out", str(tmp_path / "out")))
    shard.unlink()
    with pytest.raises(ValueError, match="missing or cut off"):
        job.check_request(config("--data", str(data), "--out", str(tmp_path / "out")))


def test_a_model_whose_weights_do_not_fit_is_refused_with_every_tensor_named(
    prepared_dataset: str, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    FaithDiffPipeline.from_pretrained("nano").save_pretrained(tmp_path / "model")
    weights = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["conv_in.bias"]
    save_file({**tensors, "surprise": torch.zeros(1), "conv_out.bias": torch.zeros(9)}, weights)
    every = r"1 missing: conv_in\.bias; 1 unexpected: surprise; 1 mismatched: conv_out\.bias \(9,\) instead of \(4,\)"
    with pytest.raises(InputError, match=every):
        job.main(["train_nano.yaml", "--data", prepared_dataset, "--model", str(tmp_path / "model")])


def test_relative_paths_are_taken_from_the_current_directory(prepared_dataset: str, monkeypatch) -> None:
    monkeypatch.chdir(Path(prepared_dataset).parent)
    request = job.check_request(config("--data", Path(prepared_dataset).name, "--out", "trained"))
    assert request.cfg.data == prepared_dataset
    assert request.cfg.out == Path(prepared_dataset).parent / "trained"
    assert request.model == "nano"
    assert json.dumps(request.tags)
    assert not request.cfg.out.exists()
