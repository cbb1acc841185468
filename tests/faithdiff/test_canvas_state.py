"""A restoration put away between two steps and taken up again."""

import numpy as np
import pytest
import torch

from faithdiff.canvas_state import CanvasState, fingerprint_of
from faithdiff.denoiser import advance
from faithdiff.errors import InputError
from faithdiff.request import RestorationRequest
from faithdiff.text import PromptEmbeds

REQUEST = RestorationRequest(scale=1, num_inference_steps=3, tile_px=64, tile_stride_px=32)


@pytest.mark.parametrize("step", [0, 1, 2, 3])
def test_a_restoration_taken_up_again_gives_the_same_bits(step, nano, photograph):
    rgb = photograph(80, 64)
    expected, restoration = nano.prepare(rgb, REQUEST), nano.prepare(rgb, REQUEST)
    for taken in range(3):
        advance(nano.unet, [expected.canvas])
        if taken < step:
            advance(nano.unet, [restoration.canvas])
    state = CanvasState.from_bytes(nano.state(restoration).to_bytes())
    again = nano.prepare(rgb, REQUEST, resume=state)
    assert again.canvas.step == step
    while not again.canvas.is_done:
        advance(nano.unet, [again.canvas])
    assert torch.equal(again.canvas.latents, expected.canvas.latents)
    assert np.array_equal(np.asarray(nano.finish(again).image), np.asarray(nano.finish(expected).image))


def test_equal_states_give_equal_bytes(nano, photograph):
    rgb = photograph(40, 40)
    first, second = (nano.state(nano.prepare(rgb, REQUEST)).to_bytes() for _ in range(2))
    assert first == second


def test_a_state_of_something_else_is_refused(nano, photograph):
    state = nano.state(nano.prepare(photograph(40, 40), REQUEST))
    other = RestorationRequest(scale=1, num_inference_steps=3, tile_px=64, tile_stride_px=32, seed=1)
    for rgb, request in ((photograph(40, 48), REQUEST), (photograph(40, 40), other)):
        with pytest.raises(InputError, match="another picture, request or model"):
            nano.prepare(rgb, request, resume=state)
    late = CanvasState(4, state.latents, state.fingerprint)
    with pytest.raises(InputError, match="step 4 of 3"):
        nano.prepare(photograph(40, 40), REQUEST, resume=late)


@pytest.mark.parametrize(
    "data", [b"", b"not a state", bytes(100), CanvasState(0, torch.zeros(1), "ab").to_bytes()[:-1]]
)
def test_bytes_that_are_no_state_are_refused(data):
    with pytest.raises(InputError, match="no saved restoration"):
        CanvasState.from_bytes(data)


def test_every_setting_and_every_pixel_changes_the_fingerprint():
    rgb = np.zeros((4, 4, 3), np.uint8)
    embeds = PromptEmbeds(torch.zeros(1, 77, 8), torch.zeros(1, 8))
    requests = [
        RestorationRequest(),
        RestorationRequest(seed=1),
        RestorationRequest(prompt="a"),
        RestorationRequest(negative_prompt="a"),
        RestorationRequest(guidance_scale=5.5),
        RestorationRequest(noise=torch.zeros(1, 4, 2, 2)),
        RestorationRequest(noise=torch.ones(1, 4, 2, 2)),
        RestorationRequest(prompt_embeds=embeds),
        RestorationRequest(negative_prompt_embeds=embeds),
    ]
    prints = [fingerprint_of(rgb, request, "v") for request in requests]
    prints += [fingerprint_of(rgb + 1, requests[0], "v"), fingerprint_of(rgb, requests[0], "w")]
    prints += [fingerprint_of(rgb.reshape(2, 8, 3), requests[0], "v")]
    assert len(set(prints)) == len(prints)
    assert fingerprint_of(rgb, RestorationRequest(), "v") == prints[0]
