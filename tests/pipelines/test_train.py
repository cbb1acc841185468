"""Both stages for real: on one worker in this process, and on one, two and four Ray workers.

What happens when workers, nodes and drivers are lost is in tests/e2e/test_train_chaos.py.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from faithdiff import FaithDiffPipeline
from faithdiff.errors import InputError
from pipelines import train as job
from pipelines.training.batch_split import BatchSplit
from pipelines.training.recipe import Stage, TrainConfig
from pipelines.training.request import check_request
from sr_platform.checkpoints import list_checkpoints
from sr_platform.config import load_config
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.folders import published_digest
from sr_platform.shards import read_manifest
from sr_platform.tracking import Tracking

Weights = dict[str, torch.Tensor]
TINY = ["--size-px", "32", "--global-batch", "4", "--align.num-updates", "8", "--unified.num-updates", "2"]
TINY += ["--align.warmup-updates", "1", "--unified.warmup-updates", "0", "--log-every-updates", "1"]
TINY += ["--validation.num-pictures", "0"]
LINEAGE = {"manifest_digest", "data_uri", "data_licences", "recipe_digest", "base_model", "base_model_digest"}
LINEAGE |= {"code_digest"}


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

    from pipelines.training.stages import stage_job
    from pipelines.training.updates import train_loop_per_worker

    folder = tmp_path_factory.mktemp("alone")
    patch = pytest.MonkeyPatch()
    patch.delenv("MLFLOW_TRACKING_URI", raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = Tracking.open(default_path=folder, experiment="alone")

    def run(stage: Stage, *flags: str) -> tuple[dict[str, float], Path, list[float]]:
        run_id = runs.start(stage, params={}, tags={})
        flags = ("--data", prepared_dataset, "--num-workers", "1", "--out", str(folder / run_id), *flags)
        request = check_request(config("--stage", stage, *flags))
        started = stage_job(request, stage, request.model, request.model_digest, tracking_uri=runs.uri, run_id=run_id)
        alone = ScalingConfig(num_workers=0)
        values = started.model_dump(mode="json")
        result = TorchTrainer(train_loop_per_worker, train_loop_config=values, scaling_config=alone).fit().return_value
        if "error" in result:
            raise FloatingPointError(result["error"])
        history = MlflowClient(runs.uri).get_metric_history(run_id, "train/loss")
        losses = [m.value for m in sorted(history, key=lambda m: m.step)]
        return result["metrics"], Path(started.model_out), losses

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
    assert trained.model_version.startswith("faithdiff-nano-unified-")
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
    with pytest.raises(
        FloatingPointError, match=r"update 2 of stage align is nan; no .*Samples of the update: s\d-\d, "
    ):
        alone("align", "--max-updates", "3")


def curve(client: Any, run_id: str, key: str) -> list[float]:
    """Values of a metric by update; every update has one."""
    history = sorted(client.get_metric_history(run_id, key), key=lambda m: m.step)
    assert [m.step for m in history] == list(range(1, len(history) + 1))
    return [m.value for m in history]


WHOLE = ["--max-micro-batch", "1", "--unified.num-updates", "6", "--unified.warmup-updates", "2"]
WHOLE += ["--checkpoint-every-updates", "2", "--registered-model", "tiny"]


@pytest.fixture(scope="module")
def whole(local_ray: None, tmp_path_factory: pytest.TempPathFactory, prepared_dataset: str) -> Any:
    """Both stages on two Ray workers that accumulate twice: (configuration, result)."""
    out = str(tmp_path_factory.mktemp("whole"))
    cfg = config("--data", prepared_dataset, "--out", out, "--num-workers", "2", *WHOLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        return cfg, job.train(cfg)


def runs_of(result: job.TrainResult) -> dict[str, Any]:
    """Name -> run of a training's MLflow runs, in an experiment of its own."""
    from mlflow import MlflowClient

    client = MlflowClient(result.tracking_uri)
    experiment = client.get_run(result.run_id).info.experiment_id
    return {run.info.run_name: run for run in client.search_runs([experiment])}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [2, pytest.param(4, marks=pytest.mark.soak)])
