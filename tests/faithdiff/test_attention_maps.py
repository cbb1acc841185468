import math

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention
from PIL import Image

from faithdiff.attention_maps import attention_shares, on_grid, overlay, record_attention, recording, word_positions
from faithdiff.errors import InputError
from faithdiff.prepared_text import PreparedText, PreparedTextAttnProcessor, prepare_text
from faithdiff.request import RestorationRequest
from faithdiff.text import encode_prompts

PROMPT = "a cat on a wall, another cat"
SETTINGS = {"scale": 1, "num_inference_steps": 2, "tile_px": 64, "tile_stride_px": 32, "seed": 3}


@pytest.fixture(scope="module")
def recorded(nano, photograph):
    """A picture of several tiles under guidance: result, maps, and the steps that were told."""
    request, told = RestorationRequest(prompt=PROMPT, **SETTINGS), []
    return *record_attention(nano, photograph(96, 80), request, lambda step, of: told.append((step, of))), told


def test_recording_changes_no_bit_of_the_picture_and_leaves_the_model_as_it_was(nano, photograph, recorded):
    plain = nano(photograph(96, 80), prompt=PROMPT, **SETTINGS)
    assert np.array_equal(np.asarray(plain.image), np.asarray(recorded[0].image))
    cross = [m for name, m in nano.unet.named_modules() if name.endswith("attn2")]
    assert {type(attn.processor) for attn in cross} == {PreparedTextAttnProcessor}


def test_the_model_has_its_own_processors_again_after_an_error(nano):
    processors = [m.processor for m in nano.unet.modules() if isinstance(m, Attention)]
    with pytest.raises(KeyboardInterrupt), recording(nano.unet, recorder=None):
        raise KeyboardInterrupt
    after = [m.processor for m in nano.unet.modules() if isinstance(m, Attention)]
    assert all(before is now for before, now in zip(processors, after, strict=True))


def test_the_shares_of_all_tokens_add_up_to_one_in_every_cell(recorded):
    tokens = recorded[1].token_shares
    assert tokens.shape == (77, 12, 10)
    assert tokens.min() >= 0
    assert torch.allclose(tokens.sum(dim=0), torch.ones(12, 10), atol=1e-5)


def test_a_word_has_the_sum_of_its_tokens_and_all_words_with_the_rest_add_up_to_one(nano, recorded):
    maps = recorded[1]
    cat = word_positions(PROMPT, "cat", nano.tokenizer)
    assert len(cat) == 4, "two tokens, twice"
    assert torch.equal(maps.of_word("cat"), maps.token_shares[cat].sum(dim=0))
    words = ["a", "cat", "on", "wall", ",", "another"]
    named = sum(maps.of_word(word) for word in words)
    num_tokens = len(nano.tokenizer(PROMPT).input_ids)
    rest = maps.token_shares[0] + maps.token_shares[num_tokens - 1 :].sum(dim=0)
    assert torch.allclose(named + rest, torch.ones(12, 10), atol=1e-5)


def test_attention_lies_where_queries_and_keys_agree():
    """Places of the left half ask for what token 3 answers to, those of the right half for token 5."""
    attn = Attention(query_dim=4, cross_attention_dim=4, heads=1, dim_head=4)
    attn.to_q.weight.data = torch.eye(4)
    left, right = 20 * torch.eye(4)[0], 20 * torch.eye(4)[1]
    hidden_states = torch.stack([torch.stack([left, left, right, right])] * 3).view(1, 12, 4)
    key = torch.zeros(1, 1, 77, 4)
    key[0, 0, 3], key[0, 0, 5] = left, right
    shares = attention_shares(attn, 0, hidden_states, PreparedText(((key, key),)), row=0)
    maps = on_grid(shares, (3, 4))
    assert torch.allclose(maps[3], torch.tensor([[1.0, 1, 0, 0]] * 3), atol=1e-6)
    assert torch.allclose(maps[5], torch.tensor([[0.0, 0, 1, 1]] * 3), atol=1e-6)


