"""Light, weather and exposure of one street."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from knet_synthetic.noise import Array

Vector = tuple[float, float, float]


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


def draw_climate(rng: np.random.Generator) -> Climate:
    kind = rng.choice(4, p=[0.36, 0.34, 0.2, 0.1])
    azimuth = rng.uniform(-np.pi, np.pi)
    if kind == 0:  # clear
        elevation, ambient, sun = rng.uniform(28, 60), (0.50, 0.56, 0.66), (0.78, 0.73, 0.62)
        zenith, horizon = (88, 138, 208), (206, 222, 236)
        cloud, haze = rng.uniform(0.0, 0.45), rng.uniform(0.002, 0.006)
    elif kind == 1:  # overcast
        elevation, ambient, sun = 50.0, (0.84, 0.86, 0.88), (0.10, 0.10, 0.09)
        zenith, horizon = (196, 202, 210), (236, 238, 240)
        cloud, haze = rng.uniform(0.8, 1.0), rng.uniform(0.004, 0.014)
    elif kind == 2:  # low sun
        elevation, ambient, sun = rng.uniform(9, 20), (0.46, 0.46, 0.54), (1.05, 0.80, 0.50)
        zenith, horizon = (112, 142, 190), (250, 222, 180)
        cloud, haze = rng.uniform(0.1, 0.5), rng.uniform(0.004, 0.010)
    else:  # the end of a grey day
        elevation, ambient, sun = 30.0, (0.40, 0.42, 0.48), (0.05, 0.05, 0.04)
        zenith, horizon = (108, 120, 142), (186, 190, 198)
        cloud, haze = rng.uniform(0.7, 1.0), rng.uniform(0.003, 0.010)
    height = np.sin(np.radians(elevation))
    flat = np.cos(np.radians(elevation))
    # The camera meters a street that is half in its own shade.
    exposure = np.mean(ambient) + 0.3 * np.mean(sun) * height
    return Climate(
        ambient=np.array(ambient) * rng.uniform(0.9, 1.1),
        sun=np.array(sun) * rng.uniform(0.85, 1.15),
        towards_sun=(float(np.sin(azimuth) * flat), float(height), float(np.cos(azimuth) * flat)),
        zenith=np.clip(np.array(zenith) * rng.uniform(0.85, 1.1), 0, 255),
        horizon=np.clip(np.array(horizon) * rng.uniform(0.95, 1.05), 0, 255),
        cloud=float(cloud),
        haze=float(haze),
        lamps_lit=bool(kind == 3),
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
