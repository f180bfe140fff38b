"""The pixels of ROS's messages ``sensor_msgs/Image`` and ``sensor_msgs/CompressedImage``."""

from __future__ import annotations

from typing import Any, NamedTuple

import cv2
import numpy as np

from knet_runtime.errors import SourceError
from knet_runtime.sources.images import decode_image, eight_bits
from knet_runtime.types import MAX_PIXELS, Rgb


class _Layout(NamedTuple):
    """How many values a pixel has, of how many bytes each, and OpenCV's way from there to RGB."""

    values: int
    depth: int
    to_rgb: int | None


# ROS names a Bayer pattern by the colours of its first row and then its second, and so do these
# names of OpenCV; its older ones (COLOR_BayerBG2RGB) go by the second row and column.
_BAYER = {
    "rggb": cv2.COLOR_BayerRGGB2RGB,
    "bggr": cv2.COLOR_BayerBGGR2RGB,
    "gbrg": cv2.COLOR_BayerGBRG2RGB,
    "grbg": cv2.COLOR_BayerGRBG2RGB,
}
_UYVY = _Layout(2, 1, cv2.COLOR_YUV2RGB_UYVY)
_YUYV = _Layout(2, 1, cv2.COLOR_YUV2RGB_YUYV)
_LAYOUTS = {
    **{f"rgb{8 * depth}": _Layout(3, depth, None) for depth in (1, 2)},
    **{f"bgr{8 * depth}": _Layout(3, depth, cv2.COLOR_BGR2RGB) for depth in (1, 2)},
    **{f"rgba{8 * depth}": _Layout(4, depth, cv2.COLOR_RGBA2RGB) for depth in (1, 2)},
    **{f"bgra{8 * depth}": _Layout(4, depth, cv2.COLOR_BGRA2RGB) for depth in (1, 2)},
    **{f"mono{8 * depth}": _Layout(1, depth, cv2.COLOR_GRAY2RGB) for depth in (1, 2)},
    **{
        f"bayer_{pattern}{8 * depth}": _Layout(1, depth, code)
        for pattern, code in _BAYER.items()
        for depth in (1, 2)
    },
    **{"yuv422": _UYVY, "uyvy": _UYVY, "yuv422_yuy2": _YUYV, "yuyv": _YUYV},
    # What OpenCV's users write who leave the colours unnamed: its own order.
    "8UC1": _Layout(1, 1, cv2.COLOR_GRAY2RGB),
    "8UC3": _Layout(3, 1, cv2.COLOR_BGR2RGB),
    "8UC4": _Layout(4, 1, cv2.COLOR_BGRA2RGB),
}


def read_ros_image(message: Any, name: str = "the message") -> Rgb:
    """The pixels of ROS's sensor_msgs/Image, or CompressedImage (JPEG or PNG), uint8 [H, W, 3] RGB.

    ``message`` is that of rclpy, rospy or rosbags. Values v of 16 bits become round(v / 257), and
    transparency is dropped. YUV is taken as BT.601, as ROS's own cv_bridge does it. ``name`` is how
    errors call the message. Raises SourceError for a damaged image, and for an encoding that is no
    picture (depth, say).

        >>> from types import SimpleNamespace  # in place of a message
        >>> from knet_deploy import read_ros_image
        >>> about = {"height": 1, "width": 1, "encoding": "bgr8", "is_bigendian": 0, "step": 3}
        >>> read_ros_image(SimpleNamespace(**about, data=bytes([1, 2, 3]))).tolist()
        [[[3, 2, 1]]]
    """
    data = np.frombuffer(message.data, np.uint8)
    if not hasattr(message, "encoding"):
        return decode_image(data.tobytes(), name)
    height, width, step = message.height, message.width, message.step
    layout = _LAYOUTS.get(message.encoding)
    if layout is None:
        raise SourceError(
            f"{name}: has the encoding {message.encoding!r}, which is not read; choose another "
            f"topic, or convert it to one of {', '.join(_LAYOUTS)}"
        )
    if not 0 < height * width <= MAX_PIXELS:
        raise SourceError(f"{name}: states a size of {height}×{width}; record it again")
    used = width * layout.values * layout.depth
    if step < used or len(data) < height * step:
        raise SourceError(
            f"{name}: holds {len(data)} bytes in rows of {step}, too few for "
            f"{height}×{width} {message.encoding}; record it again"
        )
    order = ">" if message.is_bigendian else "<"
    rows = data[: height * step].reshape(height, step)[:, :used]
    shape = (height, width) if layout.values == 1 else (height, width, layout.values)
    pixels = np.ascontiguousarray(rows).view(f"{order}u{layout.depth}").reshape(shape)
    if layout.depth == 2:
        pixels = eight_bits(pixels)
    if layout.to_rgb is None:
        return np.array(pixels, np.uint8)
    try:
        return np.asarray(cv2.cvtColor(pixels, layout.to_rgb), np.uint8)
    except cv2.error as error:
        raise SourceError(
            f"{name}: {height}×{width} is no size of {message.encoding}; record it again"
        ) from error
