import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from physnb.config import Guidance, LayerSkip, OtherModel, Perturbation, head_set
from physnb.flow import velocity_from_clean
from physnb.generate import generate
from physnb.guidance import OFF as OFF_VALUES
from physnb.guidance import (
    Plan,
    combine_predictions,
    excess_weight,
    first_twins,
    guidance_terms,
    guided_velocity,
    project_update,
    rescale_deviation,
    same_inputs,
)
from physnb.hooks import perturb, skip_layers, strength_table

OFF = Guidance()
HEADS = Guidance.from_heads("L0H1,L1H2", 2.0, 0.5)
EVERYTHING = Guidance(
    text_weight=0.7,
    weak=((1.5, Perturbation(head_set("L0H1"), 1.0)), (-0.5, Perturbation(head_set("L1H0,L1H3"), 0.3))),
)


def velocity(model, inputs, guidance, others=None, progress=0.0):
    run = guided_velocity(model, inputs["start"], inputs["given"], inputs["caption"], guidance, others)
    return run(inputs["sample"], inputs["sigma"], progress)


def clean(model, inputs, perturbation=None, caption=True):
    """One plain forward, all rows alike."""
    ids = inputs["caption"] if caption else torch.zeros_like(inputs["caption"])
    with torch.no_grad(), perturb(model, strength_table(model, [perturbation])):
        return model(**inputs | dict(caption=ids)).sample


def as_velocity(inputs, prediction):
    return velocity_from_clean(inputs["sample"], prediction, inputs["sigma"])


def test_combination_by_hand():
    c, u, p = (torch.full((2, 1, 1, 1, 1), value) for value in (1.0, 0.25, 3.0))
    combined = combine_predictions(c, [u, p], [torch.tensor([2.0, 0.0]), torch.tensor([0.5, 1.0])])
    # row 0: 1 + 2 (1 - 0.25) + 0.5 (1 - 3); row 1: 1 + 0 + 1 (1 - 3)
    assert combined.flatten().tolist() == [1.5, -1.0]


def test_all_off_is_the_plain_prediction(model, inputs):
    zero = Guidance(0.0, ((0.0, Perturbation("L0H0")),))
    plain = as_velocity(inputs, clean(model, inputs))
    assert torch.equal(velocity(model, inputs, [OFF] * 6), plain)
    assert torch.equal(velocity(model, inputs, [zero] * 6), plain)


def test_guided_prediction_is_the_formula(model, inputs):
    c, u = clean(model, inputs), clean(model, inputs, caption=False)
    p1, p2 = (clean(model, inputs, perturbation) for _, perturbation in EVERYTHING.weak)
    expected = c + 0.7 * (c - u) + 1.5 * (c - p1) - 0.5 * (c - p2)
    torch.testing.assert_close(
        velocity(model, inputs, [EVERYTHING] * 6), as_velocity(inputs, expected), atol=1e-4, rtol=1e-4
    )


def test_published_cfg_scale_is_text_weight_plus_one(model, inputs):
    c, u = clean(model, inputs), clean(model, inputs, caption=False)
    scale = 3.0
    torch.testing.assert_close(
        velocity(model, inputs, [Guidance(text_weight=scale - 1)] * 6),
        as_velocity(inputs, u + scale * (c - u)),
        atol=1e-4,
        rtol=1e-4,
    )


@pytest.mark.parametrize(
    "at_weight", [lambda w: Guidance(text_weight=w), lambda w: Guidance.from_heads("L0H1,L1H2", w, 0.5)]
)
def test_linear_in_the_weight(model, inputs, at_weight):
    v0, v1, v3 = (velocity(model, inputs, [at_weight(w)] * 6) for w in (0.0, 1.0, 3.0))
    assert (v1 - v0)[:5].flatten(1).abs().amax(1).min() > 1e-3  # row 5 has no caption to take away
    torch.testing.assert_close(v3 - v0, 3 * (v1 - v0), atol=1e-3, rtol=1e-3)


