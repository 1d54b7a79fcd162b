import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, false_discovery_control, norm, spearmanr

from physnb.statistics import (
    Overlap,
    benjamini_hochberg,
    bootstrap_mean,
    cases_needed,
    detectable_effect,
    paired_difference,
    rank_agreement,
    relative_difference,
    sign_flips,
)


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


# --- sign flips


def exact_sign_flips(differences):
    """p values alone and corrected, from every pattern of signs; cases that are NaN never count."""
    values = np.nan_to_num(differences)
    patterns = np.array(list(itertools.product((-1.0, 1.0), repeat=values.shape[1])))
    size = np.maximum(np.linalg.norm(values, axis=1), 1e-300)
    drawn = patterns @ (values / size[:, None]).T  # [pattern, test]
    observed = (values / size[:, None]).sum(1) + 1e-9
    return (drawn <= observed).mean(0), (drawn.min(1, keepdims=True) <= observed).mean(0)


def test_sign_flips_are_those_of_every_pattern_of_signs():
    generator = np.random.default_rng(0)
    differences = generator.normal([[-0.5], [0.0], [0.7], [-1.5]], 1.0, (4, 9)) + 0.5 * generator.normal(size=9)
    differences[1, 4] = differences[2, 0] = np.nan
    resamples = 40_000
    for found, exact in zip(sign_flips(differences, resamples=resamples), exact_sign_flips(differences), strict=True):
        deviation = np.sqrt(exact * (1 - exact) / resamples)
        assert (np.abs(found - exact) <= 4 * deviation + 2 / resamples).all()


def test_all_cases_below_zero_have_the_smallest_p_that_so_few_can_have():
    alone, corrected = sign_flips(np.array([[-1.0, -2.0, -0.1, -5.0, -3.0]]), resamples=40_000)
    assert alone == corrected == pytest.approx(2**-5, abs=0.004)


def test_case_that_could_not_be_judged_is_left_out():
    values = np.array([[-1.0, 2.0, -3.0, -4.0, 0.5, -2.0, -1.5, -0.2]])
    with_gaps = np.insert(values, [0, 3, 8], np.nan, axis=1)
    exact, _ = exact_sign_flips(values)
    for differences in (values, with_gaps):
        alone, _ = sign_flips(differences, resamples=40_000)
        assert alone[0] == pytest.approx(exact[0], abs=0.01)


def test_nothing_to_see_has_p_1():
    nothing = np.array([[0.0, 0.0, 0.0], [np.nan, np.nan, np.nan], [0.0, np.nan, 0.0]])
    for p in sign_flips(nothing):
        assert p.tolist() == [1.0, 1.0, 1.0]
    alone, corrected = sign_flips(np.concatenate([nothing, -np.ones((1, 3))]))
    assert alone[:3].tolist() == corrected[:3].tolist() == [1.0, 1.0, 1.0]
    assert alone[3] == corrected[3] == pytest.approx(1 / 8, abs=0.02)  # the others cannot be mistaken for a finding


def test_p_is_that_of_means_below_zero_only():
    above, _ = sign_flips(np.array([[1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 4.0]]))
    assert above[0] == 1.0


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), tests=st.integers(1, 6), cases=st.integers(1, 12), scale=st.floats(1e-6, 1e6))
def test_correction_never_makes_a_p_smaller(seed, tests, cases, scale):
    generator = np.random.default_rng(seed)
    differences = generator.standard_t(2, (tests, cases)) * np.where(generator.random((tests, cases)) < 0.1, np.nan, 1)
    before = differences.copy()
    alone, corrected = sign_flips(differences, resamples=300, seed=seed)
    np.testing.assert_array_equal(differences, before)
    assert (0 < alone).all() and (alone <= corrected).all() and (corrected <= 1).all()
    np.testing.assert_allclose(
        alone[np.argmin(alone)], sign_flips(differences * scale, resamples=300, seed=seed)[0].min()
    )
    single, same = sign_flips(differences[:1], resamples=300, seed=seed)
    assert single == same == alone[0]  # alone means alone: other rows play no part
    order = generator.permutation(tests)
    np.testing.assert_array_equal(sign_flips(differences[order], resamples=300, seed=seed)[1], corrected[order])


def correlated_nulls(hunts, tests, cases, seed):
    """Heavy-tailed differences without effect; half of the variance is what all tests of a case share."""
    generator = np.random.default_rng(seed)
    return generator.standard_t(3, (hunts, tests, cases)) + generator.standard_t(3, (hunts, 1, cases))


