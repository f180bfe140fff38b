"""The sides of the street: fronts, side walls and roofs, and what bounds their gardens.

A front is a flat texture of walls, windows, doors and shop fronts, drawn once for each facade.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np

from knet_synthetic.canvas import (
    BUILDING,
    FENCE,
    NEAR,
    TREE,
    Array,
    Camera,
    Canvas,
    fractal,
    upright,
)
from knet_synthetic.layout import STYLES, Layout, Plot
from knet_synthetic.sky import Climate

DEPTH = 9.0  # metres from front to back
SLIVER = 7  # sub-samples of width below which a front is drawn in one colour
PPM = 30  # texture pixels per metre
FLOOR = 3.0  # metres

BRICKS = ((150, 92, 72), (172, 140, 100), (128, 82, 66), (160, 112, 84), (118, 96, 84))
RENDERS = ((214, 208, 194), (192, 180, 158), (224, 224, 218), (200, 172, 140), (176, 184, 190))
STONES = ((166, 158, 144), (146, 140, 130), (182, 172, 150))
FRAMES = ((232, 232, 228), (230, 230, 226), (60, 56, 52), (96, 70, 50), (70, 84, 80))
SHOPS = ((36, 60, 52), (120, 28, 30), (28, 42, 84), (40, 40, 42), (190, 150, 40), (84, 40, 84))
_Box = tuple[float, float, float, float]  # left, top, right, bottom


class Buildings:
    def __init__(self, rng: np.random.Generator, layout: Layout, climate: Climate) -> None:
        self._layout, self._climate = layout, climate
        styles = np.repeat(STYLES, layout.facades).tolist()
        facades = self._facades = [_draw_facade(rng, style) for style in styles]
        # The front of facade k is number k, its side wall number -1 - k.
        self._textures = [f.front for f in facades] + [f.side for f in reversed(facades)]
        self._boundaries = {"fence": _planks(rng), "hedge": _hedge(rng), "railing": _bars()}
        self._lit = lru_cache(maxsize=384)(self._light)
        self._mean = lru_cache(maxsize=1024)(self._mean_light)
        self._bound = lru_cache(maxsize=128)(self._light_boundary)

    def height(self, plot: Plot) -> float:
        return self._facades[plot.facade].height * plot.scale if plot.facade >= 0 else 0.0

    def draw(self, canvas: Canvas, camera: Camera, plot: Plot, before: Plot | None) -> None:
        """`before` is the next plot towards the camera on the same side."""
        start = max(plot.start, camera.s + 1.5 * NEAR)
        if plot.end - start < 0.2:
            return
        if plot.facade >= 0:
            self._building(canvas, camera, plot, before, start)
        if plot.boundary:
            self._boundary(canvas, camera, plot, start)

    def _building(
        self, canvas: Canvas, camera: Camera, plot: Plot, before: Plot | None, start: float
    ) -> None:
        facade, height = self._facades[plot.facade], self.height(plot)
        x = self._layout.wall(plot.side) + plot.side * plot.setback
        ridge = x + plot.side * DEPTH / 2
        rise = 2.6 if facade.pitched else 0.0
        fade = self._climate.fade(0.5 * (start + plot.end) - camera.s)
        hidden = self._hidden(plot, before)
        if plot.start > camera.s + 2 * NEAR and hidden < height + rise:
            self._side_wall(canvas, camera, plot, x, height, rise, fade, hidden)
        if facade.pitched:
            slope = self._climate.shade((-plot.side * 0.5, 0.87, 0.0)) * (1 - fade)
            tone = np.clip(facade.roof * slope, 0, 255) + self._climate.horizon * fade
            eaves = x - plot.side * 0.25
            low, high = height - 0.1, height + rise
            corners = np.array([[eaves, low, start], [eaves, low, plot.end],
                                [ridge, high, plot.end], [ridge, high, start]])  # fmt: skip
            canvas.polygon(camera.polygon(corners), np.clip(tone, 0, 255), BUILDING)
            self._chimney(canvas, camera, plot, ridge, height + rise, fade)
        screen = camera.project(upright(x, height, start, plot.end))
        wide, normal = abs(screen[0, 0] - screen[1, 0]), -plot.side
        if wide < 0.5 or not _inside(screen, canvas):
            return
        if wide < SLIVER:
            canvas.polygon(screen, self._mean(plot.facade, normal, round(fade * 20)), BUILDING)
            return
        texture = self._fit(plot.facade, normal, fade, screen)
        rows, columns = texture.shape[:2]
        # The part that the near plane cut off is not squeezed into what is left.
        first = (start - plot.start) / (plot.end - plot.start) * columns
        source = np.array([[first, 0], [columns, 0], [columns, rows], [first, rows]]) - 0.5
        if plot.flip:
            source[:, 0] = columns - 1 - source[:, 0]
        canvas.quad(texture, screen, BUILDING, source)

    def _side_wall(
        self, canvas: Canvas, camera: Camera, plot: Plot, x: float, height: float, rise: float,
        fade: float, hidden: float,
    ) -> None:  # fmt: skip
        back = x + plot.side * DEPTH
        low = min(hidden, height - 0.1)
        corners = np.array([[x, height, plot.start], [back, height, plot.start],
                            [back, low, plot.start], [x, low, plot.start]])  # fmt: skip
        screen = camera.project(corners)
        if not _inside(screen, canvas):
            return
        tone = self._mean(-1 - plot.facade, 0, round(fade * 20))
        if rise:
            apex = camera.project(np.array([[0.5 * (x + back), height + rise, plot.start]]))
            canvas.polygon(np.stack([screen[0], screen[1], apex[0]]), tone, BUILDING)
        if abs(screen[0, 0] - screen[1, 0]) < 4 * SLIVER:
            canvas.polygon(screen, tone, BUILDING)
            return
        texture = self._fit(-1 - plot.facade, 0, fade, screen)
        columns, rows = texture.shape[1], texture.shape[0] * (1 - low / height)
        source = np.array([[0, 0], [columns, 0], [columns, rows], [0, rows]]) - 0.5
        canvas.quad(texture, screen, BUILDING, source)

    def _hidden(self, plot: Plot, before: Plot | None) -> float:
        """Up to which height the building before this one covers its side wall."""
        if before is None or before.facade < 0 or plot.start - before.end > 0.1:
            return 0.0
        return self.height(before) if before.setback <= plot.setback + 0.1 else 0.0

    def _chimney(
        self, canvas: Canvas, camera: Camera, plot: Plot, ridge: float, top: float, fade: float
    ) -> None:
        if not 4.0 < plot.start - camera.s < 80.0:
            return
        s = plot.start + 0.4
        brick = self._climate.shade((0, 0, -1)) * np.array((140, 92, 74))
        tone = self._climate.through_haze(brick, fade)
        for half, low, high, factor in ((0.5, -0.8, 1.1, 1.0), (0.3, 1.1, 1.5, 1.15)):
            left, right, foot, head = ridge - half, ridge + half, top + low, top + high
            box = np.array([[left, foot, s], [right, foot, s], [right, head, s], [left, head, s]])
            canvas.polygon(camera.polygon(box), np.clip(tone * factor, 0, 255), BUILDING)

    def _boundary(self, canvas: Canvas, camera: Camera, plot: Plot, start: float) -> None:
        x = self._layout.wall(plot.side) + plot.side * 0.1
        height = {"fence": 1.7, "railing": 1.2, "hedge": 1.4}[plot.boundary] * plot.scale
        label = TREE if plot.boundary == "hedge" else FENCE
        screen = camera.project(upright(x, height, start, plot.end))
        if not _inside(screen, canvas):
            return
        fade = self._climate.fade(0.5 * (start + plot.end) - camera.s)
        full = self._boundaries[plot.boundary]
        columns = max(8, min(full.shape[1], round(full.shape[1] * (plot.end - start) / 12.0)))
        down_y = _halvings(full.shape[0], abs(screen[0, 1] - screen[3, 1]))
        down_x = _halvings(columns, 2 * abs(screen[0, 0] - screen[1, 0]))
        lit = self._bound(plot.boundary, plot.side, round(fade * 20), down_y, down_x)
        canvas.quad(lit[:, : max(4, columns >> down_x)], screen, label)

    def _light_boundary(self, name: str, side: int, fade: int, down_y: int, down_x: int) -> Array:
        full, share = self._boundaries[name], fade / 20
        size = (full.shape[1] >> down_x, full.shape[0] >> down_y)
        lit = cv2.resize(full, size, interpolation=cv2.INTER_AREA).astype(np.float32)
        light = self._climate.shade((-float(side), 0.2, 0.0)) * (1 - share)
        lit[..., :3] = lit[..., :3] * light + self._climate.horizon * share
        return np.clip(lit, 0, 255).astype(np.uint8)

    def _fit(self, number: int, normal: int, fade: float, screen: Array) -> Array:
        """The texture in its light and haze, no finer than it will be seen."""
        full = self._textures[number]
        tall = max(abs(screen[0, 1] - screen[3, 1]), abs(screen[1, 1] - screen[2, 1]))
        wide = abs(screen[0, 0] - screen[1, 0]) * 1.6
        down_y, down_x = _halvings(full.shape[0], tall), _halvings(full.shape[1], wide)
        return self._lit(number, normal, round(fade * 20), down_y, down_x)

    def _mean_light(self, number: int, normal: int, fade: int) -> Array:
        """What a wall is as a whole, for those seen too narrow to show a window."""
        return np.asarray(self._lit(number, normal, fade, 4, 4).mean((0, 1)))

    def _light(self, number: int, normal: int, fade: int, down_y: int, down_x: int) -> Array:
        full = self._textures[number]
        size = (max(1, full.shape[1] >> down_x), max(1, full.shape[0] >> down_y))
        small = cv2.resize(full, size, interpolation=cv2.INTER_AREA) if down_x + down_y else full
        share = fade / 20
        way = (float(normal), 0.0, 0.0) if normal else (0.0, 0.0, -1.0)
        value = np.arange(256)[:, None] * self._climate.shade(way)
        table = self._climate.through_haze(value, share)
        lit = cv2.LUT(small, np.clip(table, 0, 255).astype(np.uint8)[:, None])
        return np.asarray(lit)


def _halvings(texels: int, samples: float) -> int:
    """How often a texture may be halved before it is coarser than the samples it fills."""
    return min(max(int(math.log2(texels / max(samples, 1.0))), 0), 4) if texels > samples else 0


def _inside(screen: Array, canvas: Canvas) -> bool:
    return bool(screen[:, 0].max() > 0 and screen[:, 0].min() < canvas.width)


def _planks(rng: np.random.Generator) -> Array:
    """Twelve metres of close-boarded fence."""
    tones = np.repeat(rng.normal(1.0, 0.12, 120), 4)
    image = np.array((142, 112, 80)) * tones[None, :, None] * np.ones((48, 1, 1))
    image *= 1 + 0.08 * fractal(rng, 48, 480, (3, 120), 2)[..., None]
    image[:, ::4] *= 0.55
    image[:, 78::80] *= 0.6
    image[:3] *= 1.2
    return np.clip(image, 0, 255).astype(np.uint8)


def _hedge(rng: np.random.Generator) -> Array:
    leaf = fractal(rng, 48, 480, (24, 240), 2)
    lump = fractal(rng, 48, 480, (2, 24), 2)
    tone = (1 + 0.28 * leaf + 0.16 * lump) * np.linspace(1.2, 0.65, 48)[:, None]
    return np.clip(np.array((70, 92, 46)) * tone[..., None], 0, 255).astype(np.uint8)


def _bars() -> Array:
    """Twelve metres of iron railings on a low wall, RGBA."""
    image: Array = np.zeros((48, 480, 4), np.uint8)
    image[..., :3] = (38, 42, 42)
    image[:, ::5, 3] = image[:, 1::5, 3] = 255
    image[3:6, :, 3] = image[30:33, :, 3] = 255
    image[36:, :, :3], image[36:, :, 3] = (140, 118, 100), 255
    return image


@dataclass(frozen=True)
class _Facade:
    """The street front, its plain side wall, and the roof's colour; sizes in metres."""

    front: Array
    side: Array
    width: float
    height: float
    roof: Array
    pitched: bool


def _draw_facade(rng: np.random.Generator, style: str) -> _Facade:
    """`style` is one of STYLES."""
    drawn = [int(rng.integers(low, high)) for low, high in ((2, 4), (2, 5), (3, 6))]
    floors = dict(zip(STYLES, (*drawn, 2), strict=True))[style]
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
            middle, half = (bay + 0.5) * pitch, pitch * wide * 0.5
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
    roof = np.rint(np.array((92, 94, 102) if rng.random() < 0.6 else (146, 88, 66)) * dark)
    return _Facade(front, side, width, height, roof, style != "office" and rng.random() < 0.85)


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


def _window(image: Array, rng: np.random.Generator, box: _Box, frame: Array, lintel: Array) -> None:
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


def _door(image: Array, rng: np.random.Generator, box: _Box) -> None:
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
    cv2.rectangle(image, (left, top), (right - 1, bottom - 1), colour.tolist(), cv2.FILLED)
