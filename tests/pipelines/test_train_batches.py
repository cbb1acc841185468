from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from pipelines.stages.write import encode_png
from pipelines.training.batch_split import BatchSplit
from pipelines.training.batches import (
    Batch,
    CropConfig,
    ItemDraws,
    MicroBatches,
    cut_item,
    decode,
    draw_item,
    micro_batches,
    to_tensor,
)
from sr_platform.errors import InputDataError
from sr_platform.sample_reader import SampleReader

CROP = CropConfig(size_px=32, caption_dropout=0.2)


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


class Samples(list[dict[str, bytes]]):
    """A prepared dataset in memory, which remembers what was read."""

    def __init__(self) -> None:
        self.mixture: dict[str, float] = {}
        self.read: list[tuple[int, Sequence[str]]] = []

    @property
    def keys(self) -> list[str]:
        return [f"sample-{i}" for i in range(len(self))]

    @property
    def groups(self) -> dict[str, np.ndarray]:
        """The last sample is a face."""
        return {"nature": np.arange(len(self) - 1), "faces": np.array([len(self) - 1])}

    def suffixes(self, index: int) -> list[str]:
        return sorted(self[index])

    def read_members(self, wanted: Sequence[tuple[int, Sequence[str]]]) -> list[dict[str, bytes]]:
        self.read += wanted
        return [{suffix: self[index][suffix] for suffix in suffixes} for index, suffixes in wanted]


@pytest.fixture(scope="module")
def samples() -> Samples:
    rng = np.random.default_rng(0)
    result = Samples()
    for i in range(11):
        lq = rng.integers(0, 256, (10 + i, 12, 3), dtype=np.uint8)
        hq = np.asarray(Image.fromarray(lq).resize((lq.shape[1] * 4, lq.shape[0] * 4)))
        result.append({"hq.png": png(hq), "lq.png": png(lq), "json": json.dumps({"caption": f"picture {i}"}).encode()})
    return result


def all_of_update(samples: Samples, split: BatchSplit, update: int) -> dict[int, tuple[object, ...]]:
    """Everything the ranks together see of one update, by number in the stream."""
    seen: dict[int, tuple[object, ...]] = {}
    for rank in range(split.world_size):
        dataset = MicroBatches(samples, split, rank=rank, seed=5, crop=CROP)
        for micro_step in range(split.accumulation):
            batch = dataset[update * split.accumulation + micro_step]
            for i, sample in enumerate(batch.samples):
                if not batch.weights[i]:
                    continue
                assert sample not in seen
                pixels = (batch.hq[i].numpy().tobytes(), batch.lq[i].numpy().tobytes())
                seen[sample] = (*pixels, batch.captions[i], tuple(batch.time_ids[i].tolist()))
    return seen


def test_recorded_draws_give_the_released_item(golden) -> None:
    case = golden("case09_dataset_item")
    for item in case.about["items"]:
        flip, (_, _, _, top), (_, _, _, left), (_, choice), drop = item["draws"]
        draws = ItemDraws(
            is_flipped=flip[1] < 0.5,
            top_px=top,
            left_px=left,
            upsampling={"0": "nearest", "2": "bilinear", "3": "bicubic"}[choice],
            is_caption_dropped=drop[1] < 0.2,
        )
        result = cut_item(case["hr_a"].numpy(), case["lr_a"].numpy(), item["text"], draws, crop_px=32)
        assert case.max_error(f"{item['tag']}_image", to_tensor([result.hq])[0]) <= 1e-6
        assert case.max_error(f"{item['tag']}_lq_image", to_tensor([result.lq])[0]) <= 1e-6
        sizes = (*item["original_size"], *item["crop_coords_top_left"], *item["target_size"])
        assert result.time_ids == sizes
        assert result.caption == item["text"]


def test_a_picture_smaller_than_the_crop_is_mirrored_at_its_right_and_bottom_edge(golden) -> None:
    case = golden("case09_dataset_item")
    hq, lq = case["hr_b"].numpy(), case["lr_b"].numpy()
    draws = ItemDraws(is_flipped=False, top_px=0, left_px=3, upsampling="nearest", is_caption_dropped=True)
    item = cut_item(hq, lq, "text", draws, crop_px=32)
    padded = np.pad(lq, ((0, 7), (0, 0), (0, 0)), mode="reflect")
    np.testing.assert_array_equal(item.lq[::4, ::4], padded[:32, 3:35])
    np.testing.assert_array_equal(item.hq[100:], hq[98:70:-1, 12:140])
    assert item.time_ids == (128, 240, 0, 12, 128, 128)
    assert item.caption == ""


def test_a_flip_mirrors_both_pictures_before_they_are_cut() -> None:
    rng = np.random.default_rng(1)
    hq, lq = rng.integers(0, 256, (64, 96, 3), dtype=np.uint8), rng.integers(0, 256, (16, 24, 3), dtype=np.uint8)
    draws = ItemDraws(is_flipped=True, top_px=1, left_px=2, upsampling="nearest", is_caption_dropped=False)
    item = cut_item(hq, lq, "", draws, crop_px=8)
    np.testing.assert_array_equal(item.lq[::4, ::4], lq[1:9, ::-1][:, 2:10])
    np.testing.assert_array_equal(item.hq, hq[4:36, ::-1][:, 8:40])


