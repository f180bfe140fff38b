"""`knet-deploy soft-labels`: a teacher's probabilities, for a smaller network to learn from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from knet_deploy.cli.choices import BundleOption, EngineOption
from knet_deploy.cli.console import needs_extra, parse_size, say, say_error, track
from knet_runtime.bundle.store import open_bundle


def soft_labels(
    images: Annotated[
        Path, typer.Argument(help="Folder of images, folders in it included; or one image.")
    ],
    out: Annotated[
        Path, typer.Option(help="Folder for a PNG per image; what it has already is kept.")
    ],
    bundle: BundleOption = None,
    engine: EngineOption = "auto",
    flip: Annotated[
        bool, typer.Option("--flip", help="Average with what it makes of the mirror image.")
    ] = False,
    scales: Annotated[
        str,
        typer.Option(
            help="Average over these scales of the bundle's input size, such as 1,1.25; others "
            "than 1 need a bundle of any size (export --dynamic)."
        ),
    ] = "1",
    map_size: Annotated[
        str | None,
        typer.Option(
            help="HEIGHTxWIDTH of the probability maps; half of the bundle's input by default."
        ),
    ] = None,
    renamed: Annotated[
        list[str] | None,
        typer.Option(
            "--map", help="A class of the teacher is another one, or a part of it: OLD=NEW."
        ),
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(
            help="The student's classes, in its order: A,B,C; pixels of others get no soft label."
        ),
    ] = None,
) -> None:
    """Write what a semantic bundle makes of images as soft labels, which `train --soft-labels`
    learns from: 8-bit grey PNGs of the images' names, with a map per class, one below the other.

    The same command continues one that was stopped. The exit status is 1 where an image was not
    readable.
    """
    with needs_extra("train", "knet-deploy soft-labels"):
        from knet_train.data.teacher import (
            Teacher,
            TeacherOptions,
            find_images,
            parse_scales,
            write_soft_labels,
        )
    options = TeacherOptions(
        flip,
        parse_scales(scales),
        None if map_size is None else parse_size(map_size, "--map-size"),
        tuple(renamed or ()),
        tuple(name.strip() for name in classes.split(",")) if classes else (),
    )
    found = find_images(images, out)
    with Teacher(open_bundle(bundle), engine, options) as teacher:
        with track("soft labels", len(found)) as advance:
            done = write_soft_labels(teacher, found, out, advance)
        sizes = (look.manifest.input.size for look in teacher.looks)
        seen = ", ".join(f"{width}×{height}" for height, width in sizes)
        say("teacher", f"{teacher.bundle.model_id}, on {teacher.engine}")
        say("seen", seen + (", mirrored too" if flip else ""))
        say("maps", f"{teacher.map_size[1]}×{teacher.map_size[0]}")
        say("classes", ", ".join(teacher.labels.names))
        if teacher.selection.dropped:
            say("left out", ", ".join(teacher.selection.dropped))
    say(
        "wrote",
        f"{done.written} files into {out}" + (f"; {done.kept} were there" * (done.kept > 0)),
    )
    for line in done.problems:
        say("problem", line)
    if done.problems:
        say_error(f"{len(done.problems)} of {len(found)} images have no soft labels")
        raise typer.Exit(1)
