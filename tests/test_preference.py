import math
import re
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.data import Clip, simulate
from physnb.metrics.preference import (
    PENALTY,
    UNTRAINED,
    RewardModel,
    bradley_terry,
    fit_reward,
    fit_strengths,
    learning_curve,
    metric_reward,
    pretrain_reward,
)
from physnb.metrics.violations import VIOLATIONS, measure_violations

WORLDS = ("uniform", "parabola", "collision")


def choices_of(rows, raters=("ann",)) -> pd.DataFrame:
    """A table of (left, right, answer), each row its own pair and the raters in turn."""
    return pd.DataFrame(
        [
            dict(pair=str(i), left_method=left, right_method=right, answer=answer, rater=raters[i % len(raters)])
            for i, (left, right, answer) in enumerate(rows)
        ]
    )


# --- strengths


def test_three_wins_to_one_are_log_3_apart():
    low, high = fit_strengths(np.array([[0, 1], [3, 0]]))
    assert high - low == pytest.approx(math.log(3)) and low + high == pytest.approx(0)


def test_a_tie_is_half_a_win_each_and_a_skip_is_nothing():
    rows = [("a", "b", "left")] * 2 + [("a", "b", "tie")] * 2 + [("b", "a", "skip")] * 5 + [("b", "a", "left")]
    found = bradley_terry(choices_of(rows), prior_wins=0.5)  # 3 : 2, and half a win each way
    assert found.items == ("a", "b") and found.choices == 5 and found.skipped == 5
    assert found.values[0] - found.values[1] == pytest.approx(math.log(3.5 / 2.5))
    assert found.to_table()["item"].tolist() == ["a", "b"]


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), items=st.integers(2, 6))
def test_strengths_make_expected_wins_equal_to_wins(seed, items):
    wins = np.random.default_rng(seed).integers(1, 30, (items, items)) * (1 - np.eye(items))
    before = wins.copy()
    found = fit_strengths(wins)
    assert found.sum() == pytest.approx(0, abs=1e-9) and (wins == before).all()
    chance = 1 / (1 + np.exp(found[None] - found[:, None]))  # the likelihood equations of the model
    np.testing.assert_allclose(((wins + wins.T) * chance).sum(1), wins.sum(1), rtol=1e-6)
    order = np.random.default_rng(seed).permutation(items)
    np.testing.assert_allclose(fit_strengths(wins[order][:, order]), found[order], atol=1e-8)


STRENGTHS = np.array([1.0, 0.2, -1.2])


def draw_choices(seed: int, count: int) -> pd.DataFrame:
    """Choices between three items of known strengths, by six raters."""
    random, names, rows = np.random.default_rng(seed), "abc", []
    for _ in range(count):
        one, other = random.permutation(3)[:2]
        wins = random.random() < 1 / (1 + np.exp(STRENGTHS[other] - STRENGTHS[one]))
        rows.append((names[one], names[other], "left" if wins else "right"))
    return choices_of(rows, raters=tuple("uvwxyz"))


def test_known_strengths_come_back_and_19_of_20_intervals_hold_them():
    found = [bradley_terry(draw_choices(seed, 150), resamples=200) for seed in range(25)]
    np.testing.assert_allclose(np.mean([f.values for f in found], axis=0), STRENGTHS, atol=0.1)
    held = np.mean([(f.low < STRENGTHS) & (STRENGTHS < f.high) for f in found])
    assert 0.88 < held < 0.99


def test_the_interval_is_repeatable_and_follows_what_is_resampled():
    choices = draw_choices(0, 60)
    found, again, by_rater = (bradley_terry(choices, resample=unit) for unit in ("pair", "pair", "rater"))
    assert (again.low == found.low).all() and (found.low < found.values).all() and (found.values < found.high).all()
    np.testing.assert_allclose(by_rater.values, found.values)
    assert (by_rater.low != found.low).any()


def test_an_extreme_record_still_converges():
    low, high = fit_strengths(np.array([[0, 0.5], [5000.5, 0]]))
    assert high - low == pytest.approx(math.log(10001), rel=1e-6)


def test_item_that_always_wins_is_finite_under_the_prior_and_refused_without():
    choices = choices_of([("a", "b", "left")] * 4)
    found = bradley_terry(choices)
    assert found.values[0] - found.values[1] == pytest.approx(math.log(4.5 / 0.5))
    with pytest.raises(ValueError, match="won or lost every comparison with the rest; pass prior_wins > 0"):
        bradley_terry(choices, prior_wins=0.0)
    mixed = choices_of([("a", "b", "left")] * 3 + [("a", "b", "right")])  # some bootstrap samples have no loss
    with pytest.raises(
        ValueError, match=r"too few choices for an interval: in a bootstrap sample, .* pass prior_wins > 0"
    ):
        bradley_terry(mixed, prior_wins=0.0)


