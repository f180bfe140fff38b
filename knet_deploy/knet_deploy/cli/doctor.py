"""``knet-deploy doctor``: what works on this machine, and the fix for what does not."""

from __future__ import annotations

import os
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from knet_deploy.cli.console import installed_version, package_version, say
from knet_runtime.atomic import json_bytes
from knet_runtime.engines import EngineSpec, engine_spec, engine_specs, probe_engine
from knet_runtime.engines.hardware import cpu_budget
from knet_runtime.errors import ConfigError, KnetError, OutputError, ParityError

_PACKAGES = {
    "numpy": "numpy",
    "opencv": "opencv-python-headless",
    "onnxruntime": "onnxruntime",
    "av": "av",
    "msgspec": "msgspec",
    "typer": "typer",
    "torch": "torch",
}
_CPU_ENGINE = "onnxruntime-cpu"  # the one that the base install brings
_EXTRAS = ("train", "export", "gpu", "openvino", "tensorrt", "serve", "ray")
_NOT_YET_RUN = "not yet run on a GPU by its authors: knet-deploy verify shows whether it is right"


class Check(msgspec.Struct, frozen=True):
    """A part of the install, an engine or an extra: whether it works, and how or what to do."""

    name: str
    ok: bool
    detail: str


class Diagnosis(msgspec.Struct, frozen=True):
    """All that doctor found; ``ok`` says whether the base runtime works here."""

    ok: bool
    versions: dict[str, str | None]  # None: not installed
    cores: int | None
    cores_usable: int
    checks: list[Check]
    engines: list[Check]
    extras: list[Check]


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Show what works on this machine, and how to fix what does not.

    Exit status 0 if the base runtime works: the CPU engine, the packaged model with its golden
    check, and H.264 output.
    """
    found = _diagnose()
    if json:
        typer.echo(msgspec.json.format(json_bytes(found), indent=2).decode())
    else:
        for label, value in _lines(found):
            say(label, value)
    if not found.ok:
        raise typer.Exit(1)


def _diagnose() -> Diagnosis:
    checks = [_check(name, works) for name, works in _CHECKS.items()]
    engines = engine_specs()
    return Diagnosis(
        ok=all(check.ok for check in checks),
        versions={
            "python": platform.python_version(),
            "knet-deploy": package_version(),
            **{name: installed_version(package) for name, package in _PACKAGES.items()},
        },
        cores=os.cpu_count(),
        cores_usable=cpu_budget(),
        checks=checks,
        engines=[_check(name, partial(_probe, spec)) for name, spec in engines.items()],
        extras=[_extra(name) for name in _EXTRAS],
    )


def _check(name: str, works: Callable[[], str]) -> Check:
    """Nothing that is broken may end the search for what else is."""
    try:
        return Check(name, True, works())
    except KnetError as error:
        return Check(name, False, str(error))
    except Exception as error:
        return Check(name, False, f"{type(error).__name__}: {error}")


def _one_onnxruntime() -> str:
    from knet_runtime.engines.onnxruntime import onnxruntime_clash

    if clash := onnxruntime_clash():
        raise ConfigError(clash)
    return "one distribution of it is installed"


def _probe(spec: EngineSpec) -> str:
    status = probe_engine(spec)
    detail = status.detail + (f"; {_NOT_YET_RUN}" if spec.device == "gpu" else "")
    if not status.available:
        raise ConfigError(detail)
    return detail


def _packaged_model() -> str:
    from knet_runtime.bundle.store import open_bundle

    bundle = open_bundle()
    return f"{bundle.model_id}, every file is what its manifest says"


def _golden() -> str:
    from knet_runtime.bundle.store import open_bundle
    from knet_runtime.engines import open_engine
    from knet_runtime.golden import replay

    bundle = open_bundle()
    with open_engine(bundle, _CPU_ENGINE) as engine:
        report = replay(bundle, engine)
    if not report.passed:
        raise ParityError(
            f"{report}: this is not the model that was trained; "
            "pip install --force-reinstall knet-deploy onnxruntime"
        )
    return str(report)


def _h264() -> str:
    import numpy as np

    from knet_runtime.sinks.encoder import ENCODERS, VideoWriter, is_playable, working_encoder

    size = (64, 96)
    encoder = working_encoder(ENCODERS["h264"], size)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "test.mp4"
        writer = VideoWriter(path, size, Fraction(1, 30), Fraction(30), encoder)
        for tick in range(3):
            writer.write(np.zeros((*size, 3), np.uint8), tick)
        writer.close()
        if not is_playable(path):
            raise OutputError(f"{encoder} writes a video that cannot be read again")
    return encoder


_CHECKS: dict[str, Callable[[], str]] = {
    "onnxruntime": _one_onnxruntime,
    "CPU engine": lambda: _probe(engine_spec(_CPU_ENGINE)),
    "model": _packaged_model,
    "golden": _golden,
    "H.264": _h264,
}


def _extra(extra: str) -> Check:
    wanted = _requirements(extra)
    missing = [name for name in wanted if installed_version(name) is None]
    if wanted and not missing:
        return Check(extra, True, ", ".join(f"{name} {installed_version(name)}" for name in wanted))
    if extra == "gpu":  # the two overwrite each other's files
        install = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu"
    else:
        install = f'pip install "knet-deploy[{extra}]"'
    return Check(extra, False, f"lacks {', '.join(missing) or 'its packages'}: {install}")


def _requirements(extra: str) -> list[str]:
    """The distributions of an extra, as the installed metadata names them."""
    try:
        lines = metadata.requires("knet-deploy") or []
    except metadata.PackageNotFoundError:
        return []
    found = []
    for line in lines:
        requirement, _, marker = line.partition(";")
        # A second condition is a back-port for an older Python: not what an extra is about.
        if re.fullmatch(rf"""\s*extra\s*==\s*['"]{extra}['"]\s*""", marker):
            found.append(re.split(r"[^A-Za-z0-9._-]", requirement.strip(), maxsplit=1)[0])
    return found


def _lines(found: Diagnosis) -> Iterator[tuple[str, str]]:
    for name, version in found.versions.items():
        yield name, version or "not installed"
    yield "cores", f"{found.cores}, of which this process may use {found.cores_usable}"
    for check in found.checks:
        yield check.name, f"{'ok' if check.ok else 'FAILS'}: {check.detail}"
    for label, checks in (("engine", found.engines), ("extra", found.extras)):
        for check in checks:
            yield label, f"{check.name}: {'yes' if check.ok else 'no'}: {check.detail}"
    yield "", "The base runtime works." if found.ok else "The base runtime does not work here."
