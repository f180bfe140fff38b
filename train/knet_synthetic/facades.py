"""Fronts of buildings as flat textures: walls, windows, doors, shop fronts."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from knet_synthetic.noise import Array, fractal

PPM = 30  # texture pixels per metre
FLOOR = 3.0  # metres

BRICKS = ((150, 92, 72), (172, 140, 100), (128, 82, 66), (160, 112, 84), (118, 96, 84))
RENDERS = ((214, 208, 194), (192, 180, 158), (224, 224, 218), (200, 172, 140), (176, 184, 190))
STONES = ((166, 158, 144), (146, 140, 130), (182, 172, 150))
FRAMES = ((232, 232, 228), (230, 230, 226), (60, 56, 52), (96, 70, 50), (70, 84, 80))
SHOPS = ((36, 60, 52), (120, 28, 30), (28, 42, 84), (40, 40, 42), (190, 150, 40), (84, 40, 84))


@dataclass(frozen=True)
class Facade:
    """The street front, its plain side wall, and the roof's colour; sizes in metres."""

    front: Array
    side: Array
    width: float
    height: float
    roof: tuple[int, int, int]
    pitched: bool


def draw_facade(rng: np.random.Generator, style: str) -> Facade:
    """`style` is terrace, high street, office or suburb."""
    floors = {
        "terrace": int(rng.integers(2, 4)),
        "high street": int(rng.integers(2, 5)),
        "office": int(rng.integers(3, 6)),
        "suburb": 2,
    }[style]
    width, height = float(rng.uniform(6.0, 11.0)), floors * FLOOR + float(rng.uniform(0.2, 0.9))
    if style == "office":
        width += 4.0
    rows, columns = round(height * PPM), round(width * PPM)
    front, base = _wall(rng, rows, columns, style)
    side = _wall(rng, rows // 2, columns // 2, style, base)[0]
    bays = max(2, round(width / rng.uniform(1.9, 3.0)))
    frame = np.array(FRAMES[rng.integers(len(FRAMES))])
    pitch = columns / bays
    tall, wide = rng.uniform(0.42, 0.6), rng.uniform(0.38, 0.62)
    lintel = np.clip(base * rng.uniform(0.7, 1.35), 0, 240)
    shop = style == "high street" and rng.random() < 0.85
    if style == "office" and rng.random() < 0.6:
        tall, wide = 0.62, 0.92
    for floor in range(floors):
        bottom = rows - floor * FLOOR * PPM
        if floor == 0 and shop:
            _shop(front, rng, round(bottom - 1.05 * FLOOR * PPM))
            continue
        door = int(rng.integers(bays)) if floor == 0 else -1
        for bay in range(bays):
            middle = (bay + 0.5) * pitch
            half = pitch * wide * 0.5
            sill = bottom - 0.28 * FLOOR * PPM
            if bay == door:
                _door(front, rng, (middle - 15, bottom - 2.15 * PPM, middle + 15, bottom))
            else:
                box = (middle - half, sill - tall * FLOOR * PPM, middle + half, sill)
                _window(front, rng, box, frame, lintel)
        if floor and rng.random() < 0.3:
            y = round(bottom)
            front[max(y - 4, 0) : y] = np.clip(base * 1.15, 0, 245)
    cornice = np.clip(base * rng.uniform(0.6, 1.3), 0, 245)
    front[:5] = cornice
    front[5:9] = (front[5:9] * 0.6).astype(np.uint8)
    # Soot and damp near the ground, and the occlusion of the corner that a wall makes with it.
    grime = np.ones((rows, 1, 1), np.float32)
    foot = round(0.9 * PPM)
    grime[-foot:, 0, 0] = np.linspace(1.0, 0.62, foot)
    front = np.clip(front * grime, 0, 255).astype(np.uint8)
    dark = rng.uniform(0.7, 1.1)
    roof = (92, 94, 102) if rng.random() < 0.6 else (146, 88, 66)
    tone = (round(roof[0] * dark), round(roof[1] * dark), round(roof[2] * dark))
    return Facade(front, side, width, height, tone, style != "office" and rng.random() < 0.85)


def _wall(
    rng: np.random.Generator, rows: int, columns: int, style: str, base: Array | None = None
) -> tuple[Array, Array]:
    kind = rng.choice(3, p=[0.1, 0.45, 0.45] if style == "office" else [0.55, 0.33, 0.12])
    if base is None:
        colours = (BRICKS, RENDERS, STONES)[kind]
        base = np.array(colours[rng.integers(len(colours))]) * rng.uniform(0.85, 1.1)
    y, x = np.arange(rows)[:, None], np.arange(columns)[None]
    if kind == 1:
        tone: Array = np.ones((rows, columns), np.float32)
    else:
        tall, long = (3, 8) if kind == 0 else (12, 24)
        course = y // tall
        brick = (x + (course % 2) * (long // 2)) // long
        table = rng.normal(1.0, 0.09, (rows // tall + 1, columns // long + 2)).astype(np.float32)
        tone = table[course, brick]
        joint = (y % tall == 0) | ((x + (course % 2) * (long // 2)) % long == 0)
        tone = np.where(joint, tone * 0.45 + (0.62 if kind == 0 else 0.4), tone)
    # Streaks run down walls: noise far longer in height than in width.
    tone = tone + 0.06 * fractal(rng, rows, columns, (2, 24), 2)
    tone = tone + 0.04 * fractal(rng, rows, columns, (24, 24), 2)
    return np.clip(tone[..., None] * base, 0, 255).astype(np.uint8), base


def _window(
    image: Array,
    rng: np.random.Generator,
    box: tuple[float, float, float, float],
    frame: Array,
    lintel: Array,
) -> None:
    left, top, right, bottom = (round(v) for v in box)
    _fill(image, left - 3, top - 5, right + 3, top, lintel)
    _fill(image, left - 3, bottom, right + 3, bottom + 4, np.clip(lintel * 1.15, 0, 250))
    _fill(image, left - 2, bottom + 4, right + 2, bottom + 7, np.array((70, 66, 62)))
    _fill(image, left, top, right, bottom, frame)
    _glass(image, rng, left + 2, top + 2, right - 2, bottom - 2)
    middle = (left + right) // 2
    if right - left > 22:
        _fill(image, middle - 1, top, middle + 1, bottom, frame)
    cut = top + round((bottom - top) * rng.choice([0.35, 0.5]))
    _fill(image, left, cut - 1, right, cut + 1, frame)
    # The reveal: a window stands back from the wall and its lintel throws a shade on the pane.
    shade = image[max(top, 0) : max(top + 4, 0), max(left, 0) : max(right, 0)]
    shade[...] = (shade * 0.6).astype(np.uint8)


def _glass(
    image: Array, rng: np.random.Generator, left: int, top: int, right: int, bottom: int
) -> None:
    pane = image[max(top, 0) : bottom, max(left, 0) : right]
    if pane.size == 0:
        return
    rows, columns = pane.shape[:2]
    sky = rng.uniform(0.1, 0.75)
    low, high = np.array((34, 38, 44)), np.array((132, 150, 168))
    ramp = np.linspace(sky, sky * 0.3, rows)[:, None] * np.linspace(1.0, 0.6, columns)[None]
    pane[...] = (low + (high - low) * ramp[..., None]).astype(np.uint8)
    if rng.random() < 0.4:  # curtains
        side = max(1, round(columns * rng.uniform(0.15, 0.3)))
        cloth = np.array((196, 188, 174)) * rng.uniform(0.5, 1.0)
        pane[:, :side] = pane[:, columns - side :] = cloth
    elif rng.random() < 0.25:  # a blind
        pane[: round(rows * rng.uniform(0.3, 0.7))] = np.array((204, 200, 190)) * 0.85


def _door(image: Array, rng: np.random.Generator, box: tuple[float, float, float, float]) -> None:
    left, top, right, bottom = (round(v) for v in box)
    _fill(image, left - 3, top - 4, right + 3, bottom, np.array((206, 202, 192)))
    paint = np.array(SHOPS[rng.integers(len(SHOPS))]) * rng.uniform(0.7, 1.1)
    _fill(image, left, top + 9, right, bottom, np.clip(paint, 0, 255))
    _glass(image, rng, left + 2, top + 1, right - 2, top + 8)
    for y in (top + 16, top + 38):
        _fill(image, left + 5, y, right - 5, y + 17, np.clip(paint * 0.75, 0, 255))


def _shop(image: Array, rng: np.random.Generator, top: int) -> None:
    rows, columns = image.shape[:2]
    top = max(top, 0)
    paint = np.array(SHOPS[rng.integers(len(SHOPS))])
    _fill(image, 0, top, columns, rows, paint * 0.9)
    board = top + round(0.65 * PPM)
    _fill(image, 4, top + 4, columns - 4, board, np.clip(paint * rng.uniform(0.8, 1.5), 0, 255))
    letters = np.array((236, 228, 200)) if paint.sum() < 330 else np.array((30, 30, 30))
    x = round(columns * rng.uniform(0.12, 0.3))
    while x < columns * 0.8:  # strokes that read as a name from the far side of the street
        stroke = int(rng.integers(3, 8))
        _fill(image, x, top + 8, x + 2, board - 4, letters)
        y = int(rng.integers(top + 8, board - 5))
        _fill(image, x, y, x + stroke, y + 2, letters)
        x += stroke + 3 + (6 if rng.random() < 0.15 else 0)
    panes = max(2, columns // 75)
    door = int(rng.integers(panes))
    for pane in range(panes):
        left, right = 6 + pane * columns // panes, (pane + 1) * columns // panes - 4
        sill = rows - (3 if pane == door else round(0.55 * PPM))
        _glass(image, rng, left, board + 5, right, sill)
        if pane == door:
            _fill(image, (left + right) // 2 - 1, board + 5, (left + right) // 2 + 2, sill, paint)
            continue
        for _ in range(int(rng.integers(3, 9))):  # goods on display, dim behind the glass
            x, y = int(rng.integers(left, right)), int(rng.integers(board + 30, sill))
            size = int(rng.integers(4, 14))
            goods = rng.uniform(30, 190, 3)
            _fill(image, x, y, min(x + size, right), sill, goods)
    if rng.random() < 0.3:  # a striped awning
        for x in range(0, columns, 16):
            tone = np.array((224, 218, 206)) if x % 32 else np.clip(paint * 1.3, 0, 255)
            _fill(image, x, board, x + 16, board + 18, tone)
        _fill(image, 0, board + 18, columns, board + 26, np.array((40, 40, 44)))


def _fill(image: Array, left: int, top: int, right: int, bottom: int, colour: Array) -> None:
    cv2.rectangle(
        image,
        (left, top),
        (right - 1, bottom - 1),
        (float(colour[0]), float(colour[1]), float(colour[2])),
        cv2.FILLED,
    )
