from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import onnx
import pytest

from knet_runtime.bundle import store as bundle_module
from knet_runtime.bundle.manifest import Manifest, SizeRange
from knet_runtime.bundle.store import (
    Bundle,
    default_bundle_path,
    open_bundle,
    record_parity,
    write_bundle,
)
from knet_runtime.errors import BundleError, ConfigError, OutputError

# ONNX files of nothing but a producer.
GRAPH, OTHER = b"\x12\x05graph", b"\x12\x05other"
CONTENT = {"model.onnx": GRAPH, "golden.npz": b"tensors", "docs/CARD.md": b"words"}


@pytest.fixture
def written(tmp_path: Path, manifest: Manifest) -> Path:
    return write_bundle(tmp_path / "colours.knet", manifest, CONTENT).path


def kept_in(tensor: onnx.TensorProto, location: str) -> None:
    """Say that the tensor's numbers are in that file."""
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_what_is_written_is_opened_again(tmp_path: Path, manifest: Manifest):
    source = tmp_path / "somewhere.onnx"
    source.write_bytes(b"\x12\xc0\x8d\xb7\x01" + b"x" * 3_000_000)
    files = {**CONTENT, "model.onnx": source, "weights/more.bin": b""}
    bundle = write_bundle(tmp_path / "new" / "colours.knet", manifest, files)
    assert names(tmp_path / "new") == {"colours.knet"}
    opened = open_bundle(str(bundle.path))
    assert opened.manifest == bundle.manifest
    assert set(opened.manifest.files) == set(files)
    assert opened.file("model.onnx").read_bytes() == source.read_bytes()
    record = opened.manifest.files["model.onnx"]
    assert record.bytes == 3_000_005
    assert record.sha256 == hashlib.sha256(source.read_bytes()).hexdigest()
    assert msgspec.structs.replace(opened.manifest, files={}) == manifest


def test_model_id_names_the_graph(written: Path):
    digest = hashlib.sha256(GRAPH).hexdigest()
    assert open_bundle(written).model_id == f"colours@{digest[:12]}"


def test_a_bundle_that_is_not_written_yet_has_a_name_and_its_files(
    tmp_path: Path, manifest: Manifest
):
    bundle = Bundle(tmp_path, manifest)
    assert bundle.model_id == "colours"
    assert bundle.file("model.onnx") == tmp_path / "model.onnx"


def test_model_id_differs_when_only_the_external_weights_do(
    tmp_path: Path, manifest: Manifest, colour_model: Callable[..., bytes]
):
    model = onnx.load_model_from_string(colour_model())
    kept_in(model.graph.initializer[0], "w.data")
    files = {**CONTENT, "model.onnx": model.SerializeToString()}
    graph = msgspec.structs.replace(manifest.graphs[0], external_data=("w.data",))
    changed = msgspec.structs.replace(manifest, graphs=(graph,))
    ids = {
        write_bundle(
            tmp_path / f"{weights}.knet", changed, {**files, "w.data": weights.encode()}
        ).model_id
        for weights in ("one", "two")
    }
    assert len(ids) == 2


