"""Where numbers were made: without this they can not be compared with anybody's."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata
from pathlib import Path

import msgspec

from knet_runtime.backends.machine import processor_name
from knet_runtime.gpu import Gpu, this_gpu

_PACKAGES = (
    "knet-deploy",
    "numpy",
    "opencv-python-headless",
    "av",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "torch",
)
_FREQUENCY = Path("/sys/devices/system/cpu/cpu0/cpufreq")


class Machine(msgspec.Struct, frozen=True):
    """Processor, clocks and versions; None is what this machine does not tell.

    ``governor`` is the rule by which the first core's clock is set, ``clock_mhz`` that clock now
    and ``max_clock_mhz`` at most; ``commit`` is the source checkout's.
    """

    processor: str
    cores: int
    system: str
    python: str
    packages: dict[str, str]
    governor: str | None
    clock_mhz: float | None
    max_clock_mhz: float | None
    load: float | None
    memory_bytes: int | None
    gpu: Gpu | None
    commit: str | None


def this_machine(cores: int) -> Machine:
    """What stands here now; ``cores`` is how many are used."""
    most = _text(_FREQUENCY / "scaling_max_freq")
    return Machine(
        processor=processor_name(),
        cores=cores,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        packages={name: version for name in _PACKAGES if (version := _version(name))},
        governor=_text(_FREQUENCY / "scaling_governor"),
        clock_mhz=_clock(),
        max_clock_mhz=int(most) / 1000 if most else None,
        load=_load(),
        memory_bytes=_memory(),
        gpu=this_gpu(),
        commit=commit_of(Path(__file__).resolve().parent),
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _clock() -> float | None:
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("cpu MHz"):
            return float(line.partition(":")[2])
    return None


def _load() -> float | None:
    """Processes that want to run, over the last minute: above zero others compute here too."""
    text = _text(Path("/proc/loadavg"))
    return float(text.split()[0]) if text else None


def _memory() -> int | None:
    for line in (_text(Path("/proc/meminfo")) or "").splitlines():
        if line.startswith("MemTotal"):
            return 1024 * int(line.split()[1])
    return None


def commit_of(folder: Path) -> str | None:
    """The commit of the checkout that ``folder`` is a part of, "-dirty" behind it where files were
    changed; None where it is not."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
        )
        tracked = subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", "."],
            capture_output=True,
        )
    except OSError:  # no git
        return None
    # Installed into somebody's repository it would name theirs.
    return done.stdout.strip() or None if not (done.returncode or tracked.returncode) else None
