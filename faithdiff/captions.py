"""Captions of pictures: LLaVA's prompt and sampling as FaithDiff uses them, and the clean-up of what it says.

captioner = LlavaCaptioner.from_pretrained("llava-hf/llava-1.5-13b-hf", dtype=torch.bfloat16, device="cuda")
captioner(pictures, keys=keys, seed=0)        -> one raw text per picture
clean_caption(text)                           -> what the restoration is conditioned on
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import (
    AutoConfig,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from faithdiff.errors import InputError

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "Describe this image and its style in a very detailed manner."
PROMPT = f"{SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:"
"""LLaVA's vicuna_v1 conversation with FaithDiff's one question. Source: llava/conversation.py:242-252, llm_agent.py."""

_NUM_OPENING_WORDS = 3


@dataclass(frozen=True)
class SamplingSettings:
    """How the next word is drawn. Source: llava/llm_agent.py:65-90 @ f11af6c."""

    temperature: float = 0.2
    top_p: float = 0.7
    max_new_tokens: int = 512


def clean_caption(text: str, *, compat: Literal["fixed", "released"] = "fixed") -> str:
    """The first two sentences without the three opening words ("The image features"), capitalised, with a full stop.

    A text of at most three words is kept whole, and an empty one stays empty, where the released code fails.
    "released" ends a caption of one or two sentences with two full stops, as the released code does.
    Source: test.py:112-118 @ f11af6c.
    """
    words = text.split()
    if len(words) > _NUM_OPENING_WORDS:
        words = words[_NUM_OPENING_WORDS:]
    if not words:
        return ""
    words[0] = words[0].capitalize()
    kept = ". ".join(" ".join(words).split(". ")[:2])
    if compat == "fixed" and kept.endswith((".", "!", "?")):
        return kept
    return kept + "."


def check_llava(name_or_path: str | Path) -> None:
    """Reads the configuration only. Raises InputError unless it is a LLaVA model's."""
    try:
        kind = AutoConfig.from_pretrained(name_or_path).model_type
    except (OSError, ValueError) as error:
        kind = " ".join(str(error).split())[:200]
    if kind != LlavaConfig.model_type:
        raise InputError(
            f"captions: {str(name_or_path)!r} holds no LLaVA model ({kind}); "
            "give a folder written by save_pretrained or a model id"
        )


class LlavaCaptioner:
    """Describes pictures with a LLaVA model; each text depends on its picture, key and seed, not on its batch."""

    def __init__(
        self, model: LlavaForConditionalGeneration, processor: Any, *, sampling: SamplingSettings | None = None
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.sampling = sampling or SamplingSettings()

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        sampling: SamplingSettings | None = None,
    ) -> LlavaCaptioner:
        """Loads model and processor from a folder or a hub id.

        Raises:
            InputError: no LLaVA model lies there.
        """
        check_llava(name_or_path)
        processor = AutoProcessor.from_pretrained(name_or_path)
        model = LlavaForConditionalGeneration.from_pretrained(name_or_path, dtype=dtype)
        return cls(model.to(device), processor, sampling=sampling)

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[NDArray[np.uint8]], *, keys: Sequence[str], seed: int) -> list[str]:
        """One raw text per picture, uint8 RGB [H, W, 3]; pass each through `clean_caption`.

        The picture is shortened to the model's square by a centre crop, as the released code does.

        Raises:
            InputError: the number of keys is not the number of pictures.
        """
        if len(pictures) != len(keys):
            raise InputError(f"captions: {len(pictures)} pictures came with {len(keys)} keys; give one key per picture")
        if not pictures:
            return []
        inputs = self.processor(
            images=[Image.fromarray(picture) for picture in pictures],
            text=[PROMPT] * len(pictures),
            return_tensors="pt",
        )
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(
            **inputs,
            # Sampling is done by the last of our processors, so that every picture has its own generator.
            do_sample=False,
            num_beams=1,
            use_cache=True,
            max_new_tokens=self.sampling.max_new_tokens,
            logits_processor=self._processors(keys, seed),
        )
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _processors(self, keys: Sequence[str], seed: int) -> LogitsProcessorList:
        return LogitsProcessorList(
            [
                TemperatureLogitsWarper(self.sampling.temperature),
                TopPLogitsWarper(top_p=self.sampling.top_p),
                _SeededDraw(keys, seed),
            ]
        )


class _SeededDraw(LogitsProcessor):
    """Adds Gumbel noise from one generator per picture: the largest score is then a draw from the softmax."""

    def __init__(self, keys: Sequence[str], seed: int) -> None:
        self.generators = [torch.Generator().manual_seed(_text_seed(seed, key)) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.stack([torch.rand(scores.shape[1], generator=g, dtype=torch.float64) for g in self.generators])
        gumbel = -torch.log(-torch.log(uniform.clamp(min=1e-300)))
        return scores.double() + gumbel.to(scores.device)


def _text_seed(seed: int, key: str) -> int:
    digest = hashlib.sha256(f"caption {seed} {key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def build_tiny_llava(path: Path, *, seed: int = 0) -> Path:
    """Writes a random LLaVA of the real classes, about 100,000 parameters, to `path`; needs no network.

    It answers with words of the prompt in no order: for tests of everything around a model.
    """
    tokenizer = _tiny_tokenizer()
    image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=image_token_id, image_seq_length=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    # Untrained, it would stop at once or answer in special tokens now and then.
    model.generation_config.min_new_tokens = 5
    model.generation_config.suppress_tokens = [
        tokenizer.convert_tokens_to_ids(token) for token in ("<unk>", "<s>", "<pad>", "<image>")
    ]
    model.save_pretrained(path)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": vision.image_size}, crop_size={"height": vision.image_size, "width": vision.image_size}
    )
    LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(path)
    return path


def _tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A word tokenizer of the prompt's own words."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    words = dict.fromkeys(f"{SYSTEM} USER: {QUESTION} ASSISTANT: The image features a photograph".split())
    vocabulary = {token: i for i, token in enumerate([*special.values(), "<image>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **special,
        additional_special_tokens=["<image>"],
        padding_side="left",
    )
