"""Golden tensors: a few real inputs and PyTorch's logits for them, replayed on the device.

``golden.npz`` holds ``images`` uint8 [K, H, W, 3] RGB, already at the model's input size, and
``logits`` float32 [K, N, h, w]. A device without labels or PyTorch can still show with them that
what it runs is the model that was trained.

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
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Any, BinaryIO, Literal

import msgspec
import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from knet_runtime.atomic import write_atomic
from knet_runtime.bundle.manifest import Tolerance
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines import Engine, engine_spec, open_engine
from knet_runtime.engines.hardware import this_gpu
from knet_runtime.engines.plan_store import plans_digest
from knet_runtime.errors import BundleError, ParityError
from knet_runtime.metrics import agreement
from knet_runtime.postprocess import upsampled_argmax
from knet_runtime.types import Size

_log = logging.getLogger(__name__)

SelfTestPolicy = Literal["refuse", "warn", "off"]
GOLDEN_NAME = "golden.npz"
_MOST = 1 << 30  # bytes of one array; a few images and their logits are far below
# What zipfile raises for a damaged archive, one that is encrypted, or packed in an unknown way.
_UNREADABLE = (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError)


class Golden(msgspec.Struct, frozen=True):
    """``images`` uint8 [K, H, W, 3] and their reference ``logits`` float32 [K, N, h, w]."""

    images: NDArray[np.uint8]
    logits: NDArray[np.float32]

    @property
    def size(self) -> Size:
        """(height, width) of the images."""
        return self.images.shape[1], self.images.shape[2]


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
    golden = _read(bundle)
    size = bundle.manifest.input.size
    expected = bundle.graph("logits").output("semantic_logits").shape(size)
    if golden.size != size:
        problem = f"images are {golden.images.shape}, the model takes {size[0]}×{size[1]}"
    elif golden.logits.shape[1:] != expected:
        shape = ", ".join(map(str, expected))
        problem = f"logits are {golden.logits.shape}, the model gives [K, {shape}]"
    else:
        return golden
    raise BundleError(f"{bundle.file(GOLDEN_NAME)}: {problem}; export the bundle again")


def _read(bundle: Bundle) -> Golden:
    """What the bundle's file holds, at whatever size; BundleError."""
    path = bundle.file(GOLDEN_NAME)
    try:
        with zipfile.ZipFile(path) as archive:
            golden = Golden(_array(archive, "images"), _array(archive, "logits"))
    except (*_UNREADABLE, OSError, ValueError, KeyError, EOFError, SyntaxError) as error:
        raise BundleError(f"{path}: no golden tensors: {error}; export the bundle again") from error
    if problem := _problem(golden.images, golden.logits):
        raise BundleError(f"{path}: {problem}; export the bundle again")
    return golden


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """One array of an .npz; ValueError for one that states more than ``_MOST`` bytes, or more than
    there are, before memory is taken for it."""
    member = archive.getinfo(f"{name}.npy")
    with archive.open(member) as file:
        version = npy.read_magic(file)
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}.get(version)
        if read is None:
            raise ValueError(f"{name} is of an unknown version {version}")
        shape, _, dtype = read(file)
        stated = math.prod(shape) * dtype.itemsize
        if dtype.hasobject or stated < 0:
            raise ValueError(f"{name} is {dtype} {shape}, not numbers")
        if stated > _MOST or stated > member.file_size:
            raise ValueError(f"{name} states {stated} bytes, of which there cannot be so many")
    with archive.open(member) as file:
        return np.ascontiguousarray(npy.read_array(file, allow_pickle=False))


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
    worst, equal = 0.0, []
    for start in range(0, len(golden.images), step):
        outputs = engine.infer(golden.images[start : start + step])[name]
        for output, reference in zip(outputs, golden.logits[start : start + step], strict=True):
            expected = upsampled_argmax(reference, golden.size)
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
            equal.append(agreement(upsampled_argmax(output, golden.size), expected))
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
    folder = cache_folder()
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
