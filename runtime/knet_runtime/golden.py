"""Golden tensors: a few real inputs and PyTorch's logits for them, replayed on the device.

``golden.npz`` holds ``images`` uint8 [K, H, W, 3] RGB, already at the model's input size, and
``logits`` float32 [K, N, h, w]; of an instance or panoptic network ``class_logits`` float32
[K, N, C] and ``mask_logits`` float16 [K, N, h, w], of which the signs count. A device without
labels or PyTorch can still show with them that what it runs is the model that was trained.

Logits are compared, and what is made of them: the class maps of a semantic network. A mask of the
others is where its logit is above 0 (a probability of one half), so for them that is compared, in
every pixel of every kernel's mask, and the logits of the classes. Segments are not: their number
depends on the rules for them, and a network that finds nothing would agree with every other.

The self-test at start (``check_at_start``) is made by the very engine that will run, once: a pass
is remembered in the user's cache folder, until the bundle, the engine, its libraries, the driver or
the device are others.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import math
import os
import sys
import zipfile
import zlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from knet_runtime.atomic import write_atomic
from knet_runtime.bundle.manifest import Meaning, Tolerance
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines import Engine, engine_spec, engine_specs, open_engine
from knet_runtime.engines.hardware import this_gpu
from knet_runtime.engines.plan_store import plans_digest
from knet_runtime.errors import BundleError, ParityError
from knet_runtime.metrics import agreement, inside
from knet_runtime.postprocess import upsampled_argmax
from knet_runtime.types import Size

_log = logging.getLogger(__name__)

SelfTestPolicy = Literal["refuse", "warn", "off"]
GOLDEN_NAME = "golden.npz"
MAX_IMAGES = 16
_MOST = 1 << 30  # bytes of all arrays; a few images and their logits are far below
_NOT_FINITE = "logits hold NaN or infinity"
# Arrays beside the images: type, axes after the first, and the output that they are compared with.
# Of masks the signs are compared: half the size will do.
_ARRAYS: dict[str, tuple[str, str, Meaning]] = {
    "logits": ("float32", "N, h, w", "semantic_logits"),
    "class_logits": ("float32", "N, C", "class_logits"),
    "mask_logits": ("float16", "N, h, w", "mask_logits"),
}
_LOCATOR, _END_RECORD = 20, 22  # bytes that end a ZIP archive without comment, as NumPy writes it
_MAX_DIRECTORY = 1 << 12  # bytes of the list of members, of which there are two or three
# What zipfile raises for a damaged archive, one that is encrypted, or packed in an unknown way.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


class Golden(msgspec.Struct, frozen=True):
    """``images`` uint8 [K, H, W, 3] and their reference ``logits`` float32 [K, N, h, w]; of a
    network for segments, the class logits float32 [K, N, C] and its ``masks``' logits float16
    [K, N, h, w]."""

    images: NDArray[np.uint8]
    logits: NDArray[np.float32]
    masks: NDArray[np.float16] | None = None

    @property
    def size(self) -> Size:
        """(height, width) of the images."""
        return self.images.shape[1], self.images.shape[2]


class GoldenReport(msgspec.Struct, frozen=True):
    """How far an engine is from the reference on ``images`` golden images.

    ``max_logit_diff`` is the largest difference as a share of the reference's largest logit (NaN
    if the engine gave NaN or infinity, None if it gives class maps), ``agreement`` the fraction
    of equal pixels of the class maps at the model's input size. Of a network for segments they are
    of the class logits, and of all its masks at the size that it gives them.
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
    target: Path | BinaryIO,
    images: NDArray[np.uint8],
    logits: NDArray[np.float32],
    masks: NDArray[np.float16] | None = None,
) -> None:
    """Write ``images`` uint8 [K, H, W, 3] and ``logits`` float32 [K, N, h, w], or the class logits
    float32 [K, N, C] and the ``masks``' logits float16 [K, N, h, w], compressed.

    Equal arrays give equal bytes. Raises ValueError when the shapes or types are others, for more
    than 16 images, and for more than 1 GiB.
    """
    arrays: dict[str, NDArray[Any]] = {"logits": logits}
    if masks is not None:
        arrays = {"class_logits": logits, "mask_logits": masks}
    if problem := _problem(images, arrays):
        raise ValueError(problem)
    if not all(np.isfinite(array).all() for array in arrays.values()):
        raise ValueError(_NOT_FINITE)
    np.savez_compressed(target, allow_pickle=False, images=images, **arrays)


