import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, spearmanr

from physnb.data import Clip, simulate
from physnb.data.worlds import frame_times
from physnb.ladder import (
    BROKEN,
    FADED,
    RUNGS,
    RungScore,
    climb,
    detectable_error,
    make_rung,
    rank_correlation,
    speed_up,
    verdict,
)  # fmt: skip
from physnb.metrics import Scores, metric_trajectory
from physnb.metrics.scores import scores
from physnb.metrics.trajectory import RESTORE
from physnb.statistics import Estimate

GIVEN = 3


def take_two(true: Clip) -> Clip:
    """A crude second take: everything one pixel higher."""
    return replace(true, frames=true.frames.roll(-1, dims=2), state=None)


@pytest.fixture(scope="module")
def true() -> Clip:
    return simulate("uniform", "id", range(6), frames=10, size=16)


@pytest.fixture(scope="module")
def rungs(true) -> dict[str, Clip]:
    return {name: make_rung(name, true, second=take_two(true), frames_given=GIVEN, seed=1) for name in RUNGS}


def test_every_rung_keeps_start_frames_and_claims_no_state(true, rungs):
    for name, made in rungs.items():
        assert torch.equal(made.frames[:, :GIVEN], true.frames[:, :GIVEN]), name
        assert made.state is None and made.frames.shape == true.frames.shape and made.captions == true.captions
        assert (name == "copy") == torch.equal(made.frames, true.frames)


def test_each_rung_is_what_it_says(true, rungs):
    after = {name: made.frames[:, GIVEN:] for name, made in rungs.items()}
    real = true.frames[:, GIVEN:]
    assert torch.equal(after["second_take"], take_two(true).frames[:, GIVEN:])
    assert torch.equal(after["reversed"], real.flip(1))
    assert ((255 - after["faded"].float()) - FADED * (255 - real.float())).abs().max() <= 0.5
    assert (after["static"] == true.frames[:, GIVEN - 1 : GIVEN]).all()
    for clip in range(len(true)):
        order = [next(t for t in range(7) if torch.equal(f, real[clip, t])) for f in after["shuffled"][clip]]
        assert sorted(order) == list(range(7)) != order
        others = [j for j in range(len(true)) if torch.equal(after["swapped"][clip], real[j])]
        assert len(others) == 1 and others != [clip]
    noise = after["noise"].float()
    assert noise.mean() == pytest.approx(127.5, abs=2) and noise.std() == pytest.approx(73.9, abs=2)
    assert not torch.equal(noise[0], noise[1])


def test_swapped_clips_stay_in_their_scenario_and_are_all_used():
    mixed = Clip.concatenate([simulate(s, "id", range(3), frames=6, size=8) for s in ("parabola", "collision")])
    made = make_rung("swapped", mixed, second=take_two(mixed), frames_given=1)
    source = [next(j for j in range(6) if torch.equal(made.frames[i, 1:], mixed.frames[j, 1:])) for i in range(6)]
    assert sorted(source) == list(range(6)) and all(i != j and i // 3 == j // 3 for i, j in enumerate(source))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 1000), name=st.sampled_from(RUNGS), given=st.integers(1, 3))
def test_rungs_are_functions_of_seed_and_case(seed, name, given):
    true = simulate("parabola", "id", range(4), frames=5, size=8, seed=seed)
    second, before = take_two(true), true.frames.clone()
    made = make_rung(name, true, second=second, frames_given=given, seed=seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    turned = make_rung(name, true[order], second=second[order], frames_given=given, seed=seed)
    assert torch.equal(made.frames[order], turned.frames)
    if name != "swapped":  # which needs the others
        alone = make_rung(name, true[2:3], second=second[2:3], frames_given=given, seed=seed)
        assert torch.equal(made.frames[2:3], alone.frames)
    assert torch.equal(true.frames, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: dict(name="upside_down"), "unknown rung 'upside_down'; choose one of copy, second_take, faded"),
        (lambda t: dict(frames_given=0), r"frames given must be in \[1, 8\] for a ladder on 10 frames, got 0"),
        (lambda t: dict(frames_given=9), r"frames given must be in \[1, 8\] for a ladder on 10 frames, got 9"),
        (lambda t: dict(true=t[0:1], second=t[0:1]), "one clip of scenario 'uniform' cannot be swapped"),
        (lambda t: dict(true=t[0:0], second=t[0:0]), "a ladder needs at least one clip"),
        (lambda t: dict(second=t[0:3]), "do not match"),
        (lambda t: dict(second=replace(t, fps=8.0)), "do not match"),
        (lambda t: dict(second=t[[1, 0, 2, 3, 4, 5]]), "the second takes are of other cases"),
    ],
)
def test_takes_that_do_not_fit_are_refused(true, change, message):
    settings = dict(name="swapped", true=true, second=true, frames_given=GIVEN) | change(true)
    with pytest.raises(ValueError, match=message):
        make_rung(settings.pop("name"), settings.pop("true"), **settings)


