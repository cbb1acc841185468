"""Which kind of picture comes under which number, and the picture itself.

draw_picture(seed=0, number=123, height_px=512, width_px=512, mixture=MixtureConfig()) -> ("text", Picture)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pydantic

from pipelines.stages.sample import sample_rng
from pipelines.synthetic.dead_leaves import dead_leaves
from pipelines.synthetic.picture import Picture
from pipelines.synthetic.text_pictures import text_picture
from pipelines.synthetic.textures import texture
from sr_platform.config import StrictConfig

KINDS: dict[str, Callable[[np.random.Generator, int, int], Picture]] = {
    "dead_leaves": dead_leaves,
    "textures": texture,
    "text": text_picture,
}
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio: its multiples fill the circle evenly."""


class MixtureConfig(StrictConfig):
    """Shares of the kinds of pictures; only their proportions count."""

    dead_leaves: pydantic.NonNegativeFloat = 0.35
    """Overlapping shapes of all sizes, with the statistics of photographs."""
    textures: pydantic.NonNegativeFloat = 0.35
    """Stone, wood, cloth, grass, bricks and the like."""
    text: pydantic.NonNegativeFloat = 0.3
    """Signs, pages, tickets and lettering, with what they say."""

    @pydantic.model_validator(mode="after")
    def _something_is_drawn(self) -> MixtureConfig:
        if not any(share > 0 for share in self.shares().values()):
            raise ValueError(f"every share is 0; give one of {', '.join(KINDS)} a share above 0")
        return self

    def shares(self) -> dict[str, float]:
        return self.model_dump()


def kind_of(seed: int, number: int, mixture: MixtureConfig) -> str:
    """The kind of picture `number`. Any run of numbers holds each kind in its share, give or take a few."""
    shares = mixture.shares()
    start = int.from_bytes(hashlib.sha256(f"mixture {seed}".encode()).digest()[:8], "little")
    place = (start + number * _GOLDEN) % 2**64 / 2**64 * sum(shares.values())
    for kind, share in shares.items():
        if place < share:
            return kind
        place -= share
    return max(shares, key=lambda kind: shares[kind])


def draw_picture(
    *, seed: int, number: int, height_px: int, width_px: int, mixture: MixtureConfig
) -> tuple[str, Picture]:
    """The kind of picture `number` and the picture; both follow from the arguments alone."""
    kind = kind_of(seed, number, mixture)
    return kind, KINDS[kind](sample_rng(seed, str(number), "synthesize"), height_px, width_px)
