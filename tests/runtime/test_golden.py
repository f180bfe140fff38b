from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from knet_runtime.bundle.manifest import Kind, Manifest
from knet_runtime.bundle.store import Bundle, write_bundle
from knet_runtime.engines import open_engine
from knet_runtime.errors import BundleError
from knet_runtime.golden import GOLDEN_NAME, load_golden, replay, save_golden
from knet_runtime.types import Closeable

IMAGES = np.zeros((2, 16, 24, 3), np.uint8)
LOGITS = np.zeros((2, 3, 4, 6), np.float32)


class Spoilt(Closeable):
    """An engine whose outputs are another's, spoilt."""

    name = "spoilt"
    device = "here"

    def __init__(
        self, bundle: Bundle, spoil: Callable[[np.ndarray], np.ndarray], kind: Kind = "logits"
    ) -> None:
        self.kind = kind
        self.inner = open_engine(bundle, "onnxruntime-cpu", kind)
        self.spoil = spoil
        self.batches: list[int] = []

    def infer(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        self.batches.append(len(batch))
        return {name: self.spoil(array) for name, array in self.inner.infer(batch).items()}

    def close(self) -> None:
        self.inner.close()


def write(tmp_path: Path, manifest: Manifest, golden: bytes) -> Bundle:
    files = {"model.onnx": b"", GOLDEN_NAME: golden}
    return write_bundle(tmp_path / "x.knet", manifest, files, replace=True)


def test_real_engine_passes(make_bundle):
    bundle = make_bundle()
    with open_engine(bundle, "onnxruntime-cpu") as loaded:
        report = replay(bundle, loaded)
    assert report.passed
    assert report.images == 5
    assert report.agreement == 1.0
    assert report.max_logit_diff < 1e-3
    assert report.tolerance == bundle.manifest.graphs[0].tolerance


def test_replay_fills_the_batches(make_bundle):
    bundle = make_bundle()
    with Spoilt(bundle, lambda logits: logits) as loaded:
        assert replay(bundle, loaded).passed
        assert loaded.batches == [3, 2]


def last_off(logits: np.ndarray) -> np.ndarray:
    spoilt = logits.copy()
    spoilt[-1, 0, 0, 0] += 1
    return spoilt


def last_nan(logits: np.ndarray) -> np.ndarray:
    spoilt = logits.copy()
    spoilt[-1, 0, 0, 0] = np.nan
    return spoilt


@pytest.mark.parametrize("spoil", [last_off, last_nan, lambda logits: logits[:, ::-1]])
def test_engine_that_differs_does_not_pass(make_bundle, spoil):
    bundle = make_bundle()
    with Spoilt(bundle, spoil) as loaded:
        report = replay(bundle, loaded)
    assert not report.passed
    assert not report.max_logit_diff <= 1e-3


def test_small_differences_that_turn_pixels_do_not_pass(make_bundle, manifest, golden):
    """Logits within their tolerance are not enough: the class maps must agree as well."""
    arrays = np.load(io.BytesIO(golden))
    assert arrays["images"].dtype == np.uint8
    flat = np.ones_like(arrays["logits"])
    flat[:, 1] += 1e-4
    bundle = make_bundle()
    buffer = io.BytesIO()
    save_golden(buffer, arrays["images"], flat)
    files = {"model.onnx": bundle.file("model.onnx"), GOLDEN_NAME: buffer.getvalue()}
    bundle = write_bundle(bundle.path, manifest, files, replace=True)
    with Spoilt(bundle, np.ones_like) as loaded:
        report = replay(bundle, loaded)
    assert report.max_logit_diff <= report.tolerance.max_logit_diff
    assert report.agreement == 0
    assert not report.passed


def test_engine_that_gives_class_maps_is_held_to_their_agreement(make_bundle, colour_model):
    bundle = make_bundle(classmap=colour_model(kind="classmap"))
    with open_engine(bundle, "onnxruntime-cpu", "classmap") as loaded:
        report = replay(bundle, loaded)
    assert (report.passed, report.max_logit_diff) == (True, None)
    assert report.agreement >= 0.999
    for spoil, agreement in ((lambda classes: 2 - classes, 0.5), (np.zeros_like, 0.5)):
        with Spoilt(bundle, spoil, "classmap") as loaded:
            report = replay(bundle, loaded)
        assert not report.passed
        assert report.agreement < agreement


def test_saved_arrays_are_loaded_and_their_bytes_are_stable(tmp_path, manifest, golden):
    tensors = load_golden(write(tmp_path, manifest, golden))
    assert tensors.images.shape == (5, 16, 24, 3)
    again = io.BytesIO()
    save_golden(again, tensors.images, tensors.logits)
    assert again.getvalue() == golden


@pytest.mark.parametrize(
    ("images", "logits", "reason"),
    [
        (IMAGES.astype(np.float32), LOGITS, "images must be uint8"),
        (IMAGES[0], LOGITS, "images must be uint8"),
        (IMAGES, LOGITS.astype(np.float64), "logits must be float32"),
        (IMAGES, LOGITS[:1], "2 images but 1 logits"),
        (IMAGES[:0], LOGITS[:0], "at least one"),
        (IMAGES, LOGITS + np.float32("nan"), "NaN"),
    ],
)
def test_arrays_of_another_form_are_neither_saved_nor_loaded(
    tmp_path, manifest, images, logits, reason
):
    with pytest.raises(ValueError, match=reason):
        save_golden(io.BytesIO(), images, logits)
    buffer = io.BytesIO()
    np.savez(buffer, images=images, logits=logits)
    with pytest.raises(BundleError, match=reason):
        load_golden(write(tmp_path, manifest, buffer.getvalue()))


@pytest.mark.parametrize(
    ("images", "logits", "reason"),
    [
        (IMAGES[:, :8], LOGITS, "the model takes 16×24"),
        (IMAGES, LOGITS[:, :2], r"the model gives \[K, 3, 4, 6\]"),
        (IMAGES, LOGITS[..., :5], r"the model gives \[K, 3, 4, 6\]"),
    ],
)
def test_arrays_of_another_model_are_refused(tmp_path, manifest, images, logits, reason):
    buffer = io.BytesIO()
    save_golden(buffer, images, logits)
    with pytest.raises(BundleError, match=reason):
        load_golden(write(tmp_path, manifest, buffer.getvalue()))


def test_file_without_golden_tensors_is_refused_by_name(tmp_path, manifest):
    pickled, single, other = io.BytesIO(), io.BytesIO(), io.BytesIO()
    np.savez(pickled, images=np.array([{}], object), logits=LOGITS)
    np.save(single, LOGITS)
    np.savez(other, photos=IMAGES)
    for data in (b"", b"words", pickled.getvalue(), single.getvalue(), other.getvalue()):
        with pytest.raises(BundleError, match=r"golden\.npz: no golden tensors"):
            load_golden(write(tmp_path, manifest, data))


def zipped(images: np.ndarray, logits: np.ndarray, **other: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, images=images, logits=logits)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_LZMA) as archive:
        for name, data in other.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def test_many_images_are_refused_before_any_is_unpacked(tmp_path, manifest):
    many = zipped(np.zeros((17, 16, 24, 3), np.uint8), np.zeros((17, 3, 4, 6), np.float32))
    with pytest.raises(BundleError, match="17 images: 16 at most") as caught:
        load_golden(write(tmp_path, manifest, many))
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(ValueError, match="17 images: 16 at most"):
        save_golden(io.BytesIO(), np.zeros((17, 8, 8, 3), np.uint8), np.zeros((17, 1, 2, 2), "f4"))
    most = zipped(np.zeros((16, 16, 24, 3), np.uint8), np.zeros((16, 3, 4, 6), np.float32))
    assert len(load_golden(write(tmp_path, manifest, most)).images) == 16


