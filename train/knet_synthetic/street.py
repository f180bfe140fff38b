"""One endless drive along one street: what is drawn in which order, and seen through which lens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from knet_synthetic.buildings import Buildings
from knet_synthetic.canvas import (
    BICYCLIST,
    CAMVID11,
    CAR,
    NEAR,
    PEDESTRIAN,
    Array,
    Camera,
    Canvas,
    generator,
)
from knet_synthetic.cars import Cars
from knet_synthetic.fixtures import Fixtures
from knet_synthetic.ground import Ground, Shadows
from knet_synthetic.layout import (
    BLOCK,
    Block,
    Car,
    Figure,
    Key,
    Plot,
    Traffic,
    build_block,
    draw_layout,
)
from knet_synthetic.people import draw_figure
from knet_synthetic.sky import Sky, draw_climate, tone_table

RANGE = 110.0  # metres that are drawn
DETAIL = 85.0  # metres within which people and what is as slight are drawn
RATE = 30.0  # frames a second
_MOST_OBJECTS = 256 - CAMVID11.num_classes  # that labels of 8 bits can tell apart; 60 are many

Draw = Callable[[], None]


class Objects(NamedTuple):
    """The cars, pedestrians and bicyclists of a frame: ``ids`` uint16 [H, W] holds 1 … S, and 0
    elsewhere. ``classes`` [S] are theirs, and ``keys`` [S] name each: an object has the same key in
    every frame."""

    ids: NDArray[np.uint16]
    classes: tuple[int, ...]
    keys: tuple[Key, ...]


class Street:
    """The street of a seed, seen at ``size`` (height, width).

    ``frame(index)`` depends on the seed, the size and the index alone; consecutive indices are a
    thirtieth of a second apart. Labels are CamVid's eleven classes in ``CAMVID11``'s order.
    A street draws on a canvas of its own: give each thread its own street.
    """

    def __init__(self, seed: int, size: tuple[int, int] = (360, 480)) -> None:
        height, width = size
        if seed < 0 or height < 32 or width < 32:
            raise ValueError(
                f"Street({seed}, {size}): a seed is not negative and a size (height, width) is at "
                "least 32 by 32"
            )
        self.seed, self.size = seed, (height, width)
        rng = generator(seed, 1)
        self._climate = draw_climate(rng)
        self._layout = draw_layout(rng)
        layout, climate = self._layout, self._climate
        self._focal = 2.0 * width * layout.focal
        self._horizon = 2.0 * height * layout.horizon
        self._buildings = Buildings(rng, layout, climate)
        self._ground = Ground(rng, layout, climate)
        self._sky = Sky(rng, climate, self._focal, self._horizon)
        self._fixtures = Fixtures(rng, climate, layout.season)
        self._cars = Cars(climate)
        self._traffic = Traffic(seed, layout, RANGE)
        self._shadows = Shadows(climate, layout, self._buildings)
        self._tone = tone_table(climate)
        self._vignette = _vignette(height, width, climate.vignette)
        grain = generator(seed, 2).normal(0, climate.noise, (height + 64, width + 64, 3))
        # Half of a sensor's grain is in its brightness, and demosaicing makes the rest soft.
        grain = 0.5 * grain + 0.8 * grain.mean(axis=2, keepdims=True)
        self._grain = np.clip(np.rint(128 + grain), 0, 255).astype(np.uint8)
        self._canvas = Canvas(height, width)
        self._block = lru_cache(maxsize=64)(partial(build_block, seed, layout))

    def frame(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """The image uint8 [H, W, 3] RGB and the labels uint8 [H, W] of a frame; IndexError
        below 0."""
        image, values, drawn = self._draw(index)
        return image, _classes(drawn)[values]

    def scene(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], Objects]:
        """The same frame, and its objects, those of no pixel left out."""
        image, values, drawn = self._draw(index)
        first = CAMVID11.num_classes
        counts = np.bincount(values.ravel(), minlength=first + len(drawn))
        seen = [number for number in range(len(drawn)) if counts[first + number]]
        table = np.zeros(first + len(drawn), np.uint16)
        table[[first + number for number in seen]] = np.arange(1, len(seen) + 1)
        classes = tuple(_class_of(drawn[number]) for number in seen)
        keys = tuple(drawn[number].key for number in seen)
        return image, _classes(drawn)[values], Objects(table[values], classes, keys)

    def _draw(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[Car | Figure]]:
        """The image; the labels, where the object of number n has the value n beyond the classes;
        and these objects, the nearest ones."""
        if index < 0:
            raise IndexError(f"frame {index}: a street begins at frame 0")
        time = index / RATE
        canvas, camera = self._canvas, self.camera(time)
        first = int(camera.s // BLOCK) - 1
        blocks = [self._block(k) for k in range(first, first + int(RANGE / BLOCK) + 3)]
        self._sky.draw(canvas, camera, np.arctan(self._layout.curve.slope(camera.s)) + camera.yaw)
        junctions = [b.junction for b in blocks if b.junction is not None]
        self._ground.draw(canvas, camera, junctions)
        for block in blocks:
            if block.crossing is not None:
                self._ground.crossing(canvas, camera, block.crossing)
            if block.junction is not None:
                self._ground.stop_line(canvas, camera, block.junction[0] - 2.0)
        moving = self._traffic.around(camera.s, time)
        mask = self._shadows.mask(self.size, camera, blocks, moving)
        top = max(int(np.ceil(camera.cy + 0.5)), 0)
        self._ground.shade(canvas, mask, top + top % 2)
        order = sorted(self._things(camera, blocks, moving, time), key=lambda item: -item[0])
        drawn = [owner for _, _, owner in order if owner is not None][-_MOST_OBJECTS:]
        numbers = {id(owner): number for number, owner in enumerate(drawn)}
        for _, draw, owner in order:
            number = numbers.get(id(owner))
            canvas.value = None if number is None else CAMVID11.num_classes + number
            draw()
        canvas.value = None
        return *self._develop(index), drawn

    def camera(self, time: float) -> Camera:
        layout = self._layout
        wave = generator(self.seed, 3).uniform(0, 6.28, 4)
        sway = 0.15 * np.sin(0.35 * time + wave[0])
        bounce = 0.004 * np.sin(2.1 * time + wave[1]) + 0.002 * np.sin(7.3 * time + wave[2])
        return Camera(
            focal=self._focal,
            cx=self.size[1] - 1.0,
            cy=self._horizon + bounce * self._focal,
            height=layout.height,
            s=layout.speed * time,
            x=layout.side * layout.lane * 0.5 + float(sway),
            yaw=float(0.02 * np.sin(0.23 * time + wave[3])),
            curve=layout.curve,
        )

    def _things(
        self, camera: Camera, blocks: list[Block], moving: list[Car | Figure], time: float
    ) -> Iterator[tuple[float, Draw, Car | Figure | None]]:
        """How far off what is drawn is, how, and the object that it is. A front counts from its
        far end: the street is nearly convex, so whatever stands in it before that end stands before
        the front."""
        canvas, climate, dim = self._canvas, self._climate, self._shadows.dim
        near, far = camera.s + NEAR, camera.s + RANGE
        before: dict[int, Plot] = {}
        for block in blocks:
            for plot in block.plots:
                if plot.end > near and plot.start < far:
                    neighbour = before.get(plot.side)
                    draw = partial(self._buildings.draw, canvas, camera, plot, neighbour)
                    yield plot.end, draw, None
                before[plot.side] = plot
            for item in block.fixtures:
                if item.kind != "tree" and item.s > camera.s + DETAIL:
                    continue
                if near < item.s + (item.size if item.kind == "barrier" else 0.0) < far:
                    yield item.s, partial(self._fixtures.draw, canvas, camera, item, time), None
            for car in block.parked:
                if near - 2.0 < car.s < far:
                    yield car.s, partial(self._cars.draw, canvas, camera, car, dim(car.x)), car
        for mover in moving:
            if not near - 5.0 < mover.s < far:
                continue
            light = dim(mover.x)
            if isinstance(mover, Car):
                yield mover.s, partial(self._cars.draw, canvas, camera, mover, light), mover
            elif mover.s < camera.s + DETAIL:
                yield mover.s, partial(draw_figure, canvas, camera, climate, mover, light), mover

    def _develop(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        """Lens and sensor: sub-samples to pixels, vignette, tone, grain, soft colour."""
        # pyrDown centres its kernel on the even samples, which are those that labels are taken of.
        image = cv2.pyrDown(self._canvas.image)
        image = cv2.multiply(image, self._vignette, scale=1 / 255)
        image = cv2.LUT(image, self._tone)
        dy, dx = generator(self.seed, 4, index).integers(0, 64, 2)
        height, width = self.size
        grain = np.ascontiguousarray(self._grain[dy : dy + height, dx : dx + width])
        image = cv2.addWeighted(image, 1.0, grain, 1.0, -128.0)
        labels = np.ascontiguousarray(self._canvas.labels[::2, ::2])
        return _soft_colour(image), labels


def _class_of(owner: Car | Figure) -> int:
    if isinstance(owner, Car):
        return CAR
    return BICYCLIST if owner.cycling else PEDESTRIAN


def _classes(drawn: Sequence[Car | Figure]) -> NDArray[np.uint8]:
    """The class of each value of the canvas's labels."""
    return np.array([*range(CAMVID11.num_classes), *map(_class_of, drawn)], np.uint8)


def _vignette(height: int, width: int, strength: float) -> Array:
    y = np.linspace(-1, 1, height)[:, None]
    x = np.linspace(-1, 1, width)[None]
    fall = 1.0 - strength * ((x * x + y * y) / 2) ** 1.3
    return np.repeat(np.rint(255 * fall).astype(np.uint8)[..., None], 3, axis=2)


def _soft_colour(image: Array) -> NDArray[np.uint8]:
    """Colour at half resolution, as JPEG and video store it."""
    planes = cv2.cvtColor(image, cv2.COLOR_RGB2YCrCb)
    y, red, blue = cv2.split(planes)
    planes = cv2.merge([y, cv2.blur(red, (3, 3)), cv2.blur(blue, (3, 3))])
    return np.asarray(cv2.cvtColor(planes, cv2.COLOR_YCrCb2RGB), np.uint8)
