"""Who is connected to the page: no more than there is room for, and each only while it asks.

Whoever connects may send nothing, or a byte a minute: without a limit that takes the descriptors
of the run itself, and keeps out those that watch over it.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections import Counter
from ipaddress import IPv6Address, ip_address
from math import inf
from pathlib import Path
from time import monotonic

from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

_MOST, _FEWEST = 256, 8
_RESERVE = 64  # descriptors that are left to the run, for its files and cameras: a quarter at most
_BEGIN = 0.05  # seconds that each has to begin, whoever else wants its place
_LOG_PAUSE = 10.0

PATIENCE = 5.0
"""Seconds in which a connection has to send its first request whole, and then each further one."""

HEADER_BYTES = 16 * 1024
"""The longest request line and headers."""

_log = logging.getLogger(__name__)


class Sparing(logging.Filter):
    """Lets through a line of each kind (they differ in what is filled in) every ``pause`` seconds,
    which then says how many were left out."""

    def __init__(self, pause: float = _LOG_PAUSE) -> None:
        super().__init__()
        self._pause = pause
        self._kinds: dict[str, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether it is let through."""
        kind = str(record.msg)
        last, left_out = self._kinds.get(kind, (-inf, 0))
        now = monotonic()
        if now - last < self._pause:
            self._kinds[kind] = last, left_out + 1
            return False
        self._kinds[kind] = now, 0
        if left_out:
            record.msg = f"{kind.strip()} (and {left_out:,} times since the last such line)"
        return True


_log.addFilter(Sparing())


def room() -> int:
    """How many connections there may be: as many as there are descriptors for, less 64 or a quarter
    for the rest of the run; 8 at least, 256 at most."""
    if sys.platform == "win32":
        return _MOST
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return _MOST
    try:
        used = sum(1 for _ in Path("/dev/fd").iterdir())
    except OSError:  # a container may lack it
        used = _RESERVE
    return max(_FEWEST, min(_MOST, limit - used - min(_RESERVE, limit // 4)))


def neighbourhood(host: str) -> str:
    """What counts as one address: an IPv4 address, or a network /64 of IPv6, which one machine may
    have all of."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(address, IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return f"{int(address) >> 64:x}::/64"
    return str(address)


class Connections:
    """All that are open, the oldest first. ``most`` at once, three quarters of them streams: so
    there is always one to close in favour of who comes next. All belong to the event loop."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._open: dict[Connection, None] = {}

    def add(self, connection: Connection) -> None:
        """It is open."""
        self._open[connection] = None

    def __contains__(self, connection: object) -> bool:
        return connection in self._open

    def discard(self, connection: Connection) -> None:
        """It is closed."""
        self._open.pop(connection, None)

    def make_room(self) -> float:
        """If there is no room for one more, close one: idle rather than at work, of the address
        that has the most of those, the oldest. Seconds to wait before, which is when to try again,
        or 0: there is room."""
        if len(self._open) < self.most:
            return 0.0
        idle = [one for one in self._open if not one.at_work]
        chosen = _oldest_of_most(idle or [one for one in self._open if not one.streams])
        if (left := chosen.since + _BEGIN - chosen.loop.time()) > 0:
            return left
        _log.warning(
            "the live page has %d connections, its limit: the oldest idle ones are closed for "
            "new ones",
            len(self._open),
        )
        self._drop(chosen)
        return 0.0

    def may_stream(self, connection: Connection) -> bool:
        """Whether there is room for one more stream; where another address has two more than this
        one's, its oldest has to go."""
        streams = [one for one in self._open if one.streams]
        if len(streams) < self.most * 3 // 4:
            return True
        have = Counter(one.address for one in streams)
        if max(have.values()) < have[connection.address] + 2:
            return False
        self._drop(_oldest_of_most(streams))
        return True

    def _drop(self, connection: Connection) -> None:
        self.discard(connection)
        connection.transport.abort()


def _oldest_of_most(candidates: list[Connection]) -> Connection:
    have = Counter(one.address for one in candidates)
    return max(candidates, key=lambda one: have[one.address])


class Connection(H11Protocol):
    """A connection that speaks HTTP/1.1, and ends when it asks nothing for ``PATIENCE`` seconds.

    The app finds it in a request's state, as ``connection``. It logs no request, whoever listens:
    its query may hold the token.
    """

    def __init__(self, connections: Connections, config: Config, server_state: ServerState) -> None:
        super().__init__(config, server_state, {"connection": self})
        self.logger = _log
        self.access_log = False
        self.address = ""
        self.since = self.loop.time()
        self.admitted = False
        """Whether the request in progress has passed the guard."""
        self.streams = False
        """Whether the answer goes on until the viewer leaves."""
        self._all = connections
        self._deadline: asyncio.TimerHandle | None = None
        self._unsent = 0

    @property
    def at_work(self) -> bool:
        """Whether it waits for an answer that it may have."""
        return self.admitted and self._asks

    @property
    def _asks(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def may_stream(self) -> bool:
        """Make the answer in progress a stream, if there is room for one more."""
        self.streams = self._all.may_stream(self)
        return self.streams

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called by the event loop."""
        super().connection_made(transport)
        self.address = neighbourhood(self.client[0] if self.client else "")
        self._all.add(self)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the event loop."""
        self._all.discard(self)
        self._stop_waiting()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Called with each piece of a request: only a whole one ends the wait."""
        super().handle_events()
        if self._asks:
            self._stop_waiting()

    def _unsupported_upgrade_warning(self) -> None:
        """Who asks for a WebSocket gets the page; uvicorn would advise to install something."""

    def on_response_complete(self) -> None:
        """Called when the answer is written; the next request may be there already."""
        self.admitted = self.streams = False
        self._wait()
        super().on_response_complete()

    def _wait(self) -> None:
        self._stop_waiting()
        if self in self._all:
            self._deadline = self.loop.call_later(PATIENCE, self._give_up)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        before, self._unsent = self._unsent, self.transport.get_write_buffer_size()
        if self._unsent and self._unsent != before:  # a slow viewer still reads the answer
            self._wait()
        else:
            self.transport.abort()