@pytest.mark.parametrize(
    "kind", ["more", "less", "twice", "another", "members", "comment", "zip64", "lzma"]
)
def test_an_archive_that_states_what_it_does_not_hold_is_refused(tmp_path, manifest, kind):
    good = zipped(IMAGES, LOGITS)
    assert load_golden(write(tmp_path, manifest, good)).images.shape == IMAGES.shape
    if kind in ("more", "less"):  # than the images' header says
        buffer = io.BytesIO()
        np.save(buffer, IMAGES)
        data = buffer.getvalue()
        buffer = io.BytesIO()
        np.savez(buffer, logits=LOGITS)
        with zipfile.ZipFile(buffer, "a") as archive:
            archive.writestr("images.npy", data + b"\0" if kind == "more" else data[:-1])
        bad = buffer.getvalue()
    elif kind == "twice":
        with pytest.warns(UserWarning, match="Duplicate name"):
            bad = zipped(IMAGES, LOGITS, **{"images.npy": b""})
    elif kind == "another":
        bad = zipped(IMAGES, LOGITS, photos=b"")
    elif kind == "members":
        bad = zipped(IMAGES, LOGITS, **{f"{n:030}": b"" for n in range(100)})
    elif kind == "comment":
        bad = good[:-2] + b"\x02\x00hi"
    elif kind == "zip64":
        bad = good[:-22] + b"PK\6\7" + bytes(16) + good[-22:]
    else:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as archive:
            for name, array in (("images", IMAGES), ("logits", LOGITS)):
                with archive.open(f"{name}.npy", "w") as file:
                    np.save(file, array)
        bad = buffer.getvalue()
    with pytest.raises(BundleError, match=r"golden\.npz: no golden tensors: "):
        load_golden(write(tmp_path, manifest, bad))


def test_bundle_without_golden_file_says_so(tmp_path, manifest):
    bundle = write_bundle(tmp_path / "x.knet", manifest, {"model.onnx": b""})
    with pytest.raises(BundleError, match=r"'golden\.npz' is not listed"):
        load_golden(bundle)
