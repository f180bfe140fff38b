"""Hugging Face's data sets: parquet files with a column of images and one of label images."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from knet_runtime.errors import DataError
from knet_train.data.convert.label_images import Coding, numbers_of, read_pixels
from knet_train.data.convert.source import Item, Source, read_json, split_of

_IMAGES = ("image", "images", "img", "pixel_values", "photo", "input")
_BATCH = 16  # rows in memory at a time
_SUFFIXES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"II*\0": ".tif", b"RIFF": ".webp"}


class _Row(NamedTuple):
    """One image and its label image, unpacked."""

    name: str
    split: str | None
    image: Path
    label: Path


def is_parquet(root: Path) -> str | None:
    """Why it is a folder of parquet files; None where it is none."""
    found = _files(root)
    return found[0].relative_to(root).as_posix() if found else None


def read_parquet(root: Path, scratch: Path) -> Source:
    """Images and labels, unpacked into ``scratch``. The names of classes are those of
    ``id2label.json``, else the numbers. Raises DataError, also where pyarrow is missing."""
    rows = [row for file in _files(root) for row in _unpack(file, scratch)]
    names = _names(root, [row.label for row in rows])
    draw = Coding(numbers_of(len(names))).draw
    items = (Item(r.name, r.image, r.label, partial(draw, r.label), r.split) for r in rows)
    return Source(names, tuple(items))


def _files(root: Path) -> list[Path]:
    return sorted((*root.glob("*.parquet"), *root.glob("*/*.parquet")))


def _unpack(file: Path, scratch: Path) -> Iterator[_Row]:
    """Write the rows of a file; its name begins with the split: train-00000-of-00001.parquet."""
    split = split_of(re.sub(r"-\d+-of-\d+.*", "", file.stem))
    for number, pictures in enumerate(_rows(file)):
        name, paths = f"{file.stem}-{number:06}", []
        for kind, data in zip(("images", "labels"), pictures, strict=True):
            suffix = next((s for magic, s in _SUFFIXES.items() if data.startswith(magic)), None)
            if suffix is None:
                raise DataError(f"{file}: row {number} has {kind} that are no PNG or JPEG")
            path = scratch / kind / f"{name}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            paths.append(path)
        yield _Row(name, split, *paths)


def _rows(file: Path) -> Iterator[tuple[bytes, bytes]]:
    """The files of image and label of each row."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        raise DataError(
            f'{file}: to read parquet files takes the extra convert: pip install "knet-deploy'
            '[convert]"'
        ) from error
    try:
        with parquet.ParquetFile(file) as opened:
            columns = _columns(file, opened.schema_arrow)
            for batch in opened.iter_batches(_BATCH, columns=columns):
                for row in batch.to_pylist():
                    image, label = ((row[column] or {}).get("bytes") for column in columns)
                    if not image or not label:
                        raise DataError(
                            f"{file} names images that it does not hold: save the data set with "
                            "its images inside"
                        )
                    yield image, label
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file}: {error}; fetch the file again") from error


def _columns(file: Path, schema: Any) -> list[str]:
    """The columns of images and of labels: the two that hold files."""
    held = [f.name for f in schema if str(f.type).startswith("struct<") and "bytes" in str(f.type)]
    images = [name for name in held if name in _IMAGES]
    labels = [name for name in held if name not in _IMAGES]
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{file} has the columns of images {', '.join(held) or '(none)'}: it wants one named "
            "image, and one of label images"
        )
    return [images[0], labels[0]]


def _names(root: Path, labels: list[Path]) -> tuple[str, ...]:
    path = root / "id2label.json"
    if path.is_file():
        named: dict[int, str] = read_json(path, dict[int, str])
        if sorted(named) == list(range(len(named))):
            return tuple(named[number] for number in range(len(named)))
        raise DataError(f"{path} does not name the classes 0, 1, 2, …: write one line for each")
    found: set[int] = set()
    for label in labels:
        found.update(np.unique(read_pixels(label)).tolist())
    return tuple(map(str, range(max(found - {255}, default=-1) + 1)))
