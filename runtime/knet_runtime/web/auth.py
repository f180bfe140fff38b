"""Who may ask: the Host header, the token, and the headers that keep a page to itself.

Where the page is served, and to whom: an address that is ours before the run begins.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import re
import socket
from base64 import b64encode
from dataclasses import dataclass
from html import escape
from http.cookies import CookieError, SimpleCookie
from importlib import resources
from ipaddress import ip_address
from urllib.parse import parse_qs

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from knet_runtime.errors import ConfigError
from knet_runtime.types import Closeable

_LOOPBACK = "127.0.0.1"
_STUCK_MS = 5000
_SEND_BUFFER = 256 * 1024


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
        _set_options(bound)
        bound.bind(place)
        bound.listen(128)  # from here on nobody else can take it
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


def _set_options(bound: socket.socket) -> None:
    """What accepted connections inherit."""
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # A deep buffer would show a slow viewer what happened seconds ago.
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: a viewer that takes nothing is dropped
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STUCK_MS)


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


_LOGIN_BYTES = 4096
_COOKIE_DAYS = 30


class AuthMiddleware:
    """Lets those requests through to ``app`` that may pass, and answers the others and /login.

    On a loopback address the Host header must name this machine: else a page from elsewhere, whose
    name was made to lead here (DNS rebinding), could read the pictures. With a token every path but
    /login needs it, as "Authorization: Bearer TOKEN" or by the cookie that /login sets.
    """

    def __init__(self, app: ASGIApp, listener: Listener) -> None:
        self._app = app
        self._listener = listener
        self._token = listener.token
        self._page = (resources.files(__package__) / "static" / "login.html").read_text("utf-8")
        style = self._page.partition("<style>")[2].partition("</style>")[0]
        digest = b64encode(hashlib.sha256(style.encode()).digest()).decode()
        self._headers = {
            "Content-Security-Policy": (
                f"default-src 'none'; script-src 'self'; style-src 'self' 'sha256-{digest}'; "
                "img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; "
                "base-uri 'none'; frame-ancestors 'none'"
            ),
            "Cross-Origin-Resource-Policy": "same-origin",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers[name] = value
            await send(message)

        request = Request(scope, receive)
        answer: ASGIApp
        if not self._host_is_ours(request):
            answer = PlainTextResponse(
                f"This page is at {self._listener.url} (the Host header names another).\n", 421
            )
        elif request.url.path == "/login":
            answer = await self._login(request)
        elif self._may_pass(request):
            answer = self._app
        elif request.url.path == "/":
            answer = self._form(401)
        else:
            answer = PlainTextResponse(
                "A token is needed: Authorization: Bearer TOKEN, or /login?token=TOKEN once.\n",
                401,
                {"WWW-Authenticate": "Bearer"},
            )
        await answer(scope, receive, send_guarded)

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
        if self._token is None:
            return True
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self._is_token(given.strip()):
            return True
        try:
            cookie = SimpleCookie(request.headers.get("cookie", "")).get(self._cookie_name)
        except CookieError:
            return False
        return cookie is not None and _equal(cookie.value, self._cookie(self._token))

    def _is_token(self, given: str) -> bool:
        return self._token is not None and _equal(given, self._token)

    @property
    def _cookie_name(self) -> str:
        # A browser sends the cookies of all ports of a host: two pages must not share one.
        return f"knet_deploy_{self._listener.port}"

    def _cookie(self, token: str) -> str:
        # Other servers on this host get it too; they cannot make the token of it.
        return hmac.new(token.encode(), b"knet-deploy live page", hashlib.sha256).hexdigest()

    async def _login(self, request: Request) -> Response:
        if self._token is None:
            return RedirectResponse("/", 303)
        if request.method == "POST":
            given = await _form_token(request)
        else:
            given = request.query_params.get("token")
        if given is None:
            return self._form(200)
        if not self._is_token(given):
            return self._form(401, "That is not the token.")
        # Not a redirect: on one that began at another site's link, SameSite=Strict is not sent.
        answer = self._filled('<meta http-equiv="refresh" content="0;url=/">', "Signed in.", 200)
        answer.set_cookie(
            self._cookie_name,
            self._cookie(self._token),
            max_age=_COOKIE_DAYS * 86_400,
            httponly=True,
            samesite="strict",
        )
        return answer

    def _form(self, status: int, problem: str = "") -> Response:
        return self._filled("", problem, status)

    def _filled(self, head: str, text: str, status: int) -> Response:
        page = self._page.replace("<!-- head -->", head).replace("<!-- text -->", escape(text))
        return HTMLResponse(page, status)


def _equal(given: str, wanted: str) -> bool:
    """Whether they are the same, in a time that does not say how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), wanted.encode())


async def _form_token(request: Request) -> str | None:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LOGIN_BYTES:
            return ""
    return parse_qs(body.decode("utf-8", "replace")).get("token", [""])[0]
