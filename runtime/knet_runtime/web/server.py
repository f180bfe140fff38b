"""The live page: its routes, its server in a thread of the run, and the sinks that feed it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from importlib import resources
from math import ceil, sqrt
from pathlib import Path
from socket import socket
from time import monotonic

import msgspec
import uvicorn
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from knet_runtime.drawing import OPACITY
from knet_runtime.labels import LabelMap
from knet_runtime.pipeline.stats import RunSnapshot
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Closeable, Frame
from knet_runtime.web.auth import AuthMiddleware, Listener
from knet_runtime.web.connections import HEADER_BYTES, Connection, Connections, room
from knet_runtime.web.status import RunStatus, read_run_status, registry
from knet_runtime.web.streams import PAGE_SIDE, Channel, Latest, overlay_jpeg, page_frame

_log = logging.getLogger(__name__)

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
_BOUNDARY = "frame"
_GRACE = 0.5  # seconds in which open streams may end by themselves when the page closes
_RETRY = 0.2  # seconds until the next try when nobody could be let in


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
    """The routes, made and asked in the event loop: the page's files, frames, the run's state.

    ``latest`` holds the feeds, by name; ``snapshot`` gives the numbers of the run. ``pool`` encodes
    frames, ``teller`` reads numbers: they are told however many frames are asked for.
    """

    def __init__(
        self,
        latest: dict[str, Latest],
        set_up: PageConfig,
        snapshot: Callable[[], RunSnapshot],
        pool: Executor,
        teller: Executor,
    ) -> None:
        self._latest = latest
        self._set_up = set_up
        self._snapshot_run = snapshot
        self._in_pool = partial(asyncio.get_running_loop().run_in_executor, pool)
        self._in_teller = partial(asyncio.get_running_loop().run_in_executor, teller)
        self._viewers = 0
        self._began = monotonic()
        self._closing = asyncio.Event()
        self._registry = registry(self._read)
        self._overlay = partial(overlay_jpeg, alpha=set_up.alpha, classes=set_up.shown)
        small = partial(self._overlay, side=PAGE_SIDE)
        self._overlays = {name: Channel(slot, small, pool) for name, slot in latest.items()}
        # All tiles of the grid have together as many pixels as one feed's own view.
        tile = PAGE_SIDE // max(1, ceil(sqrt(len(latest))))
        self._encoded: dict[str, Channel] = {}
        self._tiles: list[Channel] = []
        for name, slot in latest.items():
            whole = partial(page_frame, feed=name)
            self._encoded[name] = Channel(slot, whole, pool)
            self._tiles.append(Channel(slot, partial(whole, side=tile), pool))
        static = (resources.files(__package__) / "static").iterdir()
        self._files = {file.name: file.read_bytes() for file in static}
        self.routes = Starlette(
            routes=[
                Route("/", partial(self._file, "index.html")),
                *(Route(f"/{name}", partial(self._file, name)) for name in self._files),
                Route("/live", self._live),
                Route("/grid", self._grid),
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
            latest.close()

    async def _file(self, name: str, request: Request) -> Response:
        return Response(self._files[name], media_type=_MEDIA_TYPES[Path(name).suffix])

    async def _live(self, request: Request) -> Response:
        channel = self._encoded[self._feed(request)]
        return _stream(request, self._watched(_encoded(channel)), "application/octet-stream")

    async def _grid(self, request: Request) -> Response:
        body = self._watched(_merged(self._tiles))
        return _stream(request, body, "application/octet-stream")

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
        return Response(await self._in_pool(encode), media_type="image/jpeg")

    async def _events(self, request: Request) -> Response:
        return _stream(request, self._numbers_each_second(), "text/event-stream")

    async def _metrics(self, request: Request) -> Response:
        text = await self._in_teller(generate_latest, self._registry)
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
        seconds = monotonic() - self._began
        return read_run_status(self._snapshot_run(), self._latest, self._viewers, seconds)

    async def _numbers(self) -> RunStatus:
        return await self._in_teller(self._read)  # sensors are files that may take their time

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
        # By these a viewer knows a run that has ended from one that was lost.
        yield _event("numbers", await self._numbers())


def _stream(request: Request, body: AsyncIterator[bytes], kind: str) -> Response:
    if request.method == "HEAD":  # would never end
        return Response(media_type=kind)
    if not request.state.connection.may_stream():
        raise HTTPException(503, "There are too many viewers; try again later.\n")
    return StreamingResponse(body, media_type=kind)


async def _encoded(channel: Channel) -> AsyncIterator[bytes]:
    seq = channel.start()
    while (made := await channel.newer(seq)) is not None:
        seq = made.seq
        yield made.data


async def _merged(channels: Sequence[Channel]) -> AsyncIterator[bytes]:
    """Frames of all channels, each when it is there; of one that is slow to take them, the newest.

    Browsers open six connections to a server at most, so all feeds come by one.
    """
    waiting = {asyncio.ensure_future(one.newer(one.start())): one for one in channels}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                channel, made = waiting.pop(task), task.result()
                if made is None:  # that feed has ended
                    continue
                # While another's was sent there may have come a newer one, which is there at once.
                made = await channel.newer(made.seq - 1) or made
                waiting[asyncio.ensure_future(channel.newer(made.seq))] = channel
                yield made.data
    finally:
        for task in waiting:
            task.cancel()


async def _parts(channel: Channel) -> AsyncIterator[bytes]:
    # The boundary stands behind each part too: browsers show a part when they have seen it.
    yield f"--{_BOUNDARY}\r\n".encode()
    async for jpeg in _encoded(channel):
        head = f"Content-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n".encode()
        yield head + jpeg + f"\r\n--{_BOUNDARY}\r\n".encode()


def _event(kind: str, data: msgspec.Struct) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), msgspec.json.encode(data))


class PageSink:
    """Shows one feed on the page. ``write`` keeps the frame and returns; it never waits."""

    def __init__(self, name: str, latest: Latest) -> None:
        self.name = name
        self.path: Path | None = None
        self._latest = latest

    def write(self, frame: Frame, result: Segmentation) -> None:
        """Make this the newest frame; frame and result must not be changed afterwards."""
        self._latest.put(frame, result)

    def close(self, *, complete: bool = True) -> None:
        """Nothing comes any more; the last frame can be seen until the page closes."""
        self._latest.end(complete=complete)


class LivePage(Closeable):
    """A web page of the run, as a context manager: frames and numbers, for any number of viewers.

    ``feeds`` are the names that the snapshots know them by; ``alpha`` (0 … 1) is the opacity that
    viewers start with and that /stream.mjpg and /snapshot.jpg have, ``classes`` the names of those
    that are coloured then (all, when there are none); ``model`` and ``engine`` are told as they
    are. Raises ConfigError for a name that is no class. It owns the listener: leaving closes every
    connection within two seconds, whatever the viewers do, and leaves no thread and no socket.

        >>> from urllib.request import urlopen
        >>> from knet_deploy import Feed, LivePage, RunStats, Segmenter, listen, open_source, run
        >>> stats = RunStats()
        >>> with open_source("photos") as source, Segmenter() as segment:
        ...     listener = listen("127.0.0.1:0")
        ...     with LivePage(listener, segment.labels, stats.snapshot, feeds=["gate"]) as page:
        ...         feed = Feed(source, [page.sink("gate")], name="gate")
        ...         summary = run([feed], segment, stats=stats)
        ...         urlopen(page.url + "metrics").status
        200
    """

    def __init__(
        self,
        listener: Listener,
        labels: LabelMap,
        snapshot: Callable[[], RunSnapshot],
        *,
        feeds: list[str],
        alpha: float = OPACITY,
        classes: Sequence[str] = (),
        model: str = "",
        engine: str = "",
    ) -> None:
        self._listener = listener
        self._snapshot = snapshot
        self._latest = {name: Latest() for name in feeds}
        looks = [ClassLook(*look) for look in zip(labels.names, labels.palette, strict=True)]
        shown = list(labels.indices(classes or labels.names))
        self._set_up = PageConfig(feeds, looks, shown, alpha, model, engine)
        self._thread: threading.Thread | None = None
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """What to open in a browser; never with the token."""
        return self._listener.url

    def sink(self, feed: str) -> PageSink:
        """The sink that shows ``feed``, one of the names given."""
        return PageSink(f"the page of {feed}" if feed else "the page", self._latest[feed])

    def __enter__(self) -> LivePage:
        self.start()
        return self

    def start(self) -> None:
        """Begin to answer; returns when it does."""
        ready = threading.Event()
        self._thread = threading.Thread(
            target=self._serve, args=(ready,), name="live-page", daemon=True
        )
        self._thread.start()
        ready.wait()

    def close(self) -> None:
        """Stop answering and give the port back; a second call does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            if self._server is not None:
                self._server.should_exit = True
            thread.join()
        self._listener.close()

    def _serve(self, ready: threading.Event) -> None:
        try:
            with (
                ThreadPoolExecutor(1, "live-page-encoder") as pool,
                ThreadPoolExecutor(1, "live-page-teller") as teller,
            ):
                asyncio.run(self._answer(pool, teller, ready))
        except Exception:  # the run goes on without its page
            _log.exception("the live page has stopped")
        finally:
            ready.set()

    async def _answer(
        self, pool: ThreadPoolExecutor, teller: ThreadPoolExecutor, ready: threading.Event
    ) -> None:
        for latest in self._latest.values():
            latest.attach(asyncio.get_running_loop())
        app = App(self._latest, self._set_up, self._snapshot, pool, teller)
        config = uvicorn.Config(
            AuthMiddleware(app.routes, self._listener),
            http="h11",
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
            h11_max_incomplete_event_size=HEADER_BYTES,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config, app, ready)
        await self._server.serve(sockets=[self._listener.socket])