def pixel_error(true: Clip):
    """A metric of the test: mean absolute pixel difference."""

    def measure(made: Clip) -> Scores:
        return scores("pixel_error", "level", (made.frames.float() - true.frames.float()).abs().mean((1, 2, 3, 4)), "?")

    return measure


def test_climb_pairs_each_rung_with_the_second_take(true, rungs):
    rows = climb(pixel_error(true), true, take_two(true), frames_given=GIVEN, seed=1)
    assert [row.rung for row in rows] == list(RUNGS)
    second = pixel_error(true)(rungs["second_take"]).values
    for row in rows:
        values = pixel_error(true)(rungs[row.rung]).values
        assert row.mean.mean == pytest.approx(float(values.mean()))
        assert row.difference.mean == pytest.approx(float((values - second).mean()), abs=1e-4)
        assert row.mean.low <= row.mean.mean <= row.mean.high and row.mean.judged == row.mean.cases == 6
    assert rows[0].mean.mean == 0 and rows[0].against_second == "better"
    assert rows[0].to_dict()["mean"]["judged"] == 6


def test_climb_turns_metrics_where_higher_is_better(true):
    def similarity(made: Clip) -> Scores:
        error = pixel_error(true)(made)
        return replace(error, values=-error.values, lower_is_better=False)

    second = take_two(true)
    lower, higher = (climb(metric, true, second, frames_given=GIVEN) for metric in (pixel_error(true), similarity))
    assert [row.difference for row in lower] == [row.difference for row in higher]
    assert verdict(lower) == verdict(higher)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (lambda made: 0.5, "a ladder needs Scores, or an object with value and lower_is_better"),
        (lambda made: scores("short", "", torch.zeros(2), "?"), "short has 2 values for 6 clips"),
        (  # a direction that turns with what is judged: noise has a lower mean than discs on white
            lambda made: SimpleNamespace(value=1.0, lower_is_better=bool(made.frames.float().mean() > 180)),
            "the same kind of score, with the same direction, for every rung",
        ),
    ],
)
def test_metrics_that_return_something_else_are_refused(true, metric, message):
    with pytest.raises(ValueError, match=message):
        climb(metric, true, take_two(true), frames_given=GIVEN)


def ladder(judged: dict[str, int] | None = None, set_level: bool = False, **differences: float) -> list[RungScore]:
    """Rows of given mean differences to the second take, each +- 0.1; copy -1, second 0, faded 0.5, the others 1."""
    middle = dict(copy=-1.0, second_take=0.0, faded=0.5) | dict.fromkeys(BROKEN, 1.0) | differences
    rows = []
    for name in RUNGS:
        count, d = (judged or {}).get(name, 10), middle[name]
        edge = math.nan if set_level else 0.1
        rows.append(
            RungScore(name, Estimate(5 + d, 0, 9, count, 10), Estimate(d, d - edge, d + edge, count, 10), set_level)
        )
    return rows


def test_a_ladder_in_order_holds():
    nothing = dict(failures=[], ties=[], unjudged=[], excused=[], contrast=[])
    assert verdict(ladder()) == dict(holds=True, usable="hunting") | nothing
    assert verdict(ladder(set_level=True))["usable"] == "reporting"


@pytest.mark.parametrize(
    ("differences", "failure"),
    [
        (dict(copy=0.5), "the copy is worse than the second take"),
        (dict(reversed=-0.5), "reversed is not worse than the second take (better)"),
        (dict(shuffled=0.05), "shuffled is not worse than the second take (tie)"),
        (dict(static=-1.0), "static wins"),
        (dict(noise=-2.0), "noise is as good as the copy"),
    ],
)
@pytest.mark.parametrize("set_level", [False, True])
def test_each_rule_fails_alone(differences, failure, set_level):
    if set_level and failure.endswith("(tie)"):
        differences = dict(shuffled=0.0)
    found = verdict(ladder(set_level=set_level, **differences))
    assert failure in found["failures"] and not found["holds"] and found["usable"] == "not on this data"


