"""`knet-deploy export` with its options: what it refuses in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from traced import traced_before

from knet_deploy.cli.main import main
from knet_runtime.bundle.store import Bundle, open_bundle
from knet_runtime.labels import distinct_palette


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--precision", "half"], "is not one of 'fp32', 'fp16', 'bf16', 'int8'"),
        (["--precision", "int8"], "--calibration"),
        (["--size", "big"], "write HEIGHTxWIDTH"),
        (["--size", "66x96"], "64x96 is near"),
        (["--min", "64x64"], "--dynamic"),
        (["--dynamic"], "leaves out 64x96"),
        (["--dynamic", "--min", "64x64", "--max", "56x56"], "hold none"),
        (["--max-batch", "0"], "at least 1"),
        (["--palette", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_options_that_can_not_be_are_one_line_that_says_what_can(
    checkpoint: Path,
    tmp_path: Path,
    words: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(["export", str(checkpoint), "-o", str(tmp_path / "x.knet"), *words])
    line = capsys.readouterr().err
    assert code == 2
    assert message in line
    assert len(line.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.onnx", "export writes a bundle, a folder: -o {}/x.knet; its ONNX graph is then"),
        ("x.engine", "knet-deploy build {}/x.knet then makes the TensorRT engine"),
        ("x.pth", "-o {}/x.knet"),
    ],
)
def test_the_name_of_another_file_gets_the_command_that_was_meant(
    checkpoint: Path, tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(checkpoint), "-o", str(tmp_path / name)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message.format(tmp_path) in line
    assert list(tmp_path.iterdir()) == []


def test_the_palette_is_that_of_the_bundle_and_the_model_stays_the_same(
    checkpoint: Path, small_bundle: Bundle, tmp_path: Path
) -> None:
    names = small_bundle.manifest.labels.names
    colours = distinct_palette(len(names))[::-1]
    lines = [
        f"{name} #{r:02x}{g:02x}{b:02x}" for name, (r, g, b) in zip(names, colours, strict=True)
    ]
    (tmp_path / "colours.txt").write_text("\n".join(lines), "utf-8")
    out = tmp_path / "x.knet"
    with traced_before(small_bundle):
        words = ["--palette", str(tmp_path / "colours.txt"), "--max-batch", "2"]
        assert main(["export", str(checkpoint), "-o", str(out), *words]) == 0
    labels = open_bundle(out).manifest.labels
    assert labels.palette == colours
    assert labels.names == names
