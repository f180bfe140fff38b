"""What a contributor runs, and CI too: `nox -s quick` while working, then `nox -s tests docs`.

`python -m pip install nox` is all that is needed first. Sessions keep their environments between
runs (`-R` does not even look at them again); arguments after `--` go to pytest.
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["quick"]
nox.options.reuse_existing_virtualenvs = True

PYTHONS = ["3.10", "3.11", "3.12", "3.13", "3.14"]
LIGHT = ("tests/runtime", "tests/synthetic")
# TensorRT-RTX builds without a GPU; of these two packages only the libraries are wanted.
TENSORRT = ("onnxruntime-ep-nv-tensorrt-rtx-cu13", "tensorrt-rtx-cu13-bindings==1.7.1.116")
REFERENCE = Path(os.environ.get("KNET_REFERENCE", "../shared/reference"))
WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}  # several processes share the cores


@nox.session
def lint(session: nox.Session) -> None:
    """Style and the direction of imports."""
    session.install("ruff>=0.11", "import-linter>=2.1")
    session.install("--no-deps", "-e", ".")
    _lint(session)


@nox.session
def quick(session: nox.Session) -> None:
    """Lint, types and tests of the runtime, without PyTorch: two minutes."""
    session.install(*_package("check"))
    _lint(session)
    session.run("mypy", "-p", "knet_runtime", "-p", "knet_synthetic")
    session.run("pytest", *LIGHT, "-m", "not slow", *session.posargs)


@nox.session(python=PYTHONS)
def runtime(session: nox.Session) -> None:
    """The runtime's tests, as `quick` runs them, on one Python."""
    session.install(*_package("check"))
    session.run("pytest", *LIGHT, "-m", "not slow", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Types and every test: README's `pytest`, TensorRT-RTX, parity with mmsegmentation."""
    session.install(*_package("dev"))
    session.install("--no-deps", *TENSORRT)
    session.run("mypy")
    # TensorRT's libraries are loaded for all to see: its builds have processes of their own.
    session.run("pytest", "-m", "not tensorrt and not reference", *session.posargs, env=WAITING)
    session.run("pytest", "-m", "tensorrt", *session.posargs, env=WAITING)
    _reference(session)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, built so that a warning is an error; into site/."""
    session.install(*_package("docs"))
    session.run("mkdocs", "build", "--strict", *session.posargs)


def _package(extra: str) -> list[str]:
    """The package with an extra: as a user installs it in CI, editable elsewhere."""
    return [f".[{extra}]"] if os.environ.get("CI") else ["-e", f".[{extra}]"]


def _lint(session: nox.Session) -> None:
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports")


def _reference(session: nox.Session) -> None:
    """Parity with mmsegmentation, which lives in an environment of its own, where it can be had."""
    requirements = REFERENCE / "requirements.txt"
    if not requirements.is_file():
        session.log(f"no parity with mmsegmentation: {requirements} is not there")
        return
    home = Path(session.create_tmp()) / "reference"
    python = home / "bin" / "python"
    if not python.exists():
        session.run("python", "-m", "venv", str(home))
        words = [str(python), "-m", "pip", "install", "-q", "--no-compile", "-r", str(requirements)]
        # Every version is pinned there; a machine's own constraints must not contradict them.
        session.run(*words, external=True, env={"PIP_CONSTRAINT": str(requirements)})
    session.run("pytest", "-m", "reference", env={"KNET_REFERENCE_PYTHON": str(python)})
