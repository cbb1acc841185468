"""The LQ encoder against the released one's tensors, and against the VAE it is cut from."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL

from faithdiff.encoder import LQEncoder
from faithdiff.errors import InputError

TOLERANCE = 5e-5


@pytest.fixture(scope="module")
def full_size(fill_recipe):
    return fill_recipe(LQEncoder(), "denoise_encoder.").eval()


@pytest.fixture(scope="module")
def small_vae():
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        sample_size=64,
    ).eval()


@pytest.fixture(scope="module")
def small(small_vae):
    return LQEncoder.from_vae(small_vae).eval()


def picture(height, width, batch=1, seed=0):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_features_equal_the_released_ones(full_size, golden, rel_error):
    case = golden("case01_lq_encoder")
    with torch.no_grad():
        assert rel_error(full_size(case["image_64x64"]), case["feat_64x64"]) < TOLERANCE


def test_every_stage_equals_the_released_one(full_size, golden, rel_error):
    case = golden("case01_lq_encoder")
    with torch.no_grad():
        x = full_size.conv_in(case["image_64x64"])
        stages = {"conv_in": x}
        for i, block in enumerate(full_size.down_blocks):
            x = block(x)
            stages[f"down{i}"] = x
    errors = {name: rel_error(x[:, :8], case[f"stage_{name}_64x64"]) for name, x in stages.items()}
    assert len(errors) == 5
    assert max(errors.values()) < TOLERANCE, errors


def test_names_shapes_and_counts_are_the_released_ones(golden):
    listed = golden("faithdiff_full_keys").about["keys"]
    prefix = "denoise_encoder."
    released = {k.removeprefix(prefix): tuple(v) for k, v in listed.items() if k.startswith(prefix)}
    with torch.device("meta"):
        ours = {k: tuple(v.shape) for k, v in LQEncoder().state_dict().items()}
    assert ours == released
    assert len(ours) == 102
    assert sum(torch.Size(shape).numel() for shape in ours.values()) == 34_125_696


def test_from_vae_is_the_vae_encoder_before_its_final_norm(small, small_vae):
    lq = picture(40, 64)
    seen = []
    hook = small_vae.encoder.conv_norm_out.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        small_vae.encode(lq)
        hook.remove()
        assert torch.equal(small(lq), seen[0])


def test_from_vae_copies_the_weights(small_vae):
    encoder = LQEncoder.from_vae(small_vae)
    before = small_vae.encoder.conv_in.weight.clone()
    with torch.no_grad():
        encoder.conv_in.weight.zero_()
    assert torch.equal(small_vae.encoder.conv_in.weight, before)


def test_from_vae_keeps_the_dtype(small_vae):
    half = AutoencoderKL.from_config(small_vae.config).to(torch.bfloat16)
    assert LQEncoder.from_vae(half).dtype == torch.bfloat16


def test_saved_and_loaded_encoder_gives_the_same_features(small, tmp_path):
    small.save_pretrained(tmp_path)
    assert (tmp_path / "diffusion_pytorch_model.safetensors").is_file()
    loaded = LQEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(picture(32, 32)), small(picture(32, 32)))


def gradients(encoder, lq):
    encoder.zero_grad()
    encoder(lq).square().mean().backward()
    return [p.grad.clone() for p in encoder.parameters()]


def test_gradient_checkpointing_changes_no_gradient_and_recomputes_each_block_once(small_vae):
    encoder = LQEncoder.from_vae(small_vae).train()
    plain = gradients(encoder, picture(32, 32))
    runs = []
    # Starts are counted, not ends: recomputing stops as soon as the last needed activation is there.
    layers = [block.resnets[0] for block in [*encoder.down_blocks, encoder.mid_block]]
    for layer in layers:
        layer.register_forward_pre_hook(lambda module, args: runs.append(module))
    encoder.enable_gradient_checkpointing()
    assert encoder.is_gradient_checkpointing
    for ours, theirs in zip(gradients(encoder, picture(32, 32)), plain, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [runs.count(layer) for layer in layers] == [2] * len(layers)


def test_gradient_checkpointing_is_off_in_eval_mode(small_vae):
    encoder = LQEncoder.from_vae(small_vae).eval()
    encoder.enable_gradient_checkpointing()
    runs = []
    encoder.down_blocks[0].resnets[0].register_forward_hook(lambda module, args, out: runs.append(module))
    gradients(encoder, picture(32, 32))
    assert len(runs) == 1


@pytest.mark.parametrize("shape", [(1, 3, 36, 64), (1, 3, 64, 63), (1, 3, 0, 64)])
def test_sizes_off_the_grid_are_refused_with_the_size_and_the_remedy(small, shape):
    with pytest.raises(InputError, match=rf"{shape[3]}x{shape[2]} px.*multiples of 8.*pad"):
        small(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 4, 64, 64)])
def test_tensors_that_are_no_batch_of_rgb_are_refused(small, shape):
    with pytest.raises(InputError, match=r"must be \[B, 3, H, W\]"):
        small(torch.zeros(shape))


def test_channels_that_the_norm_groups_do_not_divide_are_refused():
    with pytest.raises(InputError, match="norm_num_groups=32"):
        LQEncoder(block_out_channels=(24, 48))


def test_pictures_that_fit_go_whole(small):
    lq = picture(64, 48)
    with torch.no_grad():
        assert torch.equal(small.encode(lq, tile_px=64), small(lq))


@pytest.mark.parametrize(("height", "width", "tile_px"), [(72, 40, 64), (40, 200, 32), (136, 136, 24), (16, 8, 8)])
def test_exact_parts_equal_the_whole_picture(small, rel_error, height, width, tile_px):
    lq = picture(height, width, batch=2)
    with torch.no_grad():
        assert rel_error(small.encode(lq, tile_px=tile_px), small(lq)) < 2e-5  # measured: 2e-6


def test_exact_parts_equal_the_whole_picture_at_full_size(full_size, rel_error):
    lq = picture(96, 64)
    with torch.no_grad():
        assert rel_error(full_size.encode(lq, tile_px=40), full_size(lq)) < TOLERANCE


def released_tiles_slowly(encoder, lq, tile_px):
    """Each output cell on its own: which tile owns it, and which earlier tiles it fades from (spec 2.6)."""
    blend = tile_px // 8 // 4
    keep = tile_px // 8 - blend
    rows = range(0, lq.shape[2], tile_px * 3 // 4)
    columns = range(0, lq.shape[3], tile_px * 3 // 4)
    tiles = {(y, x): encoder(lq[:, :, y : y + tile_px, x : x + tile_px]) for y in rows for x in columns}
    blended = {}
    for y in rows:
        for x in columns:
            tile = tiles[y, x].clone()
            above, left = blended.get((y - tile_px * 3 // 4, x)), blended.get((y, x - tile_px * 3 // 4))
            if above is not None:
                extent = min(blend, tile.shape[2], above.shape[2])
                for i in range(extent):
                    tile[:, :, i] = above[:, :, i - extent] * (1 - i / extent) + tile[:, :, i] * (i / extent)
            if left is not None:
                extent = min(blend, tile.shape[3], left.shape[3])
                for i in range(extent):
                    tile[..., i] = left[..., i - extent] * (1 - i / extent) + tile[..., i] * (i / extent)
            blended[y, x] = tile
    out = torch.full((1, encoder.out_channels, lq.shape[2] // 8, lq.shape[3] // 8), torch.nan)
    for i in range(out.shape[2]):
        for j in range(out.shape[3]):
            y, x = i // keep * (tile_px * 3 // 4), j // keep * (tile_px * 3 // 4)
            out[0, :, i, j] = blended[y, x][0, :, i % keep, j % keep]
    return out


@pytest.mark.parametrize(("height", "width", "tile_px"), [(96, 160, 64), (104, 56, 64), (200, 72, 96), (32, 40, 32)])
def test_released_tiles_are_those_of_the_specification(small, rel_error, height, width, tile_px):
    lq = picture(height, width)
    with torch.no_grad():
        expected = released_tiles_slowly(small, lq, tile_px)
    actual = small.encode(lq, tile_px=tile_px, tiling="released")
    assert rel_error(actual, expected) < 1e-6


def test_released_tiles_have_the_size_of_the_picture_at_any_tile_size(small):
    # The released code returned 112x112 features of a 768 px picture with 512 px tiles (specification 2.10, 7).
    assert small.encode(picture(192, 192), tile_px=128, tiling="released").shape[2:] == (24, 24)


def test_released_tiles_start_above_an_eighth_of_the_tile(small):
    # The released code compares pixels with the size of a tile in latents (specification 2.10, 6).
    with torch.no_grad():
        whole = small(picture(128, 128))
    assert torch.equal(small.encode(picture(128, 128), tile_px=1024, tiling="released"), whole)
    assert not torch.allclose(small.encode(picture(128, 128), tile_px=128, tiling="released"), whole, rtol=1e-3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tiling": "none"}, '"exact" or "released"'),
        ({"tile_px": 0}, "tile_px positive"),
        ({"tiling": "released", "tile_px": 40}, "multiple of 32"),
    ],
)
def test_settings_of_the_tiling_that_cannot_be_used_are_refused(small, settings, message):
    with pytest.raises(InputError, match=message):
        small.encode(picture(48, 48), **settings)


@pytest.fixture(scope="module")
def last(small_vae):
    with torch.no_grad():
        small_vae.encoder.conv_norm_out.weight.add_(0.3)  # ones would hide a forgotten scale
    return LQEncoder.from_vae(small_vae, features="last").eval()


@torch.no_grad()
def test_last_features_are_the_scaled_mean_of_the_posterior(last, small_vae, rel_error):
    lq = picture(40, 64, batch=2)
    expected = small_vae.encode(lq).latent_dist.mean * small_vae.config.scaling_factor
    assert last.out_channels == small_vae.config.latent_channels == 4
    assert rel_error(last(lq), expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize(("height", "width", "tile_px"), [(72, 40, 64), (40, 200, 32), (16, 8, 8)])
def test_exact_parts_give_the_last_features_of_the_whole_picture(last, rel_error, height, width, tile_px):
    lq = picture(height, width, batch=2)
    assert rel_error(last.encode(lq, tile_px=tile_px), last(lq)) < 2e-5


@torch.no_grad()
def test_released_tiles_give_last_features_too(last, rel_error):
    lq = picture(96, 160)
    assert rel_error(last.encode(lq, tile_px=64, tiling="released"), released_tiles_slowly(last, lq, 64)) < 1e-6


def test_every_weight_of_the_last_features_gets_a_gradient(small_vae):
    encoder = LQEncoder.from_vae(small_vae, features="last").train()
    plain = gradients(encoder, picture(32, 32))
    assert all(gradient.abs().max() > 0 for gradient in plain)
    encoder.enable_gradient_checkpointing()
    for ours, theirs in zip(gradients(encoder, picture(32, 32)), plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_encoder_of_last_features_is_saved_as_one(last, tmp_path):
    last.save_pretrained(tmp_path)
    loaded = LQEncoder.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(loaded(picture(32, 32)), last(picture(32, 32)))


def test_features_that_cannot_be_had_are_refused(small_vae):
    with pytest.raises(InputError, match=r"'first'.*penultimate, last"):
        LQEncoder(features="first")
    vae = AutoencoderKL.from_config(small_vae.config, use_quant_conv=False)
    with pytest.raises(InputError, match="without quant_conv"):
        LQEncoder.from_vae(vae, features="last")
