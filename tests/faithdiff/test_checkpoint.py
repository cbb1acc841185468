import json
from fractions import Fraction

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from faithdiff.checkpoint import load_released, save_released
from faithdiff.encoder import LQEncoder
from faithdiff.errors import InputError
from faithdiff.unet import FaithDiffUNet
from faithdiff.variants import with_architecture


@pytest.fixture(scope="module")
def released_keys(golden):
    return golden("faithdiff_full_keys").about


@pytest.fixture
def sdxl_on_meta(released_keys):
    vae = {
        "block_out_channels": (128, 256, 512, 512),
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "layers_per_block": 2,
    }
    with torch.device("meta"):
        return FaithDiffUNet.from_config(released_keys["sdxl_config"]), LQEncoder.from_vae(AutoencoderKL(**vae))


def test_all_1814_released_keys_and_shapes_are_ours(released_keys, sdxl_on_meta):
    ours = {name: list(tensor.shape) for name, tensor in save_released(*sdxl_on_meta).items()}
    assert len(ours) == 1814
    assert ours == released_keys["keys"]
    assert sum(t.numel() for t in save_released(*sdxl_on_meta).values()) == released_keys["total_params"]


def test_a_full_released_mapping_loads_on_the_meta_device(released_keys, sdxl_on_meta):
    tensors = {name: torch.empty(shape, device="meta") for name, shape in released_keys["keys"].items()}
    parts = load_released(*sdxl_on_meta, tensors)
    assert set(parts) == {
        "unet",
        "lq_encoder",
        "condition_embedding",
        "information_transformer_layes",
        "spatial_ch_projs",
    }


@pytest.mark.parametrize("name", ["FaithDiff.bin", "FaithDiff.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_released_file_round_trips_bit_equal(name, dtype, tmp_path, nano):
    unet = FaithDiffUNet.from_config(nano.unet.config).to(dtype)
    lq_encoder = LQEncoder.from_config(nano.lq_encoder.config).to(dtype)
    written = save_released(unet, lq_encoder, tmp_path / name)
    other_unet = FaithDiffUNet.from_config(nano.unet.config).to(dtype)
    other_encoder = LQEncoder.from_config(nano.lq_encoder.config).to(dtype)
    load_released(other_unet, other_encoder, tmp_path / name)
    read = save_released(other_unet, other_encoder)
    assert read.keys() == written.keys()
    assert all(torch.equal(read[key], written[key]) and read[key].dtype == dtype for key in written)
    if name.endswith(".safetensors"):
        assert load_file(tmp_path / name).keys() == written.keys()
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_stage_1_file_fills_the_alignment_module_alone(nano):
    unet = FaithDiffUNet.from_config(nano.unet.config, alignment_attention="tokens")
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    prefixes = ("condition_embedding.", "information_transformer_layes.", "spatial_ch_projs.")
    stage_1 = {k: v + 1 for k, v in save_released(unet, nano.lq_encoder).items() if k.startswith(prefixes)}
    assert len(stage_1) == 32
    load_released(unet, nano.lq_encoder, stage_1)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, before[name] + 1 if name.startswith("alignment.") else before[name]), name
    assert unet.alignment.attention == "value"
    assert unet.config.alignment_attention == "value"


def test_everything_wrong_with_a_checkpoint_is_named_at_once_and_nothing_is_loaded(nano):
    tensors = {name: tensor.clone() for name, tensor in save_released(nano.unet, nano.lq_encoder).items()}
    del tensors["conv_in.bias"]
    tensors["denoise_encoder.conv_in.bias"] = torch.zeros(3)
    tensors["surprise.weight"] = torch.zeros(1)
    tensors["conv_out.bias"] = torch.full_like(tensors["conv_out.bias"], 7)
    before = nano.unet.conv_out.bias.clone()
    with pytest.raises(InputError) as refusal:
        load_released(nano.unet, nano.lq_encoder, tensors)
    message = str(refusal.value)
    assert "1 missing: conv_in.bias" in message
    assert "1 unexpected: surprise.weight" in message
    assert "1 misshapen: denoise_encoder.conv_in.bias (3,) instead of (16,)" in message
    assert torch.equal(nano.unet.conv_out.bias, before)


def test_a_file_that_is_not_a_checkpoint_is_refused_in_one_line(tmp_path, nano):
    (tmp_path / "text.bin").write_text("hello")
    (tmp_path / "list.json.bin").write_text(json.dumps([1]))
    torch.save({"a": Fraction(1, 2)}, tmp_path / "code.bin")
    torch.save([torch.zeros(1)], tmp_path / "list.bin")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.bin")
    for name in ("absent.bin", "text.bin", "list.json.bin", "code.bin", "list.bin", "other.bin"):
        with pytest.raises(InputError, match=name):
            load_released(nano.unet, nano.lq_encoder, tmp_path / name)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ({"alignment": "sum"}, "alignment_kind='sum' instead of 'transformer'"),
        ({"features": "last"}, "features='last' instead of 'penultimate'"),
        ({"control": True}, "has_control=True instead of False"),
    ],
)
def test_architectures_that_the_released_layout_cannot_hold_are_refused(architecture, message, nano, tmp_path):
    tensors = save_released(nano.unet, nano.lq_encoder)
    pipe = with_architecture(nano, **architecture)
    for refused in (
        lambda: save_released(pipe.unet, pipe.lq_encoder, tmp_path / "FaithDiff.bin"),
        lambda: load_released(pipe.unet, pipe.lq_encoder, tensors),
    ):
        with pytest.raises(InputError, match=f"{message}.*save_pretrained"):
            refused()
    assert not list(tmp_path.iterdir())
