from __future__ import annotations

import importlib.util

import cv2
import msgspec
import numpy as np
import pytest

from knet_runtime.bundle.store import default_bundle_path
from knet_runtime.errors import BundleError, EngineError, SourceError
from knet_runtime.segmentation import Segmentation
from knet_runtime.segmenter import Segmenter

COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255))


@pytest.fixture
def segment(make_bundle):
    with Segmenter(make_bundle(), engine="onnxruntime-cpu") as segmenter:
        yield segmenter


def plain(colour: int, height: int, width: int) -> np.ndarray:
    frame = np.empty((height, width, 3), np.uint8)
    frame[:] = COLOURS[colour]
    return frame


@pytest.mark.parametrize("size", [(1, 1), (16, 24), (7, 300), (300, 7), (360, 480)])
def test_frame_of_any_size_gets_a_map_of_its_size(segment, size):
    mask = segment(plain(2, *size))
    assert mask.class_map.shape == size
    assert mask.class_map.dtype == np.uint8
    assert (mask.class_map == 2).all()


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_regions_are_found_where_they_are(make_bundle, manifest, resize):
    spec = msgspec.structs.replace(manifest.input, resize=resize)
    frame = np.concatenate([plain(0, 90, 100), plain(1, 90, 60)], axis=1)
    with Segmenter(make_bundle(input=spec)) as segment:
        classes = segment(frame).class_map
    assert (classes[:, :80] == 0).all()
    assert (classes[:, 120:] == 1).all()


@pytest.mark.parametrize("resize", ["stretch", "letterbox"])
def test_class_maps_of_the_graph_go_back_to_the_frame(
    make_bundle, manifest, colour_model, monkeypatch, resize
):
    """As on a GPU engine, which takes the graph that upsamples by itself."""
    monkeypatch.setattr("knet_runtime.engines.default_graph", lambda *_: "classmap")
    spec = msgspec.structs.replace(manifest.input, resize=resize)
    frame = np.concatenate([plain(0, 90, 100), plain(1, 90, 60)], axis=1)
    bundle = make_bundle(input=spec, classmap=colour_model(kind="classmap"))
    with Segmenter(bundle, "onnxruntime-cpu") as segment:
        mask, small = segment.batch([frame, plain(2, 4, 40)])
    classes = mask.class_map
    assert (classes.shape, classes.dtype) == ((90, 160), np.uint8)
    assert (classes[:, :80] == 0).all()
    assert (classes[:, 120:] == 1).all()
    assert small.class_map.shape == (4, 40)
    assert (small.class_map == 2).all()


def test_class_map_of_another_size_is_an_engine_fault(
    make_bundle, manifest, colour_model, monkeypatch
):
    monkeypatch.setattr("knet_runtime.engines.default_graph", lambda *_: "classmap")
    bundle = make_bundle(classmap=colour_model(kind="classmap"))
    with Segmenter(bundle, "onnxruntime-cpu") as segment:
        monkeypatch.setattr(
            segment._engine,
            "infer",
            lambda batch: {"classmap": np.zeros((len(batch), 8, 8), np.uint8)},
        )
        with pytest.raises(EngineError, match=r"the class map is \(8, 8\), expected \(16, 24\)"):
            segment(plain(0, 5, 5))


def test_batch_of_any_length_and_sizes_is_segmented_in_order(segment):
    sizes = [(16, 24), (5, 9), (40, 30), (16, 24), (3, 3), (8, 64), (20, 20)]
    frames = [plain(i % 3, *size) for i, size in enumerate(sizes)]
    masks = segment.batch(frames)
    assert [mask.class_map.shape for mask in masks] == sizes
    assert [int(mask.class_map[0, 0]) for mask in masks] == [i % 3 for i in range(7)]
    for mask, frame in zip(masks, frames, strict=True):
        assert (mask.class_map == segment(frame).class_map).all()
    assert segment.batch([]) == []


