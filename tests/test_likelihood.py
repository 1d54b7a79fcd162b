import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.config import Guidance, Perturbation
from physnb.data import Clip, encode_captions
from physnb.data.impossible import make_impossible
from physnb.flow import add_noise, velocity_from_clean
from physnb.hooks import perturb_rows
from physnb.likelihood import (
    PairLosses,
    choose_future,
    clip_losses,
    four_futures,
    futures_accuracy,
    misranked,
    noise_levels,
    pair_losses,
    paired_noise,
    preference_error,
    preference_scores,
    published_misrank,
)
from physnb.model import VideoDiT, VideoDiTOutput

GIVEN = 3
LEVELS = (0.05, 0.5, 0.95)
KINDS = ("teleport", "vanish", "gravity_off")
NAN = torch.nan
CLOSE = dict(rtol=1e-3, atol=1e-5)  # other batches, other rounding, over the square of the level


class Oracle(VideoDiT):
    """Predicts the clip it is asked about: a perfect predictor."""

    def forward(self, sample, sigma, start, given, caption, fork=None):
        return VideoDiTOutput(sample=start)


class Physicist(VideoDiT):
    """Predicts the lawful clip that begins with the start frames, of those it knows; contrary: never anything near."""

    def forward(self, sample, sigma, start, given, caption, fork=None):
        distance = (start[:, None, :, :GIVEN] - self.known[None, :, :, :GIVEN]).abs().flatten(2).sum(-1)
        return VideoDiTOutput(sample=self.known[distance.argmin(1)] * self.sign)


def stand_in(kind: type[VideoDiT], model: VideoDiT, known: Clip | None = None, sign: float = 1.0) -> VideoDiT:
    made = kind(**{name: value for name, value in model.config.items() if not name.startswith("_")})
    made.known, made.sign = None if known is None else known.pixels(), sign
    return made


@pytest.fixture(scope="module")
def variants(cases):
    return [make_impossible(cases, kind, frames_given=GIVEN) for kind in KINDS]


def test_perfect_predictor_has_no_loss_at_any_level(model, cases):
    losses = clip_losses(stand_in(Oracle, model), cases, levels=LEVELS)
    assert losses.shape == (len(cases), len(LEVELS)) and losses.max() < 1e-9


def test_loss_is_the_velocity_error_of_the_generated_frames(model, cases):
    sigma = torch.full((len(cases),), 0.5)
    clean, noise = cases.pixels(), paired_noise(model, cases, 7, 0, 0.5)
    noised = add_noise(clean, noise, sigma)
    mask = torch.zeros(len(cases), clean.shape[2])
    mask[:, :GIVEN] = 1
    predicted = model(noised, sigma, clean, mask, encode_captions(cases.captions)).sample
    error = (velocity_from_clean(noised, predicted, sigma) - (noise - clean)).square()[:, :, GIVEN:]
    found = clip_losses(model, cases, levels=[0.5], seed=7)
    torch.testing.assert_close(found[:, 0], error.mean((1, 2, 3, 4)), **CLOSE)


def test_variants_share_the_noise_of_their_clip_and_nothing_else_does(model, cases, variants):
    noise = paired_noise(model, cases, 0, 0, 0.5)
    assert torch.equal(paired_noise(model, variants[0].clip, 0, 0, 0.5), noise)
    assert torch.equal(paired_noise(model, cases[[3, 1]], 0, 0, 0.5), noise[[3, 1]])
    assert len({float(row.sum()) for row in noise}) == len(cases)
    for other in ((1, 0, 0.5), (0, 1, 0.5), (0, 0, 0.6)):
        assert not torch.equal(paired_noise(model, cases, *other), noise)


def test_loss_does_not_depend_on_batches_or_on_other_levels(model, cases):
    together = clip_losses(model, cases, levels=LEVELS)
    torch.testing.assert_close(clip_losses(model, cases, levels=LEVELS, batch_size=2), together, **CLOSE)
    order = [4, 0, 5, 2, 1, 3]
    apart = clip_losses(model, cases[order], levels=LEVELS[::-1])
    torch.testing.assert_close(apart, together[order].flip(1), **CLOSE)