def test_relative_path_still_opens_after_a_change_of_folder(
    written: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(written.parent)
    bundle = open_bundle(written.name)
    monkeypatch.chdir("/")
    assert bundle.file("model.onnx").read_bytes() == GRAPH


def test_file_that_is_not_listed_is_not_given_out(written: Path):
    (written / "extra.txt").write_text("left alone")
    with pytest.raises(BundleError, match=r"'extra\.txt' is not listed"):
        open_bundle(written).file("extra.txt")


@pytest.mark.parametrize("name", sorted(CONTENT))
def test_changed_file_is_refused_by_name(written: Path, name: str):
    data = bytearray((written / name).read_bytes())
    data[0] ^= 1
    (written / name).write_bytes(data)
    with pytest.raises(BundleError, match=f"{name} is damaged .its SHA-256"):
        open_bundle(written)


def test_truncated_file_is_refused_by_name(written: Path):
    (written / "model.onnx").write_bytes(b"gra")
    with pytest.raises(BundleError, match=r"model\.onnx is damaged .it has 3 bytes.* says 7"):
        open_bundle(written)


def test_missing_file_is_refused_by_name(written: Path):
    (written / "golden.npz").unlink()
    with pytest.raises(BundleError, match=r"golden\.npz is missing; copy the bundle again"):
        open_bundle(written)


def test_folder_or_pipe_in_place_of_a_file_is_refused(written: Path):
    (written / "model.onnx").unlink()
    (written / "model.onnx").mkdir()
    with pytest.raises(BundleError, match=r"model\.onnx is no plain file"):
        open_bundle(written)
    (written / "model.onnx").rmdir()
    os.mkfifo(written / "model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx is no plain file"):
        open_bundle(written)


def test_link_that_leaves_the_bundle_is_refused_even_to_the_right_bytes(written: Path):
    outside = written.parent / "graph"
    shutil.move(written / "model.onnx", outside)
    (written / "model.onnx").symlink_to(outside)
    with pytest.raises(BundleError, match=r"model\.onnx is a link that leaves the bundle"):
        open_bundle(written)


def test_linked_folder_and_linked_manifest_that_leave_are_refused(written: Path):
    shutil.move(written / "docs", written.parent / "docs")
    (written / "docs").symlink_to(written.parent / "docs")
    with pytest.raises(BundleError, match=r"CARD\.md is a link that leaves"):
        open_bundle(written)
    shutil.move(written / "manifest.json", written.parent / "m")
    (written / "manifest.json").symlink_to(written.parent / "m")
    with pytest.raises(BundleError, match=r"manifest\.json is a link that leaves"):
        open_bundle(written)


def test_link_that_leads_to_itself_is_refused(written: Path):
    (written / "model.onnx").unlink()
    (written / "model.onnx").symlink_to("model.onnx")
    with pytest.raises(BundleError, match=r"model\.onnx"):
        open_bundle(written)


def test_link_within_the_bundle_and_to_the_bundle_is_taken(written: Path):
    (written / "model.onnx").rename(written / "real")
    (written / "model.onnx").symlink_to("real")
    link = written.parent / "link.knet"
    link.symlink_to(written)
    assert open_bundle(link).file("model.onnx").read_bytes() == GRAPH


def test_what_is_no_bundle_is_one_clear_error(tmp_path: Path, written: Path):
    with pytest.raises(BundleError, match="there is no such bundle"):
        open_bundle(tmp_path / "absent.knet")
    with pytest.raises(BundleError, match=f"this is a file of the bundle {written}: pass that"):
        open_bundle(written / "model.onnx")
    with pytest.raises(BundleError, match=r"holds no manifest\.json"):
        open_bundle(written / "docs")
    (written / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(BundleError, match=r"colours\.knet: manifest\.json cannot be read"):
        open_bundle(written)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("run/best.safetensors", r"knet-deploy export .*best\.safetensors -o best\.knet"),
        ("published.pth", "knet-deploy import-mmseg .*published"),
        ("logits.onnx", "this is a graph; a bundle is the folder that knet-deploy export wrote"),
        ("street.knet.zip", "unpack it first"),
    ],
)
def test_a_file_instead_of_a_bundle_gets_the_command_that_makes_one(tmp_path, name, words):
    (tmp_path / "run").mkdir()
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=words):
        open_bundle(tmp_path / name)


def test_a_folder_instead_of_a_bundle_gets_the_command_or_the_bundle_in_it(tmp_path, written):
    with pytest.raises(BundleError, match=f"did you mean {written}"):
        open_bundle(tmp_path)
    (tmp_path / "best.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"knet-deploy export .*best\.safetensors -o NAME\.knet"):
        open_bundle(tmp_path)


def test_manifest_that_is_cut_anywhere_is_refused(written: Path):
    data = (written / "manifest.json").read_bytes()
    for end in range(0, len(data) - 2, 97):
        (written / "manifest.json").write_bytes(data[:end])
        with pytest.raises(BundleError, match=r"manifest\.json cannot be read"):
            open_bundle(written)


def test_manifest_that_points_outside_is_refused(written: Path):
    data = (written / "manifest.json").read_bytes()
    (written / "manifest.json").write_bytes(data.replace(b"golden.npz", b"../gold.npz"))
    with pytest.raises(BundleError, match=r"unsafe path '\.\./gold\.npz'"):
        open_bundle(written)


def test_existing_bundle_is_kept_unless_told_to_replace(written: Path, manifest: Manifest):
    with pytest.raises(OutputError, match="exists already"):
        write_bundle(written, manifest, {**CONTENT, "model.onnx": OTHER})
    assert open_bundle(written).file("model.onnx").read_bytes() == GRAPH
    write_bundle(written, manifest, {**CONTENT, "model.onnx": OTHER}, replace=True)
    assert open_bundle(written).file("model.onnx").read_bytes() == OTHER
    assert names(written.parent) == {"colours.knet"}


def test_bundle_can_be_rewritten_from_its_own_files(written: Path, manifest: Manifest):
    files = {name: written / name for name in CONTENT}
    write_bundle(written, manifest, files, replace=True)
    assert open_bundle(written).file("docs/CARD.md").read_bytes() == b"words"


def test_replacing_a_link_leaves_what_it_led_to(written: Path, manifest: Manifest):
    link = written.parent / "latest.knet"
    link.symlink_to(written)
    write_bundle(link, manifest, {**CONTENT, "model.onnx": OTHER}, replace=True)
    assert not link.is_symlink()
    assert open_bundle(written).file("model.onnx").read_bytes() == GRAPH


def test_folder_that_is_no_bundle_is_never_replaced(tmp_path: Path, manifest: Manifest):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "me.jpg").write_bytes(b"dear")
    with pytest.raises(OutputError, match="is no bundle"):
        write_bundle(tmp_path / "photos", manifest, CONTENT, replace=True)
    assert names(tmp_path / "photos") == {"me.jpg"}