def load_golden(bundle: Bundle) -> Golden:
    """Read the bundle's ``golden.npz``; BundleError if absent or at odds with the manifest."""
    golden = _read(bundle)
    size = bundle.manifest.input.size
    if golden.size == size:
        return golden
    raise BundleError(
        f"{bundle.file(GOLDEN_NAME)}: images are {golden.images.shape}, the model takes "
        f"{size[0]}×{size[1]}; export the bundle again"
    )


def _read(bundle: Bundle) -> Golden:
    """What the bundle's file holds, at whatever size that its graph takes; BundleError. Nothing is
    unpacked, and no memory taken, before all that the file states is known to fit."""
    path = bundle.file(GOLDEN_NAME)
    semantic = bundle.manifest.task == "semantic"
    names = ["logits"] if semantic else ["class_logits", "mask_logits"]
    try:
        with path.open("rb") as file:
            _check_directory(file)
            with zipfile.ZipFile(file) as archive:
                if sorted(archive.namelist()) != sorted(
                    f"{name}.npy" for name in ("images", *names)
                ):
                    raise ValueError(f"it is no archive of images and {' and '.join(names)}")
                images = _stated(archive, "images")
                stated = {name: _stated(archive, name) for name in names}
                if problem := _problem(images, stated) or _misfit(bundle, images, stated):
                    raise BundleError(f"{path}: {problem}; export the bundle again")
                golden = Golden(*(_array(archive, name) for name in ("images", *names)))
    except (*_UNREADABLE, OSError, ValueError, KeyError, EOFError, SyntaxError) as error:
        raise BundleError(f"{path}: no golden tensors: {error}; export the bundle again") from error
    if not all(np.isfinite(a).all() for a in (golden.logits, golden.masks) if a is not None):
        raise BundleError(f"{path}: {_NOT_FINITE}; export the bundle again")
    return golden


def _check_directory(file: BinaryIO) -> None:
    """ValueError for a ZIP archive whose list of members is long, or cannot be told to be short:
    all of it would be read."""
    end = file.seek(0, os.SEEK_END)
    file.seek(max(0, end - _LOCATOR - _END_RECORD))
    tail = file.read()
    locator, record = tail[:-_END_RECORD], tail[-_END_RECORD:]
    large = locator.startswith(b"PK\6\7")  # ZIP64: the size of the list stands elsewhere
    plain = record.startswith(b"PK\5\6") and record.endswith(b"\0\0")  # and no comment follows
    if large or not plain or int.from_bytes(record[12:16], "little") > _MAX_DIRECTORY:
        raise ValueError("it is no archive of images and logits")


class _Form(NamedTuple):
    dtype: np.dtype[Any]
    shape: tuple[int, ...]


def _stated(archive: zipfile.ZipFile, name: str) -> _Form:
    """What an array of an .npz is said to be; ValueError unless there are just so many bytes."""
    member = archive.getinfo(f"{name}.npy")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is packed in a way that NumPy does not use")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{name} is of an unknown version {version}")
        shape, _, dtype = read(file)
        held = member.file_size - file.tell()
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"{name} is {dtype} {shape}, not numbers")
    if (stated := math.prod(shape) * dtype.itemsize) != held:
        raise ValueError(f"{name} states {stated} bytes and holds {held}")
    return _Form(dtype, shape)


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with archive.open(f"{name}.npy") as file:
        return np.ascontiguousarray(npy.read_array(file, allow_pickle=False))


