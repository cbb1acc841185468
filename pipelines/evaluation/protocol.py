"""A protocol: everything that changes a number of an evaluation, in one file, with a digest.

Settings that only decide where, how fast and how visibly it is evaluated are not part of it (`_INCIDENTAL`). Two
reports are comparable only where the digests of their protocols agree: same pictures, degradation, settings, metrics.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
import tyro

from faithdiff.compat import resolve_switches
from faithdiff.degradation import find_recipe
from faithdiff.degradation.recipe import SCALE
from faithdiff.metrics import KNOWN_METRICS
from faithdiff.request import RestorationRequest
from pipelines.evaluation.score_table import INPUT, OURS, REFERENCE
from pipelines.evaluation.scoring import OWN_METRICS, MetricConfig, library_of
from pipelines.evaluation.text_reading import TextConfig
from sr_platform.config import StrictConfig
from sr_platform.errors import ConfigError
from sr_platform.shards import json_digest

FORMAT = 1
_INCIDENTAL: Any = {"model", "data", "report", "cache", "method", "weights", "workers", "experiment", "dry_run"}
_METHOD_NAME = r"^[A-Za-z0-9][A-Za-z0-9._+-]*$"


class DataConfig(StrictConfig):
    """Which pictures, and what is known of them."""

    kind: Literal["hq", "pairs", "lq"] = "hq"
    """hq: high-quality pictures, which the protocol degrades; pairs: `hq/` and `lq/` with the same names, or a prepared
    dataset; lq: low-quality pictures without a reference."""
    digest: str = ""
    """sha256:... of the pictures, captions and words that are meant; other ones are refused. Empty takes any, and the
    report's header says which."""
    crop_px: pydantic.NonNegativeInt = 0
    """Side of the square cut from the middle of each hq picture; 0 takes them whole, cut to multiples of 4."""
    max_pictures: pydantic.NonNegativeInt = 0
    """Only so many, the first in the order of their names; 0 takes all."""
    captions: Literal["beside", "none"] = "beside"
    """beside: the .txt beside a picture, or the caption of a prepared sample, is its prompt; none: no prompt."""


class RestorationConfig(StrictConfig):
    """How the model restores."""

    scale: pydantic.PositiveInt = 4
    """Output is so many times the size of the input."""
    num_inference_steps: pydantic.PositiveInt = 20
    """Steps."""
    guidance_scale: float = 5.0
    """How strongly the caption steers."""
    negative_prompt: str = ""
    """What it steers away from."""
    start_from: Literal["lq", "noise"] = "lq"
    """What a restoration begins with."""
    seed: pydantic.NonNegativeInt = 42
    """Of the noise; each picture's own derives from it and the picture's name."""
    tile_px: pydantic.PositiveInt = 1024
    """Side of a tile."""
    tile_stride_px: pydantic.NonNegativeInt = 0
    """Distance of tiles; 0 leaves it to the model."""
    vae_tile_px: pydantic.PositiveInt = 1024
    """Pictures longer than this pass the VAE in parts."""
    color_fix: Literal["adain", "wavelet", "none"] = "adain"
    """How colours are taken from the input."""
    compat: Literal["fixed", "released"] = "fixed"
    """released: the numbers of the released code, defects included."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of the model's arithmetic."""

    def request(self, *, prompt: str, seed: int) -> RestorationRequest:
        """What the pipeline is asked of one picture. Raises InputError where a setting is out of range."""
        return RestorationRequest(
            scale=self.scale,
            prompt=prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            seed=seed,
            start_from=self.start_from,
            tile_px=self.tile_px,
            tile_stride_px=self.tile_stride_px or None,
            vae_tile_px=self.vae_tile_px,
            color_fix=self.color_fix,
            switches=resolve_switches("released" if self.compat == "released" else None),
        )


