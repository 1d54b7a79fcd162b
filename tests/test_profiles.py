import dataclasses

import pytest
import torch
from subjects_for_tests import MOTION_HEAD, MOTION_HUNT, STAY_HEAD, motion_model, motion_trials, table_trials

from physnb.config import Guidance, preset
from physnb.flow import sampling_levels
from physnb.profiles import cases_by_scenario, measure_profiles, profile_rows, scenario_profiles
from physnb.ranking import measure_effects, rank_heads
from physnb.statistics import bootstrap_mean
from physnb.subjects import simulated_subject
from physnb.trials import Trials


@pytest.fixture(scope="module")
def known():
    trials = motion_trials(motion_model(), range(6))
    return trials, measure_profiles({"ood": trials}, MOTION_HUNT, (MOTION_HEAD, STAY_HEAD))


def test_the_head_that_moves_discs_helps_everywhere_and_the_other_harms(known):
    _, profiles = known
    assert set(profiles) == {MOTION_HEAD, STAY_HEAD}
    for by in ("noise level", "scenario", "split"):
        assert all(estimate.high < 0 for estimate in profiles[MOTION_HEAD][by].values()), by
        assert all(estimate.mean > 0 for estimate in profiles[STAY_HEAD][by].values()), by


def test_full_strength_in_all_steps_is_the_hunt_s_own_guidance(known):
    trials, profiles = known
    expected = bootstrap_mean(measure_effects(trials, [MOTION_HUNT.guidance((MOTION_HEAD,))])[0])
    profile = profiles[MOTION_HEAD]
    assert profile["strength u"]["1"] == profile["split"]["ood"] == profile["scenario"]["uniform"] == expected
    assert profile["noise level"] == {"1.000": expected}  # of one step


def test_each_step_is_guided_alone(model):
    hunt = dataclasses.replace(preset("smoke").hunt, selection_cases=2, steps=2)
    trials = {
        split: Trials(simulated_subject(model, hunt, "selection", split=split), progress=False)
        for split in ("ood", "id")
    }
    head = trials["ood"].subject.heads[3]
    found = measure_profiles(trials, hunt, (head,), a_scenario=1, strengths=(0.5,))[head]
    levels = sampling_levels("euler", 2, model.config.noise_shift)
    assert list(found["noise level"]) == [f"{level:.3f}" for level in levels]
    late = Guidance(weak=hunt.guidance((head,)).weak, start=0.5)
    cases = [n for part in cases_by_scenario(trials["ood"], 1).values() for n in part]
    effect = measure_effects(trials["ood"], [late], cases)[0]
    assert found["noise level"][f"{levels[1]:.3f}"] == bootstrap_mean(effect)
    assert list(found["scenario"]) == list(hunt.scenarios) and list(found["split"]) == ["ood", "id"]
    assert all(estimate.cases == 1 for estimate in found["scenario"].values())
    assert {estimate.cases for estimate in found["split"].values()} == {3}


def test_ranking_knows_scenarios_already(known):
    trials, profiles = known
    ranking = rank_heads(trials, MOTION_HUNT.guidance)
    found = scenario_profiles(ranking, cases_by_scenario(trials))
    assert list(found) == list(ranking.heads)
    assert found[MOTION_HEAD]["scenario"] == profiles[MOTION_HEAD]["scenario"]


def test_rows_name_head_question_and_value(known):
    rows = profile_rows(known[1])
    assert rows[0]["head"] == str(STAY_HEAD) and rows[0]["by"] == "noise level" and rows[0]["at"] == "1.000"
    assert {row["by"] for row in rows} == {"noise level", "scenario", "split", "strength u"}


def test_cases_without_scenario_and_no_trials_are_refused():
    with pytest.raises(ValueError, match="only simulated cases have a scenario"):
        cases_by_scenario(table_trials(torch.zeros(2, 3)))
    with pytest.raises(ValueError, match="no trials"):
        measure_profiles({}, MOTION_HUNT, (MOTION_HEAD,))
