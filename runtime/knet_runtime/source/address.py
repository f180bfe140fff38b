"""Addresses of streams, and how they are shown: without what is secret in them."""

from __future__ import annotations

import re

SCHEMES = ("rtsp", "rtsps", "http", "https")
"""The schemes that are read."""


def scheme_of(source: str) -> str | None:
    """The scheme of an address, in lower case; None for what is none (a path, "C:/video.mp4")."""
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):/", source)
    return scheme[1].lower() if scheme else None


def redacted(source: str) -> str:
    """An address without user, password, query and fragment; other names of sources as they are.

    Everything up to the last "@" goes: a password may hold any character. Queries often carry a
    key. "rtsp://me:secret@host/live?key=1" becomes "rtsp://***@host/live?***".
    """
    if scheme_of(source) is None:
        return source
    scheme, rest = source.split(":", 1)
    slashes = rest[: len(rest) - len(rest.lstrip("/"))]
    body = rest[len(slashes) :]
    if "@" in body:
        body = "***@" + body.rpartition("@")[2]
    body = re.sub(r"[?#].*", "?***", body, count=1, flags=re.DOTALL)
    return f"{scheme}:{slashes}{body}"
