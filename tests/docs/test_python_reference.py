"""The reference has every public name, and the pages' Python works."""

from __future__ import annotations

import ast
import re
import shutil
from importlib import import_module
from pathlib import Path

import cv2
import numpy as np
import pytest
from docs_pages import DOCS, PAGES, REPOSITORY, relative

import knet_deploy
from knet_deploy.cli.demo import _STREET
from knet_deploy.cli.main import main
from knet_runtime.bundle.store import default_bundle_path


def test_the_reference_has_every_public_name_and_no_other() -> None:
    page = (DOCS / "reference" / "python.md").read_text("utf-8")
    found = re.findall(r"^::: knet_deploy\.(\w+)$", page, re.M)
    assert sorted(found) == knet_deploy.__all__


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_python_on_a_page_compiles_and_imports_what_there_is(page: Path) -> None:
    for block in blocks(page):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


@pytest.mark.parametrize(
    "page", [REPOSITORY / "README.md", DOCS / "guide" / "python.md"], ids=relative
)
def test_python_on_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but what needs torch, or another process that writes."""
    monkeypatch.chdir(tmp_path)
    for name in ("street.knet", "street-fp16.knet"):
        shutil.copytree(default_bundle_path(), name)
    assert main(["run", str(_STREET), "-o", "drive.mp4", "--max-frames", "3"]) == 0
    Path("photos").mkdir()
    for photo in ("photo.jpg", "photos/a.png"):
        cv2.imwrite(photo, np.zeros((120, 160, 3), np.uint8))
    run = [block for block in blocks(page) if not re.search("SharedMask|checkpoint", block)]
    assert run
    for block in run:
        exec(compile(block, str(page), "exec"), {})