def test_several_workers_give_the_learning_rates_losses_and_weights_of_one(
    whole, alone, prepared_dataset: str, tmp_path: Path, monkeypatch, num_workers: int
) -> None:
    """Stage 2 on 1 x 4, 2 x 2 and 4 x 1 (workers x accumulation), from one model of stage 1."""
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    splits = ((1, 4), (2, 2), (4, 1))
    assert [BatchSplit.derive(4, workers, 1).accumulation for workers, _ in splits] == [split[1] for split in splits]
    start = f"{whole[0].out}/models/align"
    flags = [*WHOLE, "--model", start]
    _, one_path, _ = alone("unified", *flags)
    several = whole[1]
    if num_workers > 2:
        place = ["--data", prepared_dataset, "--out", str(tmp_path), "--num-workers", str(num_workers)]
        several = job.train(config(*flags, *place, "--stage", "unified"))
    runs = [
        (f"sqlite:///{one_path.parents[2] / 'mlflow.db'}", one_path.parents[1].name),
        (several.tracking_uri, runs_of(several)["unified"].info.run_id),
    ]
    rates, losses = (
        [curve(MlflowClient(uri), run_id, key) for uri, run_id in runs] for key in ("train/lr", "train/loss")
    )
    cosine = [0.5 * (1 + math.cos(math.pi * update / 4)) for update in range(4)]
    assert rates[0] == pytest.approx([3e-4 * factor for factor in (0, 0.5, *cosine)], rel=1e-12)
    assert rates[1] == rates[0]
    # Sums are taken in another order: in fp32 a loss moves in its seventh digit, and more with every update.
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)
    one, other = (FaithDiffPipeline.from_pretrained(uri).unet.state_dict() for uri in (one_path, several.model_uri))
    before = FaithDiffPipeline.from_pretrained(start).unet.state_dict()
    assert learnt_difference(other, one, before) < 2e-2


def learnt_difference(actual: Weights, expected: Weights, start: Weights) -> float:
    """Length of the difference between both, by the length of what `expected` learnt.

    AdamW turns gradients that are rounding noise into whole steps, so single weights may differ by a learning rate.
    """
    flat = [torch.cat([model[name].flatten() for name in start]).double() for model in (actual, expected, start)]
    return float((flat[0] - flat[1]).norm() / (flat[1] - flat[2]).norm())