@pytest.mark.parametrize(
    "interruption", [KeyboardInterrupt, OSError(28, "No space left on device")]
)
def test_interrupted_writing_leaves_the_old_bundle_and_no_trace(
    written: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, interruption
):
    calls = []

    def fail(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 2:
            raise interruption

    monkeypatch.setattr(os, "fsync", fail)
    expected = OutputError if isinstance(interruption, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_bundle(written, manifest, {**CONTENT, "model.onnx": OTHER}, replace=True)
    assert names(written.parent) == {"colours.knet"}
    assert open_bundle(written).file("model.onnx").read_bytes() == GRAPH


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError(5, "Input/output error")])
def test_failed_exchange_brings_the_old_bundle_back(
    written: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, interruption
):
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name.endswith(".new"):
            assert not written.exists()  # the old one has just been put aside
            raise interruption
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    expected = OutputError if isinstance(interruption, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        write_bundle(written, manifest, {**CONTENT, "model.onnx": OTHER}, replace=True)
    assert names(written.parent) == {"colours.knet"}
    assert open_bundle(written).file("model.onnx").read_bytes() == GRAPH


def test_bundle_is_never_seen_half_written(
    written: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
):
    """Whenever a file has been written, whatever stands under the name opens."""
    fsync, seen = os.fsync, []

    def look(handle: int) -> None:
        fsync(handle)
        seen.append(open_bundle(written).file("model.onnx").read_bytes())

    monkeypatch.setattr(os, "fsync", look)
    write_bundle(written, manifest, {**CONTENT, "model.onnx": OTHER}, replace=True)
    assert len(seen) >= len(CONTENT) + 1
    assert seen[0] == GRAPH
    assert seen[-1] == OTHER


def test_unwritable_places_and_missing_sources_are_output_errors(
    tmp_path: Path, manifest: Manifest
):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot be written"):
        write_bundle(tmp_path / "file" / "x.knet", manifest, CONTENT)
    absent = {**CONTENT, "model.onnx": tmp_path / "absent.onnx"}
    with pytest.raises(OutputError, match=r"absent\.onnx"):
        write_bundle(tmp_path / "x.knet", manifest, absent)
    assert names(tmp_path) == {"file"}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_parent_is_an_output_error(tmp_path: Path, manifest: Manifest):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            write_bundle(tmp_path / "x.knet", manifest, CONTENT)
    finally:
        tmp_path.chmod(0o700)


def test_files_that_do_not_fit_the_manifest_are_refused(tmp_path: Path, manifest: Manifest):
    with pytest.raises(BundleError, match=r"'model\.onnx' is not among the files"):
        write_bundle(tmp_path / "x.knet", manifest, {"golden.npz": b""})
    with pytest.raises(BundleError, match="unsafe path"):
        write_bundle(tmp_path / "x.knet", manifest, {**CONTENT, "../x": b""})
    assert not names(tmp_path)


def test_bundle_can_be_copied_and_read_by_others(written: Path, tmp_path: Path):
    shutil.copytree(written, tmp_path / "copy.knet")
    assert open_bundle(tmp_path / "copy.knet").manifest == open_bundle(written).manifest
    mask = os.umask(0)
    os.umask(mask)
    assert written.stat().st_mode & 0o777 == 0o777 & ~mask


def test_bundle_of_free_size_runs_at_another(make_bundle, manifest: Manifest):
    sizes = SizeRange((8, 8), (64, 96), 8)
    bundle = make_bundle(input=msgspec.structs.replace(manifest.input, sizes=sizes))
    assert bundle.with_input_size((16, 24)) is bundle
    other = bundle.with_input_size((64, 32))
    assert (other.manifest.input.height, other.manifest.input.width) == (64, 32)
    assert (other.path, other.model_id) == (bundle.path, bundle.model_id)
    assert (bundle.manifest.input.height, bundle.manifest.input.width) == (16, 24)
    for size in ((72, 24), (16, 104), (4, 24), (20, 24)):
        with pytest.raises(
            ConfigError, match=r"heights 8 … 64 and widths 8 … 96 in multiples of 8"
        ):
            bundle.with_input_size(size)


def test_bundle_of_one_size_says_how_to_get_others(make_bundle):
    bundle = make_bundle()
    assert bundle.with_input_size((16, 24)) is bundle
    with pytest.raises(ConfigError, match=r"exported for 16×24 only: .* with --dynamic"):
        bundle.with_input_size((32, 24))


def test_kind_that_a_bundle_lacks_is_named(make_bundle, colour_model):
    assert make_bundle(classmap=colour_model(kind="classmap")).graph("classmap").path == (
        "classmap.onnx"
    )
    with pytest.raises(BundleError, match="colours holds no classmap graph"):
        make_bundle().graph("classmap")


def test_parity_is_recorded_once_per_engine_and_device(make_bundle, colour_model, parity):
    bundle = make_bundle(classmap=colour_model(kind="classmap"))
    first = parity("openvino", passed=False)
    elsewhere = parity("openvino", device="another processor")
    for record in (first, elsewhere, parity("onnxruntime-cpu"), parity("openvino")):
        record_parity(bundle, "logits", record)
    opened = open_bundle(bundle.path)
    kept = {(found.engine, found.device): found.passed for found in opened.graph("logits").parity}
    assert len(opened.graph("logits").parity) == 3
    assert kept[first.engine, first.device]
    assert opened.graph("logits").parity_on("openvino", "another processor") == elsewhere
    assert opened.graph("logits").parity_on("tensorrt", first.device) is None
    assert opened.graph("classmap").parity == ()


def test_parity_that_cannot_be_recorded_leaves_the_manifest(
    make_bundle, parity, monkeypatch: pytest.MonkeyPatch
):
    bundle = make_bundle()
    before = (bundle.path / "manifest.json").read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundle_module, "write_atomic", full)
    with pytest.raises(OutputError, match="free some space"):
        record_parity(bundle, "logits", parity("openvino"))
    assert (bundle.path / "manifest.json").read_bytes() == before
    (bundle.path / "manifest.json").unlink()
    with pytest.raises(BundleError, match="is missing"):
        record_parity(bundle, "logits", parity("openvino"))


