"""The pages that tests hold to the program, and what mkdocs makes of them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
DOCS = REPOSITORY / "docs"
PACKAGES = ("runtime", "runtime/deploy", "train", "export", "knet_deploy")
PAGES = [
    REPOSITORY / "README.md",
    REPOSITORY / "CONTRIBUTING.md",
    *sorted(DOCS.rglob("*.md")),
    REPOSITORY / "examples" / "README.md",
    *(REPOSITORY / package / "README.md" for package in PACKAGES),
]
BENCHMARKS = REPOSITORY / "benchmarks" / "README.md"


def _hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = _hooks()


def relative(page: Path) -> str:
    """A page's path in the repository."""
    return page.relative_to(REPOSITORY).as_posix()


def without_blocks(page: Path) -> str:
    """A page as mkdocs builds it, without its blocks of code."""
    text = HOOKS.on_page_markdown(page.read_text("utf-8"))
    return re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