@pytest.mark.ray
@pytest.mark.slow
def test_both_stages_leave_models_runs_and_a_registered_version_and_are_done_once(whole, alone, monkeypatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    cfg, result = whole
    client, runs, out = MlflowClient(result.tracking_uri), runs_of(result), Path(cfg.out)
    assert runs["align"].data.tags["mlflow.parentRunId"] == runs["unified"].data.tags["mlflow.parentRunId"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    _, model_path, losses = alone("align")
    assert curve(client, runs["align"].info.run_id, "train/loss") == pytest.approx(losses, rel=1e-4)
    expected = FaithDiffPipeline.from_pretrained(model_path).unet.state_dict()
    actual = FaithDiffPipeline.from_pretrained(out / "models" / "align").unet.state_dict()
    start = FaithDiffPipeline.from_pretrained("nano").unet.state_dict()
    assert learnt_difference(actual, expected, start) < 2e-2
    assert list_checkpoints(str(out / "checkpoints" / "align")) == [6, 8]

    version = client.get_model_version_by_alias("tiny", "candidate")
    assert f"models:/tiny/{version.version}" == result.registered_uri
    assert version.tags["model_digest"] == published_digest(result.model_uri)
    for run in (client.get_run(result.run_id), runs["align"], runs["unified"]):
        assert run.data.tags.keys() >= LINEAGE
        assert {key: version.tags[key] for key in LINEAGE} == {key: run.data.tags[key] for key in LINEAGE}
    assert version.tags["manifest_digest"] == read_manifest(cfg.data).digest
    assert json.loads(version.tags["data_licences"]) == read_manifest(cfg.data).licences
    assert client.get_run(result.run_id).data.params["align.num_updates"] == "8"
    assert result.model_uri == str(out / "models" / "unified")
    card = (Path(result.model_uri) / "README.md").read_text()
    assert "align (8 updates), then unified (6 updates)" in card
    assert "loss of the last update" in card
    assert "align (8 updates), crops" in (out / "models" / "align" / "README.md").read_text()

    again = job.train(cfg)
    assert (again.registered_uri, again.run_id, again.metrics) == (result.registered_uri, result.run_id, {})
    with pytest.raises(ConfigError, match="another recipe"):
        job.train(cfg.model_copy(update={"seed": 1}))


@pytest.mark.ray
@pytest.mark.slow
def test_a_stage_tells_mlflow_all_that_it_is_watched_by(whole) -> None:
    run = runs_of(whole[1])["unified"]
    metrics = run.data.metrics
    named = {f"train/{key}" for key in ("loss", "loss_smoothed", "lr", "lr_lq_encoder", "grad_norm", "updates")}
    named |= {"train/updates_per_s", "train/samples_per_s", "perf/tflops", "perf/share_of_peak"}
    named |= {"perf/data_wait_share", "perf/peak_memory_gib", "perf/checkpoint_s"}
    assert named <= metrics.keys()
    buckets = [key for key in metrics if key.startswith("train/loss_by_timestep/")]
    assert buckets
    assert metrics["train/samples_per_s"] == pytest.approx(4 * metrics["train/updates_per_s"])
    assert 0 < metrics["perf/share_of_peak"] < 1
    assert 0 <= metrics["perf/data_wait_share"] <= 1
    assert (metrics["run/workers"], metrics["run/micro_batch"], metrics["run/accumulation"]) == (2, 1, 2)
    assert run.data.params["trains"] == "alignment, lq_encoder, unet"


@pytest.mark.ray
def test_a_run_goes_on_from_any_checkpoint_as_if_it_had_never_stopped(alone, tmp_path: Path) -> None:
    """In another folder, from the middle, bit for bit; and only in the stage that the checkpoint is of."""
    flags = ["--checkpoint-every-updates", "3", "--keep-checkpoints", "9", "--average-decay", "0.5"]
    whole_metrics, whole, losses = alone("align", *flags)
    source = whole.parents[1] / "checkpoints" / "align"
    assert list_checkpoints(str(source)) == [3, 6, 8]
    middle = source / "update_00000003"
    metrics, resumed, rest = alone("align", *flags, "--resume-from", str(middle))
    assert rest == losses[3:]
    expected, actual = (FaithDiffPipeline.from_pretrained(path).unet.state_dict() for path in (whole, resumed))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())
    assert metrics["train/loss_smoothed"] == whole_metrics["train/loss_smoothed"]
    with pytest.raises(ConfigError, match="is of stage align and the first stage here is unified; give --stage align"):
        alone("unified", "--resume-from", str(middle))
    with pytest.raises(ConfigError, match="holds no complete checkpoint"):
        alone("align", "--resume-from", str(tmp_path))


@pytest.mark.ray
@pytest.mark.slow
def test_a_sample_that_turns_out_to_be_damaged_ends_the_job_in_one_line_that_names_it(
    local_ray, prepared_dataset: str, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    data = tmp_path / "data"
    shutil.copytree(prepared_dataset, data)
    for shard in (data / "shards").iterdir():
        shard.write_bytes(shard.read_bytes().replace(b"IHDR", b"XXXX"))
    flags = ["--data", str(data), "--out", str(tmp_path / "out"), "--max-failures", "0", "--num-workers", "1"]
    with pytest.raises(
        InputDataError, match=r"a picture of sample s\d-\d is damaged; run pipelines/prepare.py"
    ) as refusal:
        job.train(config(*flags))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "{tmp}/nowhere"], "does not exist"),
        (["--model", "nanno"], "neither a folder nor a preset"),
        (["--model", "{tmp}"], "no model_index.json"),
        (["--model", "models:/nano"], "models:/name@alias"),
        (["--num-workers", "5"], "num_workers=5 is above global_batch=4"),
        (["--min-workers", "3"], "min_workers=3 is above num_workers=2"),
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
    data = tmp_path / "data"
    shutil.copytree(prepared_dataset, data)
    shard = data / "shards" / "train-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"1 of 2 shards .* first shards/train-000001.tar"):
        check_request(config("--data", str(data), "--out", str(tmp_path / "out")))
    shard.unlink()
    with pytest.raises(ValueError, match="missing or cut off"):
        check_request(config("--data", str(data), "--out", str(tmp_path / "out")))


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
    request = check_request(config("--data", Path(prepared_dataset).name, "--out", "trained"))
    assert request.cfg.data == prepared_dataset
    assert request.cfg.out == str(Path(prepared_dataset).parent / "trained")
    assert request.model == "nano"
    assert json.dumps(request.tags)
    assert not Path(request.cfg.out).exists()
