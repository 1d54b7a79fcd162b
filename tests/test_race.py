import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from subjects_for_tests import table_trials

from physnb.config import HuntConfig
from physnb.race import (
    STRATA,
    Strata,
    chances_of_top,
    pull_together,
    race_heads,
    stage_sizes,
    surest,
    variances_within,
)
from physnb.ranking import often_judged, rank_heads

GUIDE = HuntConfig().guidance


@pytest.fixture(params=range(5))
def noisy_effects(request):
    """24 heads on 200 cases: what cases share, heads that differ by a quarter of the noise, and heavy tails."""
    generator = torch.Generator().manual_seed(request.param)
    means = torch.linspace(-1, 1, 24)[torch.randperm(24, generator=generator)]
    shared = torch.randn(200, generator=generator)
    return means[:, None] + shared + torch.randn(24, 200, generator=generator) ** 3 / 10


def top(effects, k):
    return rank_heads(table_trials(effects), GUIDE).top(k)


# --- races


def test_race_finds_the_heads_of_the_exhaustive_search_for_fewer_rows(noisy_effects):
    trials = table_trials(noisy_effects)
    race = race_heads(trials, GUIDE, 6, confidence=0.98)
    assert race.winners == top(noisy_effects, 6)
    assert race.rows == len(trials.subject.rows) - 200 == int((~race.ranking.effects.isnan()).sum())
    assert race.rows < 0.6 * noisy_effects.numel()
    assert [stage.cases for stage in race.stages] == stage_sizes(200)[: len(race.stages)]
    for stage in race.stages:
        assert stage.settled + stage.dropped + stage.running == 24
    assert race.stages[-1].misses <= 0.02 < race.stages[0].misses


def test_race_between_equals_runs_to_the_end_and_agrees(noisy_effects):
    alike = noisy_effects - noisy_effects.mean(1, keepdim=True)
    alike += 0.01 * torch.randn(24, 1, generator=torch.Generator().manual_seed(9))
    race = race_heads(table_trials(alike), GUIDE, 6, confidence=0.99)
    assert race.winners == top(alike, 6)
    assert race.stages[-1].cases == 200


@pytest.mark.parametrize("uneven", [False, True])
def test_race_keeps_both_promises_over_many_hunts(uneven):
    """Heads that are hard to tell apart: the same set in nine of ten hunts, nine of ten heads of each set."""
    same, shares, rows = 0, [], dict(set=0, head=0)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        unguided = torch.rand(120, generator=generator) ** 4
        noise = torch.randn(12, 120, generator=generator) * (3 * unguided if uneven else 1.0)
        effects = torch.linspace(-0.3, 0.3, 12)[:, None] + noise
        trials = table_trials(effects, unguided=unguided)
        races = {promise: race_heads(trials, GUIDE, 4, promise=promise, seed=seed) for promise in rows}
        exhaustive = rank_heads(trials, GUIDE).top(4)
        same += races["set"].winners == exhaustive
        shares.append(len(set(races["head"].winners) & set(exhaustive)) / 4)
        rows = {promise: rows[promise] + races[promise].rows for promise in rows}
    assert same >= 33  # 36 expected
    assert np.mean(shares) >= 0.87  # 0.9 expected
    assert rows["head"] < rows["set"] < 0.85 * 40 * 12 * 120


def test_unguided_scores_that_say_where_heads_differ_save_rows():
    generator = torch.Generator().manual_seed(0)
    unguided = torch.rand(120, generator=generator) ** 4
    effects = torch.linspace(-0.2, 0.2, 12)[:, None] + 3 * unguided * torch.randn(12, 120, generator=generator)
    mixed = unguided[torch.randperm(120, generator=generator)]
    informed, blind = (
        np.mean([race_heads(table_trials(effects, unguided=u), GUIDE, 4, seed=seed).rows for seed in range(10)])
        for u in (unguided, mixed)
    )
    assert informed < 0.75 * blind


def test_race_with_cases_that_cannot_be_judged(noisy_effects):
    noisy_effects[:, ::7] = math.nan
    noisy_effects[3] = math.nan
    noisy_effects[3, 0:2] = -100.0  # seldom judged, and then well: it must not win on what nobody saw
    race = race_heads(table_trials(noisy_effects), GUIDE, 6, confidence=0.99)
    assert race.winners == top(noisy_effects, 6)
    assert math.isnan(race.ranking.estimate(race.ranking.heads[3]).mean)


def test_cases_without_an_unguided_score_are_not_run():
    unguided = torch.zeros(40)
    unguided[:10] = math.nan
    trials = table_trials(torch.randn(5, 40, generator=torch.Generator().manual_seed(0)), unguided=unguided)
    race_heads(trials, GUIDE, 2, confidence=0.999)
    assert min(case for trial, case in trials.subject.rows if trial.weak) >= 10
    nowhere = torch.full((3, 20), math.nan)
    for trials in (table_trials(torch.zeros(3, 20), unguided=nowhere[0]), table_trials(nowhere)):
        with pytest.raises(ValueError, match="could not be judged both with and without guidance on any case"):
            race_heads(trials, GUIDE, 1)


def test_a_race_is_a_function_of_its_seed(noisy_effects):
    one, same, other = (race_heads(table_trials(noisy_effects), GUIDE, 6, seed=seed) for seed in (1, 1, 2))
    assert one.stages == same.stages and torch.equal(one.ranking.weights, same.ranking.weights)
    assert not torch.equal(one.ranking.weights, other.ranking.weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(k=0), r"top k must be in \[1, 3\]"),
        (dict(k=4), "top k"),
        (dict(k=1, confidence=1.0), r"in \(0, 1\)"),
        (dict(k=1, budget=15), "budget of 15 rows is too small for a race of 3 heads, which begins with 16"),
    ],
)
def test_bad_race_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        race_heads(table_trials(torch.zeros(3, 4)), GUIDE, **settings)


