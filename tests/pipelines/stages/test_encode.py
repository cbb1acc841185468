"""Stage encode: off by default, one file per usable sample, the same bytes whatever else is in the shard."""

from __future__ import annotations

import numpy as np
import pytest
import ray.data

from faithdiff.encodings import Encoding
from faithdiff.errors import InputError
from pipelines.stages.encode import Encode, EncodeConfig, check_encoder, encode_stage
from pipelines.stages.sample import read_table, to_table
from pipelines.stages.workers import WorkersConfig

NANO = EncodeConfig(model="nano")


@pytest.fixture(scope="module")
def encode() -> Encode:
    return Encode(NANO)


def test_without_a_model_nothing_happens() -> None:
    ds = object()
    assert encode_stage(ds, EncodeConfig(), WorkersConfig(), seed=0) is ds  # type: ignore[arg-type]
    assert check_encoder(EncodeConfig()) == {}


def test_a_model_that_is_none_is_refused_before_any_work() -> None:
    with pytest.raises(InputError, match="neither a folder nor a preset"):
        check_encoder(EncodeConfig(model="nanno"))


def test_the_check_tells_weights_apart_that_every_encoding_names(encode, make_crop) -> None:
    encoding = Encoding.from_bytes(encode.encode(make_crop(caption="a house")).latents)
    assert check_encoder(NANO) == vars(encoding.digests)
    assert check_encoder(EncodeConfig(model="nano", text=False)) == {"vae": encoding.digests.vae, "text": ""}


def test_usable_samples_are_encoded_and_nothing_else_changes(encode, make_crop) -> None:
    bad = make_crop("c").rejected("crop too flat", "gray")
    given = [make_crop("a", caption="a house"), bad, make_crop("b", caption="a boat")]
    first, problem, second = read_table(encode(to_table(given)))
    assert problem == bad
    for before, after in ((given[0], first), (given[2], second)):
        assert {**vars(after), "latents": b""} == vars(before)
        assert Encoding.from_bytes(after.latents).mean.shape == (2, 4, 4, 4)
    assert first.latents != second.latents, "the captions differ"


def test_the_bytes_depend_on_crop_and_caption_alone(encode, make_crop) -> None:
    samples = [make_crop(str(i), caption=f"picture {i}", hq=noise(i)) for i in range(3)]
    together = [sample.latents for sample in read_table(encode(to_table(samples)))]
    alone = [read_table(Encode(NANO)(to_table([sample])))[0].latents for sample in reversed(samples)]
    assert together == alone[::-1]
    assert len(set(together)) == 3


@pytest.mark.ray
def test_actors_of_ray_give_the_bytes_of_this_process(local_ray, encode, make_crop) -> None:
    shards = [[make_crop(f"{i}{j}", caption="a cat", shard=i, hq=noise(i + j)) for j in range(2)] for i in range(3)]
    expected = [row for shard in shards for row in encode(to_table(shard)).to_pylist()]
    ds = ray.data.from_arrow([to_table(shard) for shard in shards])
    rows = encode_stage(ds, NANO, WorkersConfig(encode_actors=2), seed=0).take_all()
    assert sorted(rows, key=lambda row: (row["shard"], row["key"])) == expected


def noise(seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8).tobytes()