def test_correction_holds_the_chance_of_any_false_finding():
    hunts, level = 500, 0.1
    nulls = correlated_nulls(hunts, tests=16, cases=14, seed=0)
    found = [sign_flips(differences, resamples=400, seed=seed) for seed, differences in enumerate(nulls)]
    smallest_alone, smallest = (sum(p[which].min() <= level for p in found) for which in (0, 1))
    low, high = binom.ppf([0.005, 0.995], hunts, level)
    assert low <= smallest <= high  # the level is held and used up, though the tests are correlated
    assert smallest_alone > 0.4 * hunts  # which is what it is needed for


@pytest.mark.parametrize(("cases", "share"), [(24, 0.11), (64, 0.08)])
def test_skew_passes_as_often_as_the_docstring_says(cases, share):
    differences = np.random.default_rng(0).exponential(1.0, (4000, cases)) - 1.0  # mean 0, few large losses
    alone, _ = sign_flips(differences, resamples=1000)
    assert (alone <= 0.05).mean() == pytest.approx(share, abs=0.012)
    mirrored, _ = sign_flips(-differences, resamples=1000)
    assert (mirrored <= 0.05).mean() < 0.05


# --- many tests


@settings(max_examples=20, deadline=None)
@given(p=st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.01, 0.05, 1.0])), min_size=1, max_size=30))
def test_benjamini_hochberg_is_that_of_scipy(p):
    np.testing.assert_allclose(benjamini_hochberg(np.array(p)), false_discovery_control(p), rtol=1e-12)


def test_benjamini_hochberg_bounds_the_share_of_false_findings():
    generator = np.random.default_rng(0)
    simulations, tests, true, level = 1000, 40, 10, 0.1
    z = generator.normal(size=(simulations, tests)) + generator.normal(size=(simulations, 1))  # depend positively
    z[:, :true] -= 4.0
    rejected = np.stack([benjamini_hochberg(p) <= level for p in norm.cdf(z / np.sqrt(2))])
    false = rejected[:, true:].sum(1) / np.maximum(1, rejected.sum(1))
    assert false.mean() <= level + 3 * false.std() / np.sqrt(simulations)
    assert false.mean() > 0.02 and rejected[:, :true].mean() > 0.5


# --- power


@settings(max_examples=20, deadline=None)
@given(
    deviation=st.floats(0.01, 100),
    effect=st.floats(0.01, 10),
    power=st.floats(0.5, 0.99),
    level=st.floats(0.001, 0.2),
    tests=st.integers(1, 400),
)
def test_cases_and_smallest_effect_are_inverse(deviation, effect, power, level, tests):
    shared = dict(power=power, level=level, tests=tests)
    cases = cases_needed(deviation, effect, **shared)
    assert cases == cases_needed(deviation, -effect, **shared)
    assert detectable_effect(deviation, cases, **shared) <= effect * (1 + 1e-9)
    if cases > 2:
        assert detectable_effect(deviation, cases - 1, **shared) > effect * (1 - 1e-9)


def test_known_number_of_cases():
    # half a deviation: m = 4 (1.6449 + 1.2816)^2 = 34.26, n = (m + sqrt(m^2 + 2 m 1.6449^2)) / 2 = 35.6
    assert cases_needed(2.0, 1.0) == 36
    # of 48 tests: m = 4 (3.0781 + 1.2816)^2 = 76.03, n = (m + sqrt(m^2 + 2 m 3.0781^2)) / 2 = 80.5
    assert cases_needed(2.0, -1.0, tests=48) == 81
    assert detectable_effect(1.0, 10_000, power=0.5, level=0.025) == pytest.approx(0.0196, abs=1e-5)
    assert cases_needed(0.0, 1.0) == 2 and detectable_effect(0.0, 7) == 0