def _misfit(bundle: Bundle, images: _Form, arrays: Mapping[str, _Form]) -> str | None:
    """In what they are not the model's."""
    spec = bundle.manifest.input
    size = images.shape[1], images.shape[2]
    if size != spec.size and (spec.sizes is None or size not in spec.sizes):
        return f"images are {images.shape}, the model takes {spec.height}×{spec.width}"
    graph = bundle.graph("logits")
    for name, array in arrays.items():
        expected = graph.output(_ARRAYS[name][2]).shape(size)
        if array.shape[1:] != expected:
            shape = ", ".join(map(str, expected))
            return f"{name} are {array.shape}, the model gives [K, {shape}]"
    return None


def _problem(
    images: _Form | NDArray[Any], arrays: Mapping[str, _Form] | Mapping[str, NDArray[Any]]
) -> str | None:
    """In what they are not golden tensors, as far as their types and shapes tell."""
    if images.dtype != np.uint8 or len(images.shape) != 4 or images.shape[3] != 3:
        return f"images must be uint8 [K, H, W, 3], not {images.dtype} {images.shape}"
    count, total = images.shape[0], math.prod(images.shape)
    for name, array in arrays.items():
        dtype, axes = np.dtype(_ARRAYS[name][0]), _ARRAYS[name][1]
        if array.dtype != dtype or len(array.shape) != 2 + axes.count(","):
            return f"{name} must be {dtype} [K, {axes}], not {array.dtype} {array.shape}"
        numbers = math.prod(array.shape)
        if count != array.shape[0] or not total or not numbers:
            return f"{count} images but {array.shape[0]} {name}: one each, and at least one"
        total += dtype.itemsize * numbers
    if count > MAX_IMAGES:
        return f"{count} images: {MAX_IMAGES} at most, so that the self-test is short"
    if total > _MOST:
        return f"images and logits of {total} bytes: {_MOST >> 20} MiB at most"
    return None


def replay(bundle: Bundle, engine: Engine) -> GoldenReport:
    """Run the golden images through ``engine`` and compare with the reference logits.

    Batches are as large as the model takes, so that batching is part of what is tested.
    ``passed`` says whether logits and class maps, or masks, are within the graph's tolerance.
    """
    golden = load_golden(bundle)
    graph = bundle.graph(engine.kind)
    logits = engine.kind == "logits"
    step = bundle.manifest.input.max_batch
    worst, equal = 0.0, []
    for start in range(0, len(golden.images), step):
        outputs = engine.infer(golden.images[start : start + step])
        given = [outputs[spec.name] for spec in graph.outputs]
        for offset in range(len(given[0])):
            found = {
                spec.meaning: array[offset]
                for spec, array in zip(graph.outputs, given, strict=True)
            }
            index = start + offset
            reference = golden.logits[index]
            if not logits:
                expected = upsampled_argmax(reference, golden.size)
                equal.append(agreement(found["class_map"], expected))
                continue
            if not all(np.isfinite(array).all() for array in found.values()):
                worst = float("nan")  # is outside every tolerance
                equal.append(0.0)
                continue
            if golden.masks is None:
                output = found["semantic_logits"]
                sides = [upsampled_argmax(one, golden.size) for one in (output, reference)]
            else:
                output = found["class_logits"]
                sides = [inside(one) for one in (found["mask_logits"], golden.masks[index])]
            largest = max(float(np.abs(reference).max()), 1e-30)
            # np.maximum, unlike max(), carries a NaN on.
            worst = float(np.maximum(worst, np.abs(output - reference).max() / largest))
            equal.append(agreement(*sides))
    agreed = float(np.mean(equal))
    limits, difference = graph.tolerance, worst if logits else None
    passed = not limits.failures(max_logit_diff=difference, agreement=agreed)
    return GoldenReport(len(golden.images), difference, agreed, passed, limits)