@pytest.mark.parametrize("prior_wins", [0.0, 0.5])
def test_groups_that_were_never_compared_are_refused_with_any_prior(prior_wins):
    rows = [("a", "b", "left"), ("b", "a", "left"), ("c", "d", "left"), ("d", "c", "left")]
    with pytest.raises(ValueError, match="the items fall into 2 groups that were never compared; add pairs between"):
        bradley_terry(choices_of(rows), prior_wins=prior_wins)


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda t: t[:0], {}, "no choice is counted yet"),
        (lambda t: t.assign(answer="skip"), {}, "no choice is counted yet"),
        (lambda t: t.assign(answer="both"), {}, "unknown answer 'both'; choose one of left, tie, right, skip"),
        (lambda t: t.assign(right_method="a"), {}, "a choice is between an item and itself"),
        (lambda t: t.assign(left_method=None), {}, "a choice lacks an item or its pair"),
        (lambda t: t.drop(columns="answer"), {}, "the table of choices has no column answer"),
        (lambda t: t, dict(resample="rater"), "an interval over raters needs at least 2 of them, got 1"),
        (lambda t: t, dict(resample="clip"), "unknown resample 'clip'; choose one of pair, rater"),
        (lambda t: t, dict(prior_wins=-1.0), "prior_wins must not be negative"),
    ],
)
def test_choices_that_give_no_strengths_are_refused(make, settings, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry(make(choices_of([("a", "b", "left"), ("a", "b", "right")])), **settings)


@pytest.mark.parametrize(
    "wins", [np.ones((1, 1)), np.ones((2, 3)), np.ones(3), [[0, -1], [1, 0]], [[0, np.nan], [1, 0]]]
)
def test_wins_that_are_no_table_of_counts_are_refused(wins):
    with pytest.raises(ValueError, match="wins must be"):
        fit_strengths(wins)


# --- reward


def break_clip(clip: Clip, other: Clip, kind: str) -> Clip:
    """A broken copy of `clip` after its three start frames."""
    frames, generator = clip.frames.clone(), torch.Generator().manual_seed(0)
    later = frames[:, 3:]
    if kind == "shuffled":
        frames[:, 3:] = later[:, torch.randperm(later.shape[1], generator=generator)]
    elif kind == "reversed":
        frames[:, 3:] = later.flip(1)
    elif kind == "frozen":
        frames[:, 3:] = frames[:, 2:3].clone()
    elif kind == "spliced":
        frames[:, 8:] = other.frames[:, 8:]
    elif kind == "noise":
        frames[:, 3:] = torch.randint(0, 256, later.shape, generator=generator).byte()
    return replace(clip, frames=frames, state=None)


AUTOMATIC = ("shuffled", "reversed", "frozen", "spliced")


@pytest.fixture(scope="module")
def pairs() -> tuple[Clip, Clip]:
    """Lawful clips and broken copies, three worlds by four kinds of breaking."""
    lawful, broken = [], []
    for world in WORLDS:
        clip, other = (simulate(world, "train", range(i, i + 8), frames=16, size=32) for i in (0, 8))
        for kind in AUTOMATIC:
            lawful.append(clip)
            broken.append(break_clip(clip, other, kind))
    return Clip.concatenate(lawful), Clip.concatenate(broken)


@pytest.fixture(scope="module")
def reward(pairs) -> RewardModel:
    return pretrain_reward(*pairs)


def table(*rows: dict[str, float]) -> torch.Tensor:
    """Violations by name, 0 where not given."""
    return torch.tensor([[row.get(name, 0.0) for name in VIOLATIONS] for row in rows])


def test_weight_is_where_the_slope_of_the_loss_is_zero():
    left, right = table(*[dict(jump=0.5)] * 4), table(*[{}] * 4)
    found = fit_reward(left, right, torch.tensor([0.0, 0.0, 0.0, 1.0]), penalty=1e-6)
    jump = list(VIOLATIONS).index("jump")
    assert float(found.weights[jump]) * 0.5 == pytest.approx(-math.log(3), abs=1e-3)  # 1 of 4, as in Bradley-Terry
    untouched = torch.ones(len(VIOLATIONS)).bool()
    untouched[jump] = False
    assert (found.weights[untouched] == -1).all() and found.pairs == 4
    ties = fit_reward(left, right, torch.full((4,), 0.5), penalty=1e-6)
    assert float(ties.weights[jump]) == pytest.approx(0, abs=1e-3)


def test_no_violation_can_earn_reward():
    left, right = table(*[dict(jump=0.9)] * 20), table(*[{}] * 20)
    found = fit_reward(left, right, torch.ones(20))  # a rater who likes jumps
    assert (found.weights <= 0).all()


def test_no_choice_leaves_the_prior_and_many_leave_the_data(reward):
    nothing = table()[:0].reshape(0, len(VIOLATIONS))
    kept = fit_reward(nothing, nothing, torch.zeros(0), prior=reward)
    torch.testing.assert_close(kept.weights, reward.weights)
    assert kept.pairs == reward.pairs
    left, right = table(*[dict(lift=0.5)] * 2000), table(*[{}] * 2000)
    share = (torch.arange(2000) % 5 == 0).float()
    for prior in (UNTRAINED, reward):
        lift = fit_reward(left, right, share, prior=prior).weights[list(VIOLATIONS).index("lift")]
        assert float(lift) * 0.5 == pytest.approx(-math.log(4), abs=0.01)


def test_swapping_the_sides_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    left, right = torch.rand(2, 30, len(VIOLATIONS), generator=generator)
    share = torch.randint(0, 3, (30,), generator=generator) / 2
    there, back = fit_reward(left, right, share), fit_reward(right, left, 1 - share)
    torch.testing.assert_close(there.weights, back.weights, atol=1e-4, rtol=1e-4)


def test_ladder_of_the_reward_learned_from_automatic_pairs(reward):
    clips = [simulate(world, "id", range(10), frames=16, size=32) for world in WORLDS]
    others = [simulate(world, "id", range(10, 20), frames=16, size=32) for world in WORLDS]
    rewards = {
        kind: torch.cat(
            [metric_reward(break_clip(c, o, kind), reward).values for c, o in zip(clips, others, strict=True)]
        )
        for kind in ("copy", *AUTOMATIC, "noise")
    }
    second = torch.cat([metric_reward(o, reward).values for o in others])
    static = [replace(c, frames=c.frames[:, 2:3].expand_as(c.frames).clone()) for c in clips]
    rewards["static"] = torch.cat([metric_reward(s, reward).values for s in static])
    # without the true state a copy is a lawful clip like any other: the two differ by chance alone
    assert abs(float(rewards["copy"].mean() - second.mean())) < 0.3
    for kind in (*AUTOMATIC, "noise"):
        assert rewards[kind].max() < second.min(), kind
    assert rewards["static"].mean() < second.mean() - 0.5


def test_reward_is_higher_the_better_and_says_what_it_cannot_judge(reward):
    clip = simulate("uniform", "id", range(2), frames=16, size=32)
    frames = clip.frames.clone()
    frames[1] = 255
    found = metric_reward(replace(clip, frames=frames), reward)
    assert not found.lower_is_better and found.unit == "log-odds"
    assert found.reasons == (None, "no disc is wholly in the box for 4 frames in a row")
    expected = measure_violations(clip)[0] @ reward.weights
    assert float(found.values[0]) == pytest.approx(float(expected)) and found.values[1].isnan()


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(5)))
def test_order_of_the_batch_does_not_count(reward, order):
    clip = simulate("collision", "ood", range(5), frames=8, size=16)
    before = clip.frames.clone()
    there, back = metric_reward(clip[order], reward).values, metric_reward(clip, reward).values[order]
    torch.testing.assert_close(there, back, equal_nan=True)
    assert torch.equal(clip.frames, before)