def test_a_file_of_holes_is_refused_before_it_is_read(written: Path):
    with (written / "golden.npz").open("r+b") as file:
        file.truncate(2**34)
    manifest = written / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"bytes": 7\n', f'"bytes": {2**34}\n', 1))
    with pytest.raises(BundleError, match="lists more than 16 GiB of files"):
        open_bundle(written)


def test_newer_bundle_says_upgrade(written: Path):
    path = written / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"schema": 3', b'"schema": 7'))
    with pytest.raises(BundleError, match=r"schema 7, this one reads 2 to 3.: upgrade knet-deploy"):
        open_bundle(written)


def test_packaged_model_is_found_or_its_absence_explained():
    if (Path(bundle_module.__file__).parents[1] / "default.knet").is_dir():
        assert isinstance(open_bundle(default_bundle_path()), Bundle)
    else:
        with pytest.raises(BundleError, match="name a bundle"):
            default_bundle_path()


def test_packaged_models_have_names(written: Path, monkeypatch: pytest.MonkeyPatch):
    if not (Path(bundle_module.__file__).parents[1] / "default.knet").is_dir():
        pytest.skip("this build carries no model of its own")
    assert open_bundle("default").model_id == open_bundle().model_id
    panoptic = open_bundle("street-panoptic").manifest
    assert (panoptic.task, panoptic.segment_rules.nms) == ("panoptic", 0.6)
    with pytest.raises(
        BundleError, match=r"defualt: there is no such bundle.*models: default, street-panoptic"
    ):
        open_bundle("defualt")
    monkeypatch.chdir(written.parent)
    written.rename("default")  # a folder that is there counts first
    assert open_bundle("default").path == written.parent / "default"


def test_nothing_is_written_into_a_packaged_model(tmp_path: Path, parity):
    packaged = open_bundle("default")
    before = (packaged.path / "manifest.json").read_bytes()
    (tmp_path / "link.knet").symlink_to(packaged.path)
    for bundle in (packaged, open_bundle(tmp_path / "link.knet")):
        with pytest.raises(OutputError, match=r"stays as it was installed.*cp -r .*default\.knet"):
            record_parity(bundle, "logits", parity("openvino"))
    assert (packaged.path / "manifest.json").read_bytes() == before
    own = open_bundle(shutil.copytree(packaged.path, tmp_path / "own.knet"))
    record_parity(own, "logits", parity("openvino"))
    assert parity("openvino") in open_bundle(own.path).graph("logits").parity


def test_file_without_the_right_to_read_is_named(written: Path, monkeypatch: pytest.MonkeyPatch):
    original: Callable[..., object] = Path.open

    def refuse(self: Path, *args: str, **kwargs: str) -> object:
        if self.name == "golden.npz":
            raise PermissionError(13, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(BundleError, match=r"golden\.npz cannot be read: Permission denied"):
        open_bundle(written)
