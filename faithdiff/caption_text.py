"""The words around a caption: what a vision model is asked, how its next word is drawn, what is kept of its answer.

clean_caption(text)           -> what the restoration is conditioned on
text_seed(seed, key)          -> the seed of one picture's caption
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
QUESTION = "Describe this image and its style in a very detailed manner."
PROMPT = f"{SYSTEM} USER: <image>\n{QUESTION} ASSISTANT:"
"""LLaVA's vicuna_v1 conversation with FaithDiff's one question. Source: llava/conversation.py:242-252, llm_agent.py."""

NUM_OPENING_WORDS = 3
"""LLaVA begins with "The image features". Source: test.py:112-118 @ f11af6c."""


@dataclass(frozen=True)
class SamplingSettings:
    """How the next word is drawn. Source: llava/llm_agent.py:65-90 @ f11af6c."""

    temperature: float = 0.2
    top_p: float = 0.7
    max_new_tokens: int = 512


def clean_caption(
    text: str, *, num_opening_words: int = NUM_OPENING_WORDS, compat: Literal["fixed", "released"] = "fixed"
) -> str:
    """The first two sentences without the three opening words ("The image features"), capitalised, with a full stop.

    A text of no more than the opening words is kept whole, and one without a letter or digit is empty, where the
    released code fails. "released" ends a caption of one or two sentences with two full stops, as the released code
    does. Source: test.py:112-118 @ f11af6c.
    """
    words = text.split()
    if len(words) > num_opening_words:
        words = words[num_opening_words:]
    if not any(character.isalnum() for word in words for character in word):
        return ""
    words[0] = words[0].capitalize()
    kept = ". ".join(" ".join(words).split(". ")[:2])
    if compat == "fixed" and kept.endswith((".", "!", "?")):
        return kept
    return kept + "."


def text_seed(seed: int, key: str) -> int:
    """0..2^63 - 1, the same on every machine."""
    digest = hashlib.sha256(f"caption {seed} {key}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") >> 1
