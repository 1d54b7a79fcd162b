import dataclasses

import pytest
import torch
from subjects_for_tests import MOTION_HEAD, MOTION_HUNT, motion_model, motion_trials, table_trials

from physnb.config import HuntConfig, head_set, preset
from physnb.profiles import cases_by_scenario
from physnb.transfer import Condition, choose_heads, measure_transfer, scenario_conditions, simulated_condition

HUNT = HuntConfig()
NOISE = 0.01 * torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
A, B = (torch.tensor(means)[:, None] + NOISE for means in ([-2.0, -1, 0, 0, 0, 0], [0.0, -1, 0, -3, 0, 0]))


def condition(effects) -> Condition:
    sides = (table_trials(effects, part=part) for part in ("chosen on", "fresh"))
    return Condition(*sides, range(8), range(4))


@pytest.fixture
def matrix():
    rows = measure_transfer(dict(a=condition(A), b=condition(B)), HUNT, 2)
    return {(row.hunted_on, row.tested_on): row for row in rows}


def test_each_condition_chooses_its_own_heads(matrix):
    assert matrix["a", "b"].heads == head_set("L0H0,L0H1") and matrix["b", "a"].heads == head_set("L0H1,L0H3")
    assert matrix["a", "b"].shared == 1 and matrix["a", "a"].shared == 2


def test_effects_are_those_of_the_tested_condition(matrix):
    for (source, target), expected in {("a", "a"): -3, ("a", "b"): -1, ("b", "a"): -1, ("b", "b"): -4}.items():
        row = matrix[source, target]
        assert row.effect.mean == pytest.approx(expected, abs=0.05) and row.effect.cases == 4
    assert matrix["a", "b"].against_own.mean == pytest.approx(3, abs=0.05)
    assert matrix["a", "a"].against_own.mean == 0


def test_random_heads_are_the_last_rows_and_the_same_everywhere(matrix):
    random = [row for row in matrix.values() if row.hunted_on == "random heads"]
    assert list(matrix.values())[-2:] == random and random[0].heads == random[1].heads and len(random[0].heads) == 2


def test_rows_are_ready_for_json(matrix):
    row = matrix["b", "a"].to_row()
    assert (row["hunted_on"], row["tested_on"], row["heads"], row["shared"]) == ("b", "a", "L0H1, L0H3", 1)
    assert set(row["effect"]) == set(row["against_own"]) == {"mean", "low", "high", "judged", "cases"}


def test_bad_conditions_are_named():
    same = table_trials(A)
    with pytest.raises(ValueError, match="used both to choose and to confirm"):
        Condition(same, same, range(2), range(2))
    with pytest.raises(ValueError, match="small: a model with other layers and heads"):
        measure_transfer(dict(a=condition(A), small=condition(A[:3])), HUNT, 2)
    with pytest.raises(ValueError, match="no condition"):
        measure_transfer({}, HUNT, 2)
    with pytest.raises(ValueError, match=r"top k must be in \[1, 6\], got 7"):
        choose_heads(condition(A), HUNT, 7)


def test_heads_of_another_seed_carry_over_in_a_model_whose_heads_are_known():
    model = motion_model()
    sides = [
        Condition(*(motion_trials(model, range(n, n + 4)) for n in pair), range(4), range(4))
        for pair in ((0, 10), (20, 30))
    ]
    rows = measure_transfer(dict(here=sides[0], there=sides[1]), MOTION_HUNT, 1)
    assert {row.heads for row in rows if row.hunted_on != "random heads"} == {(MOTION_HEAD,)}
    assert all(row.effect.high < 0 for row in rows if row.hunted_on in ("here", "there"))


def test_simulated_conditions_split_by_scenario(model):
    hunt = dataclasses.replace(preset("smoke").hunt, selection_cases=3, confirmation_cases=5, steps=1)
    whole = simulated_condition(model, hunt, None, 1)
    assert (len(whole.selection_cases), len(whole.confirmation_cases)) == (3, 9)
    parts = scenario_conditions(whole)
    assert list(parts) == list(hunt.scenarios)
    for scenario, part in parts.items():
        assert (len(part.selection_cases), len(part.confirmation_cases)) == (1, 3)
        for trials, cases in ((part.selection, part.selection_cases), (part.confirmation, part.confirmation_cases)):
            assert {trials.subject.cases.scenarios[case] for case in cases} == {scenario}
    other = simulated_condition(model, dataclasses.replace(hunt, seed=9), None, 1)
    assert not set(other.selection.subject.case_names) & set(whole.selection.subject.case_names)
    assert cases_by_scenario(whole.selection, 2) == dict(uniform=[0, 1], parabola=[3, 4], collision=[6, 7])
