import dataclasses
import sys

import pytest
import torch
from subjects_for_tests import MOTION_HEAD, motion_model, motion_trials, moving_discs

from physnb.config import Guidance, LayerSkip, OtherModel, Perturbation, head_set
from physnb.data import Clip
from physnb.data.impossible import kinds_for, make_impossible
from physnb.likelihood import clip_losses, noise_levels, pair_losses, preference_scores
from physnb.metrics import Scores
from physnb.metrics.preference import UNTRAINED, RewardModel
from physnb.objectives import (
    LOSS_LEVELS,
    OBJECTIVES,
    Objective,
    clip_judge,
    joint_judge,
    objective_named,
    reward_objective,
)
from physnb.ranking import rank_heads
from physnb.subjects import ModelSubject, judged

OFF = Guidance()
HEADS = Guidance.from_heads("L0H1,L1H2", 2.0)
JUDGES = {objective.judge.name: objective.judge for objective in OBJECTIVES.values()}
OF_CLIPS = [name for name, objective in OBJECTIVES.items() if objective.judge.generates]
OF_MODELS = [name for name, objective in OBJECTIVES.items() if not objective.judge.generates]


def with_frames(cases, frames):
    """Clips of these cases as a generator hands them over: without a state."""
    return dataclasses.replace(cases, frames=frames, state=None)


@pytest.fixture(scope="module")
def noise(cases):
    pixels = torch.randint(0, 256, cases.frames.shape, generator=torch.Generator().manual_seed(0))
    return with_frames(cases, pixels.to(torch.uint8))


@pytest.fixture(scope="module")
def subjects(model, cases):
    """A subject for every judge: its scores by objective are those of one run."""
    chosen = {objective.judge.name: objective for objective in OBJECTIVES.values()}
    return {name: ModelSubject(model, cases, objective, steps=1) for name, objective in chosen.items()}


@pytest.fixture(scope="module")
def scored(subjects):
    rows = [(guidance, case) for case in range(6) for guidance in (OFF, HEADS)]
    return {name: subject.score(rows) for name, subject in subjects.items()}


# --- the objectives there are


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_gives_a_value_a_row(scored, name):
    values = scored[OBJECTIVES[name].judge.name][name]
    assert values.shape == (12,) and values.dtype == torch.float32
    assert not values.isinf().any() and not values.isnan().all()


@pytest.mark.parametrize("name", OF_CLIPS)
def test_a_copy_scores_better_than_noise(cases, noise, name):
    objective = OBJECTIVES[name]
    scorer = objective.judge.prepare(cases, 3, 0)
    # a frame of noise is full of discs: what is missing nowhere is missing from a blank clip
    bad = with_frames(cases, torch.full_like(cases.frames, 255)) if name == "missing_rate" else noise
    copy, worse = (scorer(clip, range(6))[name] for clip in (with_frames(cases, cases.frames), bad))
    assert not copy.values.isnan().any() and not worse.values.isnan().any()
    assert (objective.sign * (copy.values - worse.values) < 0).all()
    assert copy.lower_is_better == objective.lower_is_better and copy.unit == objective.unit


@pytest.mark.parametrize("name", ["preference_error", "preference_margin", "preference_margin/matched"])
def test_a_model_that_knows_the_motion_scores_better_than_one_that_does_not(name):
    cases, objective = moving_discs(range(3)), OBJECTIVES[name]
    found = []
    for motion, stay in ((1.0, 0.0), (0.0, 1.0)):
        model = motion_model(motion, stay)
        score = objective.judge.prepare(cases, 3, 0)(model, [OFF] * 3, range(3), None)[name]
        assert score.lower_is_better == objective.lower_is_better and score.unit == objective.unit
        found.append(score.values)
    assert (objective.sign * (found[0] - found[1]) < 0).all()


@pytest.mark.parametrize("judge", JUDGES)
def test_a_case_has_the_same_scores_whatever_other_cases_there_are(model, cases, subjects, scored, judge):
    """Rows are stored by case, so nothing else may decide them: not even what other worlds are hunted in."""
    subject = ModelSubject(model, cases[[5, 2]], subjects[judge].objective, steps=1)
    alone = subject.score([(HEADS, 1), (HEADS, 0)])
    assert set(alone) == set(scored[judge])
    for name, values in alone.items():
        together = scored[judge][name][[2 * 2 + 1, 2 * 5 + 1]]
        # one grey level in a pixel moves no score further; a preference can only tip where two losses are equal
        torch.testing.assert_close(values, together, atol=0.05, rtol=1e-3, equal_nan=True)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"reward"}))
