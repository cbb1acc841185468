"""FaithDiff (CVPR 2025): faithful picture restoration with a latent diffusion model, in pure PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faithdiff.pipeline import FaithDiffPipeline, RestorationResult

__all__ = ["FaithDiffPipeline", "RestorationResult"]


def __getattr__(name: str) -> Any:
    # diffusers and transformers take seconds to import; stages that only degrade pictures never pay for them.
    if name in __all__:
        from faithdiff import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module 'faithdiff' has no attribute {name!r}")
