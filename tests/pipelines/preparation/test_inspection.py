"""`inspect` tells all about one sample and makes its lq again; `verify` finds every byte that changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from faithdiff.degradation import PASD
from pipelines.prepare import main
from pipelines.stages.degrade import Degrade, DegradeConfig
from pipelines.stages.sample import read_table, to_table
from pipelines.stages.write import Write
from sr_platform.errors import InputDataError
from sr_platform.publication import commit_dataset, finished_shards
from sr_platform.shards import Source
from sr_platform.storage import open_storage


@pytest.fixture
def dataset(tmp_path: Path, make_crop: Callable[..., Any]) -> Path:
    crops = to_table([make_crop("k0", source="a/0.png", caption="A house.", source_sha256="ab")])
    rows = read_table(Degrade(DegradeConfig(variants=2), seed=5)(crops))
    Write(str(tmp_path), name="t", about={"recipe": "pasd", "seed": 5}, groups={}).publish(0, rows)
    source = Source(name="a", uri="/a", licence="CC0", terms="Do as you like.", num_pictures=1, sha256="cd")
    out = open_storage(tmp_path)
    recipe = {"degrade": {"content": PASD.as_dict()}}
    commit_dataset(out, list(finished_shards(out, name="t").values()), recipe=recipe, sources=[source], counts={})
    return tmp_path


def test_inspect_shows_provenance_and_makes_every_variant_again(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["inspect", str(dataset), "k0", "--save", str(tmp_path / "saved")])
    shown = capsys.readouterr().out
    for text in ("A house.", "a/0.png", "CC0", "Do as you like.", "BlurStep", "size_px="):
        assert text in shown
    assert shown.count("made again from hq: equal") == 2
    saved = {path.name for path in (tmp_path / "saved").iterdir()}
    assert saved == {"k0.hq.png", "k0.lq.png", "k0.lq1.png", "k0.json"}
    assert json.loads((tmp_path / "saved" / "k0.json").read_text())["seed"] == 5


def test_an_unknown_key_is_refused_with_keys_that_exist(dataset: Path) -> None:
    with pytest.raises(InputDataError, match=r"no sample 'k9'.*k0"):
        main(["inspect", str(dataset), "k9"])


def test_verify_passes_what_was_written_and_names_what_changed(
    dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["verify", str(dataset)])
    assert "1 shards, 1 samples: every digest holds" in capsys.readouterr().out
    shard = dataset / "shards" / "t-000000.tar"
    data = bytearray(shard.read_bytes())
    data[700] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    with pytest.raises(InputDataError, match=r"differs from its manifest in \d+ places, first: .*t-000000"):
        main(["verify", str(dataset)])
