from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from faithdiff.errors import InputError
from faithdiff.text import TokenIds, encode_ids, encode_prompts, tokenize

ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@pytest.fixture(scope="module")
def case(golden: Callable[[str], Any]) -> Any:
    return golden("case10_text_encode")


@pytest.fixture(scope="module")
def encoders(case: Any, golden_weight: Callable[..., torch.Tensor]) -> list[torch.nn.Module]:
    pairs = zip(ENCODERS.items(), ("1", "2"), strict=True)
    return [
        _filled(cls, name, case.about[f"clip_{n}"], case.about[f"keys_{n}"], golden_weight) for (name, cls), n in pairs
    ]


def _filled(cls: Any, name: str, config: dict, keys: list[str], weight: Callable[..., torch.Tensor]) -> Any:
    model = cls(CLIPTextConfig(**config)).eval()
    # transformers 5 dropped the `text_model.` level of CLIPTextModel; the golden keys have it.
    own = {f"{name}.text_model.{k.removeprefix('text_model.')}": k for k in model.state_dict()}
    own |= {f"{name}.{k}": k for k in model.state_dict() if k.startswith("text_projection")}
    state = {own[key]: weight(key, tuple(model.state_dict()[own[key]].shape)) for key in keys}
    assert not model.load_state_dict(state, strict=False).unexpected_keys
    assert set(state) == {k for k, v in model.state_dict().items() if v.is_floating_point()}
    return model


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Two real CLIP tokenizers over 999 ids that differ in padding alone, as SDXL's do."""
    folder = tmp_path_factory.mktemp("tokenizer")
    pieces = ["!", *"abcdefghijklmnopqrstuvwxyz.", *(f"{c}</w>" for c in "abcdefghijklmnopqrstuvwxyz!.")]
    vocab = {piece: i for i, piece in enumerate(pieces)} | {"<|startoftext|>": 998, "<|endoftext|>": 999}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return [_tokenizer(folder, pad) for pad in ("<|endoftext|>", "!")]


def _tokenizer(folder: Path, pad_token: str) -> Any:
    return CLIPTokenizer.from_pretrained(folder, pad_token=pad_token, model_max_length=77)


@pytest.mark.parametrize(("name", "embeds", "pooled"), [
    ("prompt", "prompt_embeds", "pooled"), ("empty", "negative_prompt_embeds", "negative_pooled"),
])  # fmt: skip
def test_embeddings_equal_the_golden_tensors(
    case: Any, encoders: list[Any], rel_error: Callable[..., float], name: str, embeds: str, pooled: str
) -> None:
    ids = TokenIds(case[f"ids_{name}_1"], case[f"ids_{name}_2"])
    encoded = encode_ids(ids, *encoders)
    assert rel_error(encoded.prompt_embeds, case[embeds]) < 5e-5
    assert rel_error(encoded.pooled_prompt_embeds, case[pooled]) < 5e-5


def test_the_first_tokenizer_pads_with_eos_and_the_second_with_id_0(case: Any, tokenizers: list[Any]) -> None:
    ids = tokenize("", *tokenizers)
    assert torch.equal(ids.ids, case["ids_empty_1"])
    assert torch.equal(ids.ids_2, case["ids_empty_2"])


def test_a_long_prompt_is_cut_at_77_tokens_and_keeps_its_end_token(tokenizers: list[Any]) -> None:
    ids = tokenize("tree " * 60, *tokenizers)
    assert ids.ids.shape == ids.ids_2.shape == (1, 77)
    assert ids.ids[0, -1] == ids.ids_2[0, -1] == 999


def test_a_prompt_is_encoded_the_same_alone_and_among_others(
    encoders: list[Any], tokenizers: list[Any], rel_error: Callable[..., float]
) -> None:
    prompts = ["a cat.", "", "a boat on a lake " * 20]
    together = encode_prompts(prompts, *tokenizers, *encoders)
    assert together.prompt_embeds.shape == (3, 77, 64)
    assert together.pooled_prompt_embeds.shape == (3, 64)
    for row, prompt in enumerate(prompts):
        alone = encode_prompts(prompt, *tokenizers, *encoders)
        assert rel_error(together.prompt_embeds[row : row + 1], alone.prompt_embeds) < 1e-5
        assert rel_error(together.pooled_prompt_embeds[row : row + 1], alone.pooled_prompt_embeds) < 1e-5


def test_no_gradients_are_recorded(encoders: list[Any], tokenizers: list[Any]) -> None:
    encoded = encode_prompts("a cat.", *tokenizers, *encoders)
    assert not encoded.prompt_embeds.requires_grad
    assert not encoded.pooled_prompt_embeds.requires_grad


@pytest.mark.parametrize("prompts", [None, [], ["a cat", None], 7, "half a pair \ud800"])
def test_something_that_is_not_text_is_refused(encoders: list[Any], tokenizers: list[Any], prompts: Any) -> None:
    with pytest.raises(InputError, match="give a text for each picture"):
        encode_prompts(prompts, *tokenizers, *encoders)
