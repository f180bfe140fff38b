"""Walkers and cyclists: jointed figures, posed by the time."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

from knet_synthetic.canvas import BICYCLIST, NEAR, PEDESTRIAN, Array, Camera, Canvas, placed
from knet_synthetic.layout import CLOTHES, SKIN, Figure, Person
from knet_synthetic.sky import Climate

FAR = 44  # sub-samples of height below which a walker is drawn with four strokes


class _Pen:
    """Places limbs given in the figure's own frame (right, up, forward) on the canvas."""

    def __init__(
        self, canvas: Canvas, camera: Camera, climate: Climate, figure: Figure, dim: float
    ) -> None:
        self.canvas, self.camera, self.figure = canvas, camera, figure
        self.label = BICYCLIST if figure.cycling else PEDESTRIAN
        _, _, self.scale = camera.point(figure.x, figure.s)
        fade = climate.fade(camera.focal / self.scale) if self.scale else 0.0
        self.light = climate.shade((0.3, 0.4, -0.85)) * dim * (1 - fade)
        self.mist = climate.horizon * fade

    def place(self, joints: Array) -> Array:
        view = self.camera.view(placed(joints, self.figure.x, self.figure.s, self.figure.heading))
        view[:, 2] = np.maximum(view[:, 2], 0.5)
        return self.camera.screen(view)

    def tone(self, colour: tuple[int, int, int] | Array, factor: float = 1.0) -> Array:
        return np.minimum(np.asarray(colour) * (factor * self.light) + self.mist, 255.0)

    def limb(self, a: Array, b: Array, width: float, tone: Array) -> None:
        self.canvas.line(a, b, width * self.scale, tone, self.label)


def draw_figure(
    canvas: Canvas, camera: Camera, climate: Climate, figure: Figure, dim: float
) -> None:
    """``dim`` is 1 in the open and less in a cast shadow."""
    pen = _Pen(canvas, camera, climate, figure, dim)
    if pen.scale > 0.0 and camera.focal / pen.scale > 1.6 * NEAR:
        (_draw_cyclist if figure.cycling else _draw_walker)(pen, figure.person, figure.phase)


def _draw_walker(pen: _Pen, person: Person, stride: float) -> None:
    h = person.height
    swing = 0.42 * math.sin(stride + person.phase)
    hip, shoulder, leg = 0.5 * h, 0.8 * h, 0.5 * h
    if pen.scale * h < FAR:
        _distant(pen, person, hip, shoulder, swing)
        return
    joints = [(0.0, 0.93 * h, 0.02), (0.0, 0.86 * h, 0.0)]
    for way in (-1, 1):
        forward = way * swing
        knee = 0.5 * leg
        lift = 0.10 * max(0.0, -way * np.cos(stride + person.phase))
        joints += [
            (way * 0.08, hip, 0.0),
            (way * 0.09, hip - knee * np.cos(forward), knee * np.sin(forward) + 0.06),
            (way * 0.09, 0.04 + lift, leg * np.sin(forward) - lift),
            (way * 0.19, shoulder - 0.03, 0.0),
            (way * 0.23, shoulder - 0.30, -0.22 * np.sin(forward)),
            (way * 0.21, hip - 0.02, 0.10 - 0.55 * np.sin(forward)),
        ]
    low = hip - 0.08
    torso = [(-0.19, shoulder, 0), (0.19, shoulder, 0), (0.15, low, 0), (-0.15, low, 0)]
    deep = [(0, shoulder, -0.1), (0, shoulder, 0.1), (0, low, 0.11), (0, low, -0.11)]
    at = pen.place(np.array(joints + torso + deep))
    coat, legs = CLOTHES[person.coat], CLOTHES[person.legs]
    body = 14
    for k in (0, 1):
        joint = at[2 + 6 * k : 8 + 6 * k]
        shade = 0.82 if k == 0 else 1.0
        pen.limb(joint[0], joint[1], 0.15, pen.tone(legs, 0.9 * shade))
        pen.limb(joint[1], joint[2], 0.11, pen.tone(legs, 0.8 * shade))
        pen.limb(joint[2], joint[2], 0.12, pen.tone((30, 28, 28)))
        pen.limb(joint[3], joint[4], 0.11, pen.tone(coat, 0.85))
        pen.limb(joint[4], joint[5], 0.09, pen.tone(coat, 0.75))
        pen.limb(joint[5], joint[5], 0.09, pen.tone(SKIN[person.skin]))
    pen.canvas.polygon(at[body + 4 : body + 8], pen.tone(coat, 0.9), PEDESTRIAN)
    pen.canvas.polygon(at[body : body + 4], pen.tone(coat), PEDESTRIAN)
    middle = (at[body] + at[body + 1] + at[body + 2] + at[body + 3]) / 4
    pen.limb((at[body] + at[body + 1]) / 2, middle, 0.24, pen.tone(coat, 1.05))
    pen.limb(middle, (at[body + 2] + at[body + 3]) / 2, 0.22, pen.tone(coat, 0.92))
    if person.bag:  # on a strap, at the hip
        pen.limb(at[body + 3], at[body + 3], 0.2, pen.tone((60, 44, 34)))
        pen.limb(at[body + 1], at[body + 3], 0.04, pen.tone((60, 44, 34)))
    pen.limb(at[1], at[1], 0.12, pen.tone(SKIN[person.skin], 0.9))
    pen.limb(at[0], at[0], 0.22, pen.tone(SKIN[person.skin]))
    crown = at[0] - (0.0, 0.03 * pen.scale)
    pen.limb(crown, crown, 0.2, pen.tone((52, 40, 32), 0.9))


