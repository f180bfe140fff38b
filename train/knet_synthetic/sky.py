"""Light, weather and exposure of one street, and the sky that they make: a panorama, with the far
skyline before it, that turns with the camera."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np

from knet_synthetic.canvas import BUILDING, SKY, TREE, Array, Camera, Canvas, fractal

Vector = tuple[float, float, float]
REACH = 1.25  # radians (as tangents) that the panorama shows to either side
TALL = 0.16  # the skyline strip's height, as a tangent
# The sun's elevation (least, most; degrees), ambient and sun as irradiances, the sky's colour at
# the zenith and at the horizon, cloud and haze (least, most).
_WEATHER = (
    ((28.0, 60.0), (0.50, 0.56, 0.66), (0.78, 0.73, 0.62),  # clear
     (88, 138, 208), (206, 222, 236), (0.0, 0.45), (0.002, 0.006)),
    ((50.0, 50.0), (0.84, 0.86, 0.88), (0.10, 0.10, 0.09),  # overcast
     (196, 202, 210), (236, 238, 240), (0.8, 1.0), (0.004, 0.014)),
    ((9.0, 20.0), (0.46, 0.46, 0.54), (1.05, 0.80, 0.50),  # low sun
     (112, 142, 190), (250, 222, 180), (0.1, 0.5), (0.004, 0.010)),
    ((30.0, 30.0), (0.40, 0.42, 0.48), (0.05, 0.05, 0.04),  # the end of a grey day
     (108, 120, 142), (186, 190, 198), (0.7, 1.0), (0.003, 0.010)),
)  # fmt: skip


@dataclass(frozen=True)
class Climate:
    """`sun` and `ambient` are RGB irradiances; `towards_sun` is (x right, y up, s ahead)."""

    ambient: Array
    sun: Array
    towards_sun: Vector
    zenith: Array
    horizon: Array
    cloud: float
    haze: float  # per metre
    lamps_lit: bool
    gain: float
    gamma: float
    contrast: float
    balance: Array
    noise: float
    vignette: float

    def shade(self, normal: Vector) -> Array:
        """RGB factor on the albedo of a surface with this normal, out of any cast shadow."""
        lit = max(0.0, sum(a * b for a, b in zip(normal, self.towards_sun, strict=True)))
        return self.ambient * (0.78 + 0.22 * normal[1]) + self.sun * lit

    @property
    def in_shadow(self) -> float:
        """How bright flat ground is in a cast shadow, relative to the open."""
        return float(np.mean(self.ambient) / np.mean(self.shade((0.0, 1.0, 0.0))))

    def fade(self, distance: float) -> float:
        """The share of haze in what is seen at this distance."""
        return float(1.0 - np.exp(-self.haze * max(distance - 6.0, 0.0)))

    def through_haze(self, colour: Array, fade: float) -> Array:
        """An RGB colour, cut to 0 … 255, behind this share of haze."""
        return np.asarray(np.clip(colour, 0, 255) * (1 - fade) + self.horizon * fade)


def draw_climate(rng: np.random.Generator) -> Climate:
    kind = int(rng.choice(4, p=[0.36, 0.34, 0.2, 0.1]))
    azimuth = rng.uniform(-np.pi, np.pi)
    (low, high), ambient, sun, zenith, horizon, clouds, hazes = _WEATHER[kind]
    elevation = rng.uniform(low, high) if low < high else low
    cloud, haze = rng.uniform(*clouds), rng.uniform(*hazes)
    height, flat = np.sin(np.radians(elevation)), np.cos(np.radians(elevation))
    # The camera meters a street that is half in its own shade.
    exposure = np.mean(ambient) + 0.3 * np.mean(sun) * height
    return Climate(
        ambient=np.array(ambient) * rng.uniform(0.9, 1.1),
        sun=np.array(sun) * rng.uniform(0.85, 1.15),
        towards_sun=(float(np.sin(azimuth) * flat), float(height), float(np.cos(azimuth) * flat)),
        zenith=np.clip(np.array(zenith) * rng.uniform(0.85, 1.1), 0, 255),
        horizon=np.clip(np.array(horizon) * rng.uniform(0.95, 1.05), 0, 255),
        cloud=cloud,
        haze=haze,
        lamps_lit=kind == 3,
        gain=float(rng.uniform(0.72, 1.2) / (0.3 + 0.7 * exposure)),
        gamma=rng.uniform(0.85, 1.25),
        contrast=rng.uniform(0.15, 0.6),
        balance=1.0 + rng.uniform(-0.05, 0.05, 3),
        noise=rng.uniform(1.5, 5.0),
        vignette=rng.uniform(0.1, 0.4),
    )


def tone_table(climate: Climate) -> Array:
    """The camera's response as a [256, 1, 3] lookup table: gain, balance, gamma and an S-curve."""
    value = np.linspace(0.0, 1.0, 256)[:, None] * climate.gain * climate.balance
    value = np.clip(value, 0.0, 1.0) ** climate.gamma
    curve = value * value * (3.0 - 2.0 * value)
    value = value + climate.contrast * (curve - value)
    return np.rint(value * 255.0).astype(np.uint8)[:, None, :]