class WorkersConfig(StrictConfig):
    """Who works; nothing here changes a number, but for run times."""

    restorers: pydantic.PositiveInt = 1
    """Processes that hold the model."""
    restorer_num_gpus: pydantic.NonNegativeFloat = 0.0
    """GPUs of each."""
    scorers: pydantic.PositiveInt = 1
    """Processes that hold the metrics."""
    scorer_num_gpus: pydantic.NonNegativeFloat = 0.0
    """GPUs, or a fraction of one, of each."""
    num_cpus: Annotated[float, pydantic.Field(gt=0)] = 1.0
    """Logical CPUs of each."""


class EvaluateConfig(StrictConfig):
    """A protocol, what is evaluated under it, and where."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9_.-]+$")
    """Of the protocol; the gate asks for evaluations under it."""
    table: str = ""
    """Table of the paper whose numbers are printed beside ours."""
    dataset: str
    """Name of the data set, such as DIV2K-Val."""
    pictures: DataConfig = DataConfig()
    degradation: str = ""
    """How hq becomes lq: level_I, level_II, level_III, pasd, or a recipe file; only for pictures.kind=hq."""
    degradation_seed: pydantic.NonNegativeInt = 0
    """Each picture's own derives from it and the picture's name."""
    restoration: RestorationConfig = RestorationConfig()
    metrics: tuple[MetricConfig, ...] = ()
    """What is measured, in the order of the report's columns; at least one, given in a recipe."""
    text: TextConfig = TextConfig()
    libraries: dict[str, str] = pydantic.Field(default_factory=dict)
    """Library -> the version that its metrics are meant by; with another one they are missing, and the report says so.
    What is left out takes the installed version."""

    model: str = ""
    """What restores: a preset, a folder, s3://, or models:/name@alias; empty scores only folders of other methods."""
    data: str
    """Where the pictures are: a folder or s3:// URI."""
    report: str = ""
    """Folder or s3:// URI of the report; all nodes must see it."""
    cache: str = ""
    """Where restored pictures and scores are remembered, by model, picture and settings; by default <report>/cache."""
    method: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """name=folder with the outputs of another method, once per method; names as in the report's pictures/lq."""
    weights: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """metric=file with the weights of one of pyiqa's metrics, once per metric; every node must see it. It is
    unpickled: take it only from somebody you trust. For text: detector=file.onnx, recogniser=file.onnx."""
    workers: WorkersConfig = WorkersConfig()
    experiment: str = "faithdiff-evaluation"
    """MLflow experiment."""
    dry_run: bool = False
    """Check everything, print the protocol and its digest, and evaluate nothing."""

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> EvaluateConfig:
        self._check_data()
        if not self.metrics:
            raise ValueError("metrics: is empty; name at least one in a recipe, as the shipped protocol_*.yaml do")
        repeated = [name for name, count in Counter(metric.name for metric in self.metrics).items() if count > 1]
        if repeated:
            raise ValueError(f"metrics: {', '.join(repeated)} is there twice; a report has one column for each")
        for metric in self.metrics:
            self._check_metric(metric)
        for folder in self.method:
            _pair(folder, "method", "name=folder")
        self.restoration.request(prompt="", seed=self.restoration.seed)
        return self

    def _check_data(self) -> None:
        if (self.pictures.kind == "hq") != bool(self.degradation):
            raise ValueError(
                f"degradation={self.degradation!r} with pictures.kind={self.pictures.kind}: hq pictures need one "
                "(level_I, level_II, level_III, pasd), and others must have none"
            )
        if self.degradation:
            find_recipe(self.degradation)
            if self.restoration.scale != SCALE:
                raise ValueError(
                    f"restoration.scale={self.restoration.scale}: degraded pictures are {SCALE} times smaller"
                )
        if self.pictures.crop_px % SCALE or (self.pictures.crop_px and self.pictures.kind == "lq"):
            raise ValueError(f"pictures.crop_px={self.pictures.crop_px}: give a multiple of {SCALE}, and hq pictures")

    def _check_metric(self, metric: MetricConfig) -> None:
        known = OWN_METRICS.get(metric.name) or KNOWN_METRICS.get(metric.name)
        if known is None:
            names = [*OWN_METRICS, *KNOWN_METRICS]
            close = difflib.get_close_matches(metric.name, names, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(names)}"
            raise ValueError(f"metrics: no metric {metric.name!r}; {hint}")
        if known.needs_reference and self.pictures.kind == "lq":
            raise ValueError(f"metrics: {metric.name} needs hq pictures, and pictures.kind=lq has none; leave it out")
        if metric.name == "degrade_again_psnr" and not self.degradation:
            raise ValueError("metrics: degrade_again_psnr needs a degradation that is known; use consistency_psnr")

    @property
    def level(self) -> str:
        """I, II or III, or empty: as the paper's tables call it."""
        return self.degradation.removeprefix("level_") if self.degradation.startswith("level_") else ""

    @property
    def reads_text(self) -> bool:
        return any(metric.name.startswith("text_") for metric in self.metrics)

    @property
    def methods(self) -> dict[str, str]:
        """Name -> folder of other methods' outputs. Raises ConfigError for a name that is none, or is there twice."""
        return _mapping(self.method, "method", "name=folder", taken=(OURS, INPUT, REFERENCE))

    @property
    def weight_files(self) -> dict[str, str]:
        """Metric -> file of weights. Raises ConfigError for one that the protocol does not name, or is there twice."""
        files = _mapping(self.weights, "weights", "metric=file")
        allowed = [metric.name for metric in self.metrics if metric.name in KNOWN_METRICS]
        allowed += ["detector", "recogniser"] if self.reads_text else []
        for name in files:
            if name not in allowed:
                raise ConfigError(
                    f"weights: {name}: weights can be given for {', '.join(allowed) or 'none of the metrics'}"
                )
        return files


