"""What is in a folder of data, by name, without what systems and programs leave behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from knet_runtime.errors import DataError

# What Synology, QNAP, Windows, macOS, Linux and Python leave in folders; see also ``_is_litter``.
_LITTER = {
    *("@eadir", "@__thumb", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot"),
    *("$recycle.bin", "recycler", "system volume information", "__macosx", "lost+found"),
    *("network trash folder", "temporary items", "__pycache__"),
}


def walk(folder: Path, problems: list[str], above: tuple[str, ...] = ()) -> Iterator[Path]:
    """All files below ``folder``, by name, links followed (but none into a folder that it lies
    in). A link to nothing is added to ``problems``. Raises DataError."""
    here = os.path.realpath(folder)
    if here in above:
        return
    for path in entries(folder):
        if path.is_dir():
            yield from walk(path, problems, (*above, here))
        elif path.is_file():
            yield path
        elif path.is_symlink():
            problems.append(
                f"{path} is a link to {path.readlink()}, which is not there: mend or remove it"
            )


def entries(folder: Path) -> list[Path]:
    """What is in a folder, by name. Raises DataError."""
    try:
        return [path for path in sorted(folder.iterdir()) if not _is_litter(path.name)]
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; let this user read the folder") from error


def place_file(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file, or make a link to it, and the folders above. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if link:
        target.symlink_to(source.resolve())
    else:
        shutil.copyfile(source, target)


def _is_litter(name: str) -> bool:
    """Hidden (.ipynb_checkpoints, or the "._photo.jpg" that macOS leaves), or of a system."""
    return name.startswith(".") or name.casefold() in _LITTER
