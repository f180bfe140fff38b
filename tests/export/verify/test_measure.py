"""What verify counts, and the limits it holds that to."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from knet_export.verify.measure import ParityMeter, default_tolerance, tightened, top_two_margin
from knet_runtime.errors import ConfigError
from knet_runtime.postprocess import upsampled_argmax


def test_the_margin_is_the_lead_of_the_best_class() -> None:
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((5, 6, 8)).astype(np.float32)
    margin = top_two_margin(logits, (6, 8))
    second, best = np.sort(logits, 0)[-2:]
    np.testing.assert_array_equal(margin, best - second)
    large = top_two_margin(logits, (24, 32))
    raised, step = logits.copy(), np.float32(1e-4)
    raised[0] += step  # where class 0 led, it leads by as much more
    won = upsampled_argmax(logits, (24, 32)) == 0
    assert 0 < won.sum() < won.size
    more = top_two_margin(raised, (24, 32))
    np.testing.assert_allclose(more[won], large[won] + step, atol=1e-6)
    assert np.isinf(top_two_margin(logits[:1], (6, 8))).all()


def test_tallies_count_margins_nan_and_labels() -> None:
    meter = ParityMeter(2, 255)
    wanted = np.array([[0, 0], [1, 1]], np.uint8)
    found = np.array([[1, 0], [1, 1]], np.uint8)
    margin = np.array([[0.05, 3.0], [0.7, 9.0]], np.float32)
    label = np.array([[0, 0], [1, 255]], np.uint8)
    assert meter.maps(wanted, found, margin, label) == 0.75
    rows = {row.above: row.agreement for row in meter.margins()}
    assert rows == {0.0: 0.0, 0.1: None, 0.5: 1.0, 1.0: None, 2.0: 1.0, 4.0: 1.0}
    assert meter.agreement_confident == 1.0
    # Class 0: 1 of 2 found; class 1: 1 labelled and found, and one pixel taken for it.
    assert meter.measured.miou == pytest.approx(0.5)
    assert meter.interval() == pytest.approx((-50, -50))
    meter.logits(np.ones((2, 1, 1), np.float32), np.full((2, 1, 1), 1.5, np.float32))
    assert meter.logit_differences() == pytest.approx((0.5, 0.5))
    assert meter.maps(wanted, None, margin, None) == 0.0
    assert meter.agreement == 3 / 8
    assert meter.logit_differences() is None


def test_tolerances_can_only_be_tightened() -> None:
    limits = default_tolerance("int8")
    tight = tightened(limits, ["delta_miou=0.1", "agreement=0.99"])
    assert (tight.delta_miou, tight.agreement) == (0.1, 0.99)
    assert tight.max_logit_diff == limits.max_logit_diff
    for setting, words in (
        ("delta_miou=2", "looser"),
        ("agreement=0.1", "looser"),
        ("delta_miou=-1", "positive"),
        ("delta_miou=nan", "positive"),
        ("delta_miou=a", "no number"),
        ("agreement=2", r"in \(0, 1\]"),
    ):
        with pytest.raises(ConfigError, match=words):
            tightened(limits, [setting])


def test_lower_precisions_are_given_more_room() -> None:
    found = [default_tolerance(precision) for precision in ("fp32", "fp16", "bf16", "int8")]
    assert [limits.delta_miou for limits in found] == sorted(limits.delta_miou for limits in found)
    for tight, loose in pairwise(found):
        assert tight.max_logit_diff < loose.max_logit_diff
        assert tight.mean_logit_diff < loose.mean_logit_diff
        assert tight.agreement > loose.agreement
        assert tight.agreement_confident > loose.agreement_confident