def test_pretraining_leaves_out_pairs_that_cannot_be_judged(pairs, reward):
    lawful, broken = pairs
    frames = broken.frames.clone()
    frames[:3] = 255
    found = pretrain_reward(lawful, replace(broken, frames=frames))
    assert found.pairs == len(lawful) - 3 and reward.pairs == len(lawful)
    with pytest.raises(ValueError, match="in no pair can a disc be followed in both clips"):
        pretrain_reward(lawful[:3], replace(broken, frames=frames)[:3])


@pytest.mark.parametrize("change", [lambda c: c[:3], lambda c: replace(c, fps=5.0)])
def test_pairs_that_do_not_match_are_refused(pairs, change):
    with pytest.raises(ValueError, match="clips do not match, or their fps"):
        pretrain_reward(pairs[0], change(pairs[1]))


def test_reward_survives_a_round_trip_and_is_the_same_each_time(pairs, reward, tmp_path):
    reward.save(tmp_path / "reward")
    assert sorted(p.name for p in (tmp_path / "reward").iterdir()) == ["reward.json", "reward.safetensors"]
    found = RewardModel.load(tmp_path / "reward")
    assert torch.equal(found.weights, reward.weights) and found.pairs == reward.pairs
    assert torch.equal(pretrain_reward(*pairs).weights, reward.weights)
    with pytest.raises(ValueError, match="reward exists; choose another name"):
        reward.save(tmp_path / "reward")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("reward.json", None, "reward.json does not exist"),
        ("reward.json", b'{"violations": {"jump": 1.0}, "pairs": 3}', "reward.json describes other violations"),
        ("reward.json", b"[]", "reward.json describes other violations"),
        ("reward.safetensors", None, "reward.safetensors does not exist"),
        ("reward.safetensors", b"half", "reward.safetensors is damaged"),
    ],
)
def test_damaged_reward_folder_is_named(reward, tmp_path, name, content, message):
    reward.save(tmp_path / "reward")
    (tmp_path / "reward" / name).unlink()
    if content is not None:
        (tmp_path / "reward" / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardModel.load(tmp_path / "reward")


@pytest.mark.parametrize(
    "weights", [torch.zeros(3), torch.ones(len(VIOLATIONS)), torch.full((len(VIOLATIONS),), torch.nan)]
)
def test_weights_that_are_no_reward_are_refused(weights):
    with pytest.raises(ValueError, match="finite weights of 0 or below"):
        RewardModel(weights, 0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x, s: (x[:, :3], x[:, :3], s, {}), r"2 pairs need two \[2, \d+\] tables, got \[2, 3\]"),
        (lambda x, s: (x, x[:1], s, {}), r"got \[2, \d+\] and \[1, \d+\]"),
        (lambda x, s: (x * torch.nan, x, s, {}), "2 pairs hold a clip that cannot be judged; leave those pairs out"),
        (lambda x, s: (x, x, s + 2, {}), r"left_share must lie in \[0, 1\]"),
        (lambda x, s: (x, x, s * torch.nan, {}), r"left_share must lie in \[0, 1\]"),
        (lambda x, s: (x, x, s, dict(penalty=0.0)), "penalty must be above 0"),
    ],
)
def test_pairs_that_cannot_be_learned_from_are_refused(make, message):
    left, right, share, settings = make(table({}, dict(jump=0.5)), torch.ones(2))
    with pytest.raises(ValueError, match=message):
        fit_reward(left, right, share, **settings)


