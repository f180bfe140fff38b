"""Whole pictures out of interlaced video, through FFmpeg's filter."""

from __future__ import annotations

import av
import av.filter

_Shape = tuple[int, int, str]


class Deinterlacer:
    """Hands pictures on as they are until one says it is interlaced; from then on through bwdif.

    One picture comes out per picture that goes in, with its own time; once active, one picture
    later, as the filter looks ahead. Pictures between that are not interlaced are left alone.
    """

    def __init__(self) -> None:
        self._graph: av.filter.Graph | None = None
        self._shape: _Shape | None = None

    @property
    def active(self) -> bool:
        """Whether there were interlaced pictures."""
        return self._graph is not None

    def feed(self, picture: av.VideoFrame) -> list[av.VideoFrame]:
        """The pictures that are ready, in order."""
        if self._graph is None and not picture.interlaced_frame:
            return [picture]
        shape = (picture.height, picture.width, picture.format.name)
        ready = []
        if shape != self._shape:
            ready = self.flush()
            if not picture.interlaced_frame or not self._build(picture):
                return [*ready, picture]
            self._shape = shape
        assert self._graph is not None
        self._graph.vpush(picture)
        return ready + self._pull()

    def flush(self) -> list[av.VideoFrame]:
        """The pictures held back; the next one begins anew."""
        if self._graph is None:
            return []
        self._graph.vpush(None)
        held = self._pull()
        self._graph = self._shape = None
        return held

    def _build(self, picture: av.VideoFrame) -> bool:
        if picture.height < 4 or picture.width < 3 or picture.time_base is None:
            return False  # smaller than the filter takes
        graph = av.filter.Graph()
        source = graph.add_buffer(
            width=picture.width,
            height=picture.height,
            format=picture.format,
            time_base=picture.time_base,
        )
        bwdif = graph.add("bwdif", "mode=send_frame:parity=auto:deint=interlaced")
        graph.link_nodes(source, bwdif, graph.add("buffersink")).configure()
        self._graph = graph
        return True

    def _pull(self) -> list[av.VideoFrame]:
        assert self._graph is not None
        ready: list[av.VideoFrame] = []
        while True:
            try:
                ready.append(self._graph.vpull())
            except (av.BlockingIOError, av.EOFError):
                return ready