def test_draws_are_averaged(model, cases):
    two = clip_losses(model, cases, levels=[0.5], draws=2)
    one = clip_losses(model, cases, levels=[0.5])
    assert (two != one).all() and torch.equal(one, clip_losses(model, cases, levels=[0.5], draws=1))


def test_perturbation_is_the_weak_model_and_guidance_leaves_it(model, cases):
    weak = Perturbation("L0H1,L1H2")
    plain, broken = (clip_losses(model, cases, levels=[0.5], perturbation=p) for p in (None, weak))
    with perturb_rows(model, weak):
        torch.testing.assert_close(clip_losses(model, cases, levels=[0.5]), broken, **CLOSE)
    some = clip_losses(model, cases, levels=[0.5], perturbation=[weak, None] * 3, batch_size=4)
    torch.testing.assert_close(some, torch.where(torch.arange(6)[:, None] % 2 == 0, broken, plain), **CLOSE)
    away = Guidance.from_heads("L0H1,L1H2", -1.0)  # C - (C - P) = P
    torch.testing.assert_close(clip_losses(model, cases, levels=[0.5], guidance=away), broken, **CLOSE)
    mixed = clip_losses(model, cases, levels=[0.5], guidance=[away, Guidance()] * 3)
    torch.testing.assert_close(mixed, some, **CLOSE)


def test_guidance_acts_where_it_would_in_sampling(model, cases):
    """Sampling reaches level shift u / (1 + (shift - 1) u) after the share 1 - u of its steps."""
    late = Guidance(weak=((2.0, Perturbation("L0H1")),), start=0.5)
    levels = noise_levels(4, model.config.noise_shift)  # at shares 7/8, 5/8, 3/8 and 1/8
    plain, guided = (clip_losses(model, cases, levels=levels, guidance=g) for g in (Guidance(), late))
    changed = ((plain - guided).abs() > 1e-6).any(0)
    assert changed.tolist() == [True, True, False, False]


def test_noise_levels_are_midpoints_shifted_on_request():
    assert noise_levels(4) == (0.125, 0.375, 0.625, 0.875)
    assert noise_levels(1, 30.0) == pytest.approx((15 / 15.5,))
    for bad in (dict(count=0), dict(shift=0)):
        with pytest.raises(ValueError, match="must be positive"):
            noise_levels(**bad)


PUBLISHED = {  # s0: 2 of 4 wrong and 2 of 2; s1: 1 of 2; s2 has nothing to compare with
    "s0": {"valid": [0.30, 0.50], "tele": [0.40, 0.30], "rev": [0.20]},
    "s1": {"valid": [0.10], "tele": [0.20, 0.05]},
    "s2": {"valid": [0.40]},
}


def test_published_arithmetic():
    assert published_misrank(PUBLISHED) == {"tele": 0.5, "rev": 1.0}
    assert published_misrank(PUBLISHED, ties="half") == {"tele": (2.5 / 4 + 1 / 2) / 2, "rev": 1.0}


@pytest.mark.parametrize(
    ("losses", "problem"),
    [
        (PUBLISHED | {"s3": {"fly": [0.1]}}, "fly"),
        (PUBLISHED | {"s3": {"valid": [0.1], "fly": []}}, "fly"),
        (PUBLISHED | {"s3": {"valid": [NAN], "tele": [0.1]}}, "tele"),
        ({"s0": {"valid": [0.1]}}, "a variation"),
        ({}, "a variation"),
    ],
)
def test_what_cannot_be_ranked_raises(losses, problem):
    with pytest.raises(ValueError, match=problem):
        published_misrank(losses)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6))
def test_half_credit_is_antisymmetric(pairs):
    a, b = torch.tensor(pairs, dtype=torch.float32).unbind(1)
    assert torch.equal(misranked(a, b) + misranked(b, a), torch.ones(len(a)))
    assert (misranked(a, b, "strict") <= misranked(a, b)).all()


