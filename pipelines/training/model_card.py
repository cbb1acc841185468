"""Manifest and lineage -> the README.md of a trained model: what it is, what it was made from, who allows what.

In : the dataset's manifest with its sources, the tags of the run, the stages that were trained.
Out: Markdown with the front matter that the Hugging Face hub reads. The same model gives the same text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import yaml

from sr_platform.model_registry import MANIFEST_DIGEST_TAG
from sr_platform.shards import Manifest, Source

CARD_NAME = "README.md"
_SPECIAL = re.compile(r"([\\`*\[\]<>|])")
_WEB_ADDRESS = re.compile(r"https?://[^\s<>|\\\"`]+")

_RESULTS = {
    "train/loss": "loss of the last update (mean absolute error of the noise)",
    "train/loss_smoothed": "loss, about the last fifty updates",
    "validation/psnr": "PSNR of the validation pictures, dB",
}
_LIMITS = """\
- It invents plausible detail: a face, a text or a plate in the result is no evidence of what the camera saw.
- It was trained to undo the degradations of its dataset's recipe, on crops of the size above; other damage may stay.
- What its sources show little of, it restores less well; its captions carry the bias of whoever wrote them.
"""


def model_card(
    manifest: Manifest,
    tags: Mapping[str, str],
    *,
    name: str,
    stages: Mapping[str, int],
    size_px: int,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """The card of the model `name`; `stages` are the stages it went through, with their updates.

    `metrics` are the last ones of the run; only those that say something about the model are printed.

    Text of sources is data: it cannot end the front matter, break the table or become a link.
    """
    return "\n".join(
        [
            _front_matter(manifest),
            f"# {_plain(name)}",
            "",
            "Restores degraded pictures: FaithDiff (CVPR 2025), for `FaithDiffPipeline.from_pretrained`.",
            "",
            "## Origin",
            "",
            *_table(["what", "value"], _origin(manifest, tags, stages, size_px)),
            "",
            *_results(metrics or {}),
            "## Sources and their terms",
            "",
            *_sources(manifest.sources),
            "",
            "The weights are derived from these pictures and from the base model: the terms of all of them apply.",
            "",
            "## Limits",
            "",
            _LIMITS,
        ]
    )


def _front_matter(manifest: Manifest) -> str:
    values = {
        "license": "other",
        "license_name": "terms-of-sources",
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "tags": ["faithdiff", "image-restoration", "super-resolution"],
        "datasets": [_one_line(source.name) for source in manifest.sources],
    }
    return f"---\n{yaml.safe_dump(values, sort_keys=False, width=1_000_000)}---\n"


def _origin(manifest: Manifest, tags: Mapping[str, str], stages: Mapping[str, int], size_px: int) -> list[list[str]]:
    trained = ", then ".join(f"{stage} ({updates} updates)" for stage, updates in stages.items())
    rows = {
        "base model": tags["base_model"],
        "base model digest": tags.get("base_model_digest", "unknown"),
        "training": f"{trained}, crops of {size_px} px",
        "samples": str(manifest.num_samples),
        "dataset digest": tags[MANIFEST_DIGEST_TAG],
        "dataset recipe digest": manifest.recipe_digest,
        "training recipe digest": tags["recipe_digest"],
        "git commit": tags.get("git_commit", "unknown"),
    }
    return [[what, _plain(value)] for what, value in rows.items()]


def _results(metrics: Mapping[str, float]) -> list[str]:
    rows = [[meaning, f"{metrics[key]:.4g}"] for key, meaning in _RESULTS.items() if key in metrics]
    if not rows:
        return []
    note = "Measured while training, on its own pictures: they tell runs apart, not models of others."
    return ["## Results of the last stage", "", *_table(["what", "value"], rows), "", note, ""]


def _sources(sources: Sequence[Source]) -> list[str]:
    if not sources:
        return ["The dataset names none."]
    rows = [
        [_plain(s.name), _plain(s.licence), _plain(s.terms), _link(s.homepage), _plain(s.group), str(s.num_pictures)]
        for s in sources
    ]
    return _table(["source", "licence", "terms", "homepage", "group", "pictures"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def _link(address: str) -> str:
    return f"<{address}>" if _WEB_ADDRESS.fullmatch(address) else _plain(address)


def _plain(text: str) -> str:
    """One line of Markdown that reads as `text` does."""
    return _SPECIAL.sub(r"\\\1", _one_line(text)) or "-"


def _one_line(text: str) -> str:
    return " ".join(text.split())
