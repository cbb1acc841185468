"""The first pass of `prepare.py`: every picture is read and measured once, distributed, and remembered.

    survey/<digest>.parquet    facts of some dozen pictures, published as soon as they are known
    survey.parquet             all of them, when the pass is complete

Facts are remembered by name, fingerprint and what was asked, so a killed run, or one with other thresholds, measures
only what is new.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray.data

from pipelines.sources import SourceConfig, source_of
from pipelines.stages.filter import FACTS_SCHEMA, Facts, FilterConfig, filter_stage
from pipelines.stages.ingest import Picture, ingest_stage
from pipelines.stages.sample import map_shards
from pipelines.stages.workers import WorkersConfig
from sr_platform.shards import json_digest
from sr_platform.storage import Storage, open_storage

SURVEY_NAME = "survey.parquet"
PARTS = "survey/"
"""Folder of the facts of an unfinished survey."""
_FACTS_VERSION = 1
_PICTURES_PER_PART = 32
_SCHEMA = FACTS_SCHEMA.append(pa.field("asked", pa.string()))

Watch = Callable[[Sequence[Facts]], None]


class Survey:
    """What is known of the pictures of one run."""

    def __init__(self, out: Storage, sources: Sequence[SourceConfig], cfg: FilterConfig) -> None:
        self.out, self.sources, self.cfg = out, {source.name: source for source in sources}, cfg

    def known(self, pictures: Sequence[Picture]) -> dict[str, Facts]:
        """Facts by name, of those pictures that need not be measured again."""
        facts = {picture.name: Facts(picture.name, problem=picture.problem) for picture in pictures if picture.problem}
        remembered = self._remembered()
        for picture in pictures:
            if found := remembered.get((picture.name, self._asked(picture))):
                facts[picture.name] = found
        return facts

    def measure(
        self, pictures: Sequence[Picture], *, cache_uri: str, workers: WorkersConfig, watch: Watch
    ) -> dict[str, Facts]:
        """Measures `pictures` on the connected Ray; `watch` sees each part's facts as they come and may raise."""
        parts = [pictures[at : at + _PICTURES_PER_PART] for at in range(0, len(pictures), _PICTURES_PER_PART)]
        rows = [{"shard": number, "pictures": picture_rows(part)} for number, part in enumerate(parts)]
        asked = {picture.name: self._asked(picture) for picture in pictures}
        sources = list(self.sources.values())
        ds = ray.data.from_items(rows, override_num_blocks=len(rows))
        ds = ingest_stage(ds, sources, cache_uri, workers)
        ds = filter_stage(ds, self.cfg, workers, sources=sources)
        ds = map_shards(ds, Remember(self.out.uri, asked).__call__, num_cpus=workers.num_cpus)
        facts: dict[str, Facts] = {}
        for block in ds.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            found = [_facts(row) for row in block.to_pylist()]
            facts.update({fact.name: fact for fact in found})
            watch(found)
        return facts

    def commit(self, pictures: Sequence[Picture], facts: Mapping[str, Facts]) -> None:
        """Writes all facts into one file and removes the parts."""
        rows = [{**vars(facts[picture.name]), "asked": self._asked(picture)} for picture in pictures]
        self.out.write_bytes_atomic(SURVEY_NAME, parquet(pa.Table.from_pylist(rows, schema=_SCHEMA)))
        self.forget_parts()

    def forget_parts(self) -> None:
        self.out.delete_all(PARTS)

    def _asked(self, picture: Picture) -> str:
        """Changes with the file and with anything that its facts depend on."""
        quality = self.sources[source_of(picture.name)].quality
        wanted = quality.model_dump(include={"metric", "weights"}) if quality else None
        return json_digest([_FACTS_VERSION, picture.size_bytes, picture.fingerprint, self.cfg.max_pixels, wanted])

    def _remembered(self) -> dict[tuple[str, str], Facts]:
        names = [name for name in (SURVEY_NAME,) if self.out.exists(name)] + self.out.list(PARTS)
        tables = [pq.read_table(io.BytesIO(data)) for data in self.out.read_all(names)]
        rows = [row for table in tables if table.schema.equals(_SCHEMA) for row in table.to_pylist()]
        return {(row["name"], row["asked"]): _facts(row) for row in rows}


class Remember:
    """Publishes the facts of one part, in the worker, so that a killed driver loses none of them."""

    def __init__(self, out_uri: str, asked: dict[str, str]) -> None:
        self.out_uri, self.asked = out_uri, ray.put(asked)

    def __call__(self, facts: pa.Table) -> pa.Table:
        asked = ray.get(self.asked)
        names = facts.column("name").to_pylist()
        table = facts.append_column("asked", pa.array([asked[name] for name in names], pa.string()))
        part = json_digest([[name, asked[name]] for name in names])[:24]
        open_storage(self.out_uri).write_bytes_atomic(f"{PARTS}{part}.parquet", parquet(table))
        return table


def picture_rows(pictures: Sequence[Picture], sha256: dict[str, str] | None = None) -> str:
    """What `ingest` reads of some pictures; with digests it refuses a picture that has changed since."""
    known = sha256 or {}
    return json.dumps([[picture.name, picture.place, known.get(picture.name, "")] for picture in pictures])


def parquet(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def _facts(row: dict[str, Any]) -> Facts:
    return Facts(**{field.name: row[field.name] for field in dataclasses.fields(Facts)})
