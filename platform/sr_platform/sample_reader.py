"""Random access to the samples of a prepared dataset, local or on S3, through its index of byte ranges.

In : a finished dataset: manifest.json, index.parquet, shards/*.tar.
Out: `reader[i]` -> {"hq.png": ..., "lq.png": ..., "json": ...}; `reader.read_many(indices)` for many at once.

    reader = SampleReader("s3://bucket/data", cache_dir=Path("/local/disk"))
    reader.read_many([7, 4, 1], ["hq.png", "json"])     # reads no byte of the other members
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sr_platform.errors import InputDataError, RequestError
from sr_platform.shard_files import ShardFiles
from sr_platform.shards import INDEX_NAME, QUARANTINE_NAME, Manifest, read_manifest
from sr_platform.storage import Storage, open_storage

Indices = npt.NDArray[np.int64]

_ABSENT = -1


@dataclass(frozen=True)
class SampleIndex:
    """Columns, one entry per sample in the order of the shards: a million samples open in a moment and travel light."""

    keys: pa.StringArray
    groups: pa.DictionaryArray
    shards: npt.NDArray[np.int32]
    """Places in the manifest's list of shards."""
    members: dict[str, tuple[Indices, Indices]]
    """Suffix -> (start, end) in bytes within the shard; -1 where a sample has no such member."""

    def __len__(self) -> int:
        return len(self.shards)

    def place(self, index: int, suffix: str) -> tuple[int, int, int]:
        """(shard, start, end) of one member."""
        start, end = self.members[suffix]
        return int(self.shards[index]), int(start[index]), int(end[index])

    def suffixes(self, index: int) -> list[str]:
        """The members of one sample."""
        return [suffix for suffix, (start, _) in self.members.items() if start[index] != _ABSENT]

    def position(self, key: str) -> int | None:
        """Where the sample of this key lies."""
        found = pc.index(self.keys, pa.scalar(key, pa.string())).as_py()
        return None if found < 0 else int(found)


def read_index(storage: Storage, manifest: Manifest) -> SampleIndex:
    """The index of the dataset. Raises InputDataError when it is missing or not the one the manifest names."""
    data = storage.read_bytes(INDEX_NAME)
    if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
        raise InputDataError(
            f"shards: {storage.path(INDEX_NAME)} differs from its manifest: it is damaged or of another dataset; "
            "prepare the dataset again"
        )
    table = pq.read_table(io.BytesIO(data))
    suffixes = [name.removesuffix(":start") for name in table.column_names if name.endswith(":start")]
    return SampleIndex(
        # In one piece: pickled pieces would each carry the whole.
        keys=table["key"].combine_chunks(),
        groups=table["group"].combine_chunks().dictionary_encode(),
        shards=table["shard"].to_numpy(),
        members={s: (_places(table[f"{s}:start"]), _places(table[f"{s}:end"])) for s in suffixes},
    )


class SampleReader:
    """The samples of a finished dataset, ordered by shard, then as written.

    Picklable without reading anything again; safe to use from several threads.
    """

    def __init__(self, uri: str, cache_dir: Path | None = None) -> None:
        """Reads the manifest and the index, and no shard.

        `cache_dir` is for datasets on S3: a folder on a local disk with room for all shards. A shard is fetched whole
        when it is first needed, checked, kept there for every process and later run, and read from there.

        Raises:
            InputDataError: the dataset is not finished or damaged.
        """
        self.manifest = read_manifest(uri)
        storage = open_storage(uri)
        self.index = read_index(storage, self.manifest)
        self.shard_files = ShardFiles(storage, self.manifest.shards, cache_dir)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, index: int) -> dict[str, bytes]:
        """One sample's members by suffix. Raises as `read_members` does."""
        return self.read_many([index])[0]

    @cached_property
    def keys(self) -> list[str]:
        """The key of every sample, in order."""
        return list(self.index.keys.to_pylist())

    @cached_property
    def groups(self) -> dict[str, Indices]:
        """Group -> indices of its samples."""
        names, codes = self.index.groups.dictionary.to_pylist(), self.index.groups.indices.to_numpy()
        return {name: np.flatnonzero(codes == code) for code, name in enumerate(names)}

    @property
    def mixture(self) -> Mapping[str, float]:
        """Group -> share of the draws in training; empty: every sample is drawn equally often."""
        return self.manifest.mixture

    def suffixes(self, index: int) -> list[str]:
        """The names of one sample's members: hq.png, lq.png, ..."""
        return self.index.suffixes(self._checked(index))

    def read_many(self, indices: Sequence[int], suffixes: Sequence[str] | None = None) -> list[dict[str, bytes]]:
        """The members of several samples, or only those of the given suffixes. Raises as `read_members` does."""
        return self.read_members([(i, self.suffixes(i) if suffixes is None else suffixes) for i in indices])

    def read_members(self, wanted: Sequence[tuple[int, Sequence[str]]]) -> list[dict[str, bytes]]:
        """The members of each (index, suffixes), read at the same time.

        Raises:
            IndexError: there is no such sample.
            RequestError: a sample has no such member.
            InputDataError: a shard is missing or cut off.
            StorageError: storage keeps failing.
        """
        places = [self._place(index, suffix) for index, suffixes in wanted for suffix in suffixes]
        found = iter(self.shard_files.read(places))
        return [{suffix: next(found) for suffix in suffixes} for _, suffixes in wanted]

    def _place(self, index: int, suffix: str) -> tuple[int, int, int]:
        index = self._checked(index)
        if suffix not in self.index.members or (place := self.index.place(index, suffix))[1] == _ABSENT:
            raise RequestError(
                f"shards: sample {self.index.keys[index]} has no {suffix}, only {', '.join(self.index.suffixes(index))}"
            )
        return place

    def _checked(self, index: int) -> int:
        if not -len(self) <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return index % len(self)


def _places(column: pa.ChunkedArray) -> Indices:
    filled = column.fill_null(_ABSENT) if column.null_count else column
    return np.asarray(filled.to_numpy(), dtype=np.int64)


def find_sample(uri: str, key: str) -> dict[str, bytes]:
    """The members of the sample of that key.

    Raises:
        InputDataError: there is no such sample; says if and why it was left out, or which keys are like it.
    """
    reader = SampleReader(uri)
    position = reader.index.position(key)
    if position is None:
        raise InputDataError(
            f"shards: {uri} has no sample {key!r}; {_why_absent(open_storage(uri), reader.index, key)}"
        )
    return reader[position]


def _why_absent(storage: Storage, index: SampleIndex, key: str) -> str:
    if storage.exists(QUARANTINE_NAME):
        for line in storage.read_bytes(QUARANTINE_NAME).splitlines():
            rejection = json.loads(line)
            if key in (rejection["key"], rejection["source"]):
                return f"it was left out: {rejection['reason']}: {rejection['detail']}"
    alike = index.keys.filter(pc.match_substring(index.keys, key)) if key else index.keys
    examples = ", ".join((alike if len(alike) else index.keys).slice(0, 3).to_pylist())
    return f"did you mean {examples}?" if len(alike) else f"its keys are {examples} ..."
