"""The base install alone: a virtual environment that has its dependencies and nothing else.

It is made without a network, by links to what is installed here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from importlib import import_module, metadata
from pathlib import Path

import cv2
import numpy as np
import pytest
from packaging.requirements import Requirement

PACKAGES = ("knet_deploy", "knet_export", "knet_train", "knet_synthetic", "knet_runtime")
IMPORT_ALL = """
import importlib, pkgutil, knet_runtime
# What is of an extra needs the extra's packages, and only those.
EXTRAS = {
    "knet_runtime.engines.openvino": ("openvino",),
    "knet_runtime.web.": ("prometheus_client", "starlette", "uvicorn"),
}
for module in pkgutil.walk_packages(knet_runtime.__path__, "knet_runtime."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        needs = [names for start, names in EXTRAS.items() if module.name.startswith(start)]
        if not needs or error.name.partition(".")[0] not in needs[0]:
            raise
"""


def closure(root: str) -> set[str]:
    """The distributions that ``root`` needs without any extra, itself left out."""
    found: set[str] = set()
    waiting = [(root, "")]
    while waiting:
        name, extra = waiting.pop()
        for line in metadata.requires(name) or []:
            need = Requirement(line)
            if need.marker is not None and not need.marker.evaluate({"extra": extra}):
                continue
            wanted = [(need.name, extra) for extra in ("", *need.extras)]
            waiting += [item for item in wanted if item[0] not in found or item[1]]
            found.add(need.name)
    return found


@pytest.fixture(scope="session")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The ``bin`` folder of the environment."""
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, with_pip=False, symlinks=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = home / "lib" / version / "site-packages"
    for name in closure("knet-deploy"):
        distribution = metadata.distribution(name)
        tops = {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}
        for top in tops:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    for package in PACKAGES:
        folder = Path(str(import_module(package).__file__)).parent
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(folder, site / package, ignore=ignored)
    ours = metadata.distribution("knet-deploy")
    info = next(file.parts[0] for file in ours.files or [] if file.name == "METADATA")
    (site / info).symlink_to(Path(str(ours.locate_file(info))))
    (script,) = (s for s in ours.entry_points if s.name == "knet-deploy")
    module, _, function = script.value.partition(":")
    command = home / "bin" / "knet-deploy"
    command.write_text(
        f"#!{home}/bin/python\n"
        f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n"
    )
    command.chmod(0o755)
    return home / "bin"


def call(program: Path, *words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    hidden = ("PYTHONPATH", "PYTHONHOME")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    return subprocess.run(
        [program, *words],
        cwd=cwd,
        env=environment | {"PYTHONNOUSERSITE": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize("module", ["torch", "timm", "onnx", "openvino", "pytest"])
def test_nothing_heavy_is_there(bare: Path, tmp_path: Path, module: str) -> None:
    done = call(bare / "python", "-c", f"import {module}", cwd=tmp_path)
    assert f"No module named '{module}'" in done.stderr


def test_every_module_of_the_runtime_imports(bare: Path, tmp_path: Path) -> None:
    done = call(bare / "python", "-c", IMPORT_ALL, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_run_writes_overlay_masks_and_json(bare: Path, tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(3):
        picture = np.full((48, 64, 3), 60 * index, np.uint8)
        cv2.imwrite(str(folder / f"{index}.png"), picture)
    knet = bare / "knet-deploy"
    made = call(knet, "run", folder, "-o", "in.mp4", "--alpha", "0", cwd=tmp_path)
    assert made.returncode == 0, made.stderr
    words = ["run", "in.mp4", "-o", "out.mp4", "--masks", "masks", "--json", "out.jsonl"]
    done = call(knet, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(list((tmp_path / "masks").iterdir())) == 3
    assert len((tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()) == 3
    assert (tmp_path / "out.mp4").stat().st_size > 0


def test_an_engine_that_is_not_installed_is_one_line_that_mends_it(
    bare: Path, tmp_path: Path
) -> None:
    cv2.imwrite(str(tmp_path / "x.png"), np.zeros((8, 8, 3), np.uint8))
    done = call(bare / "knet-deploy", "run", "x.png", "--engine", "openvino", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.endswith('pip install "knet-deploy[openvino]"\n')


def test_demo_and_doctor_pass(bare: Path, tmp_path: Path) -> None:
    demo = call(bare / "knet-deploy", "demo", "--frames", "8", cwd=tmp_path)
    assert (demo.returncode, demo.stderr) == (0, "")
    assert (tmp_path / "knet-demo" / "report.html").is_file()
    doctor = call(bare / "knet-deploy", "doctor", cwd=tmp_path)
    assert doctor.returncode == 0, doctor.stdout
    assert 'pip install "knet-deploy[export]"' in doctor.stdout
    assert 'pip install "knet-deploy[openvino]"' in doctor.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            ["train", "--data", "d", "--out", "o"],
            'knet-deploy train needs the training extra: pip install "knet-deploy[train]"',
        ),
        (
            ["export", "x", "-o", "y.knet"],
            'knet-deploy export needs the export extra: pip install "knet-deploy[export]"',
        ),
        (
            ["run", "x.png", "--serve", "127.0.0.1:0"],
            '--serve needs the serve extra: pip install "knet-deploy[serve]"',
        ),
    ],
)
def test_a_missing_extra_is_one_line_that_mends_it(
    bare: Path, tmp_path: Path, words: list[str], line: str
) -> None:
    done = call(bare / "knet-deploy", *words, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, f"knet-deploy: error: {line}\n")
