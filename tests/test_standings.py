import math

import pytest
import torch

from physnb.data import Clip, simulate
from physnb.data.takes import second_take
from physnb.ladder import RUNGS, make_rung
from physnb.metrics.physics_iq import metric_physics_iq
from physnb.plots import plot_correlations, plot_ladder, plot_sensitivity
from physnb.standings import aligned_scores, bench_metrics, judges, plain_physics_iq, rank_judges, set_judges

HUNTING = ("position_error/restored", "velocity_error/restored", "tracking_error/restored")
REPORTING = ("position_error", "velocity_error", "tracking_error", "physics_iq_verified")


def worlds(scenario: str, clips: int) -> Clip:
    return simulate(scenario, "id", range(clips), frames=16, size=32)


@pytest.fixture(scope="module", params=["uniform", "collision"])
def standings(request):
    true = worlds(request.param, 6)
    return rank_judges(judges(true, second_take(true, 1)), true, second_take(true, 2), errors=(0.5,))


def test_every_judge_climbs(standings):
    for name, standing in standings.items():
        assert standing.name == name and tuple(row.rung for row in standing.rows) == RUNGS
        assert standing.clips_per_second > 0
        assert standing.to_row().keys() >= {"metric", "usable", "why", *RUNGS}
        assert standing.to_cost()["smallest_speed_error"] in (None, 0.5)


def test_what_the_notebook_hunts_by_holds_its_ladder(standings):
    assert {name: standings[name].usable for name in HUNTING} == dict.fromkeys(HUNTING, "hunting")
    assert standings["answers"].verdict["holds"] and standings["reward"].verdict["holds"]
    for name in (*HUNTING, *REPORTING):
        assert standings[name].sensitivity.smallest == 0.5


def test_what_rewards_contrast_only_reports(standings):
    for name in (*REPORTING, "answers"):
        assert standings[name].usable == "reporting" and "faded" in standings[name].to_row()["why"], name


def test_presence_and_size_alone_are_refused(standings):
    for name in ("missing_rate", "radius_drift"):
        assert standings[name].usable == "not on this data" and "static wins" in standings[name].to_row()["why"]


def test_sums_after_impact_come_with_collisions_alone():
    for scenario, there in (("parabola", False), ("collision", True)):
        true = worlds(scenario, 2)
        assert ("momentum_error" in judges(true, second_take(true, 1))) == there


def test_sets_climb_and_are_for_reporting_only():
    true, reference = worlds("parabola", 102)[:34], worlds("parabola", 102)[34:]
    found = set_judges(reference)
    assert list(found) == ["frechet_trajectory", "kernel_trajectory"]
    standing = rank_judges({"kernel": found["kernel_trajectory"]}, true, second_take(true, 2))["kernel"]
    assert standing.usable == "reporting" and standing.sensitivity is None
    assert "sets" in standing.to_row()["why"]


def test_aligned_scores_are_all_lower_for_the_better_clip():
    true = worlds("uniform", 3)
    found = judges(true, second_take(true, 1))
    noise = make_rung("noise", true, second=true, frames_given=3)
    copy, broken = aligned_scores(found, true), aligned_scores(found, noise)
    for name in (*HUNTING, *REPORTING, "reward"):
        assert (copy[name] < broken[name]).all(), name


def test_plain_physics_iq_agrees_with_the_metric():
    true = worlds("collision", 2)
    second, made = second_take(true, 1), second_take(true, 2)
    found = metric_physics_iq(made, true, second)
    for name, values in plain_physics_iq(made, true, second).items():
        assert found[name].values.tolist() == pytest.approx(values, abs=1e-7), name


def test_bench_has_rates_above_zero():
    result = bench_metrics(clips=6, rounds=1)
    rates = {name: rate["median"] for name, rate in result["clips_per_second"].items()}
    assert rates.keys() >= {*HUNTING, *REPORTING, "answers", "reward", "physics_iq", "physics_iq_plain"}
    assert min(rates.values()) > 0 and result["ratio"]["median"] > 0
    with pytest.raises(ValueError, match="divisible by 3"):
        bench_metrics(clips=8)
    with pytest.raises(ValueError, match="rounds must be positive"):
        bench_metrics(rounds=0)


def test_figures_have_a_panel_a_metric_and_brackets_where_undecided(standings):
    ladders = {name: standing.rows for name, standing in standings.items()}
    figure = plot_ladder(ladders, {name: standing.usable for name, standing in standings.items()})
    titled = [axis for axis in figure.axes if axis.get_title()]
    assert len(titled) == len(standings)
    rho = torch.tensor([[1.0, 0.5, math.nan], [0.5, 1.0, -0.7], [math.nan, -0.7, 1.0]])
    figure = plot_correlations(["a", "b", "c"], rho, rho - 0.6, rho + 0.6)
    assert {text.get_text() for text in figure.axes[0].texts} == {"(0.50)", "-0.70"}
    rows = {name: s.sensitivity.rows for name, s in standings.items() if s.sensitivity is not None}
    axis = plot_sensitivity(rows, clips=48, power=0.95).axes[0]
    drawn = {line.get_label(): len(line.get_xdata()) for line in axis.lines[:-1]}
    count = {name: sum(row["clips_needed"] < math.inf for row in found) for name, found in rows.items()}
    worse = {name.replace("_", " "): points for name, points in count.items()}
    assert drawn == worse and max(worse.values()) > 0
