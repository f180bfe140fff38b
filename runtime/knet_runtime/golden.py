"""Golden tensors: a few real inputs and PyTorch's logits for them, replayed on the device.

``golden.npz`` holds ``images`` uint8 [K, H, W, 3] RGB, already at the model's input size, and
``logits`` float32 [K, N, h, w]. A device without labels or PyTorch can still show with them that
what it runs is the model that was trained.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from knet_runtime.bundle.manifest import Tolerance
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines import Engine
from knet_runtime.errors import BundleError
from knet_runtime.metrics import agreement
from knet_runtime.postprocess import upsampled_argmax

GOLDEN_NAME = "golden.npz"
_MOST = 1 << 30  # bytes of one array; a few images and their logits are far below
# What zipfile raises for a damaged archive, one that is encrypted, or packed in an unknown way.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


class Golden(msgspec.Struct, frozen=True):
    """``images`` uint8 [K, H, W, 3] and their reference ``logits`` float32 [K, N, h, w]."""

    images: NDArray[np.uint8]
    logits: NDArray[np.float32]


class GoldenReport(msgspec.Struct, frozen=True):
    """How far an engine is from the reference on ``images`` golden images.

    ``max_logit_diff`` is the largest difference as a share of the reference's largest logit (NaN
    if the engine gave NaN or infinity, None if it gives class maps), ``agreement`` the fraction
    of equal pixels of the class maps at the model's input size.
    """

    images: int
    max_logit_diff: float | None
    agreement: float
    passed: bool
    tolerance: Tolerance

    def __str__(self) -> str:
        logits = ""
        if self.max_logit_diff is not None:
            logits = f", logits differ by at most {self.max_logit_diff:.2g} of the largest"
        return f"{self.images} images, {100 * self.agreement:.3f} % of pixels equal{logits}"


def save_golden(
    target: Path | BinaryIO, images: NDArray[np.uint8], logits: NDArray[np.float32]
) -> None:
    """Write ``images`` uint8 [K, H, W, 3] and ``logits`` float32 [K, N, h, w], compressed.

    Equal arrays give equal bytes. Raises ValueError when the shapes or types are others.
    """
    if problem := _problem(images, logits):
        raise ValueError(problem)
    np.savez_compressed(target, images=images, logits=logits)


def load_golden(bundle: Bundle) -> Golden:
    """Read the bundle's ``golden.npz``; BundleError if absent or at odds with the manifest."""
    path = bundle.file(GOLDEN_NAME)
    images, logits = _read(path)
    size = bundle.manifest.input.size
    problem = _problem(images, logits)
    if not problem and images.shape[1:3] != size:
        problem = f"images are {images.shape}, the model takes {size[0]}×{size[1]}"
    expected = bundle.graph("logits").output("semantic_logits").shape(size)
    if not problem and logits.shape[1:] != expected:
        problem = f"logits are {logits.shape}, the model gives [K, {', '.join(map(str, expected))}]"
    if problem:
        raise BundleError(f"{path}: {problem}; export the bundle again")
    return Golden(images, logits)


def golden_size(bundle: Bundle) -> tuple[int, int]:
    """The (height, width) of the golden images; BundleError if they cannot be read."""
    path = bundle.file(GOLDEN_NAME)
    images, logits = _read(path)
    if problem := _problem(images, logits):
        raise BundleError(f"{path}: {problem}; export the bundle again")
    return images.shape[1], images.shape[2]


def replay(bundle: Bundle, engine: Engine) -> GoldenReport:
    """Run the golden images through ``engine`` and compare with the reference logits.

    Batches are as large as the model takes, so that batching is part of what is tested.
    ``passed`` says whether logits and class maps are within the graph's tolerance.
    """
    golden = load_golden(bundle)
    graph = bundle.graph(engine.kind)
    logits = engine.kind == "logits"
    name = graph.output("semantic_logits" if logits else "class_map").name
    step = bundle.manifest.input.max_batch
    size = (golden.images.shape[1], golden.images.shape[2])
    worst, equal = 0.0, []
    for start in range(0, len(golden.images), step):
        outputs = engine.infer(golden.images[start : start + step])[name]
        for output, reference in zip(outputs, golden.logits[start : start + step], strict=True):
            expected = upsampled_argmax(reference, size)
            if not logits:
                equal.append(agreement(output, expected))
                continue
            if not np.isfinite(output).all():
                worst = float("nan")  # is outside every tolerance
                equal.append(0.0)
                continue
            largest = max(float(np.abs(reference).max()), 1e-30)
            # np.maximum, unlike max(), carries a NaN on.
            worst = float(np.maximum(worst, np.abs(output - reference).max() / largest))
            equal.append(agreement(upsampled_argmax(output, size), expected))
    agreed = float(np.mean(equal))
    limits, difference = graph.tolerance, worst if logits else None
    passed = not limits.failures(max_logit_diff=difference, agreement=agreed)
    return GoldenReport(len(golden.images), difference, agreed, passed, limits)


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of an .npz; ValueError for one that states more than ``_MOST`` bytes, or more than
    there are, before memory is taken for it."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{name} is of an unknown version {version}")
        shape, fortran, dtype = read(file)
        count = math.prod(shape)
        if dtype.hasobject or count < 0:
            raise ValueError(f"{name} is {dtype} {shape}, not numbers")
        stated = count * dtype.itemsize
        if stated > _MOST or stated > member.file_size:
            raise ValueError(f"{name} states {stated} bytes, of which there cannot be so many")
        data = file.read(stated)
    if len(data) != stated:
        raise ValueError(f"{name} is cut off")
    array = np.frombuffer(data, dtype).reshape(shape, order="F" if fortran else "C")
    return np.array(array, order="C")  # of its own: the buffer cannot be written to


def _read(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            return _array(archive, "images"), _array(archive, "logits")
    except (*_UNREADABLE, OSError, ValueError, KeyError, EOFError, SyntaxError) as error:
        raise BundleError(f"{path}: no golden tensors: {error}; export the bundle again") from error


def _problem(images: NDArray[np.uint8], logits: NDArray[np.float32]) -> str | None:
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        return f"images must be uint8 [K, H, W, 3], not {images.dtype} {images.shape}"
    if logits.dtype != np.float32 or logits.ndim != 4:
        return f"logits must be float32 [K, N, h, w], not {logits.dtype} {logits.shape}"
    if len(images) != len(logits) or not logits.size or not images.size:
        return f"{len(images)} images but {len(logits)} logits: one each, and at least one"
    if not np.isfinite(logits).all():
        return "logits hold NaN or infinity"
    return None
