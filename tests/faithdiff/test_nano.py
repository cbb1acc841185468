from __future__ import annotations

import filecmp
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPTokenizer

from faithdiff import FaithDiffPipeline, nano
from faithdiff.text import encode_prompts

MODELS = ("vae", "unet", "lq_encoder", "text_encoder", "text_encoder_2")


@pytest.fixture(scope="module")
def built() -> dict[str, Any]:
    return nano.build(seed=0)


@pytest.fixture(scope="module")
def preset() -> FaithDiffPipeline:
    return FaithDiffPipeline.from_pretrained("nano")


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_the_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    nano.main(["--out", str(tmp_path / "first")])
    nano.main(["--out", str(tmp_path / "second"), "--seed", "0"])
    names = _files(tmp_path / "first")
    assert {"model_index.json", "corpus.txt", "README.md", "tokenizer/vocab.json"} <= set(names)
    same, different, unreadable = filecmp.cmpfiles(tmp_path / "first", tmp_path / "second", names, shallow=False)
    assert (sorted(same), different, unreadable) == (names, [], [])


def test_another_seed_gives_other_weights(built: dict[str, Any]) -> None:
    other = nano.build(seed=1)
    for name in MODELS:
        assert not torch.equal(
            torch.nn.utils.parameters_to_vector(built[name].parameters()),
            torch.nn.utils.parameters_to_vector(other[name].parameters()),
        ), name


def test_building_leaves_the_global_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    nano.build(seed=0)
    assert torch.equal(torch.rand(3), expected)


def test_the_committed_preset_has_the_structure_that_build_makes(
    built: dict[str, Any], preset: FaithDiffPipeline
) -> None:
    for name in MODELS:
        loaded, made = getattr(preset, name).state_dict(), built[name].state_dict()
        assert {k: v.shape for k, v in loaded.items()} == {k: v.shape for k, v in made.items()}, name
        assert {v.dtype for v in loaded.values() if v.is_floating_point()} == {torch.float32}, name
    assert preset.unet.config.lq_channels == preset.lq_encoder.out_channels == 64
    assert preset.vae.config.scaling_factor == 0.13025
    assert preset.model_version == "nano"


def test_the_committed_tokenizers_are_those_of_the_committed_corpus(
    built: dict[str, Any], preset: FaithDiffPipeline
) -> None:
    for name in ("tokenizer", "tokenizer_2"):
        assert getattr(preset, name).backend_tokenizer.to_str() == built[name].backend_tokenizer.to_str()


@pytest.mark.parametrize("loader", [CLIPTokenizer, AutoTokenizer])
@pytest.mark.parametrize(("name", "pad_id"), [("tokenizer", 1023), ("tokenizer_2", 0)])
def test_tokenizers_load_from_their_folder_and_pad_as_in_sdxl(loader: Any, name: str, pad_id: int) -> None:
    tokenizer = loader.from_pretrained(nano.NANO_PATH / name)
    ids = tokenizer("A photograph.", padding="max_length", max_length=77, truncation=True).input_ids
    vocabulary = tokenizer.get_vocab()
    words = [vocabulary[word] for word in ("a</w>", "photograph</w>", ".</w>")]
    assert ids == [1022, *words, 1023, *[pad_id] * (77 - 5)]
    assert len(tokenizer) == len(vocabulary) == 1024
    assert vocabulary["!"] == 0


def test_text_outside_the_corpus_survives_the_tokenizer(preset: FaithDiffPipeline) -> None:
    text = "zebra \u65e5\u672c \u00e9t\u00e9 42"
    assert preset.tokenizer.decode(preset.tokenizer(text).input_ids, skip_special_tokens=True).split() == [
        *text.split()[:-1], "4", "2",
    ]  # fmt: skip


def test_the_scheduler_gives_sdxl_its_own_timesteps(preset: FaithDiffPipeline, golden: Callable[[str], Any]) -> None:
    table = golden("case08_tables").about["scheduler"]["euler20"]
    preset.scheduler.set_timesteps(20)
    assert preset.scheduler.timesteps.tolist() == table["timesteps"]
    assert np.allclose(preset.scheduler.sigmas.numpy(), table["sigmas"], rtol=1e-5)


def test_prompts_change_the_conditioning(preset: FaithDiffPipeline) -> None:
    parts = (preset.tokenizer, preset.tokenizer_2, preset.text_encoder, preset.text_encoder_2)
    encoded = encode_prompts(["", "A red brick house."], *parts)
    assert encoded.prompt_embeds.shape == (2, 77, preset.unet.config.cross_attention_dim)
    assert not torch.allclose(*encoded.pooled_prompt_embeds)


def test_a_picture_goes_through_the_whole_bundle(preset: FaithDiffPipeline) -> None:
    lq = np.random.default_rng(0).integers(0, 256, (20, 28, 3), dtype=np.uint8)
    result = preset(lq, scale=2, prompt="A red brick house.", num_inference_steps=2, seed=3)
    assert result.image.size == (56, 40)
    assert np.asarray(result.image).std() > 0


def test_the_sdxl_preset_holds_the_full_unet_config(golden: Callable[[str], Any]) -> None:
    folder = nano.NANO_PATH.parent / "sdxl"
    config = json.loads((folder / "unet_config.json").read_text())
    assert config == golden("faithdiff_full_keys").about["sdxl_config"]
    parts = json.loads((folder / "model_index.json").read_text())["base"]
    assert parts["base"] == "SG161222/RealVisXL_V4.0"
    assert parts["vae"] == "madebyollin/sdxl-vae-fp16-fix"
