from __future__ import annotations

import json
from pathlib import Path

import pytest

from knet_train.average_precision import AveragePrecision
from knet_train.data.segments import open_segments


def test_average_precision_is_the_official_one(shared_data: Path, tmp_path: Path) -> None:
    folder = shared_data.parent / "reference" / "unified" / "metrics"
    if not folder.is_dir():
        pytest.skip("no reference of metrics")
    content = json.loads((folder / "instances_gt.json").read_text())
    (tmp_path / "instances_val.json").write_text(json.dumps(content))
    for image in content["images"]:
        (tmp_path / image["file_name"]).touch()
    truth = open_segments(tmp_path, "val", "instance")
    names = {one["id"]: one["name"] for one in content["categories"]}
    found = json.loads((folder / "instances_pred.json").read_text())
    for one in found:
        one["category_id"] = truth.labels.names.index(names[one["category_id"]])
    score = AveragePrecision(truth.labels)
    for number, image in enumerate(content["images"]):
        own = [one for one in found if one["image_id"] == image["id"]]
        score.update(number, own, truth.read_truth(number))
    expected = json.loads((folder / "ap_expected.json").read_text())
    stats = expected["stats"]
    assert (score.all.ap, score.all.ap50, score.all.ap75) == pytest.approx(stats[:3], abs=1e-12)
    per_class = score.per_class()
    for category, value in expected["per_class_AP"].items():
        own_class = per_class[truth.labels.names.index(names[int(category)])]
        assert (own_class.count == 0) == (value is None)
        if value is not None:
            assert own_class.ap == pytest.approx(value, abs=1e-12)