def test_misranking_of_no_number_is_no_number():
    bad = torch.tensor([NAN, torch.inf])
    assert misranked(bad, torch.ones(2)).isnan().all() and misranked(torch.ones(2), bad).isnan().all()
    with pytest.raises(ValueError, match="half, strict"):
        misranked(bad, bad, "none")


def hand_made() -> PairLosses:
    """Three cases, two kinds, two levels; the third case has no variant and the second one only of the first kind."""
    return PairLosses(
        kinds=("teleport", "vanish"),
        levels=(0.25, 0.75),
        valid=torch.tensor([[1.0, 3.0], [1.0, 1.0], [1.0, 1.0]]),
        invalid=torch.tensor([[[3.0, 5.0], [0.5, 0.5], [NAN, NAN]], [[2.0, 1.0], [NAN, NAN], [NAN, NAN]]]),
        reasons=((None, None, "too slow"), (None, "no room", "no room")),
        matched=torch.tensor([[True, True, False], [False, False, False]]),
    )


def test_scores_of_hand_made_losses():
    found = preference_scores(hand_made())
    expected = {
        "preference_error": [0.5, 1.0, NAN],
        "preference_error/matched": [0.0, 1.0, NAN],
        "preference_error/teleport": [0.0, 1.0, NAN],
        "preference_error/vanish": [1.0, NAN, NAN],
        "preference_error/sigma=0.250": [0.0, 1.0, NAN],
        "preference_error/sigma=0.750": [0.5, 1.0, NAN],
        "preference_margin": [(math.log(2) + math.log(0.75)) / 2, math.log(0.5), NAN],
        "preference_margin/matched": [math.log(2), math.log(0.5), NAN],
    }
    for name, values in expected.items():
        torch.testing.assert_close(found[name].values, torch.tensor(values), equal_nan=True)
    assert found["preference_error"].reasons == (None, None, "too slow")
    assert found["preference_error/vanish"].reasons == (None, "no room", "no room")
    assert found["preference_error"].lower_is_better and not found["preference_margin"].lower_is_better
    estimate = found["preference_error"].estimate()
    assert (estimate.mean, estimate.judged, estimate.cases) == (0.75, 2, 3)


def test_losses_that_are_no_numbers_are_not_judged():
    broken = replace(hand_made(), valid=torch.tensor([[torch.inf, 1.0], [0.0, 0.0], [1.0, 1.0]]))
    found = preference_scores(broken)
    assert found["preference_error"].values.isnan().tolist() == [True, False, True]
    assert found["preference_margin"].values.isnan().all()
    assert "not finite" in found["preference_error"].reasons[0]


def test_a_model_that_knows_the_laws_makes_no_error_and_one_that_knows_others_does(model, cases, variants):
    knows, misled = (stand_in(Physicist, model, known) for known in (cases, variants[0].clip))
    right = preference_error(knows, cases, variants, levels=LEVELS)
    assert (right["preference_error"].values == 0).all() and (right["preference_margin"].values > 5).all()
    wrong = preference_error(misled, cases, variants, levels=LEVELS)
    assert (wrong["preference_error/teleport"].values == 1).all() and (wrong["preference_error"].values > 0).all()


def test_pair_losses_are_those_of_the_clips(model, cases, variants):
    weak = [Guidance.from_heads("L0H1", float(i)) for i in range(len(cases))]
    found = pair_losses(model, cases, variants, levels=LEVELS, guidance=weak)
    torch.testing.assert_close(found.valid, clip_losses(model, cases, levels=LEVELS, guidance=weak), **CLOSE)
    for number, variant in enumerate(variants):
        expected = clip_losses(model, variant.clip, levels=LEVELS, guidance=weak)
        unjudged = torch.tensor([reason is not None for reason in variant.reasons])
        expected[unjudged] = NAN
        torch.testing.assert_close(found.invalid[number], expected, equal_nan=True, **CLOSE)
    assert found.invalid[2, 0].isnan().all() and "does not exist in uniform" in found.reasons[2][0]


