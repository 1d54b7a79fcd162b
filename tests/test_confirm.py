import dataclasses
import inspect
import json

import numpy as np
import pytest
import torch
from subjects_for_tests import MOTION_HEAD, MOTION_HUNT, STAY_HEAD, motion_model, motion_trials
from test_search import GREY_LEVEL, HUNT, LOUD, PLANTED, only_head, trials_of

from physnb import confirm as confirming
from physnb.config import Guidance, HeadId, OtherModel, head_set
from physnb.confirm import (
    FALSE_DISCOVERY_RATE,
    METRIC_UNITS,
    best_layer,
    confirm,
    confirm_heads,
    control_arms,
    mean_gap,
    random_head_sets,
    require_disjoint,
)
from physnb.families import heads_of
from physnb.ranking import HeadRanking, measure_effects, rank_heads
from physnb.search import hunt_heads
from physnb.statistics import benjamini_hochberg, sign_flips


@pytest.fixture(scope="module")
def loud_model(make_model):
    """Only PLANTED reaches the output; whether guiding away from it helps is chance."""
    return only_head(make_model)


@pytest.fixture(scope="module")
def trials(loud_model):
    """Selection and confirmation of HUNT; trials remember their rows, so tests share them."""
    return trials_of(loud_model), trials_of(loud_model, part="confirmation")


@pytest.fixture(scope="module")
def arms(trials):
    return confirm(*trials, HUNT, (PLANTED,))


@pytest.fixture(scope="module")
def motion():
    """Selection and confirmation on a model whose motion is known to be one head's work."""
    model = motion_model()
    return motion_trials(model, range(16)), motion_trials(model, range(100, 112))


# --- disjoint cases


def judging_functions(selection, confirmation, ranking):
    """Every function that judges a choice, by name, ready to be called."""
    return {
        "require_disjoint": lambda: require_disjoint(selection, confirmation),
        "confirm": lambda: confirm(selection, confirmation, HUNT, (PLANTED,)),
        "confirm_heads": lambda: confirm_heads(selection, confirmation, ranking, HUNT, (PLANTED,)),
    }


def test_selection_and_confirmation_share_no_case(trials):
    selection, confirmation = (set(part.subject.case_names) for part in trials)
    assert len(selection) == 9 and len(confirmation) == 12 and not selection & confirmation
    clips = [{f.numpy().tobytes() for f in part.subject.cases.frames} for part in trials]
    assert not clips[0] & clips[1]


def test_judging_on_a_selection_case_is_refused_everywhere(loud_model, model):
    selection = trials_of(loud_model)
    # one selection case more per scenario reaches one case into the confirmation; another model makes no new case
    confirmation = trials_of(model, dataclasses.replace(HUNT, selection_cases=2), "confirmation")
    ranking = HeadRanking((PLANTED,), torch.zeros(1, 9), selection.subject.objective)
    judges = judging_functions(selection, confirmation, ranking)
    for judge in judges.values():
        with pytest.raises(ValueError, match=r"3 cases are used both to choose and to confirm.*'collision/id/2/"):
            judge()
    assert selection.rows_run == confirmation.rows_run == 0
    public = {name: f for name, f in vars(confirming).items() if inspect.isfunction(f)}
    known = {name for name, f in public.items() if "confirmation" in inspect.signature(f).parameters}
    assert known - {"arm_values"} == set(judges), "a function that judges is not in the list above"


# --- controls


def test_controls_are_always_there(model):
    arms = control_arms(heads_of(model), HUNT, head_set("L0H1,L1H2"), layer=1, others=["early", "small"])
    assert list(arms) == [
        "unguided",
        "CFG",
        "AutoGuidance early",
        "AutoGuidance small",
        "2 random heads",
        "all heads",
        "best layer, L1",
        "SEG, L1",
        "2 hunted heads",
    ]
    assert arms["unguided"] == [Guidance()]
    assert arms["CFG"] == [Guidance(text_weight=1.0)]
    assert arms["AutoGuidance small"] == [Guidance(weak=((HUNT.weight, OtherModel("small")),))]
    assert {name: len(draws) for name, draws in arms.items() if len(draws) != 1} == {
        "2 random heads": HUNT.random_draws
    }
    weak = {name: [guidance.weak[0] for guidance in arms[name]] for name in list(arms)[4:]}
    assert all(weight == HUNT.weight and p.strength == HUNT.strength for pairs in weak.values() for weight, p in pairs)
    kinds = {name: pairs[0][1].kind for name, pairs in weak.items()}
    assert kinds.pop("SEG, L1") == "mean_query" and set(kinds.values()) == {HUNT.kind}
    assert all(len(p.heads) == 2 for _, p in weak["2 random heads"])
    assert weak["all heads"][0][1].heads == heads_of(model)
    assert weak["best layer, L1"][0][1].heads == weak["SEG, L1"][0][1].heads == head_set("L1H0,L1H1,L1H2,L1H3")
    assert weak["2 hunted heads"][0][1].heads == head_set("L0H1,L1H2")


