"""A picture's latents are its own: alone, in company, in any order, in any batch size.

Tolerance: a matrix product over another number of rows may round differently (oneDNN picks another kernel), so results
are compared at 2e-5 of the largest value after all steps, ten times the rounding that was seen; one picture alone
gives the same bits every time.
"""

import numpy as np
import pytest
import torch

from faithdiff.denoiser import BrokenTiles, TileJob, advance, predict_noise, step_tiles, tiles_per_pass
from faithdiff.request import RestorationRequest

TOLERANCE = 2e-5
STEPS = 3


def _canvas(pipe, rgb, **settings):
    settings = {"scale": 1, "num_inference_steps": STEPS, "tile_px": 64, "tile_stride_px": 32, **settings}
    return pipe.prepare(rgb, RestorationRequest(**settings)).canvas


def _run(pipe, *canvases, tiles_per_batch=4):
    while not all(canvas.is_done for canvas in canvases):
        advance(pipe.unet, canvases, tiles_per_batch=tiles_per_batch)
    return [canvas.latents for canvas in canvases]


@pytest.fixture(scope="module")
def crowd(photograph):
    """Requests that differ in size, prompt, seed, guidance and number of steps."""
    return [
        (photograph(96, 128), {"prompt": "a portrait", "seed": 1}),
        (photograph(64, 64), {"prompt": "a face", "seed": 2, "guidance_scale": 7.5}),
        (photograph(120, 72), {"prompt": "", "seed": 3, "num_inference_steps": 5}),
        (photograph(64, 96), {"seed": 4, "guidance_scale": 1.0}),
        (photograph(40, 40), {"seed": 5, "start_from": "noise"}),
    ]


def test_every_picture_of_a_crowd_equals_itself_alone(nano, crowd, rel_error):
    together = _run(nano, *(_canvas(nano, rgb, **settings) for rgb, settings in crowd))
    for (rgb, settings), latents in zip(crowd, together, strict=True):
        alone = _run(nano, _canvas(nano, rgb, **settings))[0]
        assert rel_error(latents, alone) < TOLERANCE


def test_a_permuted_crowd_gives_the_permuted_result(nano, crowd, rel_error):
    forward = _run(nano, *(_canvas(nano, rgb, **settings) for rgb, settings in crowd))
    backward = _run(nano, *(_canvas(nano, rgb, **settings) for rgb, settings in reversed(crowd)))
    for one, other in zip(forward, reversed(backward), strict=True):
        assert rel_error(one, other) < TOLERANCE


@pytest.mark.parametrize("tiles_per_batch", [1, 3, 64])
def test_the_number_of_tiles_per_batch_does_not_matter(tiles_per_batch, nano, crowd, rel_error):
    rgb, settings = crowd[0]
    expected = _run(nano, _canvas(nano, rgb, **settings))[0]
    actual = _run(nano, _canvas(nano, rgb, **settings), tiles_per_batch=tiles_per_batch)[0]
    assert rel_error(actual, expected) < TOLERANCE


def test_tiles_may_be_stepped_in_any_order_and_in_parts(nano, crowd, rel_error):
    rgb, settings = crowd[0]
    expected = _run(nano, _canvas(nano, rgb, **settings))[0]
    canvas = _canvas(nano, rgb, **settings)
    order = np.random.default_rng(0)
    while not canvas.is_done:
        tiles = order.permutation(canvas.pending_tiles())
        for part in np.array_split(tiles, 2):
            step_tiles(nano.unet, [TileJob(canvas, int(tile)) for tile in part])
        canvas.finish_step()
    assert rel_error(canvas.latents, expected) < TOLERANCE


def test_the_same_picture_twice_gives_the_same_bits(nano, crowd):
    rgb, settings = crowd[0]
    first, second = (_run(nano, _canvas(nano, rgb, **settings))[0] for _ in range(2))
    assert torch.equal(first, second)


def test_pictures_join_and_leave_between_steps(nano, crowd, rel_error):
    (rgb, settings), (other_rgb, other_settings) = crowd[0], crowd[1]
    expected = _run(nano, _canvas(nano, rgb, **settings))[0]
    early, late = _canvas(nano, other_rgb, **other_settings), _canvas(nano, rgb, **settings)
    advance(nano.unet, [early])
    advance(nano.unet, [early, late])
    assert (early.step, late.step) == (2, 1)
    assert rel_error(_run(nano, late)[0], expected) < TOLERANCE


def test_tiled_equals_whole_where_the_picture_fits_one_tile(nano, photograph):
    rgb = photograph(64, 64)
    whole = _run(nano, _canvas(nano, rgb, tile_px=1024, tile_stride_px=None))[0]
    one_tile = _canvas(nano, rgb, tile_px=1024, tile_stride_px=8)
    assert one_tile.plan.num_tiles == 1
    assert torch.equal(_run(nano, one_tile)[0], whole)


def test_guidance_of_one_and_below_predicts_with_the_prompt_alone(nano, photograph, rel_error):
    """The limit g -> 1 of u + g (t - u) is t: just above one and at one must agree, at half the rows."""
    rgb = photograph(64, 64)
    at_one = _canvas(nano, rgb, guidance_scale=1.0, prompt="a portrait")
    above = _canvas(nano, rgb, guidance_scale=1.0 + 1e-6, prompt="a portrait", negative_prompt="noise")
    below = _canvas(nano, rgb, guidance_scale=0.5, prompt="a portrait")
    assert (at_one.condition.num_prompts, above.condition.num_prompts, below.condition.num_prompts) == (1, 2, 1)
    expected = _run(nano, at_one)[0]
    assert rel_error(_run(nano, above)[0], expected) < 1e-4
    assert torch.equal(_run(nano, below)[0], expected)