def test_judges_of_simulated_worlds_refuse_prompts(name):
    with pytest.raises(ValueError, match="use an objective of the generated clip alone"):
        OBJECTIVES[name].judge.prepare(None, 0, 0)


def test_judges_of_simulated_worlds_refuse_videos_without_a_state(cases, noise):
    for judge in JUDGES.values():
        if judge.name != "reward":
            with pytest.raises(ValueError, match="compares with the true motion, which these cases lack"):
                judge.prepare(noise, 3, 0)


def test_reward_needs_no_truth(cases, noise):
    found = OBJECTIVES["reward"].judge.prepare(None, 0, 0)(with_frames(cases, cases.frames), [])["reward"]
    assert (found.values > OBJECTIVES["reward"].judge.prepare(cases, 3, 0)(noise, range(6))["reward"].values).all()


def test_fitted_reward_is_another_judge():
    fitted = [RewardModel(UNTRAINED.weights * factor, 10) for factor in (0.5, 2.0)]
    judges = [reward_objective(model).judge for model in (*fitted, UNTRAINED)] + [OBJECTIVES["reward"].judge]
    assert len({(judge.name, judge.version) for judge in judges}) == 4
    assert judges[0].name == reward_objective(fitted[0]).judge.name


def test_fitted_reward_is_what_counts(cases, noise):
    half, untrained = reward_objective(RewardModel(UNTRAINED.weights * 0.5, 10)), OBJECTIVES["reward"]
    values = [objective.judge.prepare(None, 0, 0)(noise, [])["reward"].values for objective in (half, untrained)]
    torch.testing.assert_close(2 * values[0], values[1])
    assert not half.lower_is_better


# --- the model's own losses


def test_preference_of_weight_minus_1_is_that_of_the_broken_model(model, cases):
    broken = [Perturbation("L0H1,L1H2"), Perturbation("L1H0", 0.5), Perturbation("L0H3", kind="uniform")]
    guidance = [Guidance(weak=((-1.0, perturbation),)) for perturbation in broken]
    rows = [0, 4, 5]
    found = OBJECTIVES["preference_margin"].judge.prepare(cases, 3, 7)(model, guidance, rows, None)
    kinds = dict.fromkeys(kind for name in ("uniform", "parabola", "collision") for kind in kinds_for(name))
    variants = [make_impossible(cases, kind, frames_given=3, seed=7)[rows] for kind in kinds]
    levels = noise_levels(LOSS_LEVELS, model.config.noise_shift)
    settings = dict(levels=levels, seed=7)
    expected = preference_scores(pair_losses(model, cases[rows], variants, perturbation=broken, **settings))
    for name, score in found.items():
        torch.testing.assert_close(score.values, expected[name].values, rtol=1e-4, atol=1e-4, equal_nan=True)
    guided = clip_losses(model, cases[rows], guidance=guidance, **settings)
    torch.testing.assert_close(
        guided, clip_losses(model, cases[rows], perturbation=broken, **settings), rtol=1e-4, atol=1e-6
    )
    assert ((guided - clip_losses(model, cases[rows], **settings)).abs() > 1e-3 * guided).any(1).all()


def test_losses_can_be_guided_by_other_networks_and_skipped_layers(model, make_model, cases):
    scorer = OBJECTIVES["preference_margin"].judge.prepare(cases, 3, 0)
    guidance = [OFF, Guidance(weak=((-1.0, OtherModel("early")),)), Guidance(weak=((-1.0, LayerSkip((1,))),))]
    early = make_model(seed=5)
    own, other, skipped = scorer(model, guidance, [3, 3, 3], dict(early=early))["preference_margin"].values
    assert other == pytest.approx(float(scorer(early, [OFF], [3], None)["preference_margin"].values), abs=1e-4)
    assert len({round(float(value), 4) for value in (own, other, skipped)}) == 3


# --- a user's own


def mean_red(generated, true):
    """Mean of the red channel: a tensor, one value a clip."""
    return generated.frames[..., 0].float().mean((1, 2, 3))


