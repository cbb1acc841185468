"""The parts of the model that can be trained, by name; a recipe names them without importing PyTorch."""

from __future__ import annotations

from typing import Literal, get_args

Part = Literal["alignment", "lq_encoder", "unet", "control"]
"""The alignment module, the LQ encoder, SDXL's UNet, the control branch."""
PARTS: tuple[Part, ...] = get_args(Part)
