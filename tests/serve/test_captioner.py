from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from faithdiff.captions import build_tiny_llava
from serve.captioner import Captioner, CaptionerConfig

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_the_same_picture_gets_the_same_words_at_any_depth(tmp_path: Path, picture: np.ndarray) -> None:
    captioner = Captioner(CaptionerConfig(model=str(build_tiny_llava(tmp_path / "llava"))))
    caption = await captioner.caption(picture)
    assert len(caption.split()) > 1
    assert caption.endswith(".")
    assert await captioner.caption(picture) == caption
    assert await captioner.caption(picture.astype(np.uint16) * 257) == caption
    assert await captioner.caption(255 - picture) != caption
