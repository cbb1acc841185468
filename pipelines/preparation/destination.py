"""What lies at `--out` of `prepare.py`: whether it was begun, with what, whether it is finished, and tidying up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipelines.contact_sheet import CONTACT_SHEET_NAME, write_contact_sheet
from pipelines.preparation import survey
from pipelines.preparation.plan import PLAN_NAME
from sr_platform.errors import ConfigError
from sr_platform.publication import DONE, remove_markers
from sr_platform.shards import MANIFEST_NAME, QUARANTINE_NAME, Manifest, read_manifest
from sr_platform.storage import Storage

LISTING = "listing"
"""Folder of what the listing of archives remembers."""


def begun(out: Storage, recipe: Mapping[str, Any], *, job: str = "prepare") -> dict[str, Any]:
    """The record of what `out` was begun with, if anything. Raises ConfigError when that was another recipe."""
    if not out.exists(PLAN_NAME):
        if out.exists(MANIFEST_NAME):
            raise ConfigError(f"{job}: --out {out.uri} holds another dataset; choose an empty place")
        return {}
    before: dict[str, Any] = json.loads(out.read_bytes(PLAN_NAME))
    now = json.loads(json.dumps(recipe))
    if before["recipe"] == now:
        return before
    raise ConfigError(
        f"{job}: --out {out.uri} was made with other settings ({', '.join(differences(before['recipe'], now))}); "
        "old and new shards are never mixed; choose another --out"
    )


def refuse_other_pictures(out: Storage, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises ConfigError when `out` was begun with pictures of other names or contents."""
    if before and before["contents_digest"] != now["contents_digest"]:
        _delete(out, survey.PARTS, f"{LISTING}/")
        raise ConfigError(
            f"prepare: --out {out.uri} was made with other pictures ({before['num_pictures']} then, "
            f"{now['num_pictures']} now); old and new shards are never mixed; choose another --out"
        )


def finished(out: Storage) -> Manifest | None:
    """The manifest, if it is there and every shard it names has its size."""
    if not out.exists(MANIFEST_NAME):
        return None
    manifest = read_manifest(out.uri)
    sizes = out.sizes("shards/")
    complete = all(sizes.get(shard.name) == shard.size_bytes for shard in manifest.shards)
    return manifest if complete else None


def wind_up(out: Storage, manifest: Manifest) -> Manifest:
    """Removes what only an unfinished dataset needs, draws the contact sheet and prints the summary."""
    remove_markers(out)
    out.remove_unfinished()
    _delete(out, survey.PARTS, f"{LISTING}/")
    if not out.exists(CONTACT_SHEET_NAME):
        write_contact_sheet(out.uri)
    print_summary(out, manifest)
    return manifest


def is_begun(out: Storage) -> bool:
    return out.exists(PLAN_NAME)


def discard(out: Storage) -> None:
    """Removes what a fruitless run has written; nothing else that may lie there."""
    _delete(out, survey.PARTS, f"{LISTING}/", DONE)
    out.delete(PLAN_NAME)


def print_summary(out: Storage, manifest: Manifest) -> None:
    """What a person wants to know at the end."""
    size_mib = sum(shard.size_bytes for shard in manifest.shards) / 2**20
    for source in manifest.sources:
        print(f"source       {source.name}: {source.num_pictures} pictures, {source.licence}")
    print(f"pictures     {manifest.counts['pictures']}")
    print(f"samples      {manifest.num_samples}")
    print(f"shards       {len(manifest.shards)}, {size_mib:.1f} MiB, in {out.path('shards')}")
    for reason, count in manifest.counts.items():
        if reason.startswith("quarantined"):
            print(f"{reason}: {count}, listed in {out.path(QUARANTINE_NAME)}")
    print(f"look at it   {out.path(CONTACT_SHEET_NAME)}")
    print(f"manifest     {out.path(MANIFEST_NAME)}, digest {manifest.digest[:16]}")


def _delete(out: Storage, *prefixes: str) -> None:
    for prefix in prefixes:
        out.delete_all(prefix)


def differences(before: Any, now: Any, path: str = "") -> list[str]:
    """Dotted names of the settings that differ."""
    if not (isinstance(before, Mapping) and isinstance(now, Mapping)):
        return [] if before == now else [path]
    return [
        found
        for name in sorted({*before, *now})
        for found in differences(before.get(name), now.get(name), f"{path}.{name}" if path else str(name))
    ]
