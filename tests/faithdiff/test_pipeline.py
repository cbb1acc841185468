import numpy as np
import pytest
import torch
from PIL import Image

from faithdiff.compat import RELEASED, Switches
from faithdiff.denoiser import advance
from faithdiff.errors import Cancelled, InputError
from faithdiff.request import RestorationRequest

QUICK = {"num_inference_steps": 2, "tile_px": 64}


@pytest.mark.parametrize(
    ("case_name", "prefix", "image", "noise"),
    [
        ("case03_pipeline_single_tile", "noise_", "image_u8", "noise"),
        ("case04_pipeline_tiled", "a_", "a_image_u8", "a_noise"),
    ],
)
def test_whole_runs_equal_the_released_code(
    case_name, prefix, image, noise, golden, golden_pipeline, golden_text, rel_error
):
    case = golden(case_name)
    request = RestorationRequest(
        scale=1,
        num_inference_steps=4,
        start_from="noise",
        tile_px=128,
        tile_stride_px=64,
        noise=case[noise],
        switches=RELEASED,
        **golden_text,
    )
    canvas = golden_pipeline.prepare(case[image].numpy(), request).canvas
    assert torch.equal(canvas.condition.time_ids, case[f"{prefix}time_ids"][: canvas.plan.num_tiles])
    assert rel_error(canvas.latents, case[f"{prefix}start_latents"]) < 1e-6
    for step in range(4):
        advance(golden_pipeline.unet, [canvas])
        assert rel_error(canvas.latents, case[f"{prefix}step{step}"]) < 1e-4


def test_the_released_lq_start_keeps_seven_percent_of_the_picture_and_ours_all(nano, photograph):
    """x_0's weight is what the start latents gain per x_0; the noise is the same."""
    rgb = photograph(64, 64)
    x0 = torch.randn(1, 4, 8, 8)

    def start(compat, latents):
        request = RestorationRequest(scale=1, num_inference_steps=20, lq_latents=latents, switches=compat)
        return nano.prepare(rgb, request).canvas.latents

    for compat, weight in ((RELEASED, 0.06826), (Switches(), 1.0)):
        gained = start(compat, x0) - start(compat, torch.zeros_like(x0))
        assert torch.allclose(gained, weight * x0, atol=1e-4)


@pytest.mark.parametrize(("width", "height", "scale"), [(33, 17, 4), (1, 1, 4), (5, 90, 2), (64, 64, 1), (47, 61, 3)])
def test_the_result_is_exactly_scale_times_the_input(width, height, scale, nano, photograph):
    result = nano(photograph(height, width), scale, "a photo", **QUICK)
    assert result.image.size == (width * scale, height * scale)
    assert result.image.mode == "RGB"
    assert result.report["size_px"] == [width * scale, height * scale]