def test_draws_follow_the_specified_probabilities() -> None:
    draws = [draw_item(3, n, 40, 50, crop_px=32, caption_dropout=0.2) for n in range(4000)]
    assert np.mean([d.is_flipped for d in draws]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([d.is_caption_dropped for d in draws]) == pytest.approx(0.2, abs=0.025)
    assert {d.top_px for d in draws} == set(range(9))
    assert {d.left_px for d in draws} == set(range(19))
    for name in ("nearest", "bilinear", "bicubic"):
        assert np.mean([d.upsampling == name for d in draws]) == pytest.approx(1 / 3, abs=0.03)


@pytest.mark.parametrize(("world_size", "max_micro_batch"), [(1, 2), (2, 4), (2, 1), (4, 3), (3, 2), (5, 1)])
def test_an_update_sees_the_same_examples_on_any_number_of_workers(samples, world_size, max_micro_batch) -> None:
    alone = BatchSplit.derive(8, 1, 8)
    split = BatchSplit.derive(8, world_size, max_micro_batch)
    for update in (0, 1, 5):
        assert all_of_update(samples, split, update) == all_of_update(samples, alone, update)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_may_start_at_any_update_and_in_another_process(samples, num_workers: int) -> None:
    dataset = MicroBatches(samples, BatchSplit.derive(4, 1, 2), rank=0, seed=5, crop=CROP)
    whole = list(micro_batches(dataset, 0, 4, num_workers=0))
    rest = list(micro_batches(dataset, 2, 4, num_workers=num_workers))
    assert [b.samples for b in rest] == [[8, 9], [10, 11], [12, 13], [14, 15]]
    for batch, expected in zip(rest, whole[4:], strict=True):
        torch.testing.assert_close(batch.lq, expected.lq, rtol=0, atol=0)
        assert batch.captions == expected.captions


def test_for_a_gpu_every_tensor_of_a_batch_lies_in_pinned_memory(samples: Samples, monkeypatch) -> None:
    pinned: list[int] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(id(copy := tensor.clone()))
        return copy

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batch = MicroBatches(samples, BatchSplit(2, 1, 2), rank=0, seed=5, crop=CROP)[0]
    moved = pin_memory(batch)  # what DataLoader does to each item
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert id(after) in pinned
            assert torch.equal(after, before)
        else:
            assert after == before
    assert len(pinned) == 4


@pytest.fixture
def varied(samples: Samples) -> Samples:
    """The same samples with three low-quality variants each, mirrored top to bottom one after the other."""
    result = Samples()
    for members in samples:
        lq = decode(members["lq.png"])
        result.append({**members, "lq1.png": png(lq[::-1]), "lq2.png": png(lq[:, ::-1])})
    return result


def test_of_several_variants_one_is_drawn_per_sample_and_only_it_is_read(samples: Samples, varied: Samples) -> None:
    split = BatchSplit.derive(4, 1, 4)
    seen = [all_of_update(varied, split, update) for update in range(60)]
    names = [suffixes[1] for _, suffixes in varied.read]
    for name in ("lq.png", "lq1.png", "lq2.png"):
        assert names.count(name) / len(names) == pytest.approx(1 / 3, abs=0.1)
    assert all(suffixes == ("hq.png", name, "json") for (_, suffixes), name in zip(varied.read, names, strict=True))
    # A variant changes neither what is drawn about a sample nor the order of samples.
    for update, found in enumerate(seen):
        plain = all_of_update(samples, split, update)
        for sample, (hq, lq, *text) in found.items():
            assert (hq, *text) == (plain[sample][0], *plain[sample][2:])
            assert (lq == plain[sample][1]) == (names[sample] == "lq.png")


def test_a_mixture_decides_how_often_each_group_is_drawn(samples: Samples) -> None:
    mixed = Samples()
    mixed.extend(samples)
    mixed.mixture = {"nature": 0.75, "faces": 0.25}
    dataset = MicroBatches(mixed, BatchSplit.derive(8, 2, 4), rank=1, seed=5, crop=CROP)
    captions = [caption for number in range(12) for caption in dataset[number].captions]
    faces = [caption for caption in captions if caption == "picture 10"]
    assert 0.25 * 0.5 < len(faces) / len(captions) <= 0.25 + 1 / len(captions)  # a fifth of captions is dropped


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(prepared_dataset: str, num_workers: int) -> None:
    split = BatchSplit.derive(4, 2, 1)

    def batches(first: int, last: int, workers: int) -> list[Batch]:
        dataset = MicroBatches(SampleReader(prepared_dataset), split, rank=1, seed=7, crop=CROP)
        return list(micro_batches(dataset, first, last, num_workers=workers))

    whole, resumed = batches(0, 7, 0), batches(4, 7, num_workers)  # an epoch ends after update 3
    assert len(resumed) == 6
    for batch, expected in zip(resumed, whole[8:], strict=True):
        assert batch.samples == expected.samples
        assert batch.captions == expected.captions
        for name in ("hq", "lq", "time_ids"):
            torch.testing.assert_close(getattr(batch, name), getattr(expected, name), rtol=0, atol=0)


def test_pictures_are_decoded_to_the_pixels_that_were_encoded() -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    np.testing.assert_array_equal(decode(png(pixels)), pixels)
    np.testing.assert_array_equal(decode(encode_png(pixels)), pixels)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"hq.png": b"\x89PNG damaged"}, "a picture of sample sample-0 is damaged; run pipelines/prepare.py verify"),
        ({"lq.png": None}, "sample sample-0 has no lq.png; prepare the dataset again"),
    ],
)
def test_a_damaged_or_missing_picture_is_named(samples: Samples, members: dict[str, bytes | None], message) -> None:
    broken = Samples()
    broken.append({name: data for name, data in {**samples[0], **members}.items() if data is not None})
    dataset = MicroBatches(broken, BatchSplit.derive(1, 1, 1), rank=0, seed=5, crop=CROP)
    with pytest.raises(InputDataError, match=message):
        dataset[0]
