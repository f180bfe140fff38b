"""The options of ``run`` that put it on a web page, and what they open."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from knet_deploy.console import needs_extra

if TYPE_CHECKING:
    from knet_runtime.labels import LabelMap
    from knet_runtime.segmenter import Segmenter
    from knet_runtime.serve.address import Listener
    from knet_runtime.sinks import Sink
    from knet_runtime.stats import RunStats
    from knet_runtime.stream import Feed

Serve = Annotated[
    str | None,
    typer.Option(
        "--serve",
        metavar="HOST:PORT",
        help="Show the run on a web page there, such as 127.0.0.1:8000; with metrics and health.",
    ),
]
Token = Annotated[
    str | None,
    typer.Option(
        "--token",
        envvar="KNET_DEPLOY_TOKEN",
        help="What viewers of --serve must know; needed where others than this machine reach it.",
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Let everybody who reaches --serve look, without token.")
]


@contextmanager
def page_listener(
    serve: str | None, token: str | None, insecure: bool
) -> Iterator[Listener | None]:
    """The port of --serve, held before anything that costs time is loaded; None without it.

    Raises ConfigError for an address or a token that will not do, MissingExtra without the extra.
    """
    if serve is None:
        # A token may stand in the environment of all runs.
        if insecure:
            from knet_runtime.errors import ConfigError

            raise ConfigError(
                "--insecure is about the page: add --serve HOST:PORT, or leave it out"
            )
        yield None
        return
    with needs_extra("serve", "--serve"):
        import knet_runtime.serve.page  # noqa: F401
    from knet_runtime.serve.address import listen

    listener = listen(serve, token=token, insecure=insecure)
    try:
        yield listener
    finally:
        listener.close()


@contextmanager
def live_page(
    listener: Listener | None,
    segmenter: Segmenter,
    stats: RunStats,
    feeds: Sequence[Feed],
    *,
    alpha: float,
    classes: Sequence[str] = (),
    hide: Callable[[LabelMap], Callable[[Sink], Sink]] | None = None,
) -> Iterator[None]:
    """The page of a run that is yet to begin: it becomes a sink of each feed; nothing without a
    listener. ``hide`` makes what wraps a feed's sink that shows pictures, for privacy."""
    if listener is None:
        yield
        return
    from knet_runtime.serve.page import LivePage

    with LivePage(
        listener,
        segmenter.labels,
        stats.snapshot,
        feeds=[feed.name for feed in feeds],
        alpha=alpha,
        classes=classes,
        model=segmenter.model_id,
        engine=segmenter.engine,
    ) as page:
        for feed in feeds:
            sink: Sink = page.sink(feed.name)
            feed.sinks = [*feed.sinks, sink if hide is None else hide(segmenter.labels)(sink)]
        typer.echo(f"knet-deploy: the page is at {page.url}", err=True)
        yield
