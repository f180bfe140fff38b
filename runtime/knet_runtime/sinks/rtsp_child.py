"""The process that encodes and pushes for ``RtspPush``: frames on stdin, answers on stdout.

It is a process of its own because FFmpeg, waiting for a peer that says nothing, holds Python's lock
and with it every thread. On stdin: a line of JSON (``Push``), then per frame its time (8 bytes,
little-endian, in ticks) and its pixels. On stdout: "." when connected and after each frame; "!"
and a line of text when it fails; the end of stdin ends it.
"""

from __future__ import annotations

import os
import signal
import sys
from fractions import Fraction
from typing import BinaryIO

import av
import msgspec
import numpy as np

from knet_runtime.sinks.encoder import add_stream, video_frame

OK, FAILED = b".", b"!"
TIME_BYTES = 8


class Push(msgspec.Struct, frozen=True):
    """What is pushed, and whereto. ``tick``, ``rate`` and ``aspect`` are fractions as (above,
    below); ``patience`` is in seconds."""

    url: str
    transport: str
    encoder: str
    hw: tuple[int, int]
    tick: tuple[int, int]
    rate: tuple[int, int]
    patience: float
    aspect: tuple[int, int] = (1, 1)


def main() -> int:
    """Push what comes on stdin; the exit status."""
    for number in (signal.SIGINT, signal.SIGHUP):  # they go to the whole group; we end by EOF
        signal.signal(number, signal.SIG_IGN)
    # The kernel ends us when the peer is silent, even if our parent is gone by then.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # whatever a library prints must not be taken for an answer
    stdin = sys.stdin.buffer
    push = msgspec.json.decode(stdin.readline(), type=Push)
    try:
        _push(push, stdin, answers)
    except BrokenPipeError:
        return 1  # the parent is gone, and nobody is left to tell
    except (av.FFmpegError, OSError) as error:
        # strerror alone: the text of the exception has the address with its password.
        answers.write(FAILED + (error.strerror or type(error).__name__).encode() + b"\n")
        return 1
    return 0


def _push(push: Push, stdin: BinaryIO, answers: BinaryIO) -> None:
    height, width = push.hw
    tick, size = Fraction(*push.tick), TIME_BYTES + height * width * 3
    options = {"rtsp_transport": push.transport}
    _guard(push.patience)
    with av.open(push.url, "w", format="rtsp", options=options) as container:
        stream = add_stream(
            container,
            push.encoder,
            push.hw,
            tick,
            Fraction(*push.rate),
            live=True,
            aspect=Fraction(*push.aspect),
        )
        container.start_encoding()
        answers.write(OK)
        _guard(0)
        while len(data := stdin.read(size)) == size:
            _guard(push.patience)
            ticks = int.from_bytes(data[:TIME_BYTES], "little", signed=True)
            image = np.frombuffer(data, np.uint8, offset=TIME_BYTES).reshape(height, width, 3)
            container.mux(stream.encode(video_frame(image, ticks, tick)))
            answers.write(OK)
            _guard(0)
        _guard(push.patience)
        container.mux(stream.encode(None))


def _guard(seconds: float) -> None:
    """Be killed unless it is called again within so many seconds; 0: wait for ever."""
    signal.setitimer(signal.ITIMER_REAL, seconds)


if __name__ == "__main__":
    sys.exit(main())
