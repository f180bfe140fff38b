"""The label maps of data sets: a folder's ``labels.json``, ADE20K's and Cityscapes' classes."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import msgspec

from knet_runtime.errors import DataError
from knet_runtime.labels import Colour, LabelMap, distinct_palette


class _LabelsJson(msgspec.Struct):
    class_names: tuple[str, ...]
    palette_rgb: tuple[Colour, ...] | None = None
    ignore_index: int = 255


def load_labels_json(path: Path) -> LabelMap:
    """Read a data set's ``labels.json``: ``class_names``, and optionally ``palette_rgb``
    (a distinct palette is made when it is absent) and ``ignore_index`` (255).

    Raises DataError with the file's name when it is missing or malformed.
    """
    try:
        return _decode(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror}; a data folder needs a labels.json with class_names"
        ) from error
    except (msgspec.DecodeError, ValueError) as error:
        raise DataError(f"{path}: {error}") from error


def _decode(data: bytes) -> LabelMap:
    raw = msgspec.json.decode(data, type=_LabelsJson)
    palette = raw.palette_rgb or distinct_palette(len(raw.class_names))
    return LabelMap(raw.class_names, palette, raw.ignore_index)


def _packaged(name: str) -> LabelMap:
    return _decode((resources.files("knet_train.data") / name).read_bytes())


# The 150 classes of the scene parsing benchmark (arXiv 1608.05442) in its order, with
# mmsegmentation's short names and palette (``mmseg/utils/class_names.py``); 255 is void.
ADE20K = _packaged("ade20k.json")

# The 19 classes that Cityscapes (arXiv 1604.01685) scores, by train id; 255 is void.
CITYSCAPES19 = _packaged("cityscapes.json")
