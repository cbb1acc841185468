from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from pipelines.training.batches import (
    BatchSplit,
    CropConfig,
    ItemDraws,
    MicroBatches,
    SampleOrder,
    cut_item,
    draw_item,
    micro_batches,
    to_tensor,
)

CROP = CropConfig(size_px=32, caption_dropout=0.2)


def png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


class Samples(list[dict[str, bytes]]):
    """A prepared dataset in memory."""

    @property
    def keys(self) -> list[str]:
        return [f"sample-{i}" for i in range(len(self))]


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


@pytest.mark.parametrize(("world_size", "max_micro_batch"), [(1, 2), (2, 4), (2, 1), (4, 3)])
def test_an_update_sees_the_same_examples_on_any_number_of_workers(samples, world_size, max_micro_batch) -> None:
    alone = BatchSplit.derive(8, 1, 8)
    split = BatchSplit.derive(8, world_size, max_micro_batch)
    assert split.world_size * split.micro_batch * split.accumulation == 8
    for update in (0, 1, 5):
        assert all_of_update(samples, split, update) == all_of_update(samples, alone, update)


@pytest.mark.parametrize(("share", "largest", "expected"), [(32, 16, 16), (12, 5, 4), (7, 4, 1), (4, 100, 4)])
def test_the_micro_batch_is_the_largest_that_divides_the_share(share: int, largest: int, expected: int) -> None:
    split = BatchSplit.derive(share * 2, 2, largest)
    assert (split.micro_batch, split.accumulation) == (expected, share // expected)


def test_every_epoch_visits_every_sample_once_in_another_order() -> None:
    order = SampleOrder(seed=9, num_samples=23)
    epochs = [[order.index(epoch * 23 + i) for i in range(23)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == [SampleOrder(seed=9, num_samples=23).index(23 + i) for i in range(23)]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_may_start_at_any_update_and_in_another_process(samples, num_workers: int) -> None:
    dataset = MicroBatches(samples, BatchSplit.derive(4, 1, 2), rank=0, seed=5, crop=CROP)
    whole = list(micro_batches(dataset, 0, 4, num_workers=0))
    rest = list(micro_batches(dataset, 2, 4, num_workers=num_workers))
    assert [b.samples for b in rest] == [[8, 9], [10, 11], [12, 13], [14, 15]]
    for batch, expected in zip(rest, whole[4:], strict=True):
        torch.testing.assert_close(batch.lq, expected.lq, rtol=0, atol=0)
        assert batch.captions == expected.captions
