"""The routes: the page and its files, frames, the state of the run."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from functools import partial
from importlib import resources

import msgspec
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from knet_runtime.web.encode import PAGE_SIDE, overlay_jpeg, page_frame
from knet_runtime.web.status import RunStatus, registry
from knet_runtime.web.streams import Channel, Latest

_FILES = {
    "index.html": "text/html",
    "page.css": "text/css",
    "page.js": "text/javascript",
    "stream.js": "text/javascript",
    "mixer.js": "text/javascript",
    "legend.js": "text/javascript",
    "numbers.js": "text/javascript",
}
_BOUNDARY = "frame"


class ClassLook(msgspec.Struct, frozen=True):
    """A class in the legend; ``colour`` is RGB."""

    name: str
    colour: tuple[int, int, int]


class PageConfig(msgspec.Struct, frozen=True):
    """What the page needs to know once; ``shown`` are the classes that are coloured at first."""

    feeds: list[str]
    classes: list[ClassLook]
    shown: list[int]
    alpha: float
    model: str
    engine: str


class App:
    """Everything that is asked in the event loop; ``latest`` holds the feeds, by name.

    ``read`` gives the numbers for so many viewers.
    """

    def __init__(
        self,
        latest: dict[str, Latest],
        set_up: PageConfig,
        read: Callable[[int], RunStatus],
        pool: Executor,
    ) -> None:
        self._latest = latest
        self._set_up = set_up
        self._read_for = read
        self._pool = pool
        self._viewers = 0
        self._closing = asyncio.Event()
        self._registry = registry(self._read)
        self._overlay = partial(overlay_jpeg, alpha=set_up.alpha, classes=set_up.shown)
        small = partial(self._overlay, side=PAGE_SIDE)
        self._overlays = {name: Channel(slot, small, pool) for name, slot in latest.items()}
        self._encoded = {name: Channel(slot, page_frame, pool) for name, slot in latest.items()}
        folder = resources.files(__package__) / "static"
        self._files = {name: (folder / name).read_bytes() for name in _FILES}
        self.routes = Starlette(
            routes=[
                Route("/", partial(self._file, "index.html")),
                *(Route(f"/{name}", partial(self._file, name)) for name in _FILES),
                Route("/live", self._live),
                Route("/stream.mjpg", self._mjpg),
                Route("/snapshot.jpg", self._snapshot),
                Route("/events", self._events),
                Route("/metrics", self._metrics),
                Route("/healthz", self._healthz),
            ]
        )

    def close(self) -> None:
        """Let every stream end; in the event loop."""
        self._closing.set()
        for latest in self._latest.values():
            latest.end()

    async def _file(self, name: str, request: Request) -> Response:
        return Response(self._files[name], media_type=_FILES[name])

    async def _live(self, request: Request) -> Response:
        channel = self._encoded[self._feed(request)]
        return _stream(request, self._watched(_encoded(channel)), "application/octet-stream")

    async def _mjpg(self, request: Request) -> Response:
        channel = self._overlays[self._feed(request)]
        kind = f"multipart/x-mixed-replace; boundary={_BOUNDARY}"
        return _stream(request, self._watched(_parts(channel)), kind)

    async def _snapshot(self, request: Request) -> Response:
        name = self._feed(request)
        shot = self._latest[name].shot
        if shot is None:
            raise HTTPException(503, "There is no frame yet.\n")
        states = {feed.name: feed.state for feed in (await self._numbers()).feeds}
        encode = partial(self._overlay, shot, stale=states.get(name) in ("stale", "disconnected"))
        loop = asyncio.get_running_loop()
        return Response(await loop.run_in_executor(self._pool, encode), media_type="image/jpeg")

    async def _events(self, request: Request) -> Response:
        return _stream(request, self._numbers_each_second(), "text/event-stream")

    async def _metrics(self, request: Request) -> Response:
        loop = asyncio.get_running_loop()
        text = await loop.run_in_executor(self._pool, generate_latest, self._registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    async def _healthz(self, request: Request) -> Response:
        numbers = await self._numbers()
        text = "".join(f"{feed.name}: {feed.state}\n" for feed in numbers.feeds)
        return PlainTextResponse(text, 200 if numbers.healthy else 503)

    def _feed(self, request: Request) -> str:
        """The feed that is asked for; the first one when none is named."""
        name = request.query_params.get("feed", next(iter(self._latest), ""))
        if name not in self._latest:
            raise HTTPException(404, f"There is no such feed; use {', '.join(self._latest)}.\n")
        return name

    def _read(self) -> RunStatus:
        return self._read_for(self._viewers)

    async def _numbers(self) -> RunStatus:
        # Sensors are files that may take their time.
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._read)

    async def _watched(self, body: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        self._viewers += 1
        try:
            async for part in body:
                yield part
        finally:
            self._viewers -= 1

    async def _numbers_each_second(self) -> AsyncIterator[bytes]:
        yield _event("setup", self._set_up)
        while not self._closing.is_set():
            yield _event("numbers", await self._numbers())
            try:
                await asyncio.wait_for(self._closing.wait(), 1)
            except asyncio.TimeoutError:
                continue


def _stream(request: Request, body: AsyncIterator[bytes], kind: str) -> Response:
    if request.method == "HEAD":  # would never end
        return Response(media_type=kind)
    return StreamingResponse(body, media_type=kind)


async def _encoded(channel: Channel) -> AsyncIterator[bytes]:
    seq = channel.start()
    while (made := await channel.newer(seq)) is not None:
        seq = made.seq
        yield made.data


async def _parts(channel: Channel) -> AsyncIterator[bytes]:
    # The boundary stands behind each part too: browsers show a part when they have seen it.
    yield f"--{_BOUNDARY}\r\n".encode()
    async for jpeg in _encoded(channel):
        head = f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n".encode()
        yield head + jpeg + f"\r\n--{_BOUNDARY}\r\n".encode()


def _event(kind: str, data: msgspec.Struct) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(data))
