import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from faithdiff import FaithDiffPipeline
from faithdiff.bundle import COMPONENTS, check_folder, find_folder, list_presets, read_index
from faithdiff.checkpoint import save_released
from faithdiff.errors import InputError
from faithdiff.unet import FaithDiffUNet

QUICK = {"scale": 1, "num_inference_steps": 2}


@pytest.fixture
def folder(tmp_path, nano):
    nano.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def plain_sdxl(tmp_path, nano):
    """A plain SDXL folder of nano size: diffusers' own UNet class, no LQ encoder, no alignment module."""
    folder = tmp_path / "sdxl"
    for name in ("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"):
        nano.components[name].save_pretrained(folder / name)
    unet = UNet2DConditionModel.from_config(nano.unet.config)
    unet.load_state_dict({k: v for k, v in nano.unet.state_dict().items() if not k.startswith("alignment.")})
    unet.save_pretrained(folder / "unet")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    return folder


def test_a_saved_folder_loads_with_the_same_weights_and_restores_the_same_picture(folder, nano, photograph):
    loaded = FaithDiffPipeline.from_pretrained(folder)
    for name in ("vae", "lq_encoder", "unet", "text_encoder", "text_encoder_2"):
        ours, theirs = getattr(nano, name).state_dict(), getattr(loaded, name).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
    rgb = photograph(40, 32)
    expected, actual = (np.asarray(pipe(rgb, prompt="a photo", **QUICK).image) for pipe in (nano, loaded))
    assert np.array_equal(expected, actual)


def test_the_folder_follows_diffusers_layout(folder):
    index = read_index(folder)
    assert index["_class_name"] == "FaithDiffPipeline"
    assert {name for name, value in index.items() if isinstance(value, list)} == set(COMPONENTS)
    for name in ("vae", "lq_encoder", "unet"):
        assert (folder / name / "diffusion_pytorch_model.safetensors").is_file()
        assert (folder / name / "config.json").is_file()
    assert not list(folder.rglob("*.bin"))
    assert not list(folder.parent.glob(".*partial"))


def test_saving_over_a_folder_replaces_it(folder, nano):
    (folder / "stale.txt").write_text("old")
    nano.save_pretrained(folder)
    assert not (folder / "stale.txt").exists()
    FaithDiffPipeline.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_runs_in_half_precision(dtype, folder, photograph):
    pipe = FaithDiffPipeline.from_pretrained(folder, dtype=dtype)
    assert {getattr(pipe, name).dtype for name in ("vae", "lq_encoder", "unet", "text_encoder")} == {dtype}
    assert pipe(photograph(32, 32), **QUICK).image.size == (32, 32)


def test_a_plain_sdxl_folder_becomes_a_model_that_at_first_ignores_the_lq_features(plain_sdxl, nano):
    pipe = FaithDiffPipeline.from_base(plain_sdxl, attention="tokens")
    assert pipe.unet.config.alignment_attention == "tokens"
    assert pipe.unet.config.lq_channels == pipe.lq_encoder.out_channels == 64
    for name, tensor in pipe.lq_encoder.state_dict().items():
        assert torch.equal(tensor, pipe.vae.encoder.state_dict()[name]), name
    features = torch.randn(1, 32, 4, 4)
    with torch.no_grad():
        assert torch.equal(pipe.unet.alignment(features, torch.randn(1, 64, 4, 4)), features)


def test_a_base_takes_another_vae_and_a_released_file(plain_sdxl, tmp_path, nano):
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(nano.vae.config)
    vae.save_pretrained(tmp_path / "other_vae")
    unet = FaithDiffUNet.from_config(nano.unet.config)
    released = save_released(unet, nano.lq_encoder, tmp_path / "FaithDiff.bin")
    pipe = FaithDiffPipeline.from_base(
        plain_sdxl, vae=tmp_path / "other_vae", released=tmp_path / "FaithDiff.bin", attention="tokens"
    )
    assert torch.equal(pipe.vae.decoder.conv_in.weight, vae.decoder.conv_in.weight)
    assert pipe.unet.alignment.attention == "value"
    ours = save_released(pipe.unet, pipe.lq_encoder)
    assert all(torch.equal(ours[name], tensor) for name, tensor in released.items())


