"""Near duplicates are found exactly, whatever the number of pictures, and the first of them stays."""

from __future__ import annotations

import numpy as np

from pipelines.preparation.duplicates import find_duplicates


def hashes(rows: np.ndarray) -> list[str]:
    return [row.tobytes().hex() for row in rows]


def flipped(row: np.ndarray, num_bits: int, seed: int) -> np.ndarray:
    bits = np.unpackbits(row)
    bits[np.random.default_rng(seed).choice(256, num_bits, replace=False)] ^= 1
    return np.packbits(bits)


def random_rows(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 32), dtype=np.uint8)


def test_everything_within_the_limit_is_found_and_nothing_beyond() -> None:
    rows = random_rows(60)
    copies = np.stack([flipped(row, bits, seed) for seed, (row, bits) in enumerate(zip(rows, range(60), strict=True))])
    found = find_duplicates(hashes(np.concatenate([rows, copies])), max_bits=16)
    assert (found[:60] == -1).all()
    np.testing.assert_array_equal(found[60:], [i if i <= 16 else -1 for i in range(60)])


def test_the_answer_equals_a_comparison_of_all_pairs() -> None:
    base = random_rows(30)
    rows = np.concatenate([base, *(np.stack([flipped(r, b, b) for r in base[:10]]) for b in (3, 9, 14))])
    bits = np.unpackbits(rows, axis=1).astype(int)
    expected = np.full(len(rows), -1)
    for index in range(len(rows)):
        close = [o for o in range(index) if expected[o] < 0 and abs(bits[index] - bits[o]).sum() <= 12]
        expected[index] = min(close, default=-1)
    np.testing.assert_array_equal(find_duplicates(hashes(rows), max_bits=12), expected)


def test_a_chain_of_small_changes_does_not_swallow_everything() -> None:
    start = np.zeros(32, np.uint8)
    chain = []
    for step in range(6):
        bits = np.unpackbits(start)
        bits[: 10 * step] = 1
        chain.append(np.packbits(bits))
    found = find_duplicates(hashes(np.stack(chain)), max_bits=10)
    assert found.tolist() == [-1, 0, -1, 2, -1, 4]


def test_no_pictures_have_no_duplicates() -> None:
    assert len(find_duplicates([], max_bits=16)) == 0
