"""``convert`` makes the same data folder of the same labels, in whatever format they come."""

from __future__ import annotations

import io
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_trees
import numpy as np
import pytest
from foreign_trees import EXACT, NAMES, Labelled, png, save, save_json, save_text
from PIL import Image

from knet_runtime.errors import ConfigError, DataError, OutputError
from knet_train.config import Config
from knet_train.data.check import check, survey
from knet_train.data.convert.formats import FORMAT_NAMES, FORMATS
from knet_train.data.convert.write import Converted, Options, check_options, convert, open_source


def labelled(count: int = 6) -> list[Labelled]:
    """Frames of three sequences: blocks of all classes, and an unlabelled row."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(count):
        label = rng.permutation(48).reshape(6, 8).astype(np.uint8) % 11
        label = label.repeat(4, 0).repeat(4, 1)
        label[0] = 255
        image = rng.integers(0, 255, (24, 32, 3), dtype=np.uint8)
        split = "val" if number >= count - 2 else "train"
        found.append(Labelled(f"seq{number // 2}_{number:04}", split, image, label))
    return found


def run(source: Path, out: Path, format_name: str | None = None, **options: Any) -> Converted:
    chosen = Options(**options)
    check_options(out, chosen, source)
    with open_source(source, format_name) as opened:
        return convert(opened, out, chosen)


def classes_of(words: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(words[1].split(","))


def label_files(out: Path, kind: str = "labels") -> dict[str, Path]:
    """The label files by their order: formats give the same images other names."""
    return {path.name: path for path in sorted((out / kind).rglob("*.png"))}


def values(out: Path, kind: str = "labels") -> np.ndarray:
    (path,) = label_files(out, kind).values()
    return np.asarray(Image.open(path))


def test_every_format_has_a_tree_here_or_is_one_of_outlines_or_ours() -> None:
    assert {name.partition(",")[0] for name in EXACT} | {"yolo", "knet-deploy"} == {*FORMAT_NAMES}


@pytest.mark.parametrize("name", EXACT)
def test_the_labels_of_every_format_are_equal_byte_for_byte(name: str, tmp_path: Path) -> None:
    samples = labelled()
    root, words = EXACT[name](tmp_path / "source", samples)
    with open_source(root) as opened:
        assert opened.match.format.name == name.partition(",")[0]
        done = convert(opened, tmp_path / "out", Options(classes=classes_of(words)))
    assert not done.problems
    assert sum(done.splits.values()) == len(samples)
    assert_equal(name, samples, tmp_path / "out")
    report, good = check(survey(tmp_path / "out"))
    assert not report.problems
    assert len(good) == len(samples)
    if name.partition(",")[0] not in ("camvid", "cvat", "labelme", "label-studio", "supervisely"):
        assert done.splits == {"train": 4, "val": 2}


def assert_equal(name: str, samples: list[Labelled], out: Path) -> None:
    found = label_files(out)
    assert len(found) == len(samples)
    for one in samples:
        if name == "parquet":  # whose rows have numbers alone
            place = [s.name for s in samples if s.split == one.split].index(one.name)
            (path,) = (p for p in found.values() if p.parent.name == one.split and
                       p.stem.endswith(f"{place:06}"))  # fmt: skip
        else:
            (path,) = (p for p in found.values() if one.name in p.name)
        assert path.read_bytes() == png(one.label), one.name


def test_twenty_images_of_camvid_give_equal_labels_in_every_format(
    tmp_path: Path, shared_data: Path
) -> None:
    samples = []
    for path in sorted((shared_data / "camvid" / "images" / "train").glob("*.jpg"))[::18][:20]:
        label = np.array(
            Image.open(shared_data / "camvid" / "labels" / "train" / f"{path.stem}.png")
        )
        label[label == 11] = 255
        image = np.array(Image.open(path))[::4, ::4]
        samples.append(Labelled(path.stem, "train", image, label[::4, ::4].copy()))
    samples = [one._replace(split="val" if n > 15 else "train") for n, one in enumerate(samples)]
    assert len(samples) == 20
    for name, write in EXACT.items():
        root, words = write(tmp_path / "source", samples)
        assert not run(root, tmp_path / "out", classes=classes_of(words)).problems
        assert_equal(name, samples, tmp_path / "out")
        shutil.rmtree(tmp_path / "source")
        shutil.rmtree(tmp_path / "out")


# An L and a rectangle, in x, y of the corners of pixels, and the size.
OUTLINES = {"car": [2, 2, 20, 2, 20, 8, 8, 8, 8, 20, 2, 20], "pole": [24, 4, 30, 4, 30, 22, 24, 22]}
SIZE = (24, 32)


def expected() -> np.ndarray:
    found = np.zeros(SIZE, np.uint8)
    found[2:20, 2:8] = found[2:8, 2:20] = 1
    found[4:22, 24:30] = 2
    return found


def points(outline: list[int]) -> list[list[int]]:
    return [[x, y] for x, y in zip(outline[::2], outline[1::2], strict=True)]


def yolo_tree(root: Path, text: str | None = None) -> None:
    save(root / "images" / "train" / "a.png", np.zeros((*SIZE, 3), np.uint8))
    save_text(root / "data.yaml", "names:\n  0: car\n  1: pole\n")
    scale = [1 / SIZE[1], 1 / SIZE[0]] * 6
    lines = [
        " ".join(map(str, [n, *(v * s for v, s in zip(outline, scale, strict=False))]))
        for n, outline in enumerate(OUTLINES.values())
    ]
    save_text(root / "labels" / "train" / "a.txt", "\n".join(lines) if text is None else text)


def cvat_tree(root: Path, shapes: str | None = None) -> None:
    save(root / "images" / "a.png", np.zeros((*SIZE, 3), np.uint8))
    shapes = shapes or "".join(
        f'<polygon label="{name}" z_order="0" points="'
        + ";".join(f"{x},{y}" for x, y in points(outline))
        + '"/>'
        for name, outline in OUTLINES.items()
    )
    labels = "".join(f"<label><name>{name}</name></label>" for name in OUTLINES)
    save_text(
        root / "annotations.xml",
        f"<annotations><version>1.1</version><meta><task><labels>{labels}</labels></task></meta>"
        f'<image id="0" name="a.png" width="32" height="24">{shapes}</image></annotations>',
    )


def labelme_tree(root: Path, shapes: list[Any] | None = None, image: str = "a.png") -> None:
    save(root / "a.png", np.zeros((*SIZE, 3), np.uint8))
    shapes = shapes or [
        {"label": name, "points": points(outline), "shape_type": "polygon"}
        for name, outline in OUTLINES.items()
    ]
    save_json(root / "a.json", {"shapes": shapes, "imagePath": image})


def label_studio_tree(root: Path) -> None:
    save(root / "a.png", np.zeros((*SIZE, 3), np.uint8))
    results = [
        {
            "type": "polygonlabels",
            "original_width": 32,
            "original_height": 24,
            "value": {
                "polygonlabels": [name],
                "points": [[100 * x / 32, 100 * y / 24] for x, y in points(outline)],
            },
        }
        for name, outline in OUTLINES.items()
    ]
    data = {"image": "/data/local-files/?d=street/a.png"}
    save_json(root / "export.json", [{"data": data, "annotations": [{"result": results}]}])


def supervisely_tree(root: Path, interior: list[list[list[int]]] | None = None) -> None:
    save(root / "ds" / "img" / "a.png", np.zeros((*SIZE, 3), np.uint8))
    save_json(root / "meta.json", {"classes": [{"title": "car"}, {"title": "pole"}]})
    objects = [
        {
            "classTitle": name,
            "geometryType": "polygon",
            "points": {"exterior": points(outline), "interior": interior or []},
        }
        for name, outline in OUTLINES.items()
    ]
    size = {"height": 24, "width": 32}
    save_json(root / "ds" / "ann" / "a.png.json", {"size": size, "objects": objects})


def coco_tree(root: Path) -> None:
    save(root / "images" / "a.png", np.zeros((*SIZE, 3), np.uint8))
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": 24, "width": 32}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(OUTLINES, 3)],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": n, "segmentation": [outline]}
            for n, outline in enumerate(OUTLINES.values(), 3)
        ],
    }
    save_json(root / "result.json", content)


OUTLINED = (yolo_tree, cvat_tree, labelme_tree, label_studio_tree, supervisely_tree, coco_tree)


@pytest.mark.parametrize("write", OUTLINED)
def test_polygons_come_back_within_a_pixel_with_their_objects(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / "source")
    done = run(tmp_path / "source", tmp_path / "out", task="instance")
    assert [row.name for row in done.classes] == ["background", "car", "pole"]
    assert [row.objects for row in done.classes] == [0, 1, 1]
    found, wanted = values(tmp_path / "out"), expected()
    edge = np.zeros(SIZE, bool)  # within a pixel of another class
    for axis in (0, 1):
        for step in (-1, 1):
            edge |= np.roll(wanted, step, axis) != wanted
    assert np.array_equal(found[~edge], wanted[~edge])
    assert (found == 2).any()
    numbers = values(tmp_path / "out", "instances")
    assert numbers.dtype == np.uint16
    assert np.array_equal(numbers > 0, found > 0)
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    assert labels["things"] == ["car", "pole"]


def test_yolo_of_roboflow_has_its_splits_outside(tmp_path: Path) -> None:
    yolo_tree(tmp_path / "s")
    for folder in ("images", "labels"):
        for split in ("train", "valid"):
            shutil.copytree(tmp_path / "s" / folder / "train", tmp_path / "t" / split / folder)
    shutil.copy(tmp_path / "s" / "data.yaml", tmp_path / "t")
    save(tmp_path / "t" / "train" / "images" / "b.png", np.zeros((*SIZE, 3), np.uint8))
    save_text(tmp_path / "t" / "train" / "labels" / "b.txt", "")
    save(tmp_path / "t" / "train" / "images" / "c.png", np.zeros((*SIZE, 3), np.uint8))
    done = run(tmp_path / "t", tmp_path / "out")
    assert done.splits == {"train": 2, "val": 1}
    assert done.left_out == ("1 images without a text file (c.png)",)
    assert not np.asarray(Image.open(tmp_path / "out" / "labels" / "train" / "b.png")).any()


def test_holes_are_background_and_smaller_objects_lie_on_top(tmp_path: Path) -> None:
    supervisely_tree(tmp_path / "s", interior=[[[3, 3], [7, 3], [7, 7], [3, 7]]])
    run(tmp_path / "s", tmp_path / "holes")
    assert values(tmp_path / "holes")[5, 5] == 0
    assert values(tmp_path / "holes")[12, 5] == 1
    whole = [0, 0, 32, 0, 32, 24, 0, 24]
    small = {"label": "cup", "points": points([4, 4, 8, 4, 8, 8, 4, 8]), "shape_type": "polygon"}
    table = {"label": "table", "points": points(whole), "shape_type": "polygon"}
    ignored = {"label": "__ignore__", "points": [[20, 10], [30, 20]], "shape_type": "rectangle"}
    line = {"label": "cup", "points": [[1, 1], [2, 2]], "shape_type": "line"}
    labelme_tree(tmp_path / "l", [small, table, ignored, line])
    done = run(tmp_path / "l", tmp_path / "order")
    found = values(tmp_path / "order")
    assert (found[6, 6], found[20, 2], found[15, 25]) == (1, 2, 255)
    assert done.left_out == ("1 shapes of type line",)


def test_the_higher_z_order_lies_on_top_and_what_is_hidden_is_said(tmp_path: Path) -> None:
    square = "0,0;32,0;32,24;0,24"
    cvat_tree(
        tmp_path / "s",
        f'<polygon label="car" z_order="2" points="{square}"/>'
        '<polygon label="pole" z_order="1" points="4,4;8,4;8,8;4,8"/><box label="car"/>',
    )
    done = run(tmp_path / "s", tmp_path / "out")
    assert (values(tmp_path / "out") == 1).all()
    assert done.left_out == (
        "1 shapes of type box",
        "1 objects without a pixel of their own: others cover them",
    )


def test_cityscapes_keeps_objects_and_groups(tmp_path: Path) -> None:
    numbers = np.full((24, 32), 7, np.int32)
    numbers[:4] = 26000
    numbers[4:8] = 26001
    numbers[8:12] = 24000
    numbers[12:16] = 26  # a group of cars
    numbers[16:20] = 3  # not scored
    base = tmp_path / "s"
    save(base / "leftImg8bit/train/ulm/ulm_0_0_leftImg8bit.png", np.zeros((24, 32, 3), np.uint8))
    save(base / "gtFine/train/ulm/ulm_0_0_gtFine_instanceIds.png", numbers.astype(np.uint16))
    done = run(base, tmp_path / "out", task="panoptic", classes=("road", "car", "person"))
    assert [(row.name, row.objects) for row in done.classes] == [
        *(("road", 0), ("car", 2), ("person", 1))
    ]
    found, objects = values(tmp_path / "out"), values(tmp_path / "out", "instances")
    assert found[::4, 0].tolist() == [1, 1, 2, 1, 255, 0]
    assert (objects[::4, 0] > 0).tolist() == [True, True, True, False, False, False]
    assert objects[0, 0] != objects[4, 0]


def test_classes_are_renamed_merged_chosen_and_ordered(tmp_path: Path) -> None:
    root, _ = foreign_trees.index_masks(tmp_path / "s", labelled())
    done = run(
        root,
        tmp_path / "out",
        classes=("Vehicle", "road"),
        renamed=("car=Vehicle", "bicycle=Vehicle"),
    )
    assert [row.name for row in done.classes] == ["Vehicle", "road"]
    one = labelled()[0]
    table = np.full(256, 255, np.uint8)
    table[[NAMES.index("car"), NAMES.index("bicycle"), NAMES.index("road")]] = (0, 0, 1)
    path = tmp_path / "out" / "labels" / "train" / f"{one.name}.png"
    assert np.array_equal(np.asarray(Image.open(path)), table[one.label])
    for options, text in (
        ({"classes": ("lorry",)}, "--classes names 'lorry', and the classes are sky, building"),
        ({"renamed": ("lorry=car",)}, "--map names 'lorry', and the classes are sky"),
        ({"renamed": ("car",)}, "write OLD=NEW"),
    ):
        with pytest.raises(ConfigError, match=text):
            run(root, tmp_path / "no", **options)
    assert not (tmp_path / "no").exists()


def test_sequences_are_not_torn_apart(tmp_path: Path) -> None:
    root, _ = foreign_trees.camvid(tmp_path / "s", labelled(20))
    done = run(root, tmp_path / "out", shares=(0.5, 0.3, 0.2))
    assert done.splits == {"test": 4, "train": 10, "val": 6}
    homes: dict[str, set[str]] = {}
    for path in label_files(tmp_path / "out").values():
        homes.setdefault(path.stem.partition("_")[0], set()).add(path.parent.name)
    assert len(homes) == 10
    assert all(len(splits) == 1 for splits in homes.values())
    again = run(root, tmp_path / "again", shares=(0.5, 0.3, 0.2))
    assert again == done


def test_one_sequence_is_divided_into_blocks(tmp_path: Path) -> None:
    samples = [one._replace(name=f"frame{n}") for n, one in enumerate(labelled(20))]
    root, _ = foreign_trees.camvid(tmp_path / "s", samples)
    done = run(root, tmp_path / "out")
    assert done.splits == {"train": 16, "val": 4}
    val = {path.stem for path in (tmp_path / "out" / "labels" / "val").iterdir()}
    assert val == {f"frame{n}" for n in range(16, 20)}


def test_images_are_copied_or_linked(tmp_path: Path) -> None:
    root, _ = foreign_trees.index_masks(tmp_path / "s", labelled(2))
    run(root, tmp_path / "copies")
    run(root, tmp_path / "links", link=True)
    copies = sorted((tmp_path / "copies" / "images").rglob("*.jpg"))
    links = sorted((tmp_path / "links" / "images").rglob("*.jpg"))
    assert len(copies) == len(links) == 2
    assert not any(path.is_symlink() for path in copies)
    for link in links:
        assert link.is_symlink()
        assert link.resolve().is_relative_to(root.resolve())


def test_a_zip_is_read_and_cannot_write_outside(tmp_path: Path) -> None:
    root, words = foreign_trees.cvat(tmp_path / "tree", labelled())
    archive = Path(shutil.make_archive(str(tmp_path / "task"), "zip", root))
    done = run(archive, tmp_path / "out", classes=classes_of(words))
    assert sum(done.splits.values()) == 6
    assert_equal("cvat", labelled(), tmp_path / "out")
    with pytest.raises(ConfigError, match="--link"):
        run(archive, tmp_path / "linked", link=True)
    for name in ("../evil.txt", "/evil.txt", "a/../../evil.txt", "..\\evil.txt"):
        with zipfile.ZipFile(tmp_path / "evil.zip", "w") as opened:
            opened.writestr(name, "x")
        with pytest.raises(DataError, match="leads out of it"):
            run(tmp_path / "evil.zip", tmp_path / "no")
    (tmp_path / "broken.zip").write_bytes(archive.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"broken\.zip"):
        run(tmp_path / "broken.zip", tmp_path / "no")
    assert not list(tmp_path.rglob("evil.txt"))


def test_categories_that_are_no_things_become_background_and_are_said(tmp_path: Path) -> None:
    coco_tree(tmp_path / "s")
    path = tmp_path / "s" / "result.json"
    content = json.loads(path.read_text())
    content["categories"][1]["isthing"] = 0
    save_json(path, content)
    done = run(tmp_path / "s", tmp_path / "out")
    assert [row.name for row in done.classes] == ["background", "car"]
    said = "1 categories whose isthing is 0: they become background (pole)"
    assert done.left_out == (said,)


def test_lists_of_a_flat_folder_are_its_splits(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "s" / "images" / f"{name}.png", np.zeros((*SIZE, 3), np.uint8))
        save(tmp_path / "s" / "labels" / f"{name}.png", expected())
    save_json(tmp_path / "s" / "labels.json", ["background", "car", "pole"])
    save_text(tmp_path / "s" / "split" / "train.txt", "a\nb")
    save_text(tmp_path / "s" / "split" / "val.txt", "c")
    assert run(tmp_path / "s", tmp_path / "out").splits == {"train": 2, "val": 1}


def test_our_own_folder_is_converted_with_its_objects(tmp_path: Path) -> None:
    cvat_tree(tmp_path / "s")
    run(tmp_path / "s", tmp_path / "first", task="panoptic")
    done = run(tmp_path / "first", tmp_path / "second", task="panoptic")
    assert [(row.name, row.objects) for row in done.classes] == [
        *(("background", 0), ("car", 1), ("pole", 1))
    ]
    for kind in ("labels", "instances"):
        assert np.array_equal(values(tmp_path / "first", kind), values(tmp_path / "second", kind))


def test_labels_of_ours_may_be_painted_in_the_colours_of_labels_json(tmp_path: Path) -> None:
    one = labelled()[0]
    one.label[0] = 0
    save(tmp_path / "s" / "images" / "a.png", one.image)
    save(tmp_path / "s" / "labels" / "a.png", foreign_trees.painted(one.label))
    names = {"class_names": NAMES, "palette_rgb": foreign_trees.COLOURS, "ignore_index": 255}
    save_json(tmp_path / "s" / "labels.json", names)
    run(tmp_path / "s", tmp_path / "out")
    assert np.array_equal(values(tmp_path / "out"), one.label)


def test_masks_without_a_list_are_named_by_their_values(tmp_path: Path) -> None:
    label = np.zeros((24, 32), np.uint8)
    label[5:9] = 255
    save(tmp_path / "two" / "images" / "a.png", np.zeros((24, 32, 3), np.uint8))
    save(tmp_path / "two" / "masks" / "a_mask.png", label)
    done = run(tmp_path / "two", tmp_path / "o1", renamed=("foreground=crack",))
    assert [(row.name, row.pixels) for row in done.classes] == [
        *(("background", 640), ("crack", 128))
    ]
    label[0] = 3
    save(tmp_path / "two" / "masks" / "a_mask.png", label)
    done = run(tmp_path / "two", tmp_path / "o2")
    assert [row.name for row in done.classes] == ["0", "1", "2", "3"]
    (line,) = done.left_out
    assert line.startswith("names of classes, as there is no classes.txt: write one, or use --map")
    assert done.void == 128


@pytest.mark.parametrize("name", [*EXACT, "yolo"])
def test_what_was_converted_is_trained_on(
    name: str, tmp_path: Path, tiny_config: Callable[..., Config], backbone_file: Path
) -> None:
    from knet_train.fit import train

    config = tiny_config(
        *("data.train_split=train", "data.val_split=val", "optim.steps=3", "trainer.val_every=3"),
        *("data.crop=[32, 32]", "data.eval_size=[32, 32]", "optim.warmup_steps=1"),
    )
    root, out = tmp_path / "source", tmp_path / "out"
    if name == "yolo":
        yolo_tree(root)
        for part, ending in (("images", "png"), ("labels", "txt")):
            (root / part / "val").mkdir()
            shutil.copy(root / part / "train" / f"a.{ending}", root / part / "val" / f"b.{ending}")
        run(root, out)
    else:
        root, words = EXACT[name](root, labelled())
        run(root, out, classes=classes_of(words), shares=(0.7, 0.3))
    result = train(config, out, tmp_path / "run", backbone_weights=backbone_file)
    assert result.last.is_file()
    assert np.isfinite(result.best_score)


# What is wrong, in what tree, and what the error or the problem says.
def _no_class(root: Path) -> None:
    yolo_tree(root, "7 0.1 0.1 0.5 0.1 0.5 0.5")


def _box(root: Path) -> None:
    yolo_tree(root, "0 0.5 0.5 0.2 0.2")


def _two_points(root: Path) -> None:
    cvat_tree(root, '<polygon label="car" points="1,1;5,5"/>')


def _beyond_one(root: Path) -> None:
    yolo_tree(root, "0 0.1 0.1 5 0.1 5 5")


def _outside(root: Path) -> None:
    cvat_tree(root, '<polygon label="car" points="100,100;120,100;120,120"/>')


def _strange_label(root: Path) -> None:
    cvat_tree(root, '<polygon label="lorry" points="1,1;5,1;5,5"/>')


def _mask_leaves(root: Path) -> None:
    cvat_tree(root, '<mask label="car" rle="0,4" left="31" top="0" width="2" height="2"/>')


def _short_mask(root: Path) -> None:
    cvat_tree(root, '<mask label="car" rle="0,3" left="1" top="0" width="2" height="2"/>')


def _no_image(root: Path) -> None:
    cvat_tree(root)
    (root / "images" / "a.png").unlink()


def _other_size(root: Path) -> None:
    cvat_tree(root)
    save(root / "images" / "a.png", np.zeros((12, 16, 3), np.uint8))


def _entities(root: Path) -> None:
    cvat_tree(root)
    path = root / "annotations.xml"
    path.write_text('<!DOCTYPE a [<!ENTITY b "c">]>' + path.read_text())


def _broken_xml(root: Path) -> None:
    cvat_tree(root)
    path = root / "annotations.xml"
    path.write_text(path.read_text()[:-9])


def _empty(root: Path) -> None:
    cvat_tree(root, '<box label="car"/>')


def _broken_json(root: Path) -> None:
    labelme_tree(root)
    save_text(root / "b.json", '{"shapes": [')


def _gone(root: Path) -> None:
    labelme_tree(root, image="b.png")


def _mask_size(root: Path) -> None:
    foreign_trees.index_masks(root, labelled(2))
    save(root / "masks" / "train" / "seq0_0001.png", np.zeros((3, 3), np.uint8))
    save(root / "masks" / "val" / "seq0_0001.png", np.zeros((3, 3), np.uint8))


def _value(root: Path) -> None:
    foreign_trees.index_masks(root, labelled(1))
    save(root / "masks" / "val" / "seq0_0000.png", np.full((24, 32), 77, np.uint8))


def _broken_png(root: Path) -> None:
    foreign_trees.index_masks(root, labelled(1))
    path = root / "masks" / "val" / "seq0_0000.png"
    path.write_bytes(path.read_bytes()[:60])


def _twice(root: Path) -> None:
    foreign_trees.index_masks(root, labelled(1))
    save(root / "images" / "val" / "seq0_0000.png", np.zeros((24, 32, 3), np.uint8))


def _jpeg(root: Path) -> None:
    foreign_trees.camvid(root, labelled(1))
    (path,) = (root / "LabeledApproved_full").iterdir()
    data = io.BytesIO()
    Image.open(path).save(data, "JPEG")
    path.with_suffix(".jpg").write_bytes(data.getvalue())
    path.unlink()


def _unlisted(root: Path) -> None:
    foreign_trees.camvid(root, labelled(1))
    (root / "label_colors.txt").unlink()


def _no_names(root: Path) -> None:
    yolo_tree(root)
    (root / "data.yaml").unlink()


def _no_colour(root: Path) -> None:
    cvat_tree(root)
    path = root / "annotations.xml"
    path.write_text(path.read_text().replace("</name>", "</name><color>#12345g</color>"))


def _no_colour_of_supervisely(root: Path) -> None:
    supervisely_tree(root)
    save_json(root / "meta.json", {"classes": [{"title": "car", "color": "#12"}]})


FAULTS = {
    _no_colour: r"annotations\.xml has the colour '#12345g': write it as #rrggbb",
    _no_colour_of_supervisely: r"meta\.json has the colour '#12': write it as #rrggbb",
    _no_class: r"a\.txt: line 1 is of class 7, but the classes are 0 … 1: mend the line",
    _box: r"a\.txt: line 1 is a box",
    _two_points: r"annotations\.xml: a\.png has a polygon that is no list of three points",
    _beyond_one: r"a\.txt: line 1 has points outside of 0 … 1",
    _outside: r"annotations\.xml: a\.png has a polygon that lies outside of its image of 32×24",
    _strange_label: r"a\.png has an object of 'lorry', which is none of its classes",
    _mask_leaves: r"a mask of 2×2 at \(31, 0\), which leaves its image",
    _short_mask: r"run lengths of 3 pixels in a mask of 2×2",
    _no_image: r"1 labelled images that are not there, such as a\.png: put them into",
    _other_size: r"a\.png was labelled at 32×24, but the image is 16×12: put the image there",
    _entities: r"annotations\.xml declares a document type",
    _broken_xml: r"annotations\.xml: .*; export the file again",
    _empty: r"has no labelled image: 1 shapes of type box",
    _broken_json: r"b\.json: .*; export the file again",
    _gone: r"a\.json: its image b\.png is not there: put it beside the JSON",
    _mask_size: r"seq0_0001\.png is 3×3 but its image .* is 32×24: labels are never resized",
    _value: r"seq0_0000\.png holds 768 pixels of values that are no class: 77 \(768 pixels\)",
    _broken_png: r"cannot read label .*seq0_0000\.png",
    _twice: r"share a name: rename one of them",
    _jpeg: r"_L\.jpg holds \d+ pixels of \d+ colours that its classes do not have: .*exact colours",
    _unlisted: r"is painted in colours, and nothing says what they mean: the 12 colours",
    _no_names: r"has no data\.yaml with names",
}


@pytest.mark.parametrize("write", FAULTS)
def test_what_is_wrong_is_said_and_nothing_is_written(
    write: Callable[[Path], None], tmp_path: Path
) -> None:
    write(tmp_path / "s")
    try:
        (said,) = run(tmp_path / "s", tmp_path / "out").problems
    except DataError as error:
        said = str(error)
    assert re.search(FAULTS[write], said), said
    assert "\n" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_ambiguous_unknown_and_existing_folders_are_refused(tmp_path: Path) -> None:
    cvat_tree(tmp_path / "s")
    save(tmp_path / "s" / "SegmentationClass" / "b.png", np.zeros(SIZE, np.uint8))
    with pytest.raises(DataError, match=r"2 formats: choose --from voc \(.*\); --from cvat \("):
        run(tmp_path / "s", tmp_path / "out")
    assert run(tmp_path / "s", tmp_path / "out", "cvat").classes[1].name == "car"
    with pytest.raises(DataError, match="is not in the format yolo: it looks like --from voc"):
        run(tmp_path / "s", tmp_path / "no", "yolo")
    with pytest.raises(OutputError, match="out is there already"):
        run(tmp_path / "s", tmp_path / "out", "cvat")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="in no format that is known"):
        run(tmp_path / "empty", tmp_path / "no")
    with pytest.raises(DataError, match="tells no objects apart"):
        run(foreign_trees.bdd100k(tmp_path / "b", labelled())[0], tmp_path / "no", task="instance")
    assert len({one.name for one in FORMATS}) == len(FORMATS)