def test_random_head_sets_are_reproducible_and_fair(model):
    heads = heads_of(model)
    sets = random_head_sets(heads, 3, 200, seed=5)
    assert sets == random_head_sets(heads, 3, 200, seed=5) != random_head_sets(heads, 3, 200, seed=6)
    assert all(len(set(drawn)) == 3 for drawn in sets)
    counts = torch.tensor([sum(head in drawn for drawn in sets) for head in heads])
    assert (counts - 75).abs().max() < 28  # four standard deviations
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"a set of {k} heads cannot be drawn from 8"):
            random_head_sets(heads, k, 1, seed=0)


def test_best_layer_is_where_breaking_all_heads_helps_most(motion):
    assert best_layer(motion[0], MOTION_HUNT) == MOTION_HEAD.layer
    # weight -1 is the broken model itself, which does better without the head that leaves discs where they were
    assert best_layer(motion[0], dataclasses.replace(MOTION_HUNT, weight=-1.0)) == STAY_HEAD.layer


def test_confirmation_reports_every_arm_against_unguided(arms):
    rows = {arm.name: arm.to_row() for arm in arms}
    layer = next(name for name in rows if name.startswith("best layer"))
    seg = f"SEG, {layer.split()[-1]}"
    assert list(rows) == ["unguided", "CFG", "1 random heads", "all heads", layer, seg, "1 hunted heads"]
    json.dumps(list(rows.values()), allow_nan=False)
    for metric in METRIC_UNITS:
        assert rows["unguided"][metric]["difference"] is None
        assert all(row[metric]["cases"] == 12 for row in rows.values())
    # all heads together are the planted one, and nothing else
    everything, found = (arm.values["tracking_error"] for arm in arms if arm.name in ("all heads", "1 hunted heads"))
    torch.testing.assert_close(found, everything, atol=GREY_LEVEL, rtol=0)
    assert (found - arms[0].values["tracking_error"]).abs().mean() > LOUD


def test_difference_is_paired_case_by_case(arms):
    arm = arms[-1]
    expected = (arm.values["tracking_error"] - arm.baseline["tracking_error"]).mean()
    assert arm.difference("tracking_error").mean == pytest.approx(float(expected), abs=1e-5)
    unpaired = arm.estimate("tracking_error")
    assert arm.difference("tracking_error").high - arm.difference("tracking_error").low < unpaired.high - unpaired.low
    assert arm.estimate("tracking_error", [0, 1]).mean == pytest.approx(float(arm.values["tracking_error"][:2].mean()))
    two = (arm.values["tracking_error"] - arm.baseline["tracking_error"])[:2].mean()
    assert arm.difference("tracking_error", [0, 1]).mean == pytest.approx(float(two), abs=1e-5)


def test_random_draws_are_averaged_case_by_case(trials, arms):
    sets = random_head_sets(trials[1].subject.heads, 1, HUNT.random_draws, HUNT.seed)
    scores = trials[1].scores([HUNT.guidance(heads) for heads in sets])
    random = next(arm for arm in arms if arm.name == "1 random heads")
    assert len(sets) == 2 and torch.equal(random.values["tracking_error"], scores.mean(0))


@pytest.mark.parametrize("objective", ["tracking_error", "preference_margin"])
def test_weaker_network_is_a_control_of_every_kind_of_objective(objective):
    model, weaker = motion_model(), {"early": motion_model(motion=0.25)}
    parts = [motion_trials(model, numbers, objective, others=weaker) for numbers in (range(1), range(100, 101))]
    arms = {arm.name: arm for arm in confirm(*parts, MOTION_HUNT, (MOTION_HEAD,), others=["early"])}
    assert "AutoGuidance early" in arms
    sign = parts[0].subject.objective.sign
    gains = {name: sign * arm.difference(objective).mean for name, arm in arms.items()}
    assert gains["1 hunted heads"] < gains["AutoGuidance early"] < -LOUD  # half of the motion is lost in it, not all
    assert gains["CFG"] == pytest.approx(0, abs=1e-5)  # the model reads no caption
    with pytest.raises(ValueError, match="unknown guiding model 'late'"):
        confirm(*parts, MOTION_HUNT, (MOTION_HEAD,), others=["late"])


def test_other_judges_of_the_same_cases_join_the_table():
    model = motion_model()
    selection, confirmation = (motion_trials(model, cases, "reward") for cases in (range(2), range(100, 103)))
    beside = motion_trials(model, range(100, 103))
    arms = confirm(selection, confirmation, MOTION_HUNT, (MOTION_HEAD,), beside=beside)
    assert [list(arm.values) for arm in arms] == [["reward", *METRIC_UNITS]] * len(arms)
    hunted, guidance = arms[-1], MOTION_HUNT.guidance((MOTION_HEAD,))
    assert torch.equal(hunted.values["position_error"], beside.scores([guidance], name="position_error")[0])
    assert torch.equal(hunted.values["reward"], confirmation.scores([guidance])[0])
    for others, message in (
        (range(101, 104), "beside must have the cases of confirmation"),
        (range(3), "are used both"),
    ):
        with pytest.raises(ValueError, match=message):
            confirm(selection, confirmation, MOTION_HUNT, (MOTION_HEAD,), beside=motion_trials(model, others))