def resolved_protocol(
    cfg: EvaluateConfig, *, data_digest: str, num_pictures: int, versions: Mapping[str, str], weights: Mapping[str, str]
) -> dict[str, Any]:
    """The protocol of the report's header: nothing is left open. `weights` are digests of files that were given."""
    protocol = cfg.model_dump(mode="json", exclude=_INCIDENTAL)
    protocol["format"] = FORMAT
    protocol["level"] = cfg.level
    protocol["pictures"] |= {"digest": data_digest, "num_pictures": num_pictures}
    protocol["degradation_recipe"] = find_recipe(cfg.degradation).as_dict() if cfg.degradation else None
    protocol["metrics"] = {metric.name: metric_record(metric) for metric in cfg.metrics}
    used = {library_of(metric.name) for metric in cfg.metrics} - {""}
    protocol["libraries"] = {name: cfg.libraries.get(name) or versions.get(name, "") for name in sorted(used)}
    protocol["weights"] = dict(sorted(weights.items()))
    if not cfg.reads_text:
        del protocol["text"]
    return protocol


def protocol_digest(protocol: Mapping[str, Any]) -> str:
    """Changes with anything that changes a number."""
    return f"sha256:{json_digest(protocol)}"


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """ "restoration.num_inference_steps: 20 against 10", for everything that differs in two protocols."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        keys = dict.fromkeys((*one, *other))
        return [text for key in keys for text in differences(one.get(key), other.get(key), f"{path}.{key}".strip("."))]
    return [] if one == other else [f"{path}: {_shown(one)} against {_shown(other)}"]


def metric_record(metric: MetricConfig) -> dict[str, Any]:
    """A metric's rules; channel and border only where they mean something."""
    about = OWN_METRICS.get(metric.name)
    record: dict[str, Any] = {"version": about.version if about else 0}
    if metric.name in ("psnr", "ssim"):
        record |= {"channel": metric.channel, "border_px": metric.border_px}
    if metric.name == "ssim":
        record["clip_contrast"] = metric.clip_contrast
    return record


def _shown(value: Any) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _mapping(given: Sequence[str], flag: str, form: str, taken: Sequence[str] = ()) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in given:
        name, value = _pair(text, flag, form)
        if name in taken or name in found:
            raise ConfigError(f"{flag}: {name} is {'ours' if name in taken else 'there twice'}; give another name")
        found[name] = value
    return found


def _pair(text: str, flag: str, form: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not value or not re.match(_METHOD_NAME, name):
        raise ConfigError(f"{flag}: got {text!r}; write {form}, with a name of letters, digits and ._+-")
    return name, value