class Sky:
    """Built for one focal length and horizon, in sub-samples."""

    def __init__(
        self, rng: np.random.Generator, climate: Climate, focal: float, horizon: float
    ) -> None:
        # Clouds are soft: a quarter of the frame's resolution, and less for large frames.
        self._scale = min(0.25, 140.0 / horizon)
        rows = max(8, round((horizon + 0.1 * focal) * self._scale))
        columns = max(16, round(2 * REACH * focal * self._scale))
        self._sky = _paint_sky(rng, climate, rows, columns, focal * self._scale)
        self._strip, self._strip_labels = _paint_skyline(
            rng, climate, max(4, round(TALL * focal)), round(2 * REACH * focal)
        )

    def draw(self, canvas: Canvas, camera: Camera, heading: float) -> None:
        """`heading` is the street's direction at the camera, in radians."""
        bottom = min(int(np.ceil(camera.cy)) + 2, canvas.height)
        turn = heading * camera.focal
        # The window moves by fractions of the small panorama's cells, then is enlarged.
        small = (math.ceil(canvas.width * self._scale), math.ceil(bottom * self._scale))
        across, along = canvas.width / small[0], bottom / small[1]
        k = self._scale
        left = (turn - camera.cx + 0.5 * across - 0.5) * k + self._sky.shape[1] / 2
        top = self._sky.shape[0] - 1 - (camera.cy - 0.5 * along + 0.5) * k
        matrix = np.array([[across * k, 0, left], [0, along * k, top]])
        flags, border = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, cv2.BORDER_REFLECT_101
        window = cv2.warpAffine(self._sky, matrix, small, flags=flags, borderMode=border)
        cv2.resize(window, (canvas.width, bottom), dst=canvas.image[:bottom])
        canvas.labels[:bottom] = SKY
        self._skyline(canvas, bottom, round(turn - camera.cx))

    def _skyline(self, canvas: Canvas, bottom: int, shift: int) -> None:
        rows, columns = self._strip_labels.shape
        top = max(bottom - rows, 0)
        start = shift + columns // 2
        first, last = max(0, -start), min(canvas.width, columns - start)
        if last <= first or bottom <= top:
            return
        window = (slice(rows - (bottom - top), rows), slice(start + first, start + last))
        labels = self._strip_labels[window]
        mask = cv2.threshold(labels, 0, 255, cv2.THRESH_BINARY)[1]
        cv2.copyTo(self._strip[window], mask, canvas.image[top:bottom, first:last])
        cv2.copyTo(labels, mask, canvas.labels[top:bottom, first:last])