def test_the_shares_are_diffusers_own_attention_scores(nano):
    """`Attention.get_attention_scores` is what diffusers' plain processors multiply the values with."""
    attn = next(m for n, m in nano.unet.named_modules() if n.endswith("attn2"))
    assert isinstance(attn.processor, PreparedTextAttnProcessor)
    names = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    embeds = encode_prompts(["", PROMPT], *(getattr(nano, name) for name in names)).prompt_embeds
    hidden_states = torch.randn(2, 16, attn.to_q.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        text = prepare_text(nano.unet, embeds)
        ours = attention_shares(attn, attn.processor.layer, hidden_states[1:], text, row=1)
        query, key = (attn.head_to_batch_dim(x) for x in (attn.to_q(hidden_states[1:]), attn.to_k(embeds[1:])))
        theirs = attn.get_attention_scores(query, key).mean(dim=0)
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("tile", [(8, 8), (9, 7), (1, 5)])
def test_coarse_layers_are_enlarged_to_the_cells_of_a_tile_of_any_size(tile):
    for halvings in range(3):
        height, width = (math.ceil(side / 2**halvings) for side in tile)
        maps = on_grid(torch.full((height * width, 77), 1 / 77), tile)
        assert maps.shape == (77, *tile)
        assert torch.allclose(maps, torch.full_like(maps, 1 / 77))


def test_it_is_the_positive_prompt_whose_attention_is_kept(nano, photograph, recorded):
    """Without guidance there is no other prompt; one step sees the same latents, so the maps must be the same."""
    one_step = {**SETTINGS, "num_inference_steps": 1}
    lq = photograph(64, 64)

    def maps(guidance_scale, prompt, negative_prompt):
        request = RestorationRequest(
            prompt=prompt, negative_prompt=negative_prompt, guidance_scale=guidance_scale, **one_step
        )
        return record_attention(nano, lq, request)[1].token_shares

    alone, guided = maps(1.0, PROMPT, ""), maps(5.0, PROMPT, "blurred dog")
    assert torch.allclose(alone, guided, atol=1e-5)
    assert not torch.allclose(alone, maps(1.0, "blurred dog", ""), atol=1e-5)


def test_words_of_several_tokens_and_phrases_are_found_whole(nano):
    def found(word):
        positions = word_positions("a photorealistic cat, bobcat on a stone wall", word, nano.tokenizer)
        ids = nano.tokenizer("a photorealistic cat, bobcat on a stone wall").input_ids
        return nano.tokenizer.decode([ids[i] for i in positions]).strip()

    assert found("photorealistic") == "photorealistic"
    assert found("stone wall") == "stone wall"
    assert found("cat") == "cat", "not the end of bobcat"
    assert found("CAT") == "cat"


@pytest.mark.parametrize("word", ["dog", "wal", "", "cat wall"])
def test_a_word_that_is_not_in_the_prompt_is_refused(nano, word):
    with pytest.raises(InputError, match=r"is not a word of the prompt 'a cat on a wall, another cat'"):
        word_positions(PROMPT, word, nano.tokenizer)


def test_a_word_beyond_what_is_read_of_the_prompt_is_refused(nano):
    with pytest.raises(InputError, match="'zebra' comes after the 77 tokens"):
        word_positions("a cat " * 40 + "zebra", "zebra", nano.tokenizer)


def test_a_prompt_given_as_embeddings_is_refused(nano, photograph):
    names = ("tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2")
    embeds = encode_prompts([PROMPT], *(getattr(nano, name) for name in names))
    with pytest.raises(InputError, match="the prompt came as embeddings"):
        record_attention(nano, photograph(64, 64), RestorationRequest(prompt_embeds=embeds, **SETTINGS))


def test_the_overlay_is_grey_where_the_share_is_least_and_yellow_where_it_is_greatest():
    picture = Image.new("RGB", (64, 32), (90, 90, 90))
    share = torch.tensor([[0.0, 0, 0.5, 0.5]] * 2)
    pixels = np.asarray(overlay(picture, share))
    assert pixels.shape == (32, 64, 3)
    assert pixels[16, 0].tolist() == [90, 90, 90]
    assert pixels[16, 63].tolist() == [202, 209, 47]
    flat = np.asarray(overlay(picture, torch.full((2, 2), 0.3)))
    assert (flat == 90).all()


def test_steps_are_reported(recorded):
    assert recorded[2] == [(1, 2), (2, 2)]
