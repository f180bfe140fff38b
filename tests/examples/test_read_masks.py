"""examples/read_masks.cpp, compiled, reads what the sink writes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import uuid
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from knet_runtime.labels import LabelMap, distinct_palette
from knet_runtime.segmentation import Segmentation
from knet_runtime.sinks.shared_memory import SharedMasks
from knet_runtime.types import ClassMap, Frame

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "read_masks.cpp"

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="shared memory of this kind needs Linux"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("reader") / "read_masks"
    strict = ["-std=c++17", "-O2", "-Wall", "-Wextra", "-Wconversion", "-Werror"]
    subprocess.run(["g++", *strict, "-o", program, EXAMPLE], check=True)
    return program


def result(class_map: ClassMap, classes: int) -> Segmentation:
    names = tuple(f"class {index}" for index in range(classes))
    return Segmentation(class_map, LabelMap(names, distinct_palette(classes), classes))


@pytest.mark.parametrize(
    ("classes", "dtype", "seen"),
    [(11, np.uint8, True), (300, np.uint16, True), (11, np.uint8, False)],
)
def test_what_it_prints_is_what_was_written(
    reader: Path, classes: int, dtype: type, seen: bool
) -> None:
    """Of every size: a larger mask makes the memory anew."""
    name = f"test-{uuid.uuid4().hex}"
    sink = SharedMasks(name)
    random = np.random.default_rng(classes)
    expected = []
    for number, size in enumerate([(30, 40)] * 3 + [(20, 70)] * 2 + [(90, 120)] * 3):
        class_map = random.integers(0, classes, size).astype(dtype)
        frame = Frame(np.zeros((*size, 3), np.uint8), 2 * number, None, str(number))
        counts = sorted(Counter(class_map.ravel().tolist()).items())
        pixels = " ".join(f"{value}:{count}" for value, count in counts)
        expected.append(f"{number} frame {2 * number} {size[1]}x{size[0]} {pixels}")
        sink.write(frame, result(class_map, classes))
        if not number:
            process = subprocess.Popen([reader, name], stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            lines = [process.stdout.readline().strip()]
    if seen:  # else it is gone before the reader has found the larger one
        while lines[-1] != expected[-1]:
            lines.append(process.stdout.readline().strip())
            assert lines[-1], "the last mask was not read"
    sink.close()
    lines += process.communicate(timeout=20)[0].splitlines()
    assert process.returncode == 0
    assert lines[0] == expected[0]
    assert set(lines) <= set(expected)
    assert lines == sorted(lines, key=lambda line: int(line.split()[0]))


def test_a_name_that_nobody_writes_is_an_error_in_one_line(reader: Path) -> None:
    done = subprocess.run([reader, "nobody"], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "there are no shared masks nobody; start the run that writes them first\n"
