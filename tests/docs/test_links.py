"""Every relative link and image of README and docs leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from docs_pages import BENCHMARKS, DOCS, PAGES, relative, without_blocks


def anchors(page: Path) -> set[str]:
    """What a link can lead to within a page: its headings, and names of the Python reference."""
    text = without_blocks(page)
    headings = re.findall(r"^#+ (.+)$", text, re.M)
    plain = (re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings)
    return {
        *(heading.replace(" ", "-") for heading in plain),
        *re.findall(r"^::: (.+)$", text, re.M),
    }


@pytest.mark.parametrize("page", [*PAGES, BENCHMARKS], ids=relative)
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), f"{target} leads nowhere"
        assert DOCS not in page.parents or DOCS in place.parents, f"{target} is not on the site"
        assert not anchor or anchor in anchors(place), f"{path} has no heading #{anchor}"