def test_a_tile_that_is_not_finite_in_half_precision_is_redone_in_fp32(nano, photograph, rel_error):
    """A weight that overflows fp16 in the middle of the network: the picture comes out as fp32 computes it."""
    from faithdiff.pipeline import FaithDiffPipeline

    pipe = FaithDiffPipeline(**nano.components)
    unet = type(nano.unet).from_config(nano.unet.config)
    unet.load_state_dict(nano.unet.state_dict())
    with torch.no_grad():
        unet.mid_block.resnets[0].conv2.weight.mul_(1e5)
    pipe.unet = unet.eval()
    rgb = photograph(64, 64)
    expected = _run(pipe, _canvas(pipe, rgb))[0]
    pipe.unet = unet.half()
    canvas = _canvas(pipe, rgb)
    with torch.no_grad():
        assert not torch.isfinite(predict_noise(unet, [TileJob(canvas, 0)], [canvas.prepared])).all()
    actual = _run(pipe, canvas)[0]
    assert unet.dtype == torch.float16
    assert torch.isfinite(actual).all()
    assert rel_error(actual, expected) < 2e-2


def test_broken_weights_are_reported_and_never_returned(nano, photograph):
    unet = type(nano.unet).from_config(nano.unet.config)
    unet.load_state_dict(nano.unet.state_dict())
    with torch.no_grad():
        unet.conv_out.bias.fill_(float("nan"))
    canvas = _canvas(nano, photograph(64, 64))
    with pytest.raises(FloatingPointError, match="tile 0 is not finite at step 0"):
        advance(unet.eval(), [canvas])


def _bits(pipe, canvases):
    while not all(canvas.is_done for canvas in canvases):
        advance(pipe.unet, canvases)
    return [canvas.latents for canvas in canvases]


def test_with_the_fixed_number_of_tiles_per_pass_company_changes_no_bit(nano, crowd):
    together = _bits(nano, [_canvas(nano, rgb, **settings) for rgb, settings in crowd])
    for (rgb, settings), latents in zip(crowd, together, strict=True):
        assert torch.equal(latents, _bits(nano, [_canvas(nano, rgb, **settings)])[0])


@pytest.mark.parametrize("fixed", [2, 8])
def test_passes_filled_up_with_copies_change_no_bit_either(fixed, nano, crowd, monkeypatch):
    """What an accelerator does: as many rows in every pass, whoever they belong to."""
    seen = []
    monkeypatch.setattr("faithdiff.denoiser.tiles_per_pass", lambda tile, device: fixed)
    monkeypatch.setattr(
        "faithdiff.denoiser.predict_noise",
        lambda unet, jobs, prepared: seen.append(len(jobs)) or predict_noise(unet, jobs, prepared),
    )
    crowd = [(rgb, {**settings, "num_inference_steps": 2}) for rgb, settings in crowd[:3]]
    together = _bits(nano, [_canvas(nano, rgb, **settings) for rgb, settings in crowd])
    for (rgb, settings), latents in zip(crowd, together, strict=True):
        assert torch.equal(latents, _bits(nano, [_canvas(nano, rgb, **settings)])[0])
    assert set(seen) == {fixed}


@pytest.mark.parametrize(
    ("tile_px", "device", "expected"),
    [(1024, "cpu", 1), (64, "cpu", 1), (1024, "cuda", 1), (2048, "cuda", 1), (512, "cuda", 4), (64, "cuda", 8)],
)
def test_tiles_per_pass_depend_on_shape_and_kind_of_device_alone(tile_px, device, expected):
    assert tiles_per_pass((tile_px // 8, tile_px // 8), torch.device(device)) == expected


def test_broken_tiles_take_no_step_and_the_others_of_their_batch_do(nano, photograph):
    whole = _canvas(nano, photograph(64, 64))
    broken = _canvas(nano, photograph(64, 64), noise=torch.full((1, 4, 8, 8), float("nan")))
    with pytest.raises(BrokenTiles, match="tile 0 is not finite at step 0") as failure:
        step_tiles(nano.unet, [TileJob(broken, 0), TileJob(whole, 0)])
    assert [job.canvas for job in failure.value.jobs] == [broken]
    assert (broken.pending_tiles(), whole.pending_tiles()) == ([0], [])


def test_a_failure_in_the_middle_takes_back_what_was_not_checked_yet(nano, photograph, monkeypatch):
    canvas = _canvas(nano, photograph(64, 128))
    calls = []

    def fail_second(unet, jobs, prepared):
        calls.append(jobs)
        if len(calls) == 2:
            raise MemoryError
        return predict_noise(unet, jobs, prepared)

    monkeypatch.setattr("faithdiff.denoiser.predict_noise", fail_second)
    tiles = canvas.pending_tiles()
    with pytest.raises(MemoryError):
        step_tiles(nano.unet, [TileJob(canvas, tile) for tile in tiles])
    assert canvas.pending_tiles() == tiles
