import re

import pytest
import torch

from physnb.tiny import FAMILIES, GRID, TEXT, Draw, first_tensor, tiny_model

# Mochi turns positions in an autocast region that does nothing on a CPU, and says so
pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast:UserWarning")

LATENTS = ("hidden_states", "sample", "vision_tokens")  # the argument that is denoised
VIDEO_ATTENTION = re.compile(
    r"((single_|temporal_|visual_)?transformer_blocks|blocks|vace_blocks|layers)\.\d+\.(attn1?|self_attention|self_attn)"
)


@pytest.fixture(scope="module", params=FAMILIES)
def slug(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def tiny(slug):
    """The family's model; shared by the tests of one family, so never changed."""
    return tiny_model(slug)


@torch.no_grad()
def predict(model, inputs):
    return first_tensor(model(**inputs))


def row_of(part, whole, row):
    """One row of inputs drawn for several: a tensor has rows if it grows with the batch, others serve all rows."""
    if isinstance(whole, torch.Tensor):
        return whole[row : row + 1] if whole.shape != part.shape else whole
    if isinstance(whole, (list, tuple)):
        return type(whole)(row_of(*pair, row) for pair in zip(part, whole, strict=True))
    return whole


def silenced(output):
    return tuple(silenced(x) for x in output) if isinstance(output, (list, tuple)) else output * 0


def test_prediction_is_finite_and_has_the_shape_of_the_latents(slug, tiny):
    inputs = FAMILIES[slug].inputs()
    expected = list(first_tensor(next(inputs[name] for name in LATENTS if name in inputs)).shape)
    if slug == "wan-animate":
        expected[1] = 4  # its input has channels of the reference besides
    prediction = predict(tiny, inputs)
    assert list(prediction.shape) == expected
    assert prediction.isfinite().all()
    assert torch.equal(predict(tiny, FAMILIES[slug].inputs() | dict(return_dict=False)), prediction)


def test_seeds_decide_weights_and_inputs(slug, tiny):
    family = FAMILIES[slug]
    state = torch.get_rng_state()
    prediction = predict(tiny_model(slug), family.inputs())
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(predict(tiny, family.inputs()), prediction)
    assert (predict(tiny_model(slug, seed=1), family.inputs()) - prediction).abs().max() > 1e-2
    assert (predict(tiny, family.inputs(seed=1)) - prediction).abs().max() > 1e-2


def test_rows_of_a_batch_are_predicted_as_if_alone(slug, tiny):
    family = FAMILIES[slug]
    if family.one_clip:
        with pytest.raises(ValueError, match=f"{family.name} takes one clip at a time, got batch 2"):
            family.inputs(2)
        return
    one, both = family.inputs(1), family.inputs(2)
    alone = [predict(tiny, {name: row_of(one[name], both[name], row) for name in both}) for row in range(2)]
    torch.testing.assert_close(predict(tiny, both), torch.cat(alone), atol=1e-5, rtol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-2


def test_every_video_attention_counts_and_matters(slug, tiny):
    family = FAMILIES[slug]
    found = [module for name, module in tiny.named_modules() if VIDEO_ATTENTION.fullmatch(name)]
    assert len(found) == family.layers >= 2
    heads = ("num_attention_heads", "num_heads", "heads")
    assert {next(getattr(module, name) for name in heads if hasattr(module, name)) for module in found} == {
        family.heads
    }
    prediction = predict(tiny, family.inputs())
    for module in found:
        hook = module.register_forward_hook(lambda _module, _arguments, output: silenced(output))
        changed = predict(tiny, family.inputs())
        hook.remove()
        assert (changed - prediction).abs().max() > 1e-3


def test_no_matrix_is_zero(tiny):
    assert all(parameter.any() for parameter in tiny.parameters() if parameter.ndim > 1)
    assert not tiny.training


@pytest.mark.parametrize("name", ["videodit", "wan-animate", "hunyuan", "cosmos3"])
def test_saved_models_come_back(name, tmp_path):
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    inputs = FAMILIES[name].inputs()
    # equal weights in other places of memory: sums may round another way
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), atol=0, rtol=0)
    torch.testing.assert_close(predict(loaded, inputs), predict(model, inputs), atol=1e-5, rtol=1e-5)


def test_latents_have_the_axes_that_are_asked_for():
    clips = [Draw(2, seed=0).latents(7, patch=(1, 2, 3), axes=axes) for axes in ("cthw", "tchw", "thwc")]
    assert clips[0].shape == (2, 7, GRID[0], 2 * GRID[1], 3 * GRID[2])
    assert torch.equal(clips[1], clips[0].transpose(1, 2))
    assert torch.equal(clips[2], clips[0].movedim(1, -1))


def test_padding_differs_between_rows():
    assert Draw(3, seed=0).keep_text().sum(1).tolist() == [TEXT - 2, TEXT - 1, TEXT - 2]


def test_unknown_families_and_empty_batches_are_refused():
    with pytest.raises(ValueError, match=r"unknown tiny family 'sora'; choose one of .*wan-i2v.*sana-video"):
        tiny_model("sora")
    with pytest.raises(ValueError, match="batch must be positive, got 0"):
        FAMILIES["wan"].inputs(0)


def test_first_tensor_looks_into_everything_a_model_returns():
    x = torch.ones(2)
    for output in (x, (x, None), [None, [x]], dict(sample=x, audio=None), {"sample": [x, x + 1]}):
        assert first_tensor(output) is x
    for output in (None, [], (None,), "sample"):
        with pytest.raises(ValueError, match="no tensor in "):
            first_tensor(output)