def red_difference(generated, true):
    """The same against the true clip, as Scores; a clip whose true one is too red is not judged."""
    values = mean_red(generated, None) - mean_red(true, None)
    reasons = [None] * len(values)
    values[1], reasons[1] = torch.nan, "too red"
    return Scores("of another name", "grey levels", values, tuple(reasons), lower_is_better=False)


def test_judge_from_a_function_that_gives_a_tensor(model, cases, noise):
    judge = clip_judge(mean_red)
    assert judge.generates and judge.version == 1
    found = judge.prepare(None, 0, 0)(noise, [])
    assert list(found) == ["mean_red"] and torch.equal(found["mean_red"].values, mean_red(noise, None))
    subject = ModelSubject(model, cases, Objective("mean_red", judge), steps=1)
    assert subject.score([(OFF, 4), (HEADS, 0)])["mean_red"].shape == (2,)


def test_judge_from_a_function_that_gives_scores(model, cases, noise):
    judge = clip_judge(red_difference, version=3)
    found = judge.prepare(cases, 3, 0)(noise[[4, 0]], [4, 0])["red_difference"]
    assert judge.version == 3 and found.reasons == (None, "too red")
    expected = mean_red(noise[[4]], None) - mean_red(cases[[4]], None)
    assert found.values[:1] == expected and found.values[1].isnan()
    assert (found.name, found.unit, found.lower_is_better) == ("red_difference", "grey levels", False)
    rows = [(OFF, 4), (HEADS, 0)]
    higher = ModelSubject(model, cases, Objective("red_difference", judge, lower_is_better=False), steps=1)
    assert higher.score(rows)["red_difference"].isnan().tolist() == [False, True]
    lower = ModelSubject(model, cases, Objective("red_difference", judge), steps=1)
    with pytest.raises(ValueError, match="red_difference is better when higher, but the objective is told lower"):
        lower.score(rows)


def test_not_a_number_of_a_function_has_a_reason(noise):
    def seldom(generated, true):
        return [1.0, float("nan"), 2, 3, 4, 5]

    found = clip_judge(seldom).prepare(None, 0, 0)(noise, [])["seldom"]
    assert found.reasons == (None, "seldom says not a number", None, None, None, None)


@pytest.mark.parametrize(
    ("values", "shape"), [(torch.zeros(5), r"\(5,\)"), (1.0, r"\(\)"), (torch.zeros(6, 1), r"\(6, 1\)")]
)
def test_function_that_does_not_give_one_value_a_clip_is_named(noise, values, shape):
    def wrong(generated, true):
        return values

    with pytest.raises(ValueError, match=rf"wrong gave {shape} values for 6 clips; give one each"):
        clip_judge(wrong).prepare(None, 0, 0)(noise, [])


def test_infinite_values_and_unknown_scores_are_named(model, cases):
    def infinite(generated, true):
        return torch.full((len(generated),), torch.inf)

    with pytest.raises(ValueError, match="infinite is infinite; give NaN where a clip cannot be judged"):
        ModelSubject(model, cases, Objective("infinite", clip_judge(infinite)), steps=1).score([(OFF, 0)])
    with pytest.raises(ValueError, match=r"judge \S*mean_red gives mean_red, no my_score"):
        ModelSubject(model, cases, Objective("my_score", clip_judge(mean_red)), steps=1).score([(OFF, 0)])
    two = Scores("mean_red", "", torch.zeros(2), (None, None))
    with pytest.raises(ValueError, match=r"mean_red has \(2,\) values for 3 rows"):
        judged(Objective("mean_red", clip_judge(mean_red)), dict(mean_red=two), [(OFF, 0)] * 3)


def test_function_is_not_taken_for_a_judge_of_the_same_name():
    def reward(generated, true):
        return torch.zeros(len(generated))

    mine, other = clip_judge(reward).name, clip_judge(mean_red).name
    assert mine.endswith("test_objectives.reward") and mine not in JUDGES and mine != other