class SelfTest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What came out: ``detail`` in words, ``seconds`` that the replay took when it was made, and
    whether it was made before and only looked up."""

    passed: bool
    detail: str
    seconds: float
    remembered: bool = False

    def __str__(self) -> str:
        how = "remembered" if self.remembered else f"{self.seconds:.1f} s"
        return f"{'passed' if self.passed else 'FAILED'} ({how}): {self.detail}"


def check_at_start(bundle: Bundle, engine: Engine, policy: SelfTestPolicy) -> SelfTest | None:
    """Replay the golden tensors through ``engine``, which runs ``bundle``, unless it did pass.

    None with policy "off", and with a warning for a bundle that has no golden tensors. An engine
    that runs at another size is tested by one that is opened at theirs. A failure is a ParityError
    with "refuse", a logged warning with "warn".
    """
    if policy == "off":
        return None
    if GOLDEN_NAME not in bundle.manifest.files:
        _log.warning("%s holds no golden tensors, so its results were not checked", bundle.path)
        return None
    # What an engine of the user's own depends on is not known: it is tested at every start.
    folder = cache_folder() if engine.name in engine_specs() else None
    place = folder and folder / f"{_key(bundle, engine)}.json"
    if place is not None and (known := _remembered(place)) is not None:
        return known
    test = _replay(bundle, engine)
    if test.passed:
        if place is not None:
            with contextlib.suppress(OSError):  # without a cache it is made again, no more
                place.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(place, msgspec.json.encode(test))
        return test
    text = (
        f"{bundle.path} on {engine.name} does not give the results that PyTorch gave "
        f"({test.detail}); use another --engine, or export it again"
    )
    if policy == "refuse":
        raise ParityError(f"{text}; --self-test warn runs it all the same")
    _log.warning("%s", text)
    return test


def cache_folder() -> Path | None:
    """Where passes are remembered: under XDG_CACHE_HOME, or ~/.cache; None for a user who has no
    home, as in many containers and services."""
    root = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not root.is_absolute():
        try:
            root = Path("~/.cache").expanduser()
        except RuntimeError:
            return None
    return root / "knet-deploy" / "self-test" if root.is_absolute() else None


def _remembered(place: Path) -> SelfTest | None:
    """The pass that is stored there; None for whatever cannot be read, or is none."""
    try:
        found = msgspec.json.decode(place.read_bytes(), type=SelfTest)
    except (OSError, ValueError):
        return None
    return msgspec.structs.replace(found, remembered=True) if found.passed else None


def _replay(bundle: Bundle, engine: Engine) -> SelfTest:
    began = perf_counter()
    at_golden_size = bundle.with_input_size(_read(bundle).size)
    if at_golden_size is bundle:
        report = replay(bundle, engine)
    else:
        with open_engine(at_golden_size, engine.name, engine.kind) as other:
            report = replay(at_golden_size, other)
    return SelfTest(report.passed, str(report), perf_counter() - began)


def _key(bundle: Bundle, engine: Engine) -> str:
    """A name that changes with everything that the result may depend on."""
    spec = engine_spec(engine.name)
    versions = {
        name: str(getattr(sys.modules[name], "__version__", ""))
        for name in ("cv2", "numpy", *spec.libraries)
        if name in sys.modules
    }
    try:
        package = metadata.version("knet-deploy")
    except metadata.PackageNotFoundError:  # run from a source tree
        package = ""
    parts: list[object] = [
        sorted((name, record.sha256) for name, record in bundle.manifest.files.items()),
        bundle.manifest.input,
        bundle.graph(engine.kind).tolerance,
        (engine.name, engine.kind, engine.device),
        sorted(versions.items()),
        package,
    ]
    if spec.device == "gpu":
        installed = ((str(one.metadata["Name"]), one.version) for one in metadata.distributions())
        # CUDA, cuDNN and the like as far as they come from packages.
        parts += [this_gpu(), sorted(one for one in installed if one[0].startswith("nvidia-"))]
    if spec.runs_plans:
        parts.append(plans_digest(bundle))
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]