def test_a_preset_folder_may_name_its_base(plain_sdxl, tmp_path, photograph):
    preset = tmp_path / "preset"
    preset.mkdir()
    (preset / "model_index.json").write_text(json.dumps({"base": {"base": str(plain_sdxl)}}))
    pipe = FaithDiffPipeline.from_pretrained(preset)
    assert pipe(photograph(16, 16), **QUICK).image.size == (16, 16)


def test_an_unknown_model_is_refused_with_the_presets():
    with pytest.raises(InputError, match=r"'nanoo' is neither a folder nor a preset; presets are nano, sdxl"):
        FaithDiffPipeline.from_pretrained("nanoo")
    assert list_presets() == ["nano", "sdxl", "sdxl_untrained"]


def test_the_sdxl_preset_puts_its_parts_from_the_hub_together(plain_sdxl, tmp_path, nano, monkeypatch, photograph):
    """A fake hub that holds the preset's three repositories at nano size."""
    nano.vae.save_pretrained(tmp_path / "vae_fix")
    for path in plain_sdxl.rglob("*.safetensors"):
        path.rename(path.with_suffix(".fp16.safetensors"))
    save_released(nano.unet, nano.lq_encoder, tmp_path / "FaithDiff.bin")
    repositories = {
        "SG161222/RealVisXL_V4.0": plain_sdxl,
        "madebyollin/sdxl-vae-fp16-fix": tmp_path / "vae_fix",
        "jychen9811/FaithDiff": tmp_path,
    }
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, allow_patterns: str(repositories[name]))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(repositories[name] / file))
    pipe = FaithDiffPipeline.from_pretrained("sdxl")
    rgb = photograph(32, 32)
    expected, actual = (np.asarray(model(rgb, prompt="a photo", **QUICK).image) for model in (nano, pipe))
    assert np.array_equal(expected, actual)


def test_a_model_of_the_hub_that_cannot_be_had_is_refused_in_one_line(plain_sdxl):
    """The tests run with HF_HUB_OFFLINE, as a machine without a network behaves."""
    with pytest.raises(InputError, match=r"'nobody/nothing' is neither here nor a preset .* from the hub"):
        FaithDiffPipeline.from_pretrained("nobody/nothing")
    with pytest.raises(InputError, match=r"'nobody/nothing/FaithDiff\.bin' is neither here"):
        FaithDiffPipeline.from_base(plain_sdxl, released="nobody/nothing/FaithDiff.bin")
    with pytest.raises(InputError, match=r"'SG161222/RealVisXL_V4\.0' is neither here"):
        FaithDiffPipeline.from_pretrained("sdxl")


def test_a_folder_that_is_not_a_model_is_refused_in_one_line(folder, plain_sdxl, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"has no model_index\.json"):
        FaithDiffPipeline.from_pretrained(tmp_path / "empty")
    with pytest.raises(InputError, match="from_base"):
        FaithDiffPipeline.from_pretrained(plain_sdxl)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="unet cannot be loaded"):
        FaithDiffPipeline.from_pretrained(folder)
    shutil.rmtree(folder / "vae")
    with pytest.raises(InputError, match="lacks the component vae/"):
        FaithDiffPipeline.from_pretrained(folder)
    (folder / "model_index.json").write_text("{")
    with pytest.raises(InputError, match="is not JSON"):
        FaithDiffPipeline.from_pretrained(folder)


def test_missing_extra_and_misshapen_tensors_of_a_folder_are_all_named(folder):
    from safetensors.torch import load_file, save_file

    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["conv_in.bias"]
    tensors["surprise.weight"] = torch.zeros(1)
    tensors["conv_out.bias"] = torch.zeros(9)
    save_file(tensors, path, metadata={"format": "pt"})
    for attempt in (FaithDiffPipeline.from_pretrained, check_folder):
        with pytest.raises(InputError) as refusal:
            attempt(folder)
        for name in ("conv_in.bias", "surprise.weight", "conv_out.bias"):
            assert name in str(refusal.value)


def test_a_good_folder_and_the_presets_pass_the_check_without_being_loaded(folder):
    check_folder(folder)
    for preset in list_presets():
        check_folder(find_folder(preset))
