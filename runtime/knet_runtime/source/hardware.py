"""Hardware decoders, where FFmpeg offers one that works on this machine.

Its answer "none" is what tests see; decoding on one has not been run by the authors.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable

import av
from av.codec.hwaccel import HWAccel, hwdevices_available
from av.container import InputContainer

from knet_runtime.source.decoder import READ_ERRORS

_log = logging.getLogger(__name__)

Open = Callable[[HWAccel | None], InputContainer]


def on_hardware(
    container: InputContainer, open_with: Open, name: str
) -> tuple[InputContainer, HWAccel | None]:
    """The same input on a hardware decoder, if one can be had for its codec, and which.

    ``open_with`` opens it again. What that raises is raised; not having a decoder is a logged line.
    """
    stream = container.streams.best("video")
    codec = stream.codec_context.codec.name if isinstance(stream, av.VideoStream) else None
    device = None if codec is None else _hardware_device(codec)
    if device is None:
        _log.warning("%s: no hardware decoder for it works here; decoding in software", name)
        return container, None
    container.close()
    _log.info("%s: decoding on %s", name, device)
    hardware = HWAccel(device, allow_software_fallback=True)
    return open_with(hardware), hardware


@functools.cache
def _hardware_device(codec: str) -> str | None:
    """The first of FFmpeg's devices that can be set up on this machine for a codec."""
    for device in hwdevices_available():
        try:
            HWAccel(device).create(av.Codec(codec, "r"))
        except (*READ_ERRORS, NotImplementedError):
            continue
        return device
    return None
