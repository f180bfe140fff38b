"""The page's server, in a thread of the run, and the sinks that feed it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from socket import socket
from types import TracebackType
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from knet_runtime.labels import LabelMap
from knet_runtime.segmentation import Segmentation
from knet_runtime.types import Frame
from knet_runtime.web.app import App, ClassLook, PageConfig
from knet_runtime.web.auth import AuthMiddleware, Listener
from knet_runtime.web.status import RunStatus, read_run_status
from knet_runtime.web.streams import Latest

if TYPE_CHECKING:
    from knet_runtime.pipeline.stats import RunSnapshot

_log = logging.getLogger(__name__)

_GRACE = 0.5
"""Seconds in which open streams may end by themselves when the page closes."""

_CONNECTIONS = 256


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
        self._latest.end()


class LivePage:
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
        alpha: float = 0.5,
        classes: Sequence[str] = (),
        model: str = "",
        engine: str = "",
    ) -> None:
        self._listener = listener
        self._snapshot = snapshot
        self._latest = {name: Latest() for name in feeds}
        looks = zip(labels.names, labels.palette, strict=True)
        self._set_up = PageConfig(
            feeds=feeds,
            classes=[ClassLook(name, colour) for name, colour in looks],
            shown=list(labels.indices(classes or labels.names)),
            alpha=alpha,
            model=model,
            engine=engine,
        )
        self._thread: threading.Thread | None = None
        self._server: _Server | None = None

    @property
    def url(self) -> str:
        """What to open in a browser; never with the token."""
        return self._listener.url

    def sink(self, feed: str) -> PageSink:
        """The sink that shows ``feed``, one of the names given."""
        return PageSink(f"the page of {feed}" if feed else "the page", self._latest[feed])

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

    def __enter__(self) -> LivePage:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self, ready: threading.Event) -> None:
        try:
            with ThreadPoolExecutor(1, "live-page-encoder") as pool:
                asyncio.run(self._answer(pool, ready))
        except Exception:  # the run goes on without its page
            _log.exception("the live page has stopped")
        finally:
            ready.set()

    async def _answer(self, pool: ThreadPoolExecutor, ready: threading.Event) -> None:
        for latest in self._latest.values():
            latest.attach(asyncio.get_running_loop())
        app = App(self._latest, self._set_up, self._read, pool)
        config = uvicorn.Config(
            AuthMiddleware(app.routes, self._listener),
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        self._server = _Server(config, app, ready)
        await self._server.serve(sockets=[self._listener.socket])

    def _read(self, viewers: int) -> RunStatus:
        return read_run_status(self._snapshot(), self._latest, viewers)


class _Protocol(H11Protocol):
    """HTTP/1.1 that logs no request, whoever listens: its query may hold the token."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.access_log = False


class _Server(uvicorn.Server):
    """uvicorn that says when it is ready, and that no viewer can keep from ending."""

    def __init__(self, config: uvicorn.Config, app: App, ready: threading.Event) -> None:
        super().__init__(config)
        self._app = app
        self._ready = ready

    async def startup(self, sockets: list[socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set()

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        self._app.close()
        asyncio.get_running_loop().call_later(_GRACE, self._drop)
        await super().shutdown(sockets)

    def _drop(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
