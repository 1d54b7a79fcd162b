"""Whole hunts whose answer is known: a head that was written to move discs, and heads that do nothing."""

import dataclasses

import numpy as np
import pytest
from scipy.stats import binom
from subjects_for_tests import MOTION_HEAD, MOTION_HUNT, STAY_HEAD, TableSubject, motion_model, motion_trials
from test_search import HUNT, LOUD, only_head, trials_of

from physnb.config import head_set
from physnb.confirm import FALSE_DISCOVERY_RATE, confirm, confirm_heads
from physnb.race import race_heads
from physnb.ranking import rank_heads
from physnb.search import hunt_heads
from physnb.statistics import benjamini_hochberg, sign_flips
from physnb.trials import Trials

TABLE_HEADS, TABLE_SELECTION, TABLE_FRESH, TABLE_TOP = 48, 12, 16, 8


@pytest.fixture(scope="module")
def motion():
    """Selection and confirmation on a model whose motion is known to be one head's work."""
    model = motion_model()
    return motion_trials(model, range(16)), motion_trials(model, range(100, 112))


# --- a planted head


@pytest.mark.parametrize("search", ["exhaustive", "race"])
def test_head_that_moves_discs_is_hunted_and_confirmed(motion, search):
    found = hunt_heads(motion[0], dataclasses.replace(MOTION_HUNT, search=search, rounds=3))
    assert found.picked[0] == MOTION_HEAD and STAY_HEAD not in found.picked
    verdicts = confirm_heads(*motion, found.ranking, MOTION_HUNT, found.picked)
    assert verdicts[0].confirmed and verdicts[0].fresh.high < -0.5
    # noise plays no part in this model, so decoys may help beyond doubt, but they move nothing
    assert all(abs(verdict.fresh.mean) < LOUD for verdict in verdicts[1:])


def test_race_settles_the_planted_head_early(motion):
    race = race_heads(motion[0], MOTION_HUNT.guidance, 1)
    assert race.winners == (MOTION_HEAD,) == rank_heads(motion[0], MOTION_HUNT.guidance).top(1)
    assert race.rows < 8 * 16 and race.stages[0].misses < 0.01


def test_planted_head_beats_every_control(motion):
    arms = {arm.name: arm for arm in confirm(*motion, MOTION_HUNT, (MOTION_HEAD,))}
    hunted = arms.pop("1 hunted heads").difference("tracking_error")
    assert hunted.high < -0.5
    together = [name for name in arms if name.startswith("best layer") or name == "all heads"]
    assert len(together) == 2  # these break it too
    for name, arm in arms.items():
        if name not in (*together, f"SEG, L{MOTION_HEAD.layer}"):
            assert hunted.high < arm.difference("tracking_error").low, name


@pytest.mark.parametrize(
    ("objective", "cases"),
    [("position_error", 8), ("velocity_error", 8), ("physics_iq_verified", 8), ("preference_margin", 2)],
)
def test_planted_head_is_found_by_other_objectives(objective, cases):
    model = motion_model()
    selection = motion_trials(model, range(cases), objective)
    hunt = dataclasses.replace(MOTION_HUNT, objective=objective)
    found = hunt_heads(selection, hunt, (*head_set("L0H0,L1H3"), MOTION_HEAD, STAY_HEAD))
    assert found.heads == (MOTION_HEAD,)
    fresh = motion_trials(model, range(100, 104), objective)
    (verdict,) = confirm_heads(selection, fresh, found.ranking, hunt, found.picked)
    assert verdict.confirmed and verdict.fresh.high < 0
    assert STAY_HEAD == found.ranking.order()[-1]


# --- no head


def test_model_whose_heads_do_nothing_confirms_no_head(make_model):
    hunt = dataclasses.replace(HUNT, scenarios=("collision",), steps=1)
    for seed in range(20):
        model = only_head(make_model, planted=None, seed=seed)
        search = ("exhaustive", "race")[seed % 2]
        hunt = dataclasses.replace(hunt, search=search, seed=seed)
        parts = [trials_of(model, hunt, part, batch_size=64) for part in ("selection", "confirmation")]
        found = hunt_heads(parts[0], hunt)
        verdicts = confirm_heads(*parts, found.ranking, hunt, found.picked)
        assert len(verdicts) == 2 and not any(verdict.confirmed for verdict in verdicts), seed
        assert all(verdict.p == 1 and verdict.fresh.mean == 0 for verdict in verdicts), seed


def table_hunt(effects, split):
    """Selection and confirmation trials of made-up heads: the first `split` cases, and the others."""
    parts = [TableSubject(part) for part in np.split(effects, [split], axis=1)]
    selection, confirmation = (Trials(part, progress=False, batch_size=10_000) for part in parts)
    confirmation.subject.case_names = tuple(f"fresh {name}" for name in confirmation.subject.case_names)
    return selection, confirmation


def test_head_that_no_fresh_case_can_judge_is_not_confirmed():
    effects = np.random.default_rng(0).normal(-1.0, 0.1, (3, 20))
    selection, confirmation = table_hunt(effects, split=10)
    ranking = rank_heads(selection, HUNT.guidance)
    confirmation.subject.effects[1] = np.nan
    first, second, _ = confirm_heads(selection, confirmation, ranking, HUNT, ranking.heads)
    assert first.confirmed and not second.confirmed
    assert (second.p, second.fresh.judged, second.gap.judged) == (1.0, 0, 0)
    assert second.to_row()["gap"]["mean"] is None and second.to_row()["promised"]["mean"] is not None


def noise_heads(seed):
    """Heavy-tailed effects, symmetric about 0, that share a part, as differences to one baseline do."""
    generator = np.random.default_rng(seed)
    cases = TABLE_SELECTION + TABLE_FRESH
    return generator.standard_t(2.5, (TABLE_HEADS, cases)) + 0.3 * generator.standard_t(2.5, cases)


def confirmed_heads(effects):
    """The heads that a whole hunt on made-up effects confirms."""
    parts = table_hunt(effects, TABLE_SELECTION)
    found = hunt_heads(parts[0], dataclasses.replace(HUNT, top_k=TABLE_TOP))
    return {v.head.head for v in confirm_heads(*parts, found.ranking, HUNT, found.picked) if v.confirmed}


def test_hunts_for_nothing_confirm_a_head_no_more_often_than_the_stated_rate():
    hunts = 200
    with_any = sum(bool(confirmed_heads(noise_heads(seed))) for seed in range(hunts))
    assert 0 < with_any <= binom.ppf(0.99, hunts, FALSE_DISCOVERY_RATE)
    twice = 0  # the same heads judged on the cases that chose them: what fresh cases are for
    for seed in range(30):
        selection = noise_heads(seed)[:, :TABLE_SELECTION]
        best = selection[selection.mean(1).argsort()[:TABLE_TOP]]
        twice += bool((benjamini_hochberg(sign_flips(best)[0]) <= FALSE_DISCOVERY_RATE).any())
    assert twice > 3 * FALSE_DISCOVERY_RATE * 30


def test_few_of_the_confirmed_heads_are_false_and_true_ones_are_found():
    shares, found = [], []
    for seed in range(20):
        effects = noise_heads(1000 + seed)
        effects[:4] -= 1.5
        confirmed = confirmed_heads(effects)
        shares.append(len(confirmed - set(range(4))) / max(1, len(confirmed)))
        found.append(len(confirmed & set(range(4))) / 4)
    assert np.mean(shares) <= FALSE_DISCOVERY_RATE + 2 * np.std(shares) / np.sqrt(len(shares))
    assert np.mean(found) > 0.5