def test_names_pil_images_and_arrays_are_segmented_alone_and_in_lists(segment, tmp_path):
    image = np.concatenate([plain(0, 16, 10), plain(2, 16, 20)], axis=1)
    path = tmp_path / "straße.png"
    cv2.imwrite(str(path), image[..., ::-1])
    given = [path, str(path), image]
    if importlib.util.find_spec("PIL") is not None:
        from PIL import Image

        given.append(Image.fromarray(image))
    wanted = segment.batch([image])[0]
    assert wanted.image is None
    for results in ([segment(one) for one in given], segment(given), segment(tuple(given))):
        assert len(results) == len(given)
        for result in results:
            np.testing.assert_array_equal(result.class_map, wanted.class_map)
            np.testing.assert_array_equal(result.image, image)
            np.testing.assert_array_equal(result.overlay(), wanted.overlay(image))
    assert segment(image).image is image
    assert segment([]) == []


def test_a_list_of_any_length_goes_through_in_groups(segment):
    frames = [plain(index % 3, 3 + index, 9) for index in range(7)]
    assert len(frames) > segment.max_batch > 1
    results = segment(frames)
    assert [result.size for result in results] == [(3 + index, 9) for index in range(7)]
    assert [int(result.class_map[0, 0]) for result in results] == [index % 3 for index in range(7)]


def test_every_stage_is_timed_in_milliseconds(segment):
    for mask in segment.batch([plain(0, 30, 40)] * 4):
        assert list(mask.timings) == ["preprocess", "infer", "postprocess"]
        assert all(0 < value < 10_000 for value in mask.timings.values())


def test_shares_are_fractions_by_name(manifest):
    mask = Segmentation(np.array([[0, 0], [2, 0]], np.uint8), manifest.labels, {})
    assert mask.shares() == {"red": 0.75, "green": 0.0, "blue": 0.25}


def test_segmenter_says_what_it_is(segment):
    assert segment.engine == "onnxruntime-cpu"
    assert segment.labels.names == ("red", "green", "blue")
    assert segment.model_id == segment.bundle.model_id
    assert segment.model_id.startswith("colours@")


def test_bundle_may_be_given_by_path(make_bundle):
    path = make_bundle().path
    for given in (path, str(path)):
        with Segmenter(given) as segment:
            assert (segment(plain(1, 5, 5)).class_map == 1).all()


def test_frame_that_is_none_is_refused(segment):
    with pytest.raises(SourceError, match="COLOR_GRAY2RGB"):
        segment(np.zeros((5, 5), np.uint8))
    with pytest.raises(SourceError, match="is an address; download"):
        segment(["http://host/a.png"])
    with pytest.raises(SourceError, match="skip it"):
        segment.batch([plain(0, 5, 5), np.zeros((0, 5, 3), np.uint8)])


def test_closed_segmenter_says_so(make_bundle):
    with Segmenter(make_bundle()) as segment:
        pass
    with pytest.raises(EngineError, match="was closed"):
        segment(plain(0, 5, 5))


def test_engine_that_gives_nan_is_named(segment, monkeypatch):
    nothing = np.full((1, 3, 4, 6), np.nan, np.float32)
    monkeypatch.setattr(segment._engine, "infer", lambda batch: {"logits": nothing})
    with pytest.raises(EngineError, match="onnxruntime-cpu: logits hold NaN"):
        segment(plain(0, 5, 5))


def test_default_bundle_is_the_packaged_one():
    try:
        default_bundle_path()
    except BundleError:
        with pytest.raises(BundleError, match="name a bundle"):
            Segmenter()
    else:
        with Segmenter() as segment:
            assert segment(plain(0, 36, 48)).class_map.shape == (36, 48)


def test_uncertainty_is_said_where_it_is_asked_for(make_bundle, colour_model):
    # The class map is what the engine would run, and logits are what says how sure it is.
    bundle = make_bundle(classmap=colour_model(kind="classmap"))
    with Segmenter(bundle) as segment:
        assert segment(plain(1, 20, 30)).uncertainty is None
    with Segmenter(bundle, uncertainty=True) as segment:
        sure = segment(plain(1, 20, 30)).uncertainty
        unsure = segment(np.full((20, 30, 3), 90, np.uint8)).uncertainty
    assert 0 <= sure < unsure <= 1
