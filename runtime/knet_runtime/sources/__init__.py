"""The one entry point to what frames come from: videos, images, folders, cameras, streams, pipes
and recordings of ROS."""

from __future__ import annotations

import glob
import os
import re
import shlex
from pathlib import Path

from av.container import InputContainer

from knet_runtime.errors import ConfigError, SourceError
from knet_runtime.sources.bag import BagSource, is_bag
from knet_runtime.sources.base import Source, SourceLost, SourceOptions
from knet_runtime.sources.container import (
    SCHEMES,
    CameraConnector,
    NetworkConnector,
    open_file,
    redacted,
    scheme_of,
)
from knet_runtime.sources.images import IMAGE_SUFFIXES, ImageSource, decode_image
from knet_runtime.sources.live import LiveSource
from knet_runtime.sources.pipe import STDIN, PipeSource
from knet_runtime.sources.playback import play
from knet_runtime.sources.snapshot import SnapshotSource
from knet_runtime.sources.video import VideoSource


def open_source(source: str | Path, options: SourceOptions | None = None) -> Source:
    """Open a video, an image, a folder of images, a camera, a stream, a recording of ROS or stdin;
    a context manager.

    A camera is "0", "camera:0" or "/dev/video0" (Linux); a file of such a name is reached as
    "./0". An address of rtsp, rtsps, http or https is a live stream, unless what is found there
    is one image or states how long it is. "-" is stdin (``PipeSource``); what ends in .bag, .mcap
    or .db3, and a folder of ROS 2, is a recording (``BagSource``). A live source that cannot be
    reached now is an error; one that is lost later is opened again (``LiveSource``).

    Raises SourceError, naming the source and what to do, when it is missing, damaged from the
    start, or nothing that can be read, and ConfigError for options that do not fit it. No message
    shows what is secret in an address.

        >>> from knet_deploy import open_source
        >>> with open_source("drive.mp4") as source:
        ...     for frame in source:
        ...         print(frame.index, frame.image.shape)
        ...         break
        0 (360, 480, 3)
    """
    options = options or SourceOptions()
    text = str(source)
    if options.every_seconds is not None and scheme_of(text) not in ("http", "https"):
        raise ConfigError(
            f"{redacted(text)}: every_seconds asks an HTTP address for its image again and again; "
            "leave it out here (every takes each n-th frame)"
        )
    if options.raw_input is not None and source != STDIN:
        raise ConfigError(
            f"{redacted(text)}: --raw-input says what comes on stdin; write - for it, or leave "
            "--raw-input out"
        )
    if options.topic is not None and not is_bag(Path(source)):
        raise ConfigError(
            f"{redacted(text)}: --topic is of recordings of ROS, and this is none; leave it out"
        )
    if source == STDIN:
        _refuse_playback("stdin", options)  # whoever writes has the pace
        return PipeSource(options)
    if isinstance(source, str) and (number := re.fullmatch(r"(?:camera:)?(\d+)", source)):
        return _camera(Path(f"/dev/video{int(number[1])}"), options)
    if re.fullmatch(r"/dev/video\d+", text):
        return _camera(Path(text), options)
    if isinstance(source, str) and (scheme := scheme_of(source)):
        if scheme not in SCHEMES:
            raise SourceError(
                f"{scheme} addresses cannot be read, only {', '.join(SCHEMES)}; record the "
                "stream to a file and name that"
            )
        return _stream(source, options)
    path = Path(source)
    if not os.path.lexists(path) and glob.has_magic(text):
        raise SourceError(
            f"{text}: no file has that name; knet-deploy batch {shlex.quote(text)} --out RESULTS "
            "takes patterns"
        )
    if is_bag(path):
        return play(lambda: BagSource(path, options), text, options)
    if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES:
        _refuse_part(text, options)
        return play(lambda: ImageSource(path, options), text, options)

    def open_video() -> Source:
        return VideoSource(open_file(path, hwaccel=options.hwaccel), text, options, path)

    return play(open_video, text, options)


def _camera(path: Path, options: SourceOptions) -> LiveSource:
    _refuse_part(str(path), options)
    _refuse_playback(str(path), options)
    link = CameraConnector(path, options)
    try:
        container = link.open()
    except SourceLost as error:
        lost = error
    else:
        return LiveSource(link, container, "camera", options, path)
    raise SourceError(f"{link.name}: {lost.reason}; {link.hint}")


def _stream(address: str, options: SourceOptions) -> Source:
    link = NetworkConnector(address, options)
    _refuse_playback(link.name, options)
    if options.every_seconds is not None:
        _refuse_part(link.name, options)
        return SnapshotSource(link, options)
    try:
        container = link.open()
    except SourceLost as error:
        lost = error
    else:
        return _video_at(link, container, options)
    if lost.foreign and link.is_http:  # it may be one image
        try:
            data = link.fetch()
        except SourceLost as error:
            lost = error
        else:
            _refuse_part(link.name, options)
            return SnapshotSource(link, options, decode_image(data, link.name))
        if lost.foreign:
            raise SourceError(
                f"{link.name}: what comes is no video and no image of a supported kind; open the "
                "address in a browser to see it"
            )
    raise SourceError(f"{link.name}: {lost.reason}; {link.hint}")


def _video_at(link: NetworkConnector, container: InputContainer, options: SourceOptions) -> Source:
    if link.is_finite(container):
        return VideoSource(container, link.name, options)
    try:
        _refuse_part(link.name, options)
    except ConfigError:
        container.close()
        raise
    return LiveSource(link, container, "stream", options)


def _refuse_part(name: str, options: SourceOptions) -> None:
    if options.start is not None or options.end is not None:
        raise ConfigError(f"{name}: start and end choose a part of a video; leave them out here")


def _refuse_playback(name: str, options: SourceOptions) -> None:
    if options.loop or options.realtime:
        raise ConfigError(
            f"{name}: loop and realtime are for files, and this is none; leave them out here"
        )
