"""Where the page is served, and to whom: an address that is ours before the run begins."""

from __future__ import annotations

import errno
import re
import socket
from dataclasses import dataclass
from ipaddress import ip_address

from knet_runtime.errors import ConfigError

_LOOPBACK = "127.0.0.1"
_STUCK_MS = 5000
_SEND_BUFFER = 256 * 1024


@dataclass(frozen=True)
class Listener:
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
