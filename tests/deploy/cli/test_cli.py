"""What holds for every command: help, a place in the README, one line per error, exit codes."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from knet_deploy.cli import console
from knet_deploy.cli.main import app, main
from knet_runtime.bundle.manifest import SegmentRules
from knet_runtime.bundle.store import Bundle, open_bundle, record_parity, write_bundle
from knet_runtime.engines import engine_specs
from knet_runtime.engines.plan_store import (
    BuildOptions,
    PlanRecord,
    Profile,
    Shape,
    graph_hashes,
    store_plan,
)
from knet_runtime.errors import EngineError, EngineUnavailable, ParityError

Call = Callable[..., Any]
REPOSITORY = Path(__file__).resolve().parents[3]
COMMANDS = sorted(str(info.name) for info in app.registered_commands)


def one_error(err: str) -> str:
    """The text of the only line on stderr."""
    lines = err.splitlines()
    assert len(lines) == 1, err
    assert lines[0].startswith("knet-deploy: error: ")
    return lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_a_place_in_the_readme(call: Call, name: str) -> None:
    answer = call(name, "--help")
    assert answer.code == 0
    summary = answer.out.split("\n\n")[1].strip()
    assert len(summary) > 20, answer.out
    assert f"knet-deploy {name}" in (REPOSITORY / "README.md").read_text(encoding="utf-8")


def test_every_option_of_every_command_says_what_it_does() -> None:
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        for parameter in command.params:
            assert getattr(parameter, "help", None), f"{name} {parameter.name}"


def test_help_groups_the_options_of_run_and_lists_what_can_be_chosen(call: Call) -> None:
    text = call("run", "--help").out
    panels = ["Arguments", "Input", "Outputs", "Look", "Segments", "Live page", "Engine", "Options"]
    assert re.findall(r"^(\w.*):$", text, re.M) == panels
    for option, panel in (
        ("--policy", 1),
        ("--codec", 2),
        ("--blur", 3),
        ("--score", 4),
        ("--token", 5),
    ):
        assert text.index(f"{panels[panel]}:") < text.index(f"{option} ")
        assert text.index(f"{option} ") < text.index(f"{panels[panel + 1]}:")
    for choices in (
        "file|live",
        "tcp|udp",
        "h264|hevc",
        "refuse|warn|off",
        "auto|onnxruntime-cpu|",
    ):
        assert choices in text


def test_version_and_a_bare_call(call: Call) -> None:
    version = call("--version")
    assert (version.code, version.out) == (0, f"knet-deploy {console.package_version()}\n")
    bare = call()
    assert bare.code == 2
    assert "Usage: knet-deploy" in bare.out


@pytest.mark.parametrize(
    "words", [["fly"], ["run"], ["run", "x", "--colour"], ["demo", "--frames", "0"]]
)
def test_a_misspelt_command_line_is_one_line_and_two(call: Call, words: list[str]) -> None:
    answer = call(*words)
    assert answer.code == 2
    one_error(answer.err)


def test_help_loads_no_heavy_package() -> None:
    code = (
        "import sys\nfrom knet_deploy.cli.main import main\nmain(['run', '--help'])\n"
        "assert not {'torch', 'av', 'rich.progress', 'knet_train'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (ParityError("differs"), 1, "knet-deploy: error: differs\n"),
        (EngineError("failed\n  badly"), 1, "knet-deploy: error: failed badly\n"),
        (EngineUnavailable("[red]no\x1b[31m GPU"), 2, "knet-deploy: error: [red]no?[31m GPU\n"),
        (
            ZeroDivisionError("by 0"),
            1,
            "knet-deploy: error: internal error: ZeroDivisionError: by 0; run again with --debug\n",
        ),
        (KeyboardInterrupt(), 130, ""),
        (console.Terminated(), 143, ""),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise error

    assert console.exit_code_of(fail) == code
    assert capsys.readouterr().err == text


def test_a_traceback_is_shown_with_debug_only(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr("knet_runtime.bundle.store.default_bundle_path", fail)
    assert "Traceback" not in call("inspect").err
    assert "Traceback" in call("inspect", "--debug").err


def test_a_missing_extra_is_the_pip_line() -> None:
    line = r'knet-deploy train needs the training extra: pip install "knet-deploy\[train\]"$'
    with pytest.raises(console.MissingExtra, match=line), console.needs_extra("train"):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")
    with pytest.raises(ModuleNotFoundError), console.needs_extra("train"):
        raise ModuleNotFoundError("a broken build", name="knet_train.gone")


def test_a_closed_pipe_is_quiet() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "knet_deploy", "inspect"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stderr as stderr:
        process.stdout.close()
        assert stderr.read() == b""
    assert process.wait(60) == 141


def test_doctor_reports_as_lines_and_as_json(call: Call) -> None:
    lines = call("doctor")
    assert lines.code == 0, lines.out
    assert "The base runtime works." in lines.out
    found = json.loads(call("doctor", "--json").out)
    assert found["ok"]
    assert {check["name"] for check in found["checks"]} >= {"CPU engine", "golden", "H.264"}
    engines = {engine["name"]: engine["detail"] for engine in found["engines"]}
    assert list(engines) == list(engine_specs())
    for name, detail in engines.items():
        assert ("not yet run on a GPU" in detail) == (engine_specs()[name].device == "gpu"), name
    extras = {"train", "export", "gpu", "openvino", "tensorrt", "serve", "ray"}
    assert {extra["name"] for extra in found["extras"]} == extras


def test_doctor_names_what_fails_and_ends_with_one(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        "knet_runtime.bundle.store.default_bundle_path", lambda: tmp_path / "gone.knet"
    )
    answer = call("doctor")
    assert answer.code == 1
    assert "FAILS: " in answer.out
    assert "gone.knet" in answer.out
    assert "ok: libx264" in answer.out or "H.264" in answer.out


def test_inspect_shows_the_bundle_and_prints_its_manifest(call: Call, copied_bundle: Path) -> None:
    table = call("inspect", copied_bundle)
    assert table.code == 0
    for text in (
        *("Bicyclist", "#4f03df", ".onnx", "sha256", "tolerance", "licence", "360×480"),
        *(
            "precision    fp32",
            "logits: float32 semantic logits, 11×90×120",
            "passed on onnxruntime-cpu",
        ),
    ):
        assert text in table.out
    manifest = call("inspect", copied_bundle, "--json").out
    assert manifest == (copied_bundle / "manifest.json").read_text(encoding="utf-8")


def test_inspect_shows_how_masks_become_segments(
    call: Call, segment_bundle: Bundle, copied_bundle: Path, tmp_path: Path
) -> None:
    panoptic = segment_bundle.manifest.task == "panoptic"
    table = call("inspect", segment_bundle.path).out
    assert ("won at least 0.6" in table, "best 100 pairs" in table) == (panoptic, not panoptic)
    assert ("PQ ±" in table, "AP ±" in table) == (panoptic, not panoptic)
    assert "IoU above" not in table
    rules = SegmentRules(score=0.25, nms=0.7)
    manifest = msgspec.structs.replace(segment_bundle.manifest, rules=rules)
    files = {name: segment_bundle.file(name) for name in manifest.files}
    table = call("inspect", write_bundle(tmp_path / "own.knet", manifest, files).path).out
    assert "score ≥ 0.25" in table
    assert "no two masks with an IoU above 0.7" in table
    assert "\nsegments " not in call("inspect", copied_bundle).out


def test_inspect_shows_sizes_kinds_parity_by_engine_and_plans(
    call: Call, free_bundle: Bundle, copied_bundle: Path
) -> None:
    measured = open_bundle(copied_bundle).graph("logits").parity[0]
    for passed, engine in ((True, "openvino"), (False, "openvino-bf16")):
        record_parity(
            free_bundle,
            "logits",
            msgspec.structs.replace(
                measured, engine=engine, device="some processor", passed=passed
            ),
        )
    shape = Shape(1, 16, 24)
    record = PlanRecord(
        engine="tensorrt-rtx",
        version="1.7",
        kind="classmap",
        precision="fp32",
        files=graph_hashes(free_bundle, "classmap"),
        gpu=None,
        targets=("sm86", "sm120"),
        options=BuildOptions(Profile(shape, shape, Shape(2, 16, 24))),
        sha256=hashlib.sha256(b"plan").hexdigest(),
        bytes=4,
        seconds=1.0,
        built="2026-01-01",
    )
    stored = store_plan(free_bundle, b"plan", record)
    (free_bundle.path / "engines" / "tensorrt-lost.plan").write_bytes(b"")
    table = call("inspect", free_bundle.path)
    assert (table.code, table.err) == (0, "")
    for text in (
        "8×8 to 64×96 in multiples of 8",
        "logits: float32 semantic logits, 3×4×6",
        "classmap: uint8 class map, 16×24",
        "passed on openvino (some processor)",
        "FAILED on openvino-bf16 (some processor)",
        "not measured: knet-deploy verify",
        f"{stored.path.name}: tensorrt-rtx 1.7, classmap, fp32, for sm86, sm120, 1x16x24 to 2x16x",
        "tensorrt-lost.plan: has no record",
    ):
        assert text in table.out, text


def test_a_flipped_byte_in_a_bundle_names_the_file(call: Call, copied_bundle: Path) -> None:
    graph = open_bundle(copied_bundle).graph("logits").path
    data = bytearray((copied_bundle / graph).read_bytes())
    data[1000] ^= 1
    (copied_bundle / graph).write_bytes(data)
    answer = call("inspect", copied_bundle)
    assert answer.code == 2
    assert f"{graph} is damaged" in one_error(answer.err)


def test_a_newer_schema_says_upgrade(call: Call, copied_bundle: Path) -> None:
    manifest = json.loads((copied_bundle / "manifest.json").read_text(encoding="utf-8"))
    (copied_bundle / "manifest.json").write_text(json.dumps(manifest | {"schema": 99}))
    answer = call("inspect", copied_bundle)
    assert answer.code == 2
    assert "upgrade knet-deploy" in one_error(answer.err)


def test_sigterm_of_this_process_is_restored_after_a_command() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_output_that_cannot_encode_a_sign_shows_another() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "knet_deploy", "inspect"],
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=60,
        check=True,
    )
    assert b"agreement ? " in done.stdout  # for the sign of "at least"
