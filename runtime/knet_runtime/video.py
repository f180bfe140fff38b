"""The one door to everything that frames come from: videos, images, folders, cameras."""

from __future__ import annotations

import re
from pathlib import Path

from knet_runtime.errors import SourceError
from knet_runtime.frames import Frame, Source, SourceInfo
from knet_runtime.images import IMAGE_SUFFIXES, ImageSource
from knet_runtime.video_source import VideoSource

__all__ = ["Frame", "Source", "SourceInfo", "open_source"]


def open_source(source: str | Path) -> Source:
    """Open a video file, an image, a folder of images, or a camera; a context manager.

    A camera is "0", "camera:0" or "/dev/video0" (Linux); a file of such a name is reached as
    "./0". Raises SourceError, naming the source and what to do, when it is missing, damaged from
    the start, or nothing that can be read.
    """
    text = str(source)
    if isinstance(source, str) and (number := re.fullmatch(r"(?:camera:)?(\d+)", source)):
        return VideoSource(Path(f"/dev/video{int(number[1])}"), camera=True)
    if re.fullmatch(r"/dev/video\d+", text):
        return VideoSource(Path(text), camera=True)
    # Only the scheme is repeated: an address may carry a password.
    if scheme := re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", text):
        raise SourceError(
            f"{scheme[1]} addresses can not be read; record the stream to a file and name that"
        )
    path = Path(source)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        return ImageSource(path)
    return VideoSource(path)