def test_a_metric_that_rewards_contrast_may_report_and_not_steer():
    found = verdict(ladder(faded=1.5, noise=2.0))
    assert found["holds"] and found["usable"] == "reporting"
    assert found["contrast"] == [f"faded is no better than {name}" for name in BROKEN if name != "noise"]
    found = verdict(ladder(judged=dict(faded=2)))
    assert (found["failures"], found["usable"]) == ([], "reporting")
    assert found["contrast"] == ["faded clips are not judged"]
    assert verdict(ladder(faded=-2.0))["usable"] == "hunting"  # nothing is wrong with liking the faint


def test_a_copy_that_ties_is_listed_and_allowed():
    found = verdict(ladder(copy=-0.05))
    assert found["holds"] and found["ties"] == ["copy ties with the second take"]


def test_a_rung_that_could_not_be_judged_fails_unless_a_companion_sees_it():
    rows = ladder(judged=dict(noise=3))
    found = verdict(rows)
    assert found["failures"] == ["noise: 3 of 10 clips judged"] == found["unjudged"]
    beside = verdict(rows, companion=ladder())
    assert beside["holds"] and beside["usable"] == "reporting"
    assert "the companion finds it worse" in beside["excused"][0]
    assert not verdict(rows, companion=ladder(noise=0.0))["holds"]
    assert not verdict(rows, companion=rows)["holds"]


def test_a_few_clips_not_judged_are_shown_and_make_no_objective():
    found = verdict(ladder(judged=dict(reversed=8)))
    assert found["holds"] and found["unjudged"] == ["reversed: 8 of 10 clips judged"] and found["usable"] == "reporting"


def test_nothing_judged_never_holds_and_a_missing_rung_is_refused():
    found = verdict(ladder(judged=dict.fromkeys(RUNGS, 0)))
    assert not found["holds"] and len(found["failures"]) == len(RUNGS) - 1  # faded clips are no failure
    with pytest.raises(ValueError, match="a verdict needs one row for each of copy, second_take"):
        verdict(ladder()[1:])


def test_set_level_metrics_climb(true):
    def measure(made: Clip) -> SimpleNamespace:
        error = float(pixel_error(true)(made).values.mean())
        return SimpleNamespace(value=error, lower_is_better=True, low=error - 1, high=error + 1)

    rows = climb(measure, true, take_two(true), frames_given=GIVEN)
    second = rows[1].mean.mean
    assert all(row.set_level and row.difference.mean == pytest.approx(row.mean.mean - second) for row in rows)
    assert (rows[0].mean.low, rows[0].mean.high, rows[0].against_second) == (-1, 1, "better")
    broken = climb(lambda made: SimpleNamespace(value=math.nan, lower_is_better=True), true, true, frames_given=GIVEN)
    assert not verdict(broken)["holds"] and broken[0].against_second == "not judged"


def trajectory_ladder(clips: Clip) -> dict[str, list[RungScore]]:
    """The ladder of every trajectory metric, against the crude second take; each rung is parsed once."""
    found: dict[int, dict[str, Scores]] = {}

    def metric_called(name: str):
        def metric(made: Clip) -> Scores:
            key = hash(made.frames.numpy().tobytes())
            if key not in found:
                found[key] = score(made)
            return found[key][name]

        return metric

    def score(made: Clip) -> dict[str, Scores]:
        restored = metric_trajectory(made, clips, restore=RESTORE)
        return metric_trajectory(made, clips) | {f"{name}/restored": value for name, value in restored.items()}

    return {name: climb(metric_called(name), clips, take_two(clips)) for name in score(clips)}


def test_trajectory_metrics_that_pass_their_ladder():
    parts = [simulate(s, "id", range(8), frames=16, size=32) for s in ("uniform", "parabola", "collision")]
    ladders = trajectory_ladder(Clip.concatenate(parts))
    for name in ("position_error", "velocity_error", "tracking_error"):
        found = verdict(ladders[name])
        assert found["holds"] and found["usable"] == "reporting" and found["contrast"], name
        restored = verdict(ladders[f"{name}/restored"])
        assert restored["usable"] == "hunting" and restored["contrast"] == [], name
    # and those that do not: a still picture keeps its radius best, and coloured noise has enough red to pass as a disc
    drift, missing = verdict(ladders["radius_drift"]), verdict(ladders["missing_rate"])
    assert "static wins" in drift["failures"] and "noise is as good as the copy" in missing["failures"]
    assert drift["usable"] == missing["usable"] == "not on this data"
    # two clips of three have no impact
    assert "copy: 8 of 24 clips judged" in verdict(ladders["momentum_error"])["failures"]


