"""Captions of pictures by a LLaVA model, with the prompt and the sampling that FaithDiff uses.

captioner = LlavaCaptioner.from_pretrained("llava-hf/llava-1.5-13b-hf", dtype=torch.bfloat16, device="cuda")
captioner(pictures, keys=keys, seed=0)        -> one raw text per picture; clean it with clean_caption
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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

from faithdiff.caption_text import PROMPT, QUESTION, SYSTEM, SamplingSettings, text_seed
from faithdiff.errors import InputError


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
                SeededDraw(keys, seed),
            ]
        )


class SeededDraw(LogitsProcessor):
    """Leaves one token per picture: where the picture's own uniform number falls in the cumulated softmax.

    A picture that has ended draws on until the last of its batch has, so that every step takes one number of each.
    """

    def __init__(self, keys: Sequence[str], seed: int) -> None:
        self.generators = [torch.Generator().manual_seed(text_seed(seed, key)) for key in keys]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        uniform = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in self.generators])
        cumulated = torch.softmax(scores.double(), dim=-1).cumsum(dim=-1)
        # The total is not exactly 1; a number below it always has a token with a probability above 0.
        point = uniform.to(scores.device) * cumulated[:, -1:]
        token = torch.searchsorted(cumulated, point, right=True).clamp(max=scores.shape[1] - 1)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


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
