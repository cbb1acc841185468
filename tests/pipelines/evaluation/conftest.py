"""A finished report of a small evaluation, without a model: real pictures, scores with a known winner and gaps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageFilter
from skimage import data

METRICS = [
    {"name": "psnr", "higher_is_better": True, "unit": "dB"},
    {"name": "ssim", "higher_is_better": True, "unit": ""},
    {"name": "lpips", "higher_is_better": False, "unit": ""},
    {"name": "musiq", "higher_is_better": True, "unit": ""},
]
BLUR_PX = {"ours": 0.6, "SeeSR": 1.2, "Real-ESRGAN": 2.0}
NO_WEIGHTS = "weights of musiq are not here; give --metric-weights musiq=FILE"


@pytest.fixture(scope="session")
def written_report(tmp_path_factory) -> Path:
    """Read only: shared by the session."""
    return write_report(tmp_path_factory.mktemp("evaluation") / "report")


@pytest.fixture
def make_report(tmp_path) -> Callable[..., Path]:
    """`make_report(names=(...), **header)`: a report of its own."""
    return lambda **settings: write_report(tmp_path / "report", **settings)


@pytest.fixture
def report_with_reference(make_report) -> Path:
    """The reference as a method, whose psnr cannot be and whose other scores are missing."""
    folder: Path = make_report()
    known = pq.read_table(folder / "scores.parquet")
    rows = [row for row in known.to_pylist() if row["method"] == "ours"]
    for row in rows:
        reason = "hq is the reference itself" if row["metric"] == "psnr" else NO_WEIGHTS
        row |= {"method": "hq", "value": None, "reason": reason}
    pq.write_table(pa.concat_tables([known, pa.Table.from_pylist(rows, known.schema)]), folder / "scores.parquet")
    return folder


def write_report(folder: Path, names: tuple[str, ...] = (), **header: Any) -> Path:
    """musiq is missing everywhere; Real-ESRGAN has no result for the last picture."""
    pictures = names or tuple(f"{group}/{i:02d} {group} #{i}" for group in ("face", "street") for i in range(6))
    rows = []
    for index, picture in enumerate(pictures):
        hq = _photograph(index)
        _save(hq, folder, "hq", picture)
        _save(hq.resize((hq.width // 4, hq.height // 4)), folder, "lq", picture)
        for method, blur in BLUR_PX.items():
            restored = None if (method, index) == ("Real-ESRGAN", len(pictures) - 1) else _blurred(hq, blur)
            if restored is not None:
                _save(restored, folder, method, picture)
            rows += _rows(method, picture, index, blur, has_result=restored is not None)
    columns = ("method", "picture", "metric", "value", "reason", "seconds")
    table = pa.table({name: [row[name] for row in rows] for name in columns})
    pq.write_table(table, folder / "scores.parquet")
    (folder / "report.json").write_text(json.dumps({**_header(len(pictures)), **header}))
    return folder


def _rows(method: str, picture: str, index: int, blur: float, *, has_result: bool) -> list[dict[str, Any]]:
    noise = np.random.default_rng([index, int(blur * 10)]).normal(0, 0.4)
    values = {
        "psnr": 29 - 3 * blur - 0.5 * (index % 6) + noise,
        "ssim": 0.9 - 0.1 * blur - 0.02 * (index % 6) + noise / 50,
        "lpips": 0.1 + 0.08 * blur + 0.02 * (index % 6) - noise / 50,
        "musiq": None,
    }
    reasons = {name: NO_WEIGHTS if name == "musiq" else None for name in values}
    if not has_result:
        values = dict.fromkeys(values)
        reasons = dict.fromkeys(values, f"{method} has no picture of this name")
    return [
        {"method": method, "picture": picture, "metric": m, "value": v, "reason": reasons[m], "seconds": 0.1}
        for m, v in values.items()
    ]


def _header(num_pictures: int) -> dict[str, Any]:
    return {
        "protocol": {
            "name": "div2k_val_level_1",
            "table": "1",
            "dataset": "DIV2K-Val",
            "level": "I",
            "scale": 4,
            "restoration": {"num_inference_steps": 20, "guidance_scale": 5.0, "color_fix": "adain", "seed": 0},
            "metrics": {"psnr": {"channel": "rgb", "border_px": 0}, "ssim": {"channel": "y", "border_px": 0}},
        },
        "protocol_digest": "sha256:" + "5f" * 32,
        "model": {"uri": "models:/faithdiff/3", "digest": "sha256:" + "a1" * 32},
        "versions": {"python": "3.11.9", "torch": "2.14.1", "pyiqa": "0.1.13"},
        "machine": {"cpu": "x86_64", "accelerator": "none"},
        "counts": {"pictures": num_pictures, "restored": num_pictures, "left_out": 0},
        "methods": list(BLUR_PX),
        "metrics": METRICS,
    }


def _photograph(index: int) -> Image.Image:
    source = Image.fromarray((data.astronaut, data.chelsea, data.coffee)[index % 3]())
    left, top = 40 * (index // 3), 20 * (index // 3)
    return source.crop((left, top, left + 240, top + (240, 176, 200)[index % 3]))


def _blurred(image: Image.Image, radius: float) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(radius))


def _save(image: Image.Image, folder: Path, method: str, picture: str) -> None:
    path = folder / "pictures" / method / f"{picture}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