# --- learning curve


def simulated_pool(count: int = 120):
    """Pairs in which a person minds nothing but jumps and stillness, jumps three times as much."""
    left, right = torch.rand(2, count, len(VIOLATIONS), generator=torch.Generator().manual_seed(0))
    minds = table(dict(jump=-3.0, stillness=-1.0))[0]
    return left, right, (left - right) @ minds > 0


def test_learning_curve_rises_to_what_the_person_minds():
    pool = simulated_pool()
    knows = RewardModel(table(dict(jump=-3.0, stillness=-1.0))[0], 50)
    curve = learning_curve(*pool, pretrained=knows, counts=(0, 10, 90), flip=0.1, draws=8)
    found = curve.set_index(["start", "pairs"]).accuracy
    assert found["from nothing", 0] == 0.5  # no opinion is no success
    assert found["automatic pairs", 0] == 1.0 and found["automatic pairs", 90] > 0.85
    for start in ("from nothing", "equal weights"):
        assert found[start, 90] > found[start, 10] + 0.05 and found[start, 90] > 0.8
    assert ((curve.low <= curve.accuracy) & (curve.accuracy <= curve.high)).all() and (curve.draws == 8).all()
    pd.testing.assert_frame_equal(curve, learning_curve(*pool, pretrained=knows, counts=(0, 10, 90), flip=0.1, draws=8))


def test_a_noisier_person_teaches_less():
    pool = simulated_pool()
    sure, unsure = (
        learning_curve(*pool, counts=(40,), flip=flip, draws=8).set_index("start").accuracy["from nothing"]
        for flip in (0.0, 0.4)
    )
    assert sure > unsure + 0.1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(counts=(0, 110)), "110 of 120 pairs leave fewer than 20 to hold out; give more pairs"),
        (dict(counts=(-1,)), "counts must be given and not be negative"),
        (dict(counts=()), "counts must be given"),
        (dict(counts=(10,), flip=0.5), r"flip must be in \[0, 0.5\), got 0.5"),
        (dict(counts=(10,), draws=1), "an interval needs at least 2 draws, got 1"),
        (dict(counts=(10,), penalty=-PENALTY), "penalty must be above 0"),
    ],
)
def test_a_curve_that_cannot_be_measured_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        learning_curve(*simulated_pool(), **settings)
