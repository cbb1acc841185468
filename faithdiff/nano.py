"""`nano`: a complete SDXL-shaped bundle of a few million parameters, small enough for a laptop and for every test.

    python -m faithdiff.nano --out DIR          writes it in diffusers' folder layout

The committed `faithdiff/presets/nano` is this module's output. The tokenizers are built from our own text,
`presets/nano/corpus.txt`; the weights are initial ones, the same for the same seed.
"""

from __future__ import annotations

import argparse
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from faithdiff.encoder import LQEncoder
from faithdiff.text import NUM_TOKENS
from faithdiff.unet import FaithDiffUNet

NANO_PATH = Path(__file__).parent / "presets" / "nano"
CORPUS_PATH = NANO_PATH / "corpus.txt"

VOCAB_SIZE = 1024
_BOS, _EOS = "<|startoftext|>", "<|endoftext|>"
_BOS_ID, _EOS_ID = VOCAB_SIZE - 2, VOCAB_SIZE - 1

# The names of SDXL's configs, with its ratios kept: text_time conditioning, 8x VAE, two text encoders side by side.
UNET_CONFIG: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [32, 64, 96],
    "layers_per_block": 1,
    "transformer_layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4, 6],  # as in SDXL's config, where this name holds the number of heads
    "cross_attention_dim": 32 + 64,
    "use_linear_projection": True,
    "norm_num_groups": 8,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": 6 * 32 + 64,
}
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [16, 32, 64, 64],
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 8,
    "sample_size": 512,
    "scaling_factor": 0.13025,
    "force_upcast": False,
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
    "interpolation_type": "linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
    "use_karras_sigmas": False,
}
_TEXT_CONFIG: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": NUM_TOKENS,
    "bos_token_id": _BOS_ID,
    "eos_token_id": _EOS_ID,
}
TEXT_CONFIG = _TEXT_CONFIG | {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
    "hidden_act": "quick_gelu",
    "pad_token_id": _EOS_ID,
}
TEXT_CONFIG_2 = _TEXT_CONFIG | {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "projection_dim": 64,
    "hidden_act": "gelu",
    "pad_token_id": 0,
}


def build(seed: int = 0) -> dict[str, Any]:
    """The components of a nano bundle by their names in `FaithDiffPipeline`, fp32, in eval mode.

    Every component's weights follow from (seed, its name) and can be stored as fp16 without loss. As in stage 1 of
    training, the LQ encoder starts as a copy of the VAE's and the alignment module passes latents through.
    """
    vae = _seeded(seed, "vae", lambda: AutoencoderKL(**VAE_CONFIG))
    vocab, merges = train_bpe(CORPUS_PATH.read_text(encoding="utf-8").splitlines())
    return {
        "vae": vae,
        "unet": _seeded(
            seed,
            "unet",
            lambda: FaithDiffUNet.from_config(UNET_CONFIG, lq_channels=VAE_CONFIG["block_out_channels"][-1]),
        ),
        "lq_encoder": _seeded(seed, "lq_encoder", lambda: LQEncoder.from_vae(vae)),
        "text_encoder": _seeded(seed, "text_encoder", lambda: CLIPTextModel(CLIPTextConfig(**TEXT_CONFIG))),
        "text_encoder_2": _seeded(
            seed, "text_encoder_2", lambda: CLIPTextModelWithProjection(CLIPTextConfig(**TEXT_CONFIG_2))
        ),
        "tokenizer": _tokenizer(vocab, merges, pads_with=_EOS),
        "tokenizer_2": _tokenizer(vocab, merges, pads_with="!"),
        "scheduler": EulerDiscreteScheduler(**SCHEDULER_CONFIG),
    }


def train_bpe(lines: Sequence[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """CLIP's byte-pair vocabulary of 1,024 ids learned from `lines`, in CLIP's order: "!" is 0, EOS the highest.

    Own code, because the trainer of `tokenizers` breaks ties by hash order: two runs learn different merges.
    """
    backend = CLIPTokenizer().backend_tokenizer
    texts = (backend.normalizer.normalize_str(line) for line in lines)
    words = Counter(word for text in texts for word, _ in backend.pre_tokenizer.pre_tokenize_str(text))
    spellings = {word: [*word[:-1], word[-1] + "</w>"] for word in words}
    alphabet = _bytes_in_clip_order()
    merges: list[tuple[str, str]] = []
    for _ in range(VOCAB_SIZE - 2 * len(alphabet) - 2):
        counts: Counter[tuple[str, str]] = Counter()
        for word, pieces in spellings.items():
            for pair in pairwise(pieces):
                counts[pair] += words[word]
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        spellings = {word: _merge(pieces, best) for word, pieces in spellings.items()}
    vocabulary = [*alphabet, *(c + "</w>" for c in alphabet), *(a + b for a, b in merges), _BOS, _EOS]
    vocab = {piece: i for i, piece in enumerate(vocabulary)}
    assert len(vocab) == VOCAB_SIZE
    return vocab, merges


def write(folder: Path, seed: int = 0) -> None:
    """Writes the bundle in diffusers' layout, weights as fp16 safetensors, with its corpus and README."""
    from faithdiff.pipeline import FaithDiffPipeline

    components = build(seed)
    for component in components.values():
        if isinstance(component, torch.nn.Module):
            torch.nn.Module.half(component)
    texts = {path.name: path.read_bytes() for path in (CORPUS_PATH, NANO_PATH / "README.md")}
    FaithDiffPipeline(**components, model_version="nano").save_pretrained(folder)
    for name, content in texts.items():
        (folder / name).write_bytes(content)
    for name in ("tokenizer", "tokenizer_2"):
        # SDXL's own layout, which transformers 4 needs; transformers 5 writes tokenizer.json alone.
        components[name].backend_tokenizer.model.save(str(folder / name))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m faithdiff.nano", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the initial weights (default: 0)")
    args = parser.parse_args(argv)
    write(args.out, args.seed)


def _seeded(seed: int, name: str, make: Callable[[], Any]) -> Any:
    """The module that `make` returns, initialised from (seed, name) alone and rounded to what fp16 can hold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
        module = make()
    for parameter in module.parameters():
        parameter.data = parameter.data.half().float()
    return module.eval()


def _tokenizer(vocab: dict[str, int], merges: list[tuple[str, str]], *, pads_with: str) -> CLIPTokenizer:
    return CLIPTokenizer(
        vocab=vocab, merges=merges, bos_token=_BOS, eos_token=_EOS, unk_token=_EOS, pad_token=pads_with,
        model_max_length=NUM_TOKENS,
    )  # fmt: skip


def _merge(pieces: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in pieces:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _bytes_in_clip_order() -> list[str]:
    """The 256 byte characters as CLIP's vocabulary lists them: the printable ones first, from "!" on."""
    stand_ins = {c for c in ByteLevel.alphabet() if ord(c) >= 256}
    return sorted(set(ByteLevel.alphabet()) - stand_ins) + sorted(stand_ins)


if __name__ == "__main__":
    main()
