"""Encodings: they are what training computes, depend on their sample alone, and survive the way through a file."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from faithdiff.bundle import load_encoders
from faithdiff.encodings import Encoding, FrozenEncoders, encoder_digests, weights_digest
from faithdiff.errors import InputError
from faithdiff.text import encode_prompts


@pytest.fixture(scope="module")
def encoders() -> FrozenEncoders:
    return FrozenEncoders(load_encoders("nano"), dtype=torch.float32, device="cpu")


def picture(seed: int, side_px: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)


def test_an_encoding_holds_the_posteriors_of_picture_and_mirror_image_and_the_text(encoders) -> None:
    hq = picture(0)
    encoding = encoders.encode(hq, "a red house")
    for index, seen in enumerate((hq, hq[:, ::-1])):
        pixels = torch.from_numpy(seen.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1.0
        with torch.no_grad():
            posterior = encoders.vae.encode(pixels).latent_dist
        torch.testing.assert_close(encoding.mean[index], posterior.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(encoding.std[index], posterior.std[0], rtol=1e-4, atol=1e-5)
    text = encode_prompts("a red house", *encoders.tokenizers, *encoders.text_encoders)
    assert torch.equal(encoding.prompt_embeds, text.prompt_embeds[0])
    assert torch.equal(encoding.pooled_prompt_embeds, text.pooled_prompt_embeds[0])
    assert (encoding.mean[1] - encoding.mean[0].flip(-1)).abs().max() > 1e-3, "a flipped latent would have done"


def test_an_encoding_is_the_same_file_on_any_number_of_threads(encoders) -> None:
    threads, files = torch.get_num_threads(), set()
    for number in (1, 2):
        torch.set_num_threads(number)
        files.add(encoders.encode(picture(1), "a boat").to_bytes())
        assert torch.get_num_threads() == number
    torch.set_num_threads(threads)
    assert len(files) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_gives_back_the_encoding_bit_for_bit(encoders, dtype: torch.dtype) -> None:
    made = FrozenEncoders(load_encoders("nano"), dtype=dtype, device="cpu").encode(picture(2, 32), "a tree")
    read = Encoding.from_bytes(made.to_bytes())
    assert read.digests == made.digests == encoders.digests, "rounded text encoders have the digest of what was loaded"
    assert read.mean.dtype == read.std.dtype == torch.float32
    assert read.prompt_embeds is not None
    assert read.prompt_embeds.dtype == dtype
    for name in ("mean", "std", "prompt_embeds", "pooled_prompt_embeds"):
        assert torch.equal(getattr(read, name), getattr(made, name))


def test_without_text_a_file_holds_latents_alone() -> None:
    encoders = FrozenEncoders(load_encoders("nano"), dtype=torch.float32, device="cpu", text=False)
    encoding = Encoding.from_bytes(encoders.encode(picture(3, 32), "ignored").to_bytes())
    assert encoding.prompt_embeds is None
    assert encoding.pooled_prompt_embeds is None
    assert encoding.digests.text == ""


def test_what_is_no_encoding_is_refused(encoders) -> None:
    data = encoders.encode(picture(4, 32), "a lake").to_bytes()
    for wrong in (b"", b"no safetensors", data[:-8], data.replace(b'"faithdiff"', b'"something"')):
        with pytest.raises(InputError, match="no file of the encode stage"):
            Encoding.from_bytes(wrong)


def test_weights_that_give_no_finite_numbers_are_refused() -> None:
    components = load_encoders("nano")
    components["vae"].quant_conv.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="not finite"):
        FrozenEncoders(components, dtype=torch.float32, device="cpu").encode(picture(5, 32), "a dog")


def test_the_digest_of_weights_knows_every_value_and_name_but_not_how_they_were_stored() -> None:
    def layer(**changes: Any) -> torch.nn.Module:
        module = torch.nn.Linear(3, 3)
        torch.nn.init.constant_(module.weight, changes.get("weight", 0.5))
        torch.nn.init.constant_(module.bias, changes.get("bias", 0.25))
        return module

    digest = weights_digest(layer())
    assert weights_digest(layer().half()) == weights_digest(layer().bfloat16()) == digest
    others = [weights_digest(layer(weight=0.75)), weights_digest(layer(bias=0.5)), weights_digest(layer(), layer())]
    others += [weights_digest(torch.nn.Sequential(layer()))]
    assert len({digest, *others}) == 5


def test_digests_of_a_model_survive_saving_it(nano, tmp_path) -> None:
    nano.save_pretrained(tmp_path / "model")
    saved = encoder_digests(load_encoders(tmp_path / "model"))
    assert saved == encoder_digests(nano.components)
    assert saved.vae != saved.text