def test_the_same_request_gives_the_same_picture_and_another_seed_another(nano, photograph):
    rgb = photograph(32, 32)
    first, again, other = (np.asarray(nano(rgb, 2, seed=seed, **QUICK).image) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_pil_images_of_any_mode_equal_their_rgb_array(nano, photograph):
    image = Image.fromarray(photograph(24, 24)).convert("L")
    from_pil = nano(image, 1, **QUICK).image
    from_array = nano(np.asarray(image.convert("RGB")), 1, **QUICK).image
    assert np.array_equal(np.asarray(from_pil), np.asarray(from_array))


def test_released_compatibility_changes_the_picture_and_unknown_ones_are_refused(nano, photograph):
    rgb = photograph(48, 40)
    ours, released = (np.asarray(nano(rgb, 2, compat=compat, **QUICK).image) for compat in (None, "released"))
    assert not np.array_equal(ours, released)
    with pytest.raises(InputError, match="'relesed'"):
        nano(rgb, compat="relesed")


def test_a_large_picture_passes_the_vae_in_parts_with_the_same_result(nano, photograph):
    rgb = photograph(40, 700)
    whole, *parts = (
        np.asarray(nano(rgb, 1, vae_tile_px=size, num_inference_steps=1, color_fix="none").image).astype(int)
        for size in (1024, 512, 64)
    )
    assert max(abs(whole - part).max() for part in parts) <= 1


@pytest.mark.parametrize(("tiling", "least_px"), [("exact", 64), ("released", 512)])
def test_a_part_for_the_vae_has_a_least_size(tiling, least_px):
    switches = Switches(vae_tiling=tiling)
    for wrong_px in (least_px - 64, least_px + 32):
        with pytest.raises(InputError, match=f"vae_tile_px is {wrong_px}; .* multiple of 64, at least {least_px}"):
            RestorationRequest(vae_tile_px=wrong_px, switches=switches)


def test_a_callback_sees_every_step_with_a_picture_and_may_cancel(nano, photograph):
    seen = []

    def callback(step, num_steps, preview):
        seen.append((step, num_steps, preview.size))
        return step < 2

    with pytest.raises(Cancelled, match="after step 2 of 3"):
        nano(photograph(40, 80), 1, num_inference_steps=3, callback=callback)
    assert seen == [(1, 3, (80, 40)), (2, 3, (80, 40))]


def test_the_report_says_what_was_done(nano, photograph):
    report = nano(photograph(24, 40), 4, seed=3, **QUICK).report
    assert report["model_version"] == "nano"
    assert (report["steps"], report["tiles"], report["seed"]) == (2, 8, 3)
    assert set(report["seconds"]) == {"upscale", "text", "encode", "denoise", "decode", "color_fix"}
    assert report["consistency_psnr_db"] > 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"scale": 0}, "scale is 0"),
        ({"scale": 17}, "1 to 16"),
        ({"scale": 2.5}, "whole number"),
        ({"num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"start_from": "lr"}, "lq, noise"),
        ({"color_fix": "ycc"}, "adain, wavelet, none"),
        ({"tile_px": 100}, "multiple of 8"),
        ({"tile_px": (128, 128, 3)}, "height, width"),
        ({"tile_px": 128, "tile_stride_px": 136}, "from 8 to tile_px = 128"),
        ({"noise": torch.zeros(1, 4, 2, 2)}, r"noise has shape \[1, 4, 2, 2\]"),
        ({"prompt": None}, "must be text"),
    ],
)
def test_a_setting_out_of_range_is_refused_before_any_work(setting, message, nano, photograph):
    with pytest.raises(InputError, match=message):
        nano(photograph(16, 16), **{"num_inference_steps": 1, **setting})


@pytest.mark.parametrize(
    "picture", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3), np.float32), np.zeros((0, 4, 3), np.uint8), "a"]
)
def test_what_is_not_a_picture_is_refused(picture, nano):
    with pytest.raises(InputError, match="picture: got"):
        nano(picture)


@pytest.mark.parametrize("color_fix", ["adain", "wavelet"])
def test_sixteen_bits_go_through_and_are_those_of_eight_bits_refined(nano, photograph, color_fix):
    eight = photograph(40, 48)
    sixteen = eight.astype(np.uint16) * 257  # the same levels
    coarse = nano(eight, scale=1, **QUICK, color_fix=color_fix)
    fine = nano(sixteen, scale=1, **QUICK, color_fix=color_fix)
    assert (coarse.array.dtype, fine.array.dtype) == (np.uint8, np.uint16)
    assert len(np.unique(fine.array)) > 256
    # With 8 bits the decoded picture is rounded before its colours are matched, which stretches what was rounded away.
    difference = np.abs(np.asarray(fine.image).astype(int) - coarse.array.astype(int))
    assert difference.max() <= 3
    assert difference.mean() < 0.5
    enlarged = nano(sixteen, scale=2, **QUICK)
    assert (enlarged.array.shape, enlarged.array.dtype) == ((80, 96, 3), np.uint16)
