"""The golden self-test at start: does this bundle, on this engine and machine, still give the
results that PyTorch gave?

It is made by the very engine that will run, once: a pass is remembered in the user's cache folder,
until the bundle, the engine, its libraries, the driver or the device are others.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sys
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Literal

import msgspec

from knet_runtime.atomic import write_atomic
from knet_runtime.bundle.store import Bundle
from knet_runtime.engines import Engine, engine_spec, open_engine
from knet_runtime.engines.hardware import this_gpu
from knet_runtime.engines.plan_store import plans_digest
from knet_runtime.errors import ParityError
from knet_runtime.golden import GOLDEN_NAME, golden_size, replay

SelfTestPolicy = Literal["refuse", "warn", "off"]

_log = logging.getLogger(__name__)


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
    place = cache_folder() / f"{_key(bundle, engine)}.json"
    with contextlib.suppress(OSError, msgspec.DecodeError):
        found = msgspec.json.decode(place.read_bytes(), type=SelfTest)
        return msgspec.structs.replace(found, remembered=True)
    test = _replay(bundle, engine)
    if test.passed:
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


def cache_folder() -> Path:
    """Where passes are remembered: under XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(base) if Path(base).is_absolute() else Path("~/.cache").expanduser()
    return root / "knet-deploy" / "self-test"


def _replay(bundle: Bundle, engine: Engine) -> SelfTest:
    began = perf_counter()
    size = golden_size(bundle)
    if size == bundle.manifest.input.size:
        report = replay(bundle, engine)
    else:
        other = bundle.with_input_size(size)
        with open_engine(other, engine.name, engine.kind) as same:
            report = replay(other, same)
    return SelfTest(report.passed, str(report), perf_counter() - began)


def _key(bundle: Bundle, engine: Engine) -> str:
    """A name that changes with everything that the result may depend on."""
    spec = engine_spec(engine.name)
    versions = {
        name: str(getattr(sys.modules[name], "__version__", ""))
        for name in ("cv2", "numpy", *spec.libraries)
        if name in sys.modules
    }
    parts: list[object] = [
        sorted((name, record.sha256) for name, record in bundle.manifest.files.items()),
        bundle.manifest.input,
        bundle.graph(engine.kind).tolerance,
        (engine.name, engine.kind, engine.device),
        sorted(versions.items()),
        _package_version(),
    ]
    if spec.device == "gpu":
        parts.append(this_gpu())
        parts.append(_gpu_libraries())
    if spec.runs_plans:
        parts.append(plans_digest(bundle))
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()[:32]


def _package_version() -> str:
    try:
        return metadata.version("knet-deploy")
    except metadata.PackageNotFoundError:  # run from a source tree
        return ""


def _gpu_libraries() -> list[tuple[str, str]]:
    """CUDA, cuDNN and the like as far as they come from packages."""
    found = ((str(part.metadata["Name"]), part.version) for part in metadata.distributions())
    return sorted(one for one in found if one[0].startswith("nvidia-"))