class _Server(uvicorn.Server):
    """uvicorn that says when it is ready, lets in no more than there is room for, and that no
    viewer can keep from ending."""

    def __init__(self, config: uvicorn.Config, app: App, ready: threading.Event) -> None:
        super().__init__(config)
        self._app = app
        self._ready = ready
        self._connections = Connections(room())
        self._accepting: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets=[])
        (listening,) = sockets or []
        self._accepting = asyncio.create_task(self._accept(listening))
        self._ready.set()

    async def _accept(self, listening: socket) -> None:
        """Let in one after the other; asyncio would let in thousands before the first is seen."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                viewer, _ = await loop.sock_accept(listening)
            except ConnectionError:  # gone again
                continue
            except OSError as error:
                _log.warning("the live page lets nobody in: %s", error.strerror)
                await asyncio.sleep(_RETRY)
                continue
            while wait := self._connections.make_room():
                await asyncio.sleep(wait)
            try:
                await loop.connect_accepted_socket(self._connection, viewer)
            except OSError:
                viewer.close()

    def _connection(self) -> Connection:
        return Connection(self._connections, self.config, self.server_state)

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        if self._accepting is not None:
            self._accepting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._accepting
        self._app.close()
        asyncio.get_running_loop().call_later(_GRACE, self._drop)
        await super().shutdown(sockets)

    def _drop(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
