"""Exact and near duplicates across a whole run, by perceptual hashes of 256 bits.

find_duplicates(hashes, max_bits=16) -> for every picture the earlier one that it repeats, or -1

Exact for any number of pictures: two hashes that differ in at most d bits agree in at least one of d + 1 bands
(pigeonhole), so only pictures that share a band are compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

HASH_BITS = 256


def find_duplicates(hashes: Sequence[str], *, max_bits: int) -> NDArray[np.int64]:
    """Per picture, the index of the kept picture that it repeats, else -1; in order of precedence: the first is kept.

    `hashes` are hexadecimal, 256 bits each. A picture repeats a kept one when they differ in at most `max_bits` bits;
    one that is left out keeps nothing out itself, so chains of small changes do not swallow a whole set.
    """
    original = np.full(len(hashes), -1, np.int64)
    if not hashes:
        return original
    bits = np.array([np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8)) for text in hashes])
    assert bits.shape[1] == HASH_BITS, bits.shape
    words = np.packbits(bits, axis=1).view(np.uint64)
    for index, neighbours in enumerate(_close_earlier(bits, words, max_bits)):
        kept = [other for other in neighbours if original[other] < 0]
        if kept:
            original[index] = min(kept)
    return original


def _close_earlier(bits: NDArray[np.uint8], words: NDArray[np.uint64], max_bits: int) -> list[list[int]]:
    """For every hash, the earlier ones within `max_bits` of it."""
    close: list[set[int]] = [set() for _ in range(len(bits))]
    for band in np.array_split(np.arange(HASH_BITS), max_bits + 1):
        for members in _equal_rows(bits[:, band]):
            for position in range(1, len(members)):
                index, earlier = members[position], members[:position]
                distance = np.bitwise_count(words[earlier] ^ words[index]).sum(axis=1)
                close[index].update(earlier[distance <= max_bits].tolist())
    return [sorted(found) for found in close]


def _equal_rows(band: NDArray[np.uint8]) -> list[NDArray[np.int64]]:
    """Groups of at least two rows that are equal, each in ascending order."""
    packed = np.ascontiguousarray(np.packbits(band, axis=1))
    rows = packed.view(np.dtype((np.void, packed.shape[1]))).ravel()
    order = np.argsort(rows, kind="stable")
    ends = np.flatnonzero(rows[order][1:] != rows[order][:-1]) + 1
    return [group for group in np.split(order, ends) if len(group) > 1]