def _paint_sky(
    rng: np.random.Generator, climate: Climate, rows: int, columns: int, focal: float
) -> Array:
    height = np.linspace(1.0, 0.0, rows, dtype=np.float32)[:, None]
    ramp = (height**0.7)[..., None]
    image = climate.horizon * (1 - ramp) + climate.zenith * ramp
    image = np.broadcast_to(image, (rows, columns, 3)).astype(np.float32)
    noise = fractal(rng, rows, columns, (4, 9), 5)
    # Clouds seen from below pile up towards the horizon: squeeze the noise's rows there.
    squeeze = (np.sqrt(1 - height[:, 0]) * (rows - 1)).astype(int)
    noise = noise[squeeze]
    cover = np.clip((noise - (1.1 - 2.2 * climate.cloud)) * 0.9, 0, 1)[..., None]
    under = np.clip(0.86 + 0.10 * np.roll(noise, rows // 12, 0), 0.6, 1.05)[..., None]
    image = image * (1 - 0.85 * cover) + (climate.horizon * under) * 0.85 * cover
    sun_x, sun_y, sun_s = climate.towards_sun
    if sun_s > 0.1 and climate.sun.mean() > 0.2:
        x = (np.arange(columns) - columns / 2)[None] / focal - sun_x / sun_s
        y = (rows - 1 - np.arange(rows))[:, None] / focal - sun_y / sun_s
        glow = np.exp(-(x * x + y * y) / 0.10)[..., None]
        image = image + (255 - image) * np.clip(1.1 * glow * (1 - 0.5 * cover), 0, 1)
    return np.asarray(np.clip(image, 0, 255), np.uint8)


def _paint_skyline(
    rng: np.random.Generator, climate: Climate, rows: int, columns: int
) -> tuple[Array, Array]:
    """Roofs and tree tops some hundred and fifty metres away, in haze."""
    image: Array = np.zeros((rows, columns, 3), np.uint8)
    labels: Array = np.zeros((rows, columns), np.uint8)
    haze = float(np.clip(climate.fade(150.0), 0.35, 0.75))
    light = climate.ambient + 0.3 * climate.sun
    x = 0
    while x < columns:
        wide = int(rng.integers(rows // 3 + 1, rows + 2))
        built = rng.random() < 0.6
        wall = np.array((1.0, 0.95, 0.88)) * rng.uniform(90, 170)
        albedo = wall if built else np.array((66, 84, 48))
        colour = albedo * light * (1 - haze) + climate.horizon * haze
        fill = tuple(map(float, np.clip(colour, 0, 255)))
        top = int(rows * (1 - rng.uniform(0.25, 0.62)))
        if built:
            cv2.rectangle(image, (x, top), (x + wide, rows), fill, -1)
            cv2.rectangle(labels, (x, top), (x + wide, rows), (BUILDING,), -1)
            dark = tuple(0.95 * v for v in fill)
            for y in range(top + 6, rows, 11):
                for column in range(x + 4, x + wide - 6, 9):
                    cv2.rectangle(image, (column, y), (column + 3, y + 5), dark, -1)
        else:
            middle, crown = x + wide // 2, (rows - top) // 2
            axes = (max(1, wide // 2), max(1, (rows - top) * 3 // 5))
            for target, tone in ((image, fill), (labels, (float(TREE),))):
                cv2.ellipse(target, (middle, rows - crown), axes, 0, 0, 360, tone, -1)
            for angle in np.arange(0, 2 * np.pi, 0.22):
                tuft = rng.uniform(0.94, 1.06)
                centre = (
                    int(middle + axes[0] * np.cos(angle) * rng.uniform(0.5, 1.0)),
                    int(rows - crown + axes[1] * np.sin(angle) * rng.uniform(0.5, 1.0)),
                )
                radius = int(rng.integers(1, max(3, rows // 12)))
                cv2.circle(image, centre, radius, tuple(v * tuft for v in fill), -1)
                cv2.circle(labels, centre, radius, (TREE,), -1)
        x += max(2, int(wide * rng.uniform(0.6, 1.0)))
    # Whatever gap is left at the very foot would be sky below the roofs.
    foot = labels[rows - rows // 8 :]
    bare = foot == 0
    image[rows - rows // 8 :][bare] = climate.horizon * haze + 70 * (1 - haze)
    foot[bare] = BUILDING
    return image, labels
