import math

import pytest
import torch
from subjects_for_tests import MOTION_HEAD, MOTION_HUNT, motion_model, motion_trials

from physnb.config import Guidance, HeadId, HuntConfig, LayerSkip, OtherModel
from physnb.confirm import ArmResult
from physnb.objectives import objective_named
from physnb.strength import (
    RESTORED_UNITS,
    SURFACE_UNITS,
    contrast_arms,
    describe_surface,
    effects_of,
    interval_grid,
    measure_arms,
    method_settings,
    saturation_weight,
    tune,
    tune_contrast,
    weight_grid,
)
from physnb.trials import Trials

CASES = 12
LUCK = 0.1 * torch.randn(CASES, generator=torch.Generator().manual_seed(0))


class DialSubject:
    """Scores follow from weight w and strength u alone: tracking error falls until w u = 2 and rises again after."""

    def __init__(self, part: str):
        self.objective, self.heads = (
            objective_named("tracking_error"),
            (HeadId(0, 0), HeadId(0, 1), HeadId(1, 0), HeadId(1, 1)),
        )
        self.case_names = tuple(f"{part} {i}" for i in range(CASES))
        self.identity = dict(part=part)

    def rows_that_fit(self):
        return 100

    def score(self, rows):
        dials = [sum(w * getattr(weak, "strength", 1.0) for w, weak in g.weak) for g, _ in rows]
        dial, luck = torch.tensor(dials, dtype=torch.float), LUCK[[case for _, case in rows]]
        missing = (dial > 3).float()
        return dict(tracking_error=5 + (dial - 2) ** 2 + luck * dial, missing_rate=missing, oversaturation=0 * dial)


@pytest.fixture
def trials():
    return [Trials(DialSubject(part), progress=False) for part in ("selection", "confirmation")]


@pytest.fixture
def arms(trials):
    return measure_arms(trials[0], weight_grid(HuntConfig(), "L0H0", [0, 1, 2, 4], [0.5, 1]))


def test_grid_is_no_guidance_where_a_dial_is_off():
    grid = weight_grid(HuntConfig(kind="uniform", axis="time"), "L0H0", [0, 2], [0, 0.5])
    assert [point for point, guidance in grid.items() if guidance == Guidance()] == [(0, 0), (2, 0), (0, 0.5)]
    assert grid[2, 0.5] == Guidance.from_heads("L0H0", 2, 0.5, kind="uniform", axis="time")


def test_intervals_are_all_runs_of_neighbouring_steps():
    guidance = Guidance.from_heads("L0H0", 2.0)
    grid = interval_grid(guidance, 4)
    assert len(grid) == 10 and grid[0.0, 1.0] == guidance
    assert grid[0.25, 0.75] == Guidance(weak=guidance.weak, start=0.25, stop=0.75)
    with pytest.raises(ValueError, match="steps must be positive"):
        interval_grid(guidance, 0)


def test_arms_hold_every_metric_beside_no_guidance(arms):
    effects = effects_of(arms)
    assert list(effects) == ["missing_rate", "tracking_error", "oversaturation"]
    assert effects["tracking_error"][2.0, 1.0]["mean"] == pytest.approx(-4 + 2 * LUCK.mean().item(), abs=1e-4)
    assert effects["tracking_error"][0.0, 1.0]["mean"] == 0
    assert effects["missing_rate"][4.0, 1.0]["mean"] == 1


def test_nothing_is_run_for_points_that_are_off(trials):
    measure_arms(trials[0], weight_grid(HuntConfig(), "L0H0", [0, 1], [0]))
    assert trials[0].rows_run == CASES


def test_saturation_is_where_no_larger_weight_is_better(arms):
    assert saturation_weight(arms, 1.0, "tracking_error") == 2
    assert saturation_weight(arms, 0.5, "tracking_error") == 4  # w u = 2 needs twice the weight
    with pytest.raises(ValueError, match=r"no point has strength u = 0\.3"):
        saturation_weight(arms, 0.3, "tracking_error")


def test_description_says_where_it_helps_saturates_and_breaks(arms):
    helps, saturates, missing, burns = describe_surface(arms, "tracking_error")
    assert "at 5 of 6 points; lowest at w = " in helps  # at w u = 4 the error is back where it was
    assert saturates.startswith("saturates: at u = ") and "w = " in saturates
    assert missing == "breaks: missing_rate rises beyond doubt at 1 of 6 points from w = 4, u = 1 on"
    assert burns == "breaks: oversaturation rises beyond doubt at 0 of 6 points"
    with pytest.raises(ValueError, match="give one that guides"):
        describe_surface({(0.0, 1.0): arms[0.0, 1.0]}, "tracking_error")