def test_conservation_errors_pass_their_ladder_on_collisions():
    ladders = trajectory_ladder(simulate("collision", "id", range(16), frames=16, size=32))
    for name in ("momentum_error", "energy_error"):
        found = verdict(ladders[name])
        assert found["holds"] and found["ties"] == ["copy ties with the second take"]  # both obey the law
        # some swapped clips have their impact elsewhere, and too few frames around the true one
        assert [text.split(":")[0] for text in found["unjudged"]] == ["faded", "swapped"]
        assert found["usable"] == "reporting"


def test_speed_error_of_free_motion_by_hand():
    for scenario in ("uniform", "parabola"):
        true = simulate(scenario, "id", range(3), frames=8, size=16)
        faster, times = speed_up(true, 0.5), torch.from_numpy(frame_times(8)).float()
        since = (times - times[GIVEN - 1]).clamp(min=0)
        speed = true.state.velocities[:, GIVEN - 1, 0]
        moved = faster.state.positions[:, :, 0] - true.state.positions[:, :, 0]
        torch.testing.assert_close(moved, 0.5 * speed[:, None] * since[:, None], atol=1e-5, rtol=0)
        change = faster.state.velocities[:, GIVEN:, 0].diff(dim=1)  # gravity stays
        torch.testing.assert_close(change, true.state.velocities[:, GIVEN:, 0].diff(dim=1), atol=1e-5, rtol=0)
        assert torch.equal(faster.frames[:, :GIVEN], true.frames[:, :GIVEN])


@pytest.mark.parametrize("error", [0.4, 0.0, -0.3])
def test_speed_error_of_a_collision_still_meets_and_bounces(error):
    true = simulate("collision", "id", range(12), frames=16, size=16)
    state = speed_up(true, error).state
    gap = state.positions[:, :, 1, 0] - state.positions[:, :, 0, 0] - state.radii.sum(1)[:, None]
    assert gap.min() > -1e-4  # they touch and never overlap
    since = (state.impact_time_s - frame_times(16)[GIVEN - 1]) * (1 + error)
    torch.testing.assert_close(since, true.state.impact_time_s - frame_times(16)[GIVEN - 1], atol=1e-5, rtol=0)
    steps = state.positions[:, GIVEN - 1 :, :, 0].diff(dim=1) / 0.1
    torch.testing.assert_close(steps[:, 0], (1 + error) * true.state.velocities[:, GIVEN, :, 0], atol=1e-3, rtol=0)
    hit = state.impact_time_s < frame_times(16)[-2]
    torch.testing.assert_close(steps[hit, -1], (1 + error) * true.state.velocities[hit, -1, :, 0], atol=1e-3, rtol=0)


def test_power_follows_the_normal_approximation(true):
    drawn = torch.randn(6, generator=torch.Generator().manual_seed(0)).double()

    def metric(made: Clip) -> Scores:
        changed = (made.frames != true.frames).any()
        return scores("made_up", "", drawn + 1.0 if changed else torch.zeros(6).double(), "?")

    found = detectable_error(metric, true, clips=9, errors=(0.5,))
    d, s = float((drawn + 1).mean()), float((drawn + 1).std())
    assert found.rows[0]["power"] == pytest.approx(float(norm.cdf(d * 3 / s - 1.96)))
    assert (found.rows[0]["difference"], found.rows[0]["spread"]) == (pytest.approx(d), pytest.approx(s))
    needed = found.rows[0]["clips_needed"]
    again = detectable_error(metric, true, clips=math.ceil(needed), errors=(0.5,)).rows[0]["power"]
    assert again == pytest.approx(float(norm.cdf(d * math.sqrt(math.ceil(needed)) / s - 1.96))) and again >= 0.95


def test_tracking_error_sees_small_speed_errors_and_more_clips_see_smaller_ones():
    true = simulate("uniform", "id", range(8), frames=16, size=32)

    def metric(made: Clip) -> Scores:
        return metric_trajectory(made, true)["tracking_error"]

    few, many = (detectable_error(metric, true, clips=n) for n in (4, 400))
    assert [row["error"] for row in few.rows] == sorted(row["error"] for row in few.rows)
    assert many.smallest <= few.smallest <= 0.1
    natural = detectable_error(metric, true, clips=4, reference=take_two(true))
    assert natural.smallest is None or natural.smallest > few.smallest


