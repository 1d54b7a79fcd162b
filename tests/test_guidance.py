import pytest
import torch

from physnb.config import Guidance, Perturbation, head_set
from physnb.flow import velocity_from_clean
from physnb.guidance import combine_predictions, guided_velocity
from physnb.hooks import perturb, strength_table

OFF = Guidance()
HEADS = Guidance.from_heads("L0H1,L1H2", 2.0, 0.5)
EVERYTHING = Guidance(
    text_weight=0.7,
    weak=((1.5, Perturbation(head_set("L0H1"), 1.0)), (-0.5, Perturbation(head_set("L1H0,L1H3"), 0.3))),
)


def velocity(model, inputs, guidance):
    run = guided_velocity(model, inputs["start"], inputs["given"], inputs["caption_ids"], guidance)
    return run(inputs["sample"], inputs["sigma"])


def clean(model, inputs, perturbation=None, caption=True):
    """One plain forward, all rows alike."""
    ids = inputs["caption_ids"] if caption else torch.zeros_like(inputs["caption_ids"])
    with torch.no_grad(), perturb(model, strength_table(model, [perturbation])):
        return model(**inputs | dict(caption_ids=ids)).sample


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


def test_rows_that_ask_for_nothing_cost_nothing(model, inputs):
    rows = []
    handle = model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    velocity(model, inputs, [OFF] * 4 + [HEADS, EVERYTHING])
    handle.remove()
    assert rows == [6 + 1 + 1 + 2]  # one batch: 6 plain rows, 1 without caption, 1 + 2 with broken heads


def test_head_that_the_model_lacks_is_named(model, inputs):
    with pytest.raises(ValueError, match="head L99H0 does not exist"):
        velocity(model, inputs, [Guidance.from_heads("L99H0", 1.0)] * 6)
