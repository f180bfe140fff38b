"""Cars, vans and buses in the picture: parked, met, and followed."""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from knet_synthetic.camera import NEAR, Camera
from knet_synthetic.canvas import Canvas
from knet_synthetic.carbody import PAINTS, SHAPES, BodyBuilder, Model
from knet_synthetic.climate import Climate

CAR = 8


class Cars:
    """All models of one street; a model is made for each shape, paint and heading once."""

    def __init__(self, climate: Climate) -> None:
        self._climate = climate
        self._model = lru_cache(maxsize=256)(self._build)

    def draw(
        self, canvas: Canvas, camera: Camera, x: float, s: float, heading: float,
        shape: int, paint: int, dim: float,
    ) -> None:  # fmt: skip
        """`heading` 0 is along the street; `dim` is 1 in the open and less in a cast shadow."""
        form = SHAPES[shape]
        _, _, scale = camera.point(x, max(s, camera.s + 1.5 * NEAR))
        quarter = round(heading / (np.pi / 2)) % 4
        fade = round(self._climate.fade(camera.focal / scale) * 16) / 16
        fine = scale * form.height > 26
        model = self._model(shape, paint % len(PAINTS), quarter, fade, dim, fine)
        sin, cos = np.sin(heading), np.cos(heading)
        local = model.points
        points = np.stack(
            [x + local[:, 0] * cos + local[:, 2] * sin, local[:, 1],
             s + local[:, 2] * cos - local[:, 0] * sin], 1
        )  # fmt: skip
        view = camera.view(points)
        passing = float(view[:, 2].min()) < NEAR
        if passing:
            view[:, 2] = np.maximum(view[:, 2], NEAR)  # only faces that are cut need more care
        fixed = np.rint(camera.screen(view) * 16).astype(np.int32)
        if fixed[:, 0].max() < 0 or fixed[:, 0].min() > canvas.width * 16:
            return
        dx, ds = camera.x - x - camera.bend_at(s - camera.s), camera.s - s
        right, ahead = dx * cos - ds * sin, dx * sin + ds * cos
        seen = {"always"}
        if abs(right) > form.width / 2:
            seen.add("right" if right > 0 else "left")
        if abs(ahead) > form.length / 2 - 0.3:
            seen.add("front" if ahead > 0 else "rear")
        if camera.height > form.height:
            seen.add("above")
        for face in model.faces:
            if face.seen not in seen:
                continue
            if passing:
                outline = camera.polygon(points[face.first : face.last])
                canvas.polygon(outline, np.array(face.colour), CAR)
            else:
                canvas.fill(fixed[face.first : face.last], face.colour, CAR)

    def _build(
        self, shape: int, paint: int, quarter: int, fade: float, dim: float, fine: bool
    ) -> Model:
        return BodyBuilder(self._climate, SHAPES[shape], PAINTS[paint], quarter, fade, dim).build(
            fine, bus=shape == 6, van=shape == 5
        )
