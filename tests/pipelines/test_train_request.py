"""What a training request may go on from, and what is refused before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from faithdiff.bundle import PRESETS_PATH
from pipelines.training.export import model_digest
from pipelines.training.recipe import TrainConfig
from pipelines.training.request import check_request, read_record, record_start, write_record
from sr_platform.config import load_config
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.folders import publish_folder


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def config(data: str, out: Path | str, *flags: str) -> TrainConfig:
    return load_config(TrainConfig, ["train_nano.yaml", "--data", data, "--out", str(out), *flags], job="train")


def begin(data: str, out: Path, *flags: str) -> str:
    """What the job writes when it begins; returns the digest of the model that its first stage starts from."""
    request = check_request(config(data, out, *flags))
    recipe = request.cfg.model_dump(mode="json")
    write_record(str(out), {"identity": request.identity, "recipe": recipe, "starts": {}, "run_id": "r"})
    record_start(str(out), read_record(str(out)), request.cfg.stages[0], request.model_digest)
    return request.model_digest


def finish(out: Path, stage: str, tmp_path: Path) -> str:
    """A trained model of the stage, not the nano preset's: its digest."""
    model = tmp_path / f"model-{stage}"
    shutil.copytree(PRESETS_PATH / "nano", model)
    shutil.copy(model / "vae" / "diffusion_pytorch_model.safetensors", model / "vae" / f"{stage}.safetensors")
    publish_folder(model, str(out / "models" / stage))
    return model_digest(str(out / "models" / stage))


def test_the_second_stage_goes_on_from_the_first_ones_model_in_the_same_folder(prepared_dataset, out, tmp_path) -> None:
    begin(prepared_dataset, out, "--stage", "align")
    aligned = finish(out, "align", tmp_path)
    request = check_request(config(prepared_dataset, out, "--stage", "unified"))
    assert (request.model, request.model_digest) == (str(out / "models" / "align"), aligned)
    assert request.tags["base_model"] == "nano"
    assert check_request(config(prepared_dataset, out)).model == "nano"


def test_stages_that_started_from_something_else_are_not_mixed(prepared_dataset, out, tmp_path) -> None:
    begin(prepared_dataset, out, "--stage", "unified")
    with pytest.raises(ConfigError, match=r"stage unified in .* started from another model than it would now"):
        check_request(config(prepared_dataset, out))
    assert check_request(config(prepared_dataset, out, "--stage", "unified")).model == "nano"
    finish(out, "align", tmp_path)
    with pytest.raises(ConfigError, match="started from another model"):
        check_request(config(prepared_dataset, out, "--stage", "unified"))


def test_another_recipe_in_the_same_folder_is_refused_and_its_difference_named(prepared_dataset, out) -> None:
    begin(prepared_dataset, out)
    with pytest.raises(ConfigError, match=r"another recipe \(align.learning_rate, seed\); give another folder"):
        check_request(config(prepared_dataset, out, "--seed", "3", "--align.learning-rate", "2e-3"))
    cfg = config(prepared_dataset, out, "--num-workers", "1", "--zero-stage", "3", "--experiment", "x")
    assert check_request(cfg).cfg.num_workers == 1


def test_validation_data_and_paths_are_checked_and_made_absolute(prepared_dataset, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(Path(prepared_dataset).parent)
    name = Path(prepared_dataset).name
    cfg = check_request(config(prepared_dataset, (tmp_path / "o").as_uri(), "--validation.data", name)).cfg
    assert cfg.validation.data == prepared_dataset
    assert cfg.out == str(tmp_path / "o")
    with pytest.raises(InputDataError, match="nowhere"):
        check_request(config(prepared_dataset, tmp_path / "o", "--validation.data", "nowhere"))


def test_samples_that_attend_to_each_other_must_fit_into_a_micro_batch(prepared_dataset, out) -> None:
    flags = ["--alignment-attention", "batch", "--attention-group", "8"]
    with pytest.raises(ConfigError, match=r"attention_group=8 samples .* max_micro_batch=4 is less; raise it"):
        config(prepared_dataset, out, *flags)