def test_text_guidance_without_a_caption_does_nothing(model, inputs):
    guided = velocity(model, inputs, [Guidance(text_weight=5.0)] * 6)
    torch.testing.assert_close(guided[5], as_velocity(inputs, clean(model, inputs))[5], atol=1e-4, rtol=1e-4)


def test_rows_with_different_guidance_equal_single_row_calls(model, inputs):
    guidance = [OFF, HEADS, EVERYTHING, Guidance(text_weight=1.0), Guidance.from_heads("L1H1", -1.0), EVERYTHING]
    together = velocity(model, inputs, guidance)
    for row, alone in enumerate(guidance):
        single = velocity(model, {name: value[row : row + 1] for name, value in inputs.items()}, [alone])
        torch.testing.assert_close(single[0], together[row], atol=1e-4, rtol=1e-4)


def rows_seen(model, modules, run):
    """How many rows each module sees in each call while `run` runs."""
    rows = []
    handles = [m.register_forward_pre_hook(lambda module, args: rows.append(len(args[0]))) for m in modules]
    run()
    for handle in handles:
        handle.remove()
    return rows


def test_rows_that_ask_for_nothing_cost_nothing(model, inputs):
    last = [model.blocks[-1]]
    seen = rows_seen(model, last, lambda: velocity(model, inputs, [OFF] * 4 + [HEADS, EVERYTHING]))
    assert seen == [6 + 1 + 1 + 2]  # one batch: 6 plain rows, 1 without caption, 1 + 2 with broken heads


@pytest.mark.parametrize(
    ("weak", "rows"),
    [
        (Perturbation("L0H0"), [12, 12]),  # parts before the first block
        (Perturbation("L1H0,L1H2", 0.5), [6, 12]),
        (LayerSkip((1,)), [6, 12]),
        (LayerSkip((0, 1)), [12, 12]),
    ],
)
def test_layers_before_the_first_broken_one_run_once(model, inputs, weak, rows):
    guidance = [Guidance(weak=((1.0, weak),))] * 6
    assert rows_seen(model, model.blocks, lambda: velocity(model, inputs, guidance)) == rows


def skipped(model, inputs, layers):
    """The prediction of a copy of the model that lacks some blocks."""
    with torch.no_grad(), skip_layers(model, [LayerSkip(layers)] * 6):
        return model(**inputs).sample


def test_skipped_layers_pass_on_what_they_get(model, inputs):
    seen = {}
    hooks = [
        block.register_forward_hook(lambda module, args, out, n=n: seen.update({n: (args[0], out)}))
        for n, block in enumerate(model.blocks)
    ]
    with skip_layers(model, [None, LayerSkip((0,)), LayerSkip((1,)), None, None, LayerSkip((0, 1))]):
        handle = model.blocks[1].register_forward_hook(lambda module, args, out: seen.update(last=(args[0], out)))
        model(**inputs)
    for hook in (*hooks, handle):
        hook.remove()
    first_in, second_in, second_out = seen[0][0], *seen["last"]
    for row in range(6):
        assert torch.equal(first_in[row], second_in[row]) == (row in (1, 5))
        assert torch.equal(second_in[row], second_out[row]) == (row in (2, 5))
    assert not torch.equal(skipped(model, inputs, (0,)), clean(model, inputs))
    assert torch.equal(skipped(model, inputs, ()), clean(model, inputs))


def test_every_kind_of_weak_model_adds_its_term(model, make_model, inputs):
    other = make_model(seed=5)
    guidance = Guidance(
        weak=(
            (0.5, LayerSkip((1,))),
            (1.5, OtherModel("earlier")),
            (-0.3, Perturbation("L1H1", 0.7, "mean_query")),
            (0.4, Perturbation("L0H2", kind="blur", sigma=(1, 1, 0.5))),
        )
    )
    c = clean(model, inputs)
    expected = c + 0.5 * (c - skipped(model, inputs, (1,))) + 1.5 * (c - clean(other, inputs))
    for weight, weak in guidance.weak[2:]:
        with torch.no_grad(), perturb(model, strength_table(model, [weak]), weak.form):
            expected = expected + weight * (c - model(**inputs).sample)
    made = velocity(model, inputs, [guidance] * 6, {"earlier": other})
    torch.testing.assert_close(made, as_velocity(inputs, expected), atol=1e-4, rtol=1e-4)
    mixed = velocity(model, inputs, [guidance, OFF, HEADS, OFF, guidance, HEADS], {"earlier": other})
    torch.testing.assert_close(mixed[[0, 4]], made[[0, 4]], atol=1e-4, rtol=1e-4)


