"""Pictures of text: a board with writing, hung straight, turned or in perspective before a texture.

What is written, and exactly where, is known: `Picture.lines`.
"""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from pipelines.synthetic.boards import BOARDS, Board
from pipelines.synthetic.dead_leaves import dead_leaves
from pipelines.synthetic.fields import light, noise
from pipelines.synthetic.picture import SUPERSAMPLING, Picture, TextLine, quantized
from pipelines.synthetic.textures import texture

_MARGIN = 0.015
"""Share of the picture that stays free around a board."""
_CAPTION_CHARACTERS = 60


def text_picture(rng: np.random.Generator, height_px: int, width_px: int) -> Picture:
    """One picture with text."""
    behind = (dead_leaves if rng.random() < 0.2 else texture)(rng, height_px, width_px)
    scale = SUPERSAMPLING
    draw_board = BOARDS[rng.choice(len(BOARDS), p=[0.3, 0.12, 0.23, 0.2, 0.15])]
    board = draw_board(
        rng, int(width_px * scale * rng.uniform(0.6, 0.95)), int(height_px * scale * rng.uniform(0.6, 0.95))
    )
    matrix = hang(rng, board.image.size, width_px * scale, height_px * scale)
    pixels = compose(rng, behind.pixels, board, matrix)
    lines = tuple(TextLine(text, _box(matrix, ink)) for text, ink in board.lines)
    return Picture(pixels, _caption(board, behind), lines)


def hang(rng: np.random.Generator, size: tuple[int, int], width: int, height: int) -> NDArray[np.float64]:
    """The homography from a board of `size` onto a canvas: straight, turned or in perspective, and whole."""
    corners = np.array([[0, 0], [size[0], 0], [size[0], size[1]], [0, size[1]]], float)
    middle = corners - corners.mean(axis=0)
    way = rng.choice(3, p=[0.35, 0.3, 0.35])
    angle = rng.normal(0, 0.01) if way == 0 else rng.normal(0, 0.22)
    turned = middle @ np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    if way == 2:
        # Seen from the side: what is farther away is smaller.
        towards = rng.uniform(0, 2 * np.pi)
        depth = middle @ [math.cos(towards), math.sin(towards)] / max(size)
        turned = turned / (1 + rng.uniform(0.3, 0.7) * depth[:, None])
    low, high = turned.min(axis=0), turned.max(axis=0)
    room = np.array([width, height]) * (1 - 2 * _MARGIN)
    factor = min(1.0, float((room / (high - low)).min()))
    free = room - (high - low) * factor
    placed = (turned - low) * factor + np.array([width, height]) * _MARGIN + free * rng.random(2)
    return np.asarray(cv2.getPerspectiveTransform(corners.astype(np.float32), placed.astype(np.float32)), np.float64)


def compose(
    rng: np.random.Generator, behind: NDArray[np.uint8], board: Board, matrix: NDArray[np.float64]
) -> NDArray[np.uint8]:
    """The board in front of what is behind it, with its shadow and a little roughness of its own."""
    height_px, width_px = behind.shape[:2]
    canvas = (width_px * SUPERSAMPLING, height_px * SUPERSAMPLING)
    # Premultiplied, or the colour of transparent pixels would show at the edges.
    rgba = np.asarray(board.image.convert("RGBa"))
    # Pixel centres lie at half: the homography speaks of edges, warpPerspective of centres.
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
    warped = cv2.warpPerspective(rgba, np.linalg.inv(half) @ matrix @ half, canvas, flags=cv2.INTER_LINEAR)
    small = cv2.resize(warped, (width_px, height_px), interpolation=cv2.INTER_AREA).astype(np.float32) / 255
    cover = small[..., 3:]
    tile = noise(rng, 1.2)
    grain = np.tile(tile, (-(-height_px // len(tile)), -(-width_px // len(tile))))[:height_px, :width_px, None]
    factor = (1 + rng.uniform(0.005, 0.035) * grain) * light(rng, height_px, width_px)[..., None]
    blur = max(min(height_px, width_px) * rng.uniform(0.004, 0.015), 0.5)
    shadow = cv2.GaussianBlur(np.roll(cover[..., 0], (round(blur), round(blur)), (0, 1)), (0, 0), blur)[..., None]
    below = behind.astype(np.float32) / 255 * (1 - rng.uniform(0.2, 0.6) * shadow)
    return quantized(below * (1 - cover) + small[..., :3] * factor)


def _box(matrix: NDArray[np.float64], ink: tuple[int, int, int, int]) -> tuple[tuple[float, float], ...]:
    left, top, right, bottom = ink
    corners = np.array([[left, top], [right, top], [right, bottom], [left, bottom]], np.float64)
    placed = cv2.perspectiveTransform(corners[None], matrix)[0] / SUPERSAMPLING
    return tuple((round(float(x), 2), round(float(y), 2)) for x, y in placed)


def _caption(board: Board, behind: Picture) -> str:
    """Names the board, quotes what fits, and says what is behind it."""
    quoted, more = board.lines[0][0], ""
    for text, _ in board.lines[1:]:
        if len(quoted) + len(text) > _CAPTION_CHARACTERS:
            more = " and more"
            break
        quoted += f" {text}"
    where = behind.caption.removesuffix(".").removesuffix(", seen from close by")
    verb = "read" if board.name.endswith("letters") else "reads"
    name = board.name[0].upper() + board.name[1:]
    return f'{name} that {verb} "{quoted}"{more}. Behind: {where[0].lower()}{where[1:]}.'