def test_saturation_that_is_not_reached_says_so():
    values = {w: dict(tracking_error=torch.full((4,), 5 - w)) for w in (0.0, 1.0, 2.0)}
    arms = {(w, 1.0): ArmResult("", values[w], values[0.0]) for w in values}
    assert describe_surface(arms, "tracking_error")[1] == "saturates: at u = 1 not reached up to w = 2"


def test_each_method_is_judged_at_its_own_best_setting_on_fresh_cases(trials):
    methods = {
        "strong": {f"w = {w}": Guidance.from_heads("L0H0", w) for w in (1, 2, 4)},
        "weak": {f"w = {w}": Guidance.from_heads("L0H0", w, 0.1) for w in (1, 2)},
    }
    strong, weak = tune(*trials, methods)
    assert (strong.setting, weak.setting) == ("w = 2", "w = 2")
    assert strong.guidance == methods["strong"]["w = 2"]
    assert strong.promised.mean == pytest.approx(strong.arm.difference("tracking_error").mean)  # of a made-up world
    assert trials[1].rows_run == 3 * CASES  # fresh cases see the chosen settings alone
    row = strong.to_row()
    assert row["method"] == "strong" and row["setting"] == "w = 2" and row["tracking_error"]["difference"]["mean"] < -3


def test_methods_are_not_tuned_on_the_cases_that_judge_them(trials):
    with pytest.raises(ValueError, match="used both to choose and to confirm"):
        tune(trials[0], trials[0], {})


def test_methods_get_the_same_weights(trials):
    methods = method_settings(trials[0], HuntConfig(), "L0H0,L1H1", [0, 1, 2], [0, 0.5, 1], ["worse"])
    names = list(methods)
    assert names[0] == "2 random heads" and names[-1] == "2 hunted heads" and "AutoGuidance worse" in names
    for name, settings in methods.items():
        assert list(settings) == ["w = 1", "w = 2"] or name == "2 hunted heads"
    assert list(methods["2 hunted heads"]) == ["w = 1, u = 0.5", "w = 2, u = 0.5", "w = 1, u = 1", "w = 2, u = 1"]
    kinds = {name.split(",")[0]: next(iter(settings.values())) for name, settings in methods.items()}
    assert kinds["CFG"] == Guidance(text_weight=1.0)
    assert isinstance(kinds["skip"].weak[0][1], LayerSkip) and kinds["SEG"].weak[0][1].kind == "mean_query"
    assert kinds["AutoGuidance worse"].weak == ((1.0, OtherModel("worse")),)
    assert len(kinds["2 random heads"].weak[0][1].heads) == 2
    layers = {head.layer for head in kinds["best layer"].weak[0][1].heads}
    assert len(layers) == 1 and len(kinds["best layer"].weak[0][1].heads) == 2


def test_real_clips_give_every_metric_of_a_surface():
    trials = motion_trials(motion_model(), range(3))
    arms = measure_arms(trials, weight_grid(MOTION_HUNT, (MOTION_HEAD,), [1.0], [1.0]), cases=[0, 2])
    values = arms[1.0, 1.0].values
    assert list(values) == list(SURFACE_UNITS) and all(len(v) == 2 for v in values.values())
    assert arms[1.0, 1.0].difference("tracking_error").mean < 0
    assert not math.isnan(arms[1.0, 1.0].difference("oversaturation").mean)


def test_contrast_alone_finds_faded_discs_again_and_moves_nothing():
    selection, fresh = (motion_trials(motion_model(), range(n, n + 4)) for n in (0, 10))
    arms = contrast_arms(selection, [1.0, 1.5])
    assert set(arms[1.0].values) == set(SURFACE_UNITS)
    assert all(arms[1.0].difference(metric).mean == 0 for metric in SURFACE_UNITS)
    burnt = arms[1.5].difference("oversaturation")
    assert burnt.mean > 0
    tuned = tune_contrast(selection, fresh, [1.0, 1.5])
    best = min((1.0, 1.5), key=lambda gain: arms[gain].difference("tracking_error").mean)
    assert (
        tuned.setting == f"x {best:g}" and tuned.guidance == Guidance() and len(tuned.arm.values["tracking_error"]) == 4
    )
    with pytest.raises(ValueError, match="used both to choose and to confirm"):
        tune_contrast(selection, selection, [1.5])
    with pytest.raises(ValueError, match="simulated worlds"):
        contrast_arms(Trials(DialSubject("selection"), progress=False), [1.5])


def test_judge_blind_to_contrast_gives_the_same_metrics_under_names_of_their_own():
    trials = motion_trials(motion_model(), range(3), "tracking_error/restored")
    arms = measure_arms(trials, weight_grid(MOTION_HUNT, (MOTION_HEAD,), [1.0], [1.0]))
    assert list(arms[1.0, 1.0].values) == list(RESTORED_UNITS)
    assert arms[1.0, 1.0].difference("tracking_error/restored").mean < 0  # this head does move discs