def test_guiding_model_that_was_not_passed_is_named(model, inputs):
    with pytest.raises(ValueError, match="unknown guiding model 'earlier'"):
        velocity(model, inputs, [Guidance(weak=((1.0, OtherModel("earlier")),))] * 6)


def test_guiding_model_that_reads_other_captions_is_refused(model, make_model, inputs):
    other = copy.deepcopy(make_model(1))
    other.register_to_config(vocabulary=("a", "word"))
    with pytest.raises(ValueError, match="'earlier' reads other captions than the model that it guides"):
        velocity(model, inputs, [Guidance(weak=((1.0, OtherModel("earlier")),))] * 6, {"earlier": other})


def test_layer_that_the_model_lacks_is_named(model, inputs):
    with pytest.raises(ValueError, match="layer 7 does not exist: the model has layers 0 to 1"):
        velocity(model, inputs, [Guidance(weak=((1.0, LayerSkip((7,))),))] * 6)


@pytest.mark.parametrize(("progress", "acts"), [(0.0, False), (0.25, True), (0.74, True), (0.75, False)])
def test_guidance_acts_within_its_interval(model, inputs, progress, acts):
    always = Guidance(text_weight=1.0, weak=HEADS.weak)
    within = Guidance(text_weight=1.0, weak=HEADS.weak, start=0.25, stop=0.75, rescale=0.5)
    found = velocity(model, inputs, [within] + [always] * 5, progress=progress)
    whole = Guidance(text_weight=1.0, weak=HEADS.weak, rescale=0.5) if acts else OFF
    expected = velocity(model, inputs, [whole] + [always] * 5, progress=progress)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found[0], velocity(model, inputs, [OFF if acts else always] * 6)[0])


def test_rescaled_prediction_has_the_deviation_of_the_conditional_one():
    torch.manual_seed(0)
    c, guided = torch.randn(3, 3, 4, 5, 5), 4 * torch.randn(3, 3, 4, 5, 5)
    half = rescale_deviation(c, guided, torch.tensor([0.0, 0.5, 1.0]))
    spread = [x.flatten(1).std(1) for x in (c, guided, half)]
    torch.testing.assert_close(spread[2], torch.stack([spread[1][0], (spread[0] + spread[1])[1] / 2, spread[0][2]]))


def test_projected_update_is_orthogonal_to_the_conditional_prediction():
    torch.manual_seed(0)
    c, guided = torch.randn(2, 3, 4, 5, 5), torch.randn(2, 3, 4, 5, 5)
    projected = project_update(c, guided, torch.tensor([0.0, 1.0]))
    assert float(((projected - c) * c)[0].sum()) == pytest.approx(0, abs=1e-4)
    torch.testing.assert_close(projected[1], guided[1])
    # the part across C is kept: what is left of the update is a multiple of C
    part = (guided - projected)[0].flatten()
    assert float(torch.cosine_similarity(part, c[0].flatten(), dim=0).abs()) == pytest.approx(1, abs=1e-5)


PUBLISHED = {  # each formula as it is published, from the predictions of the model, the weak one, and the scale
    "cfg": lambda c, u, w: u + w * (c - u),
    "cfg-original": lambda c, u, w: c + w * (c - u),
    "pag": lambda c, p, s: c + s * (c - p),
    "pag-adm": lambda c, p, g: p + g * (c - p),
    "headhunter": lambda c, p, w: (1 + w) * c - w * p,
    "seg": lambda c, p, s: c + s * (c - p),
    "stg": lambda c, p, s: c + s * (c - p),
    "slg": lambda c, p, s: c + s * (c - p),
    "autoguidance": lambda c, p, w: torch.lerp(p, c, w),
    "ltx2-modality": lambda c, p, m: c + (m - 1) * (c - p),
    "diffusers-guider-without-cfg": lambda c, p, s: p + s * (c - p),
}


