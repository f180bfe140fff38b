"""The example's notebook: every cell runs, and what it shows is there."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from knet_deploy import open_bundle, open_source
from knet_deploy.cli.demo import _STREET

NOTEBOOK = Path(__file__).resolve().parents[2] / "examples" / "notebook.ipynb"


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Where the notebook ran, and what each cell shows, by the cell's code."""
    nbformat = pytest.importorskip("nbformat", reason="nbclient is not installed: it is in [dev]")
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: it is in [dev]")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed: it is in [dev]")
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "outputs are not committed"
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    found = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type == "execute_result", output
            found[cell.source] = output.data
    return folder, found


def of(shown: dict[str, Any], last_line: str) -> Any:
    (data,) = (data for code, data in shown.items() if code.splitlines()[-1] == last_line)
    return data


def test_the_result_shows_its_overlay(shown: tuple[Path, dict[str, Any]]) -> None:
    data = of(shown[1], "result")
    assert data["text/plain"].startswith("Segmentation(panoptic, 540×960, ")
    png = np.frombuffer(base64.b64decode(data["image/png"]), np.uint8)
    picture = np.asarray(cv2.imdecode(png, cv2.IMREAD_COLOR_RGB), np.float32)
    with open_source(_STREET) as source:
        image = next(iter(source)).image
    assert picture.shape[0] > 540  # the legend below
    assert picture.shape[1:] == (960, 3)
    # The street is seen through the colours.
    seen = np.corrcoef(picture[:540].mean(2).ravel(), image.mean(2).ravel())[0, 1]
    assert 0.5 < seen < 0.999


def test_the_bundle_shows_itself_and_the_files_are_there(
    shown: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = shown
    bundle = open_bundle("street-panoptic")
    assert of(found, "bundle")["text/html"] == bundle._repr_html_()
    assert sorted(path.name for path in folder.iterdir()) == ["street.png", "street.segments.png"]
    assert any("Car" in data["text/plain"] for data in found.values())