# --- what it knows


def test_stages_grow_to_all_cases():
    assert stage_sizes(5) == [5] and stage_sizes(30) == [12, 15, 19, 24, 30]


def test_strata_hold_every_case_once_in_the_order_of_their_scores():
    unguided = torch.randn(50, generator=torch.Generator().manual_seed(1))
    unguided[7] = math.nan
    strata = Strata(unguided, seed=0)
    assert sorted(np.concatenate(strata.cases).tolist()) == [i for i in range(50) if i != 7]
    assert len(strata.cases) == STRATA and len(Strata(unguided[:11], seed=0).cases) == 1
    for low, high in zip(strata.cases, strata.cases[1:], strict=False):
        assert unguided[low].max() <= unguided[high].min()


def test_new_cases_go_where_the_spread_is():
    """Neyman (1934): with equal strata, cases in proportion to the standard deviations."""
    strata = Strata(torch.arange(400.0), seed=0)
    assert len(strata.grow(8)) == 8 and strata.taken == [2, 2, 2, 2]
    strata.deviations = np.array([1.0, 1.0, 2.0, 4.0])
    new = strata.grow(80)
    assert strata.taken == pytest.approx([10, 10, 20, 40], abs=1) and len(new) == 72
    strata.grow(400)
    assert strata.taken == [100] * 4 and strata.weights(400).tolist() == [1.0] * 400


def test_mean_and_error_are_those_of_drawing_without_replacement():
    """(1) is unbiased and (2) is its variance, over many orders of the same cases."""
    generator = torch.Generator().manual_seed(2)
    unguided = torch.rand(80, generator=generator)
    effects = torch.randn(6, 80, generator=generator) * (0.1 + unguided)
    effects -= effects.mean(0)  # nothing shared, so that a head's own variance is all
    means, errors = [], []
    for seed in range(600):
        strata = Strata(unguided, seed)
        new = strata.grow(24)
        seen = torch.full_like(effects, math.nan)
        seen[:, new] = effects[:, new]
        mean, error, _ = strata.estimates(seen, strata.weights(80).expand(6, -1))
        means.append(mean)
        errors.append(error)
    means, errors = np.array(means), np.array(errors)
    spread = means.std(0)
    assert np.abs(means.mean(0) - effects.mean(1).numpy()).max() < 4 * spread.max() / math.sqrt(600)
    assert np.sqrt((errors**2).mean()) == pytest.approx(np.sqrt((spread**2).mean()), rel=0.1)


def test_no_doubt_is_left_where_all_cases_are_known():
    effects = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    effects[1, 3] = math.nan
    strata = Strata(torch.arange(30.0), seed=0)
    strata.grow(30)
    mean, error, _ = strata.estimates(effects, strata.weights(30).expand(4, -1))
    assert mean == pytest.approx(effects.double().nanmean(1).numpy()) and error.tolist() == [0.0] * 4


def test_variance_is_about_what_the_heads_share():
    values = np.random.default_rng(0).standard_normal((50, 2000))
    own, pooled = variances_within(values + 100 * np.arange(2000) + 7 * np.arange(50)[:, None])
    assert pooled == pytest.approx(1.0, rel=0.02) and own == pytest.approx(np.ones(50), rel=0.2)
    own, pooled = variances_within(np.array([[1.0, math.nan], [2.0, math.nan]]))
    assert (own.tolist(), pooled) == ([0.0, 0.0], 0.0)


def test_chances_are_those_of_two_normal_heads():
    """P(first is best) = Phi(d / sqrt(2) e)."""
    found = chances_of_top(np.array([0.0, 1.0]), np.array([1.0, 1.0]), 1, np.random.default_rng(0))
    assert found[0] == pytest.approx(norm.cdf(1 / math.sqrt(2)), abs=0.03) and found.sum() == pytest.approx(1)


def test_means_are_pulled_together_as_far_as_errors_explain_them():
    """B = t^2 / (t^2 + e^2), with t^2 = var(x) - e^2; heads that differ by their errors alone keep the least t^2."""
    means, errors = np.array([-3.0, 0.0, 3.0]), np.ones(3)  # var 6, so t^2 = 5
    middle, doubts = pull_together(means, errors, means, 0.0)
    assert middle == pytest.approx(5 / 6 * means) and doubts == pytest.approx(np.full(3, math.sqrt(5 / 6)))
    middle, doubts = pull_together(means, 10 * errors, means, 25.0)
    assert middle == pytest.approx(means / 5) and doubts == pytest.approx(np.full(3, 10 / math.sqrt(5)))
    middle, doubts = pull_together(means, 0 * errors, means, 0.0)
    assert middle.tolist() == means.tolist() and doubts.tolist() == [0.0] * 3


def test_heads_that_nobody_could_judge_have_no_chance():
    unknown, errors = np.full(3, np.inf), np.zeros(3)
    assert pull_together(unknown, errors, unknown, 1.0)[0].tolist() == unknown.tolist()
    assert chances_of_top(unknown, errors, 1, np.random.default_rng(0)).sum() == 0


def test_the_surest_heads_stop_first():
    assert surest(np.array([0.3, 0.0, 0.05, 0.02]), 0.08).tolist() == [1, 3, 2]
    assert surest(np.array([0.3, 0.2]), 0.1).tolist() == []


def test_heads_judged_on_few_of_their_cases_are_unknown():
    effects, ran = torch.tensor([[1.0, math.nan, math.nan], [1.0, 2.0, math.nan]]), torch.full((2, 1), 3)
    assert often_judged(effects, ran)[0].isnan().all() and often_judged(effects, ran)[1, 1] == 2