def _distant(pen: _Pen, person: Person, hip: float, shoulder: float, swing: float) -> None:
    """Two legs, a trunk and a head are all that is seen of somebody far away."""
    h, step = person.height, 0.5 * person.height * math.sin(swing)
    at = pen.place(
        np.array([(-0.08, 0.05, -step), (0.08, 0.05, step), (0, hip, 0), (0, shoulder - 0.05, 0),
                  (0, 0.93 * h, 0)])
    )  # fmt: skip
    legs = pen.tone(CLOTHES[person.legs], 0.85)
    pen.limb(at[0], at[2], 0.13, legs)
    pen.limb(at[1], at[2], 0.13, legs)
    pen.limb(at[2], at[3], 0.38, pen.tone(CLOTHES[person.coat]))
    pen.limb(at[4], at[4], 0.21, pen.tone(SKIN[person.skin], 0.7))


def _draw_cyclist(pen: _Pen, person: Person, pedal: float) -> None:
    angle = np.linspace(0, 2 * np.pi, 15)
    rim = np.stack([np.zeros(15), 0.34 + 0.34 * np.sin(angle), 0.34 * np.cos(angle)], 1)
    rubber = pen.tone((28, 28, 30))
    turn = pedal + person.phase
    foot = [(w * 0.1, 0.30 + 0.17 * np.sin(turn + k), 0.05 + 0.17 * np.cos(turn + k))
            for k, w in ((0.0, -1), (np.pi, 1))]  # fmt: skip
    seat, head, bracket = (0, 0.95, -0.18), (0, 0.98, 0.38), (0, 0.30, 0.05)
    joints = [
        (0, 0.34, -0.52), (0, 0.34, 0.52), seat, head, bracket,
        (-0.25, 1.03, 0.36), (0.25, 1.03, 0.36), *foot,
        (-0.11, 0.62, 0.20), (0.11, 0.62, 0.20), (0, 0.98, -0.16), (0, 1.46, 0.10),
        (-0.2, 1.42, 0.08), (0.2, 1.42, 0.08), (-0.26, 1.18, 0.18), (0.26, 1.18, 0.18),
        (0, 1.66, 0.18),
    ]  # fmt: skip
    at = pen.place(np.array(joints, float))
    for axle in (-0.52, 0.52):
        ring = pen.place(rim + np.array((0.0, 0.0, axle)))
        for a, b in pairwise(ring):
            pen.limb(a, b, 0.045, rubber)
    frame = pen.tone(CLOTHES[(person.coat + 3) % len(CLOTHES)])
    for a, b in ((0, 4), (0, 2), (2, 4), (4, 3), (2, 3), (3, 1), (5, 6)):
        pen.limb(at[a], at[b], 0.045, frame)
    coat, legs = pen.tone(CLOTHES[person.coat], 1.1), pen.tone(CLOTHES[person.legs])
    hip = at[11]
    for knee, shoe in ((9, 7), (10, 8)):
        pen.limb(hip, at[knee], 0.16, legs)
        pen.limb(at[knee], at[shoe], 0.11, legs)
        pen.limb(at[shoe], at[shoe], 0.11, pen.tone((30, 28, 28)))
    pen.limb(hip, at[12], 0.30, coat)
    pen.limb(at[13], at[14], 0.16, coat)
    for shoulder, elbow, hand in ((13, 15, 5), (14, 16, 6)):
        pen.limb(at[shoulder], at[elbow], 0.10, coat)
        pen.limb(at[elbow], at[hand], 0.08, coat)
    pen.limb(at[17], at[17], 0.22, pen.tone(SKIN[person.skin]))
    crown = at[17] - (0.0, 0.05 * pen.scale)
    helmet = (230, 230, 226) if person.bag else (44, 38, 34)
    pen.limb(crown, crown, 0.2, pen.tone(helmet))