@pytest.mark.parametrize(("power", "tests"), [(0.9, 1), (0.6, 1), (0.8, 20), (0.9, 48)])
def test_promised_power_is_that_of_the_test(power, tests):
    simulations, cases, level = 1500, 40, 0.05
    effect = detectable_effect(1.5, cases, power=power, level=level, tests=tests)
    differences = np.random.default_rng(0).normal(-effect, 1.5, (simulations, cases))
    p, _ = sign_flips(differences, resamples=4000)  # simulations are rows: alone is alone
    assert (p <= level / tests).mean() == pytest.approx(power, abs=0.04)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cases_needed(1.0, 0.0), "a number other than 0, got 0.0"),
        (lambda: cases_needed(1.0, math.nan), "a number other than 0, got nan"),
        (lambda: cases_needed(math.nan, 1.0), "deviation must be a number of at least 0, got nan"),
        (lambda: detectable_effect(-1.0, 5), "deviation must be a number of at least 0, got -1.0"),
        (lambda: detectable_effect(1.0, 0), "cases must be positive, got 0"),
        (lambda: cases_needed(1.0, 1.0, power=1.0), "the power must be above level / tests and below 1, got 1.0"),
        (lambda: cases_needed(1.0, 1.0, power=0.01), "the power must be above level / tests"),
        (lambda: detectable_effect(1.0, 5, level=0.0), "of 1 tests at level 0.0"),
        (lambda: detectable_effect(1.0, 5, tests=0), "of 0 tests at level 0.05"),
    ],
)
def test_power_of_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- shares, ranks, overlaps


def test_relative_difference_is_a_share_of_the_mean_and_pairs_its_cases():
    baseline = torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.5
    found = relative_difference(0.8 * baseline, baseline)
    assert (found.mean, found.low, found.high) == pytest.approx((-0.2, -0.2, -0.2), abs=1e-6)  # no noise is left
    found = relative_difference(torch.tensor([1.0, math.nan, 3.0]), torch.tensor([2.0, 5.0, 2.0]))
    assert found.mean == pytest.approx(0.0) and (found.judged, found.cases) == (2, 3)
    assert math.isnan(relative_difference(torch.tensor([math.nan]), torch.ones(1)).mean)
    with pytest.raises(ValueError, match="needs a mean baseline above 0, got 0"):
        relative_difference(torch.ones(3), torch.zeros(3))
    with pytest.raises(ValueError, match="paired values must match: 2 against 3"):
        relative_difference(torch.ones(2), torch.ones(3))


def test_relative_difference_covers_the_true_share_about_19_times_of_20():
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(200):
        baseline = 1 + torch.rand(60, generator=generator)
        found = relative_difference(0.9 * baseline + 0.3 * torch.randn(60, generator=generator), baseline)
        covered += found.low <= -0.1 <= found.high
    assert 180 <= covered <= 199


def test_rank_agreement_is_scipys_on_the_means():
    generator = torch.Generator().manual_seed(2)
    first, second = (torch.randn(12, 30, generator=generator).double() for _ in range(2))
    second += torch.arange(12)[:, None] * 0.1
    found = rank_agreement(first, second)
    assert found.mean == pytest.approx(spearmanr(first.mean(1), second.mean(1)).statistic)
    assert found.low <= found.mean <= found.high and (found.judged, found.cases) == (12, 12)


def test_rank_agreement_pairs_cases_where_they_are_the_same():
    effects = torch.randn(20, 8, generator=torch.Generator().manual_seed(3))
    assert rank_agreement(effects, effects).low == pytest.approx(1.0)  # noise that both share orders both alike
    assert rank_agreement(effects, effects, paired=False).low < 0.9
    with pytest.raises(ValueError, match="paired sides need the same cases: 8 and 5"):
        rank_agreement(effects, effects[:, :5])
    with pytest.raises(ValueError, match="both sides need the same items: 20 and 19"):
        rank_agreement(effects, effects[1:])


def test_rank_agreement_leaves_out_items_that_one_side_could_not_judge():
    effects = torch.randn(6, 9, generator=torch.Generator().manual_seed(4))
    gaps = effects.clone()
    gaps[0], gaps[1, :4] = math.nan, math.nan
    found = rank_agreement(effects, gaps)
    assert found.judged == 5 and 0 < found.mean <= 1
    assert math.isnan(rank_agreement(effects[:2], effects[:2]).mean)


def test_overlap_has_the_chance_of_two_random_choices():
    generator, shared = np.random.default_rng(0), []
    for _ in range(4000):
        first, second = (set(generator.choice(48, 8, replace=False).tolist()) for _ in range(2))
        shared.append(len(first & second))
    found = Overlap(3, 8, 48)
    assert found.expected == pytest.approx(np.mean(shared), abs=0.05)
    assert found.p == pytest.approx(np.mean(np.array(shared) >= 3), abs=0.02)
    assert Overlap(0, 8, 48).p == 1.0 and Overlap(8, 8, 48).p < 1e-8
