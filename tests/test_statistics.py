import math

import numpy as np
import pytest
import torch

from physnb.statistics import bootstrap_mean, paired_difference


def test_interval_covers_the_true_mean_about_19_times_of_20():
    generator = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        estimate = bootstrap_mean(torch.from_numpy(generator.exponential(1.0, 40)), seed)
        covered += estimate.low <= 1.0 <= estimate.high
    assert 0.86 <= covered / 200 <= 0.99  # skewed data cost the percentile bootstrap a little


def test_interval_has_the_normal_width():
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    estimate = bootstrap_mean(values)
    half = 1.96 * float(values.std()) / 20
    assert estimate.mean == pytest.approx(float(values.mean()))
    assert estimate.high - estimate.mean == pytest.approx(half, rel=0.15)
    assert estimate.mean - estimate.low == pytest.approx(half, rel=0.15)


def test_clips_that_could_not_be_judged_are_counted_and_left_out():
    estimate = bootstrap_mean(torch.tensor([1.0, torch.nan, 3.0]))
    assert (estimate.mean, estimate.judged, estimate.cases) == (2.0, 2, 3)
    assert 1.0 <= estimate.low <= estimate.high <= 3.0


def test_nothing_judged_is_nan_and_null_in_json():
    estimate = bootstrap_mean(torch.tensor([torch.nan, torch.nan]))
    assert math.isnan(estimate.mean) and (estimate.judged, estimate.cases) == (0, 2)
    assert estimate.to_dict() == dict(mean=None, low=None, high=None, judged=0, cases=2)


def test_same_seed_gives_the_same_interval():
    values = torch.arange(10.0)
    assert bootstrap_mean(values, 1) == bootstrap_mean(values, 1) != bootstrap_mean(values, 2)


def test_pairing_removes_what_both_share():
    baseline = 100 * torch.randn(50, generator=torch.Generator().manual_seed(0))
    difference = paired_difference(baseline + 0.5, baseline)
    assert difference.mean == pytest.approx(0.5, abs=1e-4)
    assert difference.high - difference.low < 1e-4


def test_pair_counts_only_clips_judged_in_both():
    estimate = paired_difference(torch.tensor([1.0, torch.nan, 5.0, 7.0]), torch.tensor([0.0, 1.0, torch.nan, 4.0]))
    assert (estimate.mean, estimate.judged, estimate.cases) == (2.0, 2, 4)


def test_pair_of_unequal_length_is_refused():
    with pytest.raises(ValueError, match="paired values must match: 3 against 2"):
        paired_difference(torch.zeros(3), torch.zeros(2))


def test_estimate_prints_mean_and_interval():
    assert str(bootstrap_mean(torch.ones(3))) == "1.000 [1.000, 1.000]"