def test_pairs_that_do_not_belong_together_are_refused(model, cases, variants):
    with pytest.raises(ValueError, match="no variant"):
        pair_losses(model, cases, [])
    with pytest.raises(ValueError, match="other clips"):
        pair_losses(model, cases[:3], variants)
    with pytest.raises(ValueError, match="start frames"):
        pair_losses(model, cases, variants, frames_given=4)
    with pytest.raises(ValueError, match="2 of guidance for 6"):
        pair_losses(model, cases, variants, guidance=[Guidance()] * 2)


def test_bad_settings_are_refused(model, cases):
    heads = Guidance.from_heads("L0H1", 1.0)
    for settings_, problem in [
        (dict(levels=[0.0]), "noise levels"),
        (dict(levels=[1.5]), "noise levels"),
        (dict(levels=[]), "noise levels"),
        (dict(draws=0), "draws"),
        (dict(batch_size=0), "batch_size"),
        (dict(frames_given=8), "frames given"),
        (dict(guidance=heads, perturbation=Perturbation("L0H1")), "guidance or perturbation"),
        (dict(perturbation=Perturbation("L9H0")), "L9H0"),
    ]:
        with pytest.raises(ValueError, match=problem):
            clip_losses(model, cases, **settings_)
    with pytest.raises(ValueError, match="no clip"):
        clip_losses(model, cases[[]])
    with pytest.raises(ValueError, match="the model makes clips"):
        clip_losses(model, replace(cases, frames=cases.frames[:, :1]))


def test_four_futures_hold_the_true_one_and_three_broken_laws(cases):
    question = four_futures(cases, frames_given=GIVEN)
    for row in range(len(cases)):
        if question.reasons[row] is not None:
            assert question.answer[row] == -1
            continue
        kinds = question.kinds[row]
        assert kinds[question.answer[row]] == "valid" and len(set(kinds)) == 4
        frames = [option.frames[row] for option in question.options]
        assert torch.equal(frames[question.answer[row]], cases.frames[row])
        assert len({frame.numpy().tobytes() for frame in frames}) == 4
    assert sum(reason is None for reason in question.reasons) >= 4
    turned = four_futures(cases[[5, 0]], frames_given=GIVEN)
    assert turned.answer.tolist() == question.answer[[5, 0]].tolist() and turned.kinds[1] == question.kinds[0]
    orders = {tuple(four_futures(cases[:1], frames_given=GIVEN, seed=s).answer.tolist()) for s in range(8)}
    assert len(orders) > 1


def test_a_model_that_knows_the_laws_chooses_the_lawful_future(model, cases):
    question = four_futures(cases, frames_given=GIVEN)
    scored = futures_accuracy(stand_in(Physicist, model, cases), question, levels=[0.5])
    assert [v == 1.0 for v in scored.values.tolist()] == [reason is None for reason in question.reasons]
    assert scored.reasons == question.reasons and not scored.lower_is_better
    first = choose_future(stand_in(Oracle, model), question.options, levels=[0.5], guidance=[Guidance()] * len(cases))
    assert first.shape == (len(cases),)


def test_a_choice_from_no_numbers_is_not_judged(model, cases):
    question = four_futures(cases, frames_given=GIVEN)
    lost = stand_in(Physicist, model, cases, sign=NAN)
    assert (choose_future(lost, question.options, levels=[0.5]) == -1).all()
    scored = futures_accuracy(lost, question, levels=[0.5])
    assert scored.values.isnan().all() and all(scored.reasons)


def test_options_must_share_their_start(model, cases):
    with pytest.raises(ValueError, match="at least 2"):
        choose_future(model, [cases])
    with pytest.raises(ValueError, match="same 3 start frames"):
        choose_future(model, [cases, replace(cases, frames=cases.frames.flip(1))])
