"""Breaks: where long computations pause, and where they must not."""

import threading

import pytest
import torch

from faithdiff.breaks import breaks, no_breaks, take_break
from faithdiff.errors import Cancelled
from faithdiff.precision import as_float32
from faithdiff.request import RestorationRequest

BANDED = RestorationRequest(scale=1, num_inference_steps=1, tile_px=256, vae_tile_px=512)


def test_a_break_outside_of_the_block_does_nothing_and_other_threads_have_their_own():
    taken = []
    take_break()
    with breaks(lambda: taken.append(threading.current_thread().name)):
        take_break()
        thread = threading.Thread(target=take_break)
        thread.start()
        thread.join()
        with no_breaks():
            take_break()
        take_break()
    take_break()
    assert taken == [threading.current_thread().name] * 2


def test_encoding_and_decoding_a_large_picture_pause_often_and_change_nothing(nano, photograph):
    rgb = photograph(48, 528)
    expected = nano.prepare(rgb, BANDED)
    taken = []
    with breaks(lambda: taken.append("encode")):
        paused = nano.prepare(rgb, BANDED)
    assert torch.equal(paused.canvas.latents, expected.canvas.latents)
    paused.canvas.step = 1
    with breaks(lambda: taken.append("decode")):
        nano.decode(paused)
    assert taken.count("encode") >= 50
    assert taken.count("decode") >= 50


def test_what_a_break_raises_ends_the_computation(nano, photograph):
    left = 10

    def cancel():
        nonlocal left
        left -= 1
        if left == 0:
            raise Cancelled("enough")

    with pytest.raises(Cancelled), breaks(cancel):
        nano.prepare(photograph(48, 528), BANDED)
    assert left == 0


def test_nothing_pauses_while_a_model_is_in_another_precision():
    taken = []
    module = torch.nn.Linear(2, 2).half()
    with breaks(lambda: taken.append(next(module.parameters()).dtype)), as_float32(module):
        take_break()
    assert taken == []