@pytest.mark.parametrize("convention", OFF_VALUES)
@pytest.mark.parametrize("scale", [0.0, 1.0, 2.8])
def test_published_scale_becomes_an_excess_weight(convention, scale):
    torch.manual_seed(0)
    c, weak = torch.randn(2, 1, 1, 1, 4), torch.randn(2, 1, 1, 1, 4)
    ours = combine_predictions(c, [weak], [torch.full((2,), excess_weight(scale, convention))])
    torch.testing.assert_close(ours, PUBLISHED[convention](c, weak, scale))


def test_unknown_convention_is_named():
    with pytest.raises(ValueError, match="unknown guidance convention 'dynamic'; choose one of cfg"):
        excess_weight(1.0, "dynamic")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(start=0.6, stop=0.4), "in this order"),
        (dict(rescale=1.5), "rescale must be in"),
        (dict(parallel=float("nan")), "finite"),
        (dict(weak=((1.0, LayerSkip((0,))), (float("inf"), LayerSkip((1,))))), "finite"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**settings)


def test_head_that_the_model_lacks_is_named(model, inputs):
    with pytest.raises(ValueError, match="head L99H0 does not exist"):
        velocity(model, inputs, [Guidance.from_heads("L99H0", 1.0)] * 6)


# --- rows that see the same input share its prediction

MIXED = [
    OFF,
    HEADS,
    EVERYTHING,
    Guidance(text_weight=1.0),
    Guidance(weak=((1.5, OtherModel("earlier")), (0.5, LayerSkip((1,))))),
    Guidance(weak=((-0.3, Perturbation("L1H1", 0.7, "mean_query")), (2.0, OtherModel("earlier")))),
    Guidance(text_weight=-0.5, weak=((1.0, LayerSkip((0,))),), rescale=0.5),
    Guidance(weak=HEADS.weak, start=0.5),
]


def take(inputs, rows):
    return {name: value[list(rows)] for name, value in inputs.items()}


def forward_rows(model, run):
    """How many rows each forward of the model, and each call of its last block, sees while `run` runs."""
    forwards = []
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: forwards.append(len(kwargs["sample"])), with_kwargs=True
    )
    last = rows_seen(model, [model.blocks[-1]], run)
    handle.remove()
    return list(zip(forwards, last, strict=True))


@pytest.fixture(scope="module")
def earlier(make_model):
    return make_model(seed=5)


def test_heads_of_a_hunt_share_the_prediction_of_their_case_in_the_first_step(model, cases):
    heads = [Guidance.from_heads(name, 2.0) for name in ("L1H0", "L1H1", "L1H3")]
    guidance = [trial for _ in range(2) for trial in (OFF, *heads)]
    batch = cases[[1] * 4 + [5] * 4]
    seen = forward_rows(model, lambda: generate(model, batch, guidance=guidance, steps=3))
    # before the fork 2 cases, behind it 6 broken heads more; then 8 clips that go their own ways
    assert seen == [(2, 8), (8, 14), (8, 14)]


def test_all_of_a_loss_is_shared(model, inputs):
    rows = take(inputs, [0, 0, 0, 3, 3, 3])
    text = Guidance(text_weight=1.0)
    seen = forward_rows(model, lambda: velocity(model, rows, [OFF, HEADS, text, text, text, OFF]))
    assert seen == [(4, 5)]  # two inputs, with and without their captions, and one row of broken heads


def test_other_networks_see_every_input_once(model, earlier, inputs):
    rows = take(inputs, [2, 2, 1, 2, 1])
    other = Guidance(weak=((1.0, OtherModel("earlier")),))
    guidance = [other, Guidance(weak=((2.0, OtherModel("earlier")),)), OFF, OFF, other]
    seen = forward_rows(earlier, lambda: velocity(model, rows, guidance, {"earlier": earlier}))
    assert seen == [(2, 2)]


