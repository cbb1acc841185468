"""Looks at a finished dataset: `prepare.py inspect URI KEY` and `prepare.py verify URI`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro
from numpy.typing import NDArray
from tqdm import tqdm

from faithdiff.degradation import Recipe, Step, degrade, draw_parameters
from faithdiff.degradation.recipe import recipe_from
from pipelines.sources import source_of
from pipelines.stages.write import lq_suffix
from sr_platform.config import StrictConfig, load_config
from sr_platform.errors import InputDataError
from sr_platform.sample_reader import find_sample
from sr_platform.shards import Manifest, read_manifest
from sr_platform.verification import verify_dataset


class InspectConfig(StrictConfig):
    """Shows one sample of a dataset with its whole provenance."""

    uri: tyro.conf.Positional[str]
    """The dataset: a path, file:// or s3:// URI."""
    key: tyro.conf.Positional[str]
    """Key of the sample, as in the shards, on the contact sheet and in quarantine.jsonl."""
    save: Path | None = None
    """Folder that gets the sample's files."""


class VerifyConfig(StrictConfig):
    """Compares every byte of a dataset with what its manifest promises."""

    uri: tyro.conf.Positional[str]
    """The dataset: a path, file:// or s3:// URI."""


def inspect_command(argv: Sequence[str]) -> None:
    cfg = load_config(InspectConfig, argv, job="prepare inspect", recipe=False)
    manifest, sample = read_manifest(cfg.uri), find_sample(cfg.uri, cfg.key)
    print(sample_account(manifest, cfg.key, sample))
    if cfg.save:
        cfg.save.mkdir(parents=True, exist_ok=True)
        for suffix, data in sample.items():
            (cfg.save / f"{cfg.key}.{suffix}").write_bytes(data)
        print(f"{'saved':<15}{len(sample)} files in {cfg.save}")


def verify_command(argv: Sequence[str]) -> None:
    """Raises InputDataError, naming the first problem, when anything differs."""
    cfg = load_config(VerifyConfig, argv, job="prepare verify", recipe=False)
    manifest = read_manifest(cfg.uri)
    total_bytes = sum(shard.size_bytes for shard in manifest.shards)
    with tqdm(total=total_bytes, desc="verify", unit="B", unit_scale=True) as bar:

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.update(done_bytes - bar.n)

        problems = verify_dataset(cfg.uri, show)
    for problem in problems:
        print(problem)
    if problems:
        raise InputDataError(
            f"prepare verify: {cfg.uri} differs from its manifest in {len(problems)} places, first: {problems[0]}; "
            "delete the shards named above and run prepare.py again"
        )
    print(f"{len(manifest.shards)} shards, {manifest.num_samples} samples: every digest holds ({manifest.digest[:16]})")


def sample_account(manifest: Manifest, key: str, sample: dict[str, bytes]) -> str:
    """Everything that is known of one sample, and whether it can be made again from its hq picture alone."""
    about: dict[str, Any] = json.loads(sample["json"])
    source = next((s for s in manifest.sources if s.name == source_of(about.get("source", ""))), None)
    lines = [("key", key)]
    lines += [(name, _short(value)) for name, value in about.items() if name != "degradation"]
    if source:
        lines += [("licence", source.licence), ("terms", source.terms), ("origin", source.homepage or source.uri)]
    lines += [("dataset", f"{manifest.digest[:16]}, recipe {manifest.recipe_digest[:16]}")]
    lines += [(f".{suffix}", f"{len(data)} bytes") for suffix, data in sample.items()]
    if "lq.png" in sample:
        recipe = recipe_from(manifest.recipe["degrade"]["content"], where=f"recipe of {key}")
        lines += _degradation_lines(recipe, about, key, sample)
    return "\n".join(f"{name:<15}{value}" for name, value in lines if value)


def _degradation_lines(
    recipe: Recipe, about: dict[str, Any], key: str, sample: dict[str, bytes]
) -> list[tuple[str, str]]:
    hq, lines, variant = _pixels(sample["hq.png"]), [], 0
    while (suffix := lq_suffix(variant)) in sample:
        steps = draw_parameters(recipe, key=key, seed=about["seed"], variant=variant)
        again = degrade(hq, recipe, key=key, seed=about["seed"], variant=variant)
        equal = np.array_equal(again, _pixels(sample[suffix]))
        lines.append((suffix, "made again from hq: " + ("equal" if equal else "DIFFERENT")))
        lines += [(f"  {type(step).__name__}", _drawn(step)) for step in steps]
        variant += 1
    return lines


def _drawn(step: Step) -> str:
    """The parameters that the step uses, as "size_px=7, cutoff_rad=1.208"."""
    used = {f.name: getattr(step, f.name) for f in dataclasses.fields(step) if getattr(step, f.name) != f.default}
    return ", ".join(
        f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in used.items()
    )


def _pixels(png: bytes) -> NDArray[np.uint8]:
    return np.asarray(cv2.cvtColor(cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB))


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
