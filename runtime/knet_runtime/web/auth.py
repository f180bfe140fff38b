"""Where the page is served and to whom: the address, the Host header, the token.

The address is bound before the run begins, so that a wrong one is an error at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hmac
import re
import socket
from base64 import b64decode
from collections import OrderedDict
from dataclasses import dataclass
from ipaddress import ip_address
from time import monotonic

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from knet_runtime.errors import ConfigError
from knet_runtime.types import Closeable

_LOOPBACK = "127.0.0.1"
_STUCK_MS = 5000
_SEND_BUFFER = 256 * 1024
_REMEMBERED = 1000  # addresses that sent a wrong token
_LONGEST_WAIT = 5.0
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data: blob:; connect-src 'self'; form-action 'none'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


@dataclass(frozen=True)
class Listener(Closeable):
    """A bound socket and who may ask on it: all who know ``token``, or everybody without one.

    ``port`` is the real one, also where 0 was asked for; ``loopback`` says that only this machine
    reaches it. Whoever made it closes it, unless a ``LivePage`` has taken it over.
    """

    socket: socket.socket
    host: str
    port: int
    token: str | None
    loopback: bool

    @property
    def url(self) -> str:
        """What to open in a browser; never with the token."""
        anywhere = self.host in ("0.0.0.0", "::")
        host = socket.gethostname() if anywhere else self.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}/"

    def close(self) -> None:
        """Give the port back; a second call does nothing."""
        self.socket.close()


def listen(address: str, *, token: str | None = None, insecure: bool = False) -> Listener:
    """Bind "HOST:PORT", "[IPV6]:PORT", or "PORT" alone on 127.0.0.1; port 0 takes any free one.

    Raises ConfigError when it is misspelt, taken or not to be had, when others than this machine
    could reach it and there is neither a token nor ``insecure``, and for a token that is too easy
    to guess or does not fit into a URL.

        >>> from knet_deploy import listen
        >>> with listen("127.0.0.1:0") as listener:
        ...     listener.url
        'http://127.0.0.1:.../'
    """
    host, port = _parse(address)
    if token is not None:
        if insecure:
            raise ConfigError("--insecure means no token: leave out --token or --insecure")
        if re.fullmatch(r"[A-Za-z0-9._~-]{8,200}", token) is None:
            raise ConfigError(
                "the token must be 8 to 200 letters, digits or . _ ~ -; openssl rand -hex 16 "
                "makes a good one"
            )
    try:
        # Bound to the very address that is judged: a name could lead elsewhere the next time.
        family, kind, number, _, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"--serve {address}: there is no host {host!r} here") from error
    loopback = ip_address(str(place[0]).partition("%")[0]).is_loopback
    if not loopback and token is None and not insecure:
        raise ConfigError(
            f"--serve {address}: others than this machine can reach it: add --token TOKEN, or "
            "--insecure if everybody there may look"
        )
    bound = socket.socket(family, kind, number)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # These two are what accepted connections inherit. A deep buffer would show a slow viewer
        # what happened seconds ago; a viewer that takes nothing is dropped (Linux).
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STUCK_MS)
        bound.bind(place)
        bound.listen(1024)  # from here on nobody else can take it
        bound.setblocking(False)
    except OSError as error:
        bound.close()
        raise ConfigError(f"--serve {address}: {_reason(error)}") from error
    return Listener(bound, host, int(bound.getsockname()[1]), token, loopback)


def _parse(address: str) -> tuple[str, int]:
    found = re.fullmatch(
        r"(?:(?P<host>[^\s:\[\]/@]*):|\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]:)?(?P<port>\d{1,5})", address
    )
    if found is None or int(found["port"]) > 65535:
        raise ConfigError(f"--serve is {address!r}: write HOST:PORT, such as 127.0.0.1:8000")
    return found["v6"] or found["host"] or _LOOPBACK, int(found["port"])


def _reason(error: OSError) -> str:
    match error.errno:
        case errno.EADDRINUSE:
            return "the port is taken; choose another, or 0 for any free one"
        case errno.EACCES:
            return "ports below 1024 are the system's; choose a higher one"
        case errno.EADDRNOTAVAIL:
            return "this machine does not have that address; choose one of its own"
        case _:
            return f"{error.strerror}; choose another address"


class _Failures:
    """How long the answer to a wrong token waits: the first few of an address not at all, then
    there are two in a second, and 50 of all addresses together. The right token never waits, so
    that nobody can lock out whoever has it."""

    def __init__(self) -> None:
        self._of: OrderedDict[str, _Slots] = OrderedDict()
        self._of_all = _Slots(1 / 50, 100)

    def wait(self, address: str) -> float:
        """Note one more of this address; seconds for which its answer is to wait, 5 at most."""
        slots = self._of.pop(address, None) or _Slots(1 / 2, 8)
        self._of[address] = slots
        if len(self._of) > _REMEMBERED:
            self._of.popitem(last=False)
        return max(slots.wait(), self._of_all.wait())


class _Slots:
    """Moments ``apart`` seconds; up to ``saved`` that were not used may be used at once."""

    def __init__(self, apart: float, saved: int) -> None:
        self._apart, self._saved = apart, saved
        self._next = 0.0

    def wait(self) -> float:
        """Seconds to the next moment, which is taken."""
        now = monotonic()
        earliest = now - self._saved * self._apart
        self._next = min(max(self._next, earliest) + self._apart, now + _LONGEST_WAIT)
        return max(0.0, self._next - now)


class AuthMiddleware:
    """Lets those requests through to ``app`` that may pass, and answers the others.

    On a loopback address the Host header must name this machine: else a page from elsewhere, whose
    name was made to lead here (DNS rebinding), could read the frames. With a token every path needs
    it: as "Authorization: Bearer TOKEN", or as the password of HTTP Basic (RFC 7617), under any
    user name, which is how browsers ask for it. The answer to a wrong one may be slow in coming.
    """

    def __init__(self, app: ASGIApp, listener: Listener) -> None:
        self._app = app
        self._listener = listener
        self._failures = _Failures()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        request = Request(scope, receive)
        answer: ASGIApp
        if not self._host_is_ours(request):
            answer = PlainTextResponse(
                f"This page is at {self._listener.url} (the Host header names another).\n", 421
            )
        elif self._may_pass(request):
            request.state.connection.admitted = True
            answer = self._app
        else:
            if "authorization" in request.headers:  # browsers ask without it first
                await self._slow_down(request)
            answer = PlainTextResponse(
                "A token is needed: as the password of a browser, or as the header "
                '"Authorization: Bearer TOKEN".\n',
                401,
                {"WWW-Authenticate": 'Basic realm="knet-deploy: the token is the password"'},
            )
        await answer(scope, receive, send_guarded)

    async def _slow_down(self, request: Request) -> None:
        """Wait, unless who asks goes away before."""
        wait = self._failures.wait(request.state.connection.address)
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(_gone(request), wait)

    def _host_is_ours(self, request: Request) -> bool:
        if not self._listener.loopback:
            return True
        host = request.headers.get("host", "")
        name = host[: host.index("]") + 1] if "]" in host else host.partition(":")[0]
        if name.lower() in ("localhost", self._listener.host.lower()):
            return True
        try:
            return ip_address(name.strip("[]")).is_loopback
        except ValueError:
            return False

    def _may_pass(self, request: Request) -> bool:
        if self._listener.token is None:
            return True
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        given = given.strip()
        if kind.lower() == "basic":
            try:
                given = b64decode(given, validate=True).decode().partition(":")[2]
            except ValueError:
                return False
        elif kind.lower() != "bearer":
            return False
        # In a time that does not say how much of it is right.
        return hmac.compare_digest(given.encode("utf-8", "replace"), self._listener.token.encode())


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