def test_planted_head_is_found_by_a_function_of_ones_own():
    def red_disc_is_left(generated: Clip, true: Clip) -> torch.Tensor:
        """How far left of the frame the darkest column lies at the end: to be low where discs move on."""
        columns = (255 - generated.frames[:, -1, :, :, 1].float()).sum(1)
        return 1 - (columns * torch.linspace(0, 1, columns.shape[1])).sum(1) / columns.sum(1)

    trials = motion_trials(motion_model(), range(4), Objective("red_disc_is_left", clip_judge(red_disc_is_left)))
    ranking = rank_heads(trials, lambda heads: Guidance.from_heads(heads, 1.0), (MOTION_HEAD, *head_set("L0H0,L0H1")))
    assert ranking.order()[0] == MOTION_HEAD and ranking.label == "red disc is left minus unguided"


# --- by name


def test_objectives_have_the_name_they_are_found_by():
    for name, objective in OBJECTIVES.items():
        assert objective_named(name) is objective and objective.name == name
        assert objective.sign == (1 if objective.lower_is_better else -1)


@pytest.fixture
def my_module(tmp_path, monkeypatch):
    """write(text) is a fresh module `my_objectives` with that text."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        sys.modules.pop("my_objectives", None)
        (tmp_path / "my_objectives.py").write_text(text)
        for cached in tmp_path.glob("__pycache__/*"):
            cached.unlink()  # two texts of one length within a second look the same to the import system

    yield write
    sys.modules.pop("my_objectives", None)


DARKNESS = "def darkness(generated, true):\n    return {} - generated.frames.float().mean((1, 2, 3, 4))\n"


def test_function_of_a_module_by_name(my_module, noise):
    my_module(DARKNESS.format(255) + "other = darkness\n")
    objective = objective_named("my_objectives:darkness")
    assert objective.name == "darkness" and objective.lower_is_better
    found = objective.judge.prepare(None, 0, 0)(noise, [])["darkness"].values
    torch.testing.assert_close(found, 255 - noise.frames.float().mean((1, 2, 3, 4)))
    assert objective_named("my_objectives:other").name == "darkness"


def test_function_that_was_changed_is_another_judge(my_module):
    versions = []
    for offset in (255, 255, 254):
        my_module(DARKNESS.format(offset))
        judge = objective_named("my_objectives:darkness").judge
        assert judge.name == "my_objectives.darkness"
        versions.append(judge.version)
    assert versions[0] == versions[1] != versions[2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beauty", "unknown objective 'beauty'; choose one of tracking_error, position_error"),
        ("no_such_module:f", r"objective no_such_module:f cannot be imported \(No module named 'no_such_module'\)"),
        ("my_objectives:absent", r"cannot be imported \(module 'my_objectives' has no attribute 'absent'\)"),
        ("my_objectives:", "objective my_objectives: cannot be imported"),
        (":darkness", "objective :darkness cannot be imported"),
        ("my_objectives:FACTOR", r"objective my_objectives:FACTOR is no function of \(generated, true\)"),
        ("math:sin", r"objective math:sin is no function of \(generated, true\)"),
        ("my_objectives:unsaved", "objective my_objectives:unsaved lies in no file"),
    ],
)
def test_bad_names_are_explained(my_module, name, message):
    my_module("FACTOR = 1\nexec('def unsaved(generated, true): pass', made := {'__name__': 'nowhere'})\n"
              "unsaved = made['unsaved']\n")  # fmt: skip
    with pytest.raises(ValueError, match=message):
        objective_named(name)


# --- several judges of one generation


def test_a_joint_judge_gives_the_scores_of_its_judges(model, cases, scored):
    judges = {OBJECTIVES[name].judge.name: OBJECTIVES[name].judge for name in OF_CLIPS}
    joint = joint_judge(*judges.values())
    assert joint.name == "+".join(f"{judge.name}@{judge.version}" for judge in judges.values())
    subject = ModelSubject(model, cases, dataclasses.replace(OBJECTIVES["reward"], judge=joint), steps=1)
    found = subject.score([(guidance, case) for case in range(6) for guidance in (OFF, HEADS)])
    for name in judges:
        for score, values in scored[name].items():
            assert torch.equal(found[score].nan_to_num(nan=-9), values.nan_to_num(nan=-9)), score


def test_judges_that_cannot_join_are_refused():
    with pytest.raises(ValueError, match="two judges or more"):
        joint_judge(OBJECTIVES["reward"].judge)
    with pytest.raises(ValueError, match="plausibility scores the model, not its clips"):
        joint_judge(OBJECTIVES["reward"].judge, OBJECTIVES["preference_error"].judge)
