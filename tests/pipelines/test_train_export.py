"""Checkpoint -> folder -> released file -> folder keeps every bit, whoever wrote the checkpoint."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from faithdiff import FaithDiffPipeline, bundle
from faithdiff.checkpoint import save_released
from faithdiff.errors import InputError
from faithdiff.loss import FaithDiffForTraining, trained_parameters
from faithdiff.nano import NANO_PATH
from faithdiff.schedule import alphas_cumprod
from faithdiff.variants import with_architecture
from pipelines.training.export import ExportConfig, export, main, model_digest, pipeline_of, weights_digest
from pipelines.training.recipe import ArchitectureConfig
from sr_platform.checkpoint_writer import CheckpointWriter
from sr_platform.checkpoints import open_checkpoint
from sr_platform.errors import ConfigError, InputDataError
from sr_platform.folders import fetch_folder, publish_folder
from sr_platform.storage import open_storage
from sr_platform.train_state import AVERAGE, EXP_AVG, WEIGHT, Fragment, Snapshot

PARTS = {"align": ("alignment",), "unified": ("alignment", "lq_encoder", "unet")}
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
Values = dict[str, dict[str, Tensor]]


@functools.cache
def nano() -> FaithDiffPipeline:
    """The preset, for whoever does not change it."""
    return FaithDiffPipeline.from_pretrained("nano")


def trained_values(stage: str, architecture: dict[str, Any], kinds: tuple[str, ...], seed: int) -> Values:
    """Kind -> name -> whole parameter: those of the nano model, moved a little."""
    pipeline = with_architecture(nano(), **architecture)
    module = FaithDiffForTraining(pipeline.unet, pipeline.lq_encoder, alphas_cumprod(pipeline.scheduler.config))
    names, parameters = trained_parameters(module, PARTS[stage]), dict(module.named_parameters())
    generator = torch.Generator().manual_seed(seed)
    return {
        kind: {n: parameters[n].detach() + 0.01 * torch.randn(parameters[n].shape, generator=generator) for n in names}
        for kind in kinds
    }


def save_checkpoint(
    uri: str,
    stage: str = "unified",
    *,
    update: int = 100,
    kinds: tuple[str, ...] = (WEIGHT, EXP_AVG, AVERAGE),
    world_size: int = 3,
    **meta: Any,
) -> Values:
    """Writes what `world_size` ranks would, each of them a range of every parameter; returns the whole of it."""
    meta = {
        "stage": stage,
        "model": "nano",
        "model_digest": weights_digest(NANO_PATH),
        "model_version": "nano-trained",
        "architecture": ArchitectureConfig().model_dump(mode="json"),
        "recipe": {"alignment_attention": "model"},
        **meta,
    }
    values = trained_values(stage, meta["architecture"], kinds, update)
    shapes = {name: tuple(tensor.shape) for name, tensor in values[WEIGHT].items()}
    writers = [
        CheckpointWriter(uri, rank=rank, world_size=world_size, attempt=f"a{update}", keep=9)
        for rank in range(world_size)
    ]
    for rank, writer in enumerate(writers):
        fragments = {}
        for name in shapes:
            flat = {kind: values[kind][name].reshape(-1) for kind in kinds}
            start, end = (r * len(flat[WEIGHT]) // world_size for r in (rank, rank + 1))
            if start < end:
                fragments[name] = Fragment(start, {kind: tensor[start:end].clone() for kind, tensor in flat.items()})
        writer.save(update, Snapshot(fragments, shapes, torch.tensor(float(update)), {}), meta)
    for writer in writers:
        writer.close()
    return values


def run(source: str, to: str | Path, **settings: Any) -> str:
    return export(ExportConfig(source=source, to=str(to), **settings))


def load(folder: Path) -> FaithDiffPipeline:
    return FaithDiffPipeline.from_pretrained(folder)


def weights_of(pipeline: FaithDiffPipeline) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in bundle.MODELS
        for name, tensor in getattr(pipeline, part).state_dict().items()
    }


def assert_bit_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    different = [
        name
        for name, tensor in expected.items()
        if actual[name].dtype != tensor.dtype or not torch.equal(actual[name], tensor)
    ]
    assert not different


@pytest.mark.parametrize(("stage", "weights", "kind"), [("align", "averaged", AVERAGE), ("unified", "raw", WEIGHT)])
def test_every_road_between_the_forms_keeps_every_bit(stage: str, weights: str, kind: str, tmp_path: Path) -> None:
    checkpoints = str(tmp_path / "checkpoints" / stage)
    values = save_checkpoint(checkpoints, stage)[kind]
    run(checkpoints, tmp_path / "folder", weights=weights)
    expected = weights_of(nano()) | values
    assert len(expected) == len(weights_of(nano()))
    assert_bit_equal(weights_of(load(tmp_path / "folder")), expected)

    run(str(tmp_path / "folder"), tmp_path / "FaithDiff.bin")
    released = torch.load(tmp_path / "FaithDiff.bin", weights_only=True)
    model = load(tmp_path / "folder")
    assert_bit_equal(released, save_released(model.unet, model.lq_encoder))
    run(checkpoints, tmp_path / "straight.bin", weights=weights)
    assert_bit_equal(torch.load(tmp_path / "straight.bin", weights_only=True), released)

    run(str(tmp_path / "FaithDiff.bin"), tmp_path / "back", model="nano")
    assert_bit_equal(weights_of(load(tmp_path / "back")), expected)
    run(str(tmp_path / "back"), tmp_path / "again.bin")
    assert_bit_equal(torch.load(tmp_path / "again.bin", weights_only=True), released)


def test_released_names_follow_the_pattern_of_the_released_file(tmp_path: Path, golden: Callable[[str], Any]) -> None:
    save_checkpoint(str(tmp_path / "unified"))
    run(str(tmp_path / "unified"), tmp_path / "FaithDiff.bin")

    def patterns(names: Any) -> set[str]:
        return {re.sub(r"\d+", "N", name) for name in names}

    ours = patterns(torch.load(tmp_path / "FaithDiff.bin", weights_only=True))
    assert ours == patterns(golden("faithdiff_full_keys").about["keys"])


def test_an_exported_folder_restores_as_the_checkpoint_does(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / "unified"))
    account = run(str(tmp_path / "unified"), tmp_path / "folder")
    reader = open_checkpoint(str(tmp_path / "unified"))
    assert reader is not None
    pictures = [
        np.asarray(pipeline(PICTURE, scale=2, num_inference_steps=2).image)
        for pipeline in (load(tmp_path / "folder"), pipeline_of(reader, NANO_PATH, "raw"))
    ]
    assert np.array_equal(*pictures)
    assert load(tmp_path / "folder").model_version == "nano-trained"
    assert "update_00000100 of stage unified, raw weights, fp32" in account
    assert re.search(r"unet +[\d,]+ parameters", account)
    assert re.search(r"written +/.*/folder, \d\d\.\d MB", account)
    assert re.search(r"sha256 +[0-9a-f]{64}$", account)


def test_a_checkpoint_is_the_newest_or_the_one_that_is_named(tmp_path: Path) -> None:
    uri, name = str(tmp_path / "align"), "unet.alignment.proj.bias"
    first, second = (save_checkpoint(uri, "align", update=update)[WEIGHT][name] for update in (50, 100))
    run(uri, tmp_path / "newest")
    run(f"{uri}/update_00000050/", tmp_path / "named")
    assert torch.equal(weights_of(load(tmp_path / "newest"))[name], second)
    assert torch.equal(weights_of(load(tmp_path / "named"))[name], first)
    with pytest.raises(InputDataError, match=r"none of update 70; it has \[50, 100\]"):
        run(f"{uri}/update_00000070", tmp_path / "missing")


def test_a_model_attends_as_it_was_trained_to(tmp_path: Path) -> None:
    nano().unet.set_alignment_attention("tokens")
    nano().save_pretrained(tmp_path / "tokens")
    nano().unet.set_alignment_attention("value")
    save_checkpoint(str(tmp_path / "align"), "align")
    reader = open_checkpoint(str(tmp_path / "align"))
    assert reader is not None
    for trained, expected in (("model", "tokens"), ("value", "value"), ("batch", "value")):
        reader.meta["recipe"]["alignment_attention"] = trained
        assert pipeline_of(reader, tmp_path / "tokens", "raw").unet.config.alignment_attention == expected
    account = run(str(tmp_path / "tokens"), tmp_path / "FaithDiff.bin")
    assert "attends to tokens, which a released file cannot say" in account


@pytest.mark.parametrize("architecture", [{"features": "last"}, {"control": True}], ids=str)
def test_an_ablation_becomes_a_folder_and_never_a_released_file(architecture: dict[str, Any], tmp_path: Path) -> None:
    meta = ArchitectureConfig(**architecture).model_dump(mode="json")
    values = save_checkpoint(str(tmp_path / "unified"), architecture=meta)[WEIGHT]
    run(str(tmp_path / "unified"), tmp_path / "folder")
    written = weights_of(load(tmp_path / "folder"))
    assert all(torch.equal(written[name], tensor) for name, tensor in values.items())
    with pytest.raises(InputError, match="the released layout cannot hold this model"):
        run(str(tmp_path / "unified"), tmp_path / "FaithDiff.bin")
    assert not (tmp_path / "FaithDiff.bin").exists()


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_is_rounded_once(dtype: str, tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / "unified"))
    run(str(tmp_path / "unified"), tmp_path / "half.safetensors", dtype=dtype)
    run(str(tmp_path / "half.safetensors"), tmp_path / "folder", model="nano", dtype=dtype)
    run(str(tmp_path / "folder"), tmp_path / "again.safetensors", dtype=dtype)
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "half.safetensors").read_bytes()


def test_everything_may_lie_in_storage(s3_uri: str, tmp_path: Path) -> None:
    values = save_checkpoint(f"{s3_uri}/checkpoints/align", "align")[WEIGHT]
    account = run(f"{s3_uri}/checkpoints/align", f"{s3_uri}/models/align")
    folder = fetch_folder(f"{s3_uri}/models/align", tmp_path / "cache")
    written = weights_of(load(folder))
    assert all(torch.equal(written[name], tensor) for name, tensor in values.items())
    assert f"{s3_uri}/models/align" in account
    run(f"{s3_uri}/checkpoints/align", f"{s3_uri}/FaithDiff.safetensors")
    assert open_storage(s3_uri).size("FaithDiff.safetensors") > 1e6
    assert model_digest(f"{s3_uri}/models/align") == weights_digest(folder)
    for taken in ("models/align", "FaithDiff.safetensors"):
        with pytest.raises(ConfigError, match=f"{taken} exists; give another place"):
            run(f"{s3_uri}/checkpoints/align", f"{s3_uri}/{taken}")


def test_what_cannot_be_done_is_said_before_anything_is_written(tmp_path: Path) -> None:
    save_checkpoint(str(tmp_path / "align"), "align", kinds=(WEIGHT,))
    align, out = str(tmp_path / "align"), tmp_path / "out"
    (tmp_path / "taken").mkdir()
    save_released(nano().unet, nano().lq_encoder, tmp_path / "x.bin")
    nano().save_pretrained(tmp_path / "other")
    before = sorted(tmp_path.rglob("*"))
    refused: list[tuple[str, dict[str, Any]]] = [
        (r"taken exists; give another place", {"source": align, "to": tmp_path / "taken"}),
        (r"has no averaged weights \(average_decay was 0\)", {"source": align, "to": out, "weights": "averaged"}),
        (r"only a checkpoint has averaged weights", {"source": "nano", "to": out, "weights": "averaged"}),
        (r"nano is a whole model, or no checkpoint at all", {"source": "nano", "to": out, "model": "nano"}),
        (r"x.bin has no VAE and no text encoders", {"source": str(tmp_path / "x.bin"), "to": out}),
        (
            r"started from weights .* \(nano\) and .*other has",
            {"source": align, "to": out, "model": tmp_path / "other"},
        ),
        (r"neither a folder nor a preset", {"source": "nothing", "to": out}),
        (r"nothing.bin does not exist", {"source": str(tmp_path / "nothing.bin"), "to": out, "model": "nano"}),
    ]
    for message, settings in refused:
        with pytest.raises((ConfigError, InputError), match=message):
            run(**{name: str(value) for name, value in settings.items()})
    assert sorted(tmp_path.rglob("*")) == before


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    for architecture, said in (({"features": "last"}, r"\(\d+,\)"), ({"alignment": "sum"}, "nothing of that name")):
        values = ArchitectureConfig(**architecture).model_dump(mode="json")
        save_checkpoint(str(tmp_path / said), "align", architecture=values)
        reader = open_checkpoint(str(tmp_path / said))
        assert reader is not None
        if said.startswith("n"):
            reader.shapes["unet.other"] = (1,)
        reader.meta["architecture"] = {}
        with pytest.raises(InputDataError, match=rf"has unet\.\S+ of shape .* and its model {said}; give the model"):
            pipeline_of(reader, "nano", "raw")


def test_a_checkpoint_that_was_damaged_is_not_exported(tmp_path: Path) -> None:
    uri = str(tmp_path / "checkpoints")
    save_checkpoint(uri, "align")
    path = min((tmp_path / "checkpoints").rglob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputDataError, match=f"{path.name} differs from what was written"):
        run(uri, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_digest_of_a_model_is_that_of_its_weights(tmp_path: Path) -> None:
    nano().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("another text")
    digest = weights_digest(tmp_path / "a")
    assert digest == model_digest(str(tmp_path / "a")) != weights_digest(NANO_PATH) == model_digest("nano")
    publish_folder(tmp_path / "a", str(tmp_path / "b"))
    assert model_digest(str(tmp_path / "b")) == digest
    changed = copy.deepcopy(nano().unet)
    changed.conv_in.bias.data += 1
    changed.save_pretrained(tmp_path / "a" / "unet")
    assert weights_digest(tmp_path / "a") != digest
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / bundle.INDEX_NAME).write_text("{}")
    with pytest.raises(InputDataError, match="has no weights"):
        weights_digest(tmp_path / "empty")


def test_a_preset_of_named_parts_has_the_digest_of_their_weights(tmp_path: Path) -> None:
    nano().save_pretrained(tmp_path / "base")
    save_released(nano().unet, nano().lq_encoder, tmp_path / "FaithDiff.bin")
    (tmp_path / "preset").mkdir()
    digests = set()
    for parts in ({}, {"vae": str(tmp_path / "base" / "vae")}, {"released": str(tmp_path / "FaithDiff.bin")}):
        index = {"base": {"base": str(tmp_path / "base"), **parts}}
        (tmp_path / "preset" / bundle.INDEX_NAME).write_text(json.dumps(index))
        digests.add(weights_digest(tmp_path / "preset"))
    assert len(digests) == 3


def test_the_command_prints_its_account(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--source", "nano", "--to", str(tmp_path / "FaithDiff.bin")])
    printed = capsys.readouterr().out
    assert "export: nano, fp32" in printed
    assert "lq_encoder" in printed
    with pytest.raises(ConfigError, match=r"^train export: flags: "):
        main(["--source", "nano"])