def test_a_blind_metric_sees_no_error(true):
    blind = detectable_error(lambda made: scores("blind", "", torch.zeros(len(made)), "?"), true, clips=100)
    assert blind.smallest is None and all(row["power"] < 0.05 for row in blind.rows)
    assert all(row["clips_needed"] == math.inf for row in blind.rows)
    absent = detectable_error(lambda made: scores("none", "", torch.full((6,), torch.nan), "absent"), true, clips=100)
    assert absent.smallest is None and all(row["judged"] == 0 and math.isnan(row["power"]) for row in absent.rows)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(clips=1), "clips must be at least 2, got 1"),
        (dict(errors=()), "errors must be positive shares"),
        (dict(errors=(0.0, 0.1)), "errors must be positive shares"),
        (dict(power=1.0), r"power must be in \(0, 1\)"),
        (dict(metric=lambda made: SimpleNamespace(value=1.0, lower_is_better=True)), "needs per-clip Scores"),
        (dict(frames_given=10), r"frames given must be in \[1, 9\]"),
    ],
)
def test_bad_sensitivity_settings_are_refused(true, settings, message):
    settings = dict(metric=pixel_error(true), clips=10) | settings
    with pytest.raises(ValueError, match=message):
        detectable_error(settings.pop("metric"), true, **settings)


def test_speed_errors_need_a_state(true):
    with pytest.raises(ValueError, match="a speed error needs the true state"):
        speed_up(replace(true, state=None), 0.1)
    with pytest.raises(ValueError, match="a speed error must be above -1"):
        speed_up(true, -1.0)


def test_rank_correlation_is_spearmans():
    x = torch.tensor([1.0, 2.0, 2.0, 4.0, 5.0, 7.0])
    y = torch.tensor([3.0, 1.0, 4.0, 4.0, 9.0, 8.0])
    found = rank_correlation(dict(x=x, cube=x**3, minus=-x, y=y))
    assert found.names == ("x", "cube", "minus", "y")
    assert found.rho[0, :3].tolist() == pytest.approx([1, 1, -1])
    assert float(found.rho[0, 3]) == pytest.approx(spearmanr(x, y).statistic)
    assert torch.equal(found.rho, found.rho.T) and (found.low <= found.high + 1e-12).all()
    assert found.low[0, 3] < found.rho[0, 3] < 1 and not found.reasons


def test_rank_correlation_leaves_out_and_counts_what_one_score_could_not_judge():
    nan = torch.nan
    first = torch.tensor([1.0, 2.0, 3.0, nan, 9.0])
    second = torch.tensor([1.0, 5.0, 6.0, 2.0, nan])
    found = rank_correlation(dict(first=first, second=second, flat=torch.ones(5), lost=torch.full((5,), nan)))
    assert found.judged.tolist() == [[4, 3, 4, 0], [3, 4, 4, 0], [4, 4, 5, 0], [0, 0, 0, 0]]
    assert float(found.rho[0, 1]) == pytest.approx(1)
    assert found.rho[0, 2].isnan() and found.reasons["first", "flat"] == "flat is the same for every clip"
    assert found.reasons["lost", "first"] == found.reasons["first", "lost"] == "0 clips judged by both, under 3"
    assert {(found.names[i], found.names[j]) for i, j in found.rho.isnan().nonzero().tolist()} == set(found.reasons)


def test_interval_of_a_rank_correlation_shrinks_with_clips():
    generator = np.random.default_rng(0)
    widths = []
    for clips in (20, 200):
        x = torch.from_numpy(generator.standard_normal(clips))
        y = x + torch.from_numpy(generator.standard_normal(clips))
        found = rank_correlation(dict(x=x, y=y))
        widths.append(float(found.high[0, 1] - found.low[0, 1]))
        assert found.low[0, 1] < 0.69 < found.high[0, 1]  # 6 / pi asin(rho / 2), Pearson's rho = 1 / sqrt(2)
    assert widths[1] < widths[0] / 2


def test_scores_that_cannot_be_ranked_are_refused():
    with pytest.raises(ValueError, match="needs two scores or more, got 1"):
        rank_correlation(dict(a=torch.zeros(3)))
    with pytest.raises(ValueError, match=r"over the same clips, got lengths \[3, 4\]"):
        rank_correlation(dict(a=torch.zeros(3), b=torch.zeros(4)))