@pytest.mark.parametrize("name", ["sample", "sigma", "start", "given", "caption"])
def test_rows_that_differ_in_any_input_share_nothing(model, inputs, name):
    rows = take(inputs, [0, 0])
    assert forward_rows(model, lambda: velocity(model, rows, [OFF, OFF])) == [(1, 1)]
    values = rows[name].reshape(2, -1).clone()
    values[1, 0 if name == "start" else -1] += 1  # the first frame is given, the last one is not
    rows[name] = values.view(rows[name].shape)
    assert forward_rows(model, lambda: velocity(model, rows, [OFF, OFF])) == [(2, 2)]
    found = velocity(model, rows, [HEADS, HEADS])
    alone = velocity(model, take(rows, [1]), [HEADS])
    torch.testing.assert_close(found[1:], alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[1])


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    picks=st.lists(st.tuples(st.integers(0, 5), st.integers(0, len(MIXED) - 1)), min_size=1, max_size=9),
    progress=st.sampled_from([0.0, 0.7]),
)
def test_sharing_changes_no_prediction(model, earlier, inputs, picks, progress):
    cases, trials = zip(*picks, strict=True)
    rows, guidance, others = take(inputs, cases), [MIXED[trial] for trial in trials], {"earlier": earlier}
    found = velocity(model, rows, guidance, others, progress)
    for row, alone in enumerate(guidance):
        single = velocity(model, take(rows, [row]), [alone], others, progress)
        torch.testing.assert_close(found[row : row + 1], single, atol=1e-4, rtol=1e-4)
    terms = guidance_terms(guidance)
    twins = first_twins(rows["start"], rows["given"], rows["caption"])
    sources = same_inputs(twins, rows["sample"], rows["sigma"])
    assert len(set(sources)) == len(set(cases))
    with torch.inference_mode():
        shared = Plan(model, terms, sources).predict(rows, others)
        own = Plan(model, terms, range(len(rows["sigma"]))).predict(rows, others)
    assert len(shared) == 1 + len(terms)
    for one, other in zip(shared, own, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_first_twins_are_the_first_rows_with_the_same_conditions():
    start, words = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0]), torch.tensor([[3, 0], [3, 0], [3, 0], [3, 1], [3, 0]])
    assert first_twins(start[:, None], words) == [0, 1, 0, 3, 1]
    assert first_twins(start[:, None]) == [0, 1, 0, 0, 1]
    assert first_twins(start[:0, None]) == []


def test_twins_part_once_their_clips_or_levels_differ():
    twins = [0, 1, 0, 0, 1]
    noised, sigma = torch.zeros(5, 1, 1, 1, 2), torch.ones(5)
    assert same_inputs(twins, noised, sigma) == (0, 1, 0, 0, 1)
    noised[2, ..., 1] = 1e-7
    assert same_inputs(twins, noised, sigma) == (0, 1, 2, 0, 1)
    sigma[4] = 0.5
    assert same_inputs(twins, noised, sigma) == (0, 1, 2, 0, 4)
    noised[0] = 1.0  # row 3 keeps to itself, and is not a twin of the changed row
    assert same_inputs(twins, noised, sigma) == (0, 1, 2, 3, 4)
    assert same_inputs([0, 1, 2, 3, 4], torch.zeros_like(noised), torch.ones(5)) == (0, 1, 2, 3, 4)


def test_sharing_ends_with_the_first_step_and_clips_stay_their_own(model, cases):
    trials = [OFF, Guidance.from_heads("L0H1", 3.0), Guidance.from_heads("L1H2", 3.0, kind="uniform")]
    rows = [(case, trial) for case in (0, 4) for trial in trials]
    together = generate(model, cases[[case for case, _ in rows]], guidance=[trial for _, trial in rows], steps=4)
    for number, (case, trial) in enumerate(rows):
        alone = generate(model, cases[[case]], guidance=trial, steps=4)
        assert (alone.frames.int() - together.frames[[number]].int()).abs().max() <= 1
    assert len(together.frames.unique(dim=0)) == len(rows)