def test_head_that_the_model_lacks_is_named(trials):
    with pytest.raises(ValueError, match="head L7H0 does not exist"):
        confirm(*trials, HUNT, (HeadId(7, 0),))


# --- single heads


def test_verdicts_compare_promise_and_fresh_cases(motion):
    ranking = rank_heads(motion[0], MOTION_HUNT.guidance)
    heads = (STAY_HEAD, MOTION_HEAD, HeadId(0, 0))
    verdicts = confirm_heads(*motion, ranking, MOTION_HUNT, heads)
    assert tuple(verdict.head for verdict in verdicts) == heads
    effects = measure_effects(motion[1], [MOTION_HUNT.guidance((head,)) for head in heads])
    p, _ = sign_flips(effects)
    for verdict, fresh, p_value, q in zip(verdicts, effects, p, benjamini_hochberg(p), strict=True):
        promised = ranking.effects[ranking.heads.index(verdict.head)]
        assert verdict.promised.mean == pytest.approx(float(promised.mean()), abs=1e-5)
        assert verdict.fresh.mean == pytest.approx(float(fresh.mean()), abs=1e-5)
        assert verdict.gap.mean == pytest.approx(float(fresh.mean() - promised.mean()), abs=1e-5)
        assert (verdict.promised.cases, verdict.fresh.cases, verdict.gap.cases) == (16, 12, 12)
        assert (verdict.p, verdict.q) == (p_value, q)
        assert verdict.confirmed == (q <= FALSE_DISCOVERY_RATE)
    stay, move, _ = verdicts
    assert move.confirmed and not stay.confirmed
    assert move.p == pytest.approx(2**-12, abs=1e-3)  # it helps in all twelve cases: the smallest p there is
    rows = [verdict.to_row() for verdict in verdicts]
    json.dumps(rows, allow_nan=False)
    assert [(row["head"], row["confirmed"]) for row in rows[:2]] == [("L0H1", False), ("L1H2", True)]


def test_heads_without_a_promise_are_refused(motion):
    selection = motion[0]
    alone = rank_heads(selection, MOTION_HUNT.guidance, [MOTION_HEAD])
    with pytest.raises(ValueError, match="nothing was promised of L0H1: the ranking lacks them"):
        confirm_heads(*motion, alone, MOTION_HUNT, [MOTION_HEAD, STAY_HEAD])
    with pytest.raises(ValueError, match="there is no head to confirm"):
        confirm_heads(*motion, alone, MOTION_HUNT, [])
    together = hunt_heads(selection, dataclasses.replace(MOTION_HUNT, rounds=2)).rounds[1]
    with pytest.raises(ValueError, match=r"broken together with others; give a hunt's first, Hunt\.ranking"):
        confirm_heads(*motion, together, MOTION_HUNT, [STAY_HEAD])


# --- the winner's curse


def test_gap_between_two_samples_is_covered_19_times_of_20():
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        chosen, fresh = generator.exponential(1.0, 40), generator.normal(3.0, 2.0, 25)
        gap = mean_gap(torch.from_numpy(chosen), torch.from_numpy(fresh))
        covered += gap.low <= 2.0 <= gap.high
    assert 0.91 <= covered / 400 <= 0.98


def test_best_of_many_noise_heads_promises_what_it_does_not_keep():
    generator = np.random.default_rng(1)
    gaps, covered = [], 0
    for _ in range(300):
        selection = generator.standard_t(5, (24, 20))
        best = selection[selection.mean(1).argmin()]
        gap = mean_gap(torch.from_numpy(best), torch.from_numpy(generator.standard_t(5, 40)))
        gaps.append(gap.mean)
        covered += gap.low <= -best.mean() <= gap.high  # its true mean is 0
    expected = 1.95 * np.sqrt(5 / 3) / np.sqrt(20)  # of 24 normal means the smallest is 1.95 deviations below 0
    assert np.mean(gaps) == pytest.approx(expected, rel=0.1)
    assert np.mean(np.array(gaps) > 0) > 0.9
    assert covered / 300 >= 0.93


def test_gap_without_a_judged_case_is_not_a_number():
    gap = mean_gap(torch.tensor([1.0, 2.0]), torch.tensor([torch.nan, torch.nan, torch.nan]))
    assert np.isnan([gap.mean, gap.low, gap.high]).all() and (gap.judged, gap.cases) == (0, 3)
    gap = mean_gap(torch.tensor([1.0, torch.nan]), torch.tensor([torch.nan, 4.0, 4.0]))
    assert (gap.mean, gap.low, gap.high, gap.judged, gap.cases) == (3.0, 3.0, 3.0, 2, 3)
