import pytest
import torch
from torch import nn

from physnb.config import HeadId, Perturbation, head_set
from physnb.families import attention_layers, check_heads, heads_of
from physnb.hooks import capture_attention, perturb, strength_table
from physnb.model import rotate


def attention_modules(model):
    return [layer.module for layer in attention_layers(model)]


def predict(model, inputs):
    with torch.no_grad():
        return model(**inputs).sample


def table(model, batch, **strengths):
    """A strength table with the named heads set in every row: table(model, 6, L0H1=0.5)."""
    u = torch.zeros(batch, len(attention_modules(model)), attention_modules(model)[0].heads)
    for name, value in strengths.items():
        u[:, HeadId.parse(name).layer, HeadId.parse(name).head] = torch.as_tensor(value)
    return u


class head_outputs:
    """Collects what each attention layer passes to its output projection, [batch, head, token, channel] a layer."""

    def __init__(self, model):
        self.layers, self.seen = attention_modules(model), []

    def __enter__(self):
        self.handles = [
            layer.out.register_forward_pre_hook(
                lambda module, args, heads=layer.heads: self.seen.append(
                    args[0].unflatten(-1, (heads, -1)).transpose(1, 2)
                )
            )
            for layer in self.layers
        ]
        return self.seen

    def __exit__(self, *_):
        for handle in self.handles:
            handle.remove()


def slow_attention(layer, u):
    """The layer as published: one head at a time, its map built explicitly and mixed with the identity."""

    def forward(x, rotary):
        tokens, width = x.shape[1:]
        channels = width // layer.heads
        query_key = rotate(layer.query_key(x), rotary)
        outputs = []
        for head in range(layer.heads):
            part = slice(head * channels, (head + 1) * channels)
            q, k, v = query_key[..., :width][..., part], query_key[..., width:][..., part], layer.value(x)[..., part]
            attention = (q @ k.transpose(1, 2) / channels**0.5).softmax(-1)
            strength = u[:, head, None, None]
            outputs.append(((1 - strength) * attention + strength * torch.eye(tokens)) @ v)
        return layer.out(torch.cat(outputs, -1))

    return forward


def test_every_head_of_the_model_is_listed(model):
    heads = heads_of(model)
    assert heads == tuple(HeadId(layer, head) for layer in range(2) for head in range(4))


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="Linear is not a known video transformer"):
        heads_of(nn.Linear(2, 2))


@pytest.mark.parametrize("heads", ["L99H0", "L0H4", "L2H0", "L0H0,L1H99"])
def test_head_that_the_model_lacks_is_named(model, heads):
    with pytest.raises(
        ValueError, match=r"head L\d+H\d+ does not exist: the model has layers 0 to 1 with heads 0 to 3"
    ):
        check_heads(model, head_set(heads))
    with pytest.raises(ValueError, match="does not exist"):
        strength_table(model, [Perturbation(heads)])
    with pytest.raises(ValueError, match="does not exist"), capture_attention(model, head_set(heads)):
        pass


@pytest.mark.parametrize("head", [(-1, 0), (0, -1)])
def test_negative_head_is_not_counted_from_the_end(model, head):
    with pytest.raises(ValueError, match="does not exist"):
        check_heads(model, (HeadId(*head),))


def test_strength_zero_changes_no_bit(model, inputs):
    plain = predict(model, inputs)
    with perturb(model, table(model, 6)):
        assert torch.equal(predict(model, inputs), plain)
    # also in a layer that another row perturbs
    mixed = table(model, 6, L0H0=1.0, L1H3=0.5)
    mixed[:3] = 0
    with perturb(model, mixed):
        broken = predict(model, inputs)
    assert torch.equal(broken[:3], plain[:3])
    assert ((broken - plain)[3:].flatten(1).abs().amax(1) > 1e-3).all()


def test_strength_one_passes_the_values_through(model, inputs):
    with perturb(model, table(model, 6, L0H2=1.0)), head_outputs(model) as seen:
        values = []
        handle = attention_modules(model)[0].value.register_forward_hook(lambda module, args, out: values.append(out))
        predict(model, inputs)
        handle.remove()
    channels = values[0].shape[-1] // 4
    assert torch.equal(seen[0][:, 2], values[0][..., 2 * channels : 3 * channels])


@pytest.mark.parametrize("strength", [0.0, 0.3, 1.0])
def test_any_head_set_equals_explicit_maps(model, inputs, monkeypatch, strength):
    generator = torch.Generator().manual_seed(4)
    chosen = torch.rand(6, 2, 4, generator=generator) < 0.5  # another head set in every row
    u = chosen * strength + chosen * (1 - strength) * torch.rand(6, 2, 4, generator=generator) * (strength == 0.3)
    with perturb(model, u):
        fast = predict(model, inputs)
    for number, layer in enumerate(attention_modules(model)):
        monkeypatch.setattr(layer, "forward", slow_attention(layer, u[:, number]))
    torch.testing.assert_close(fast, predict(model, inputs), atol=1e-5, rtol=1e-5)


def test_only_the_named_head_changes(model, inputs):
    with head_outputs(model) as plain:
        predict(model, inputs)
    with head_outputs(model) as broken, perturb(model, table(model, 6, L1H2=0.7)):
        predict(model, inputs)
    assert torch.equal(plain[0], broken[0])
    changed = (plain[1] != broken[1]).transpose(0, 1).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


def test_rows_are_perturbed_independently(model, inputs):
    u = torch.rand(6, 2, 4, generator=torch.Generator().manual_seed(0))
    with perturb(model, u):
        together = predict(model, inputs)
    for row in range(6):
        with perturb(model, u[row : row + 1]):
            alone = predict(model, {name: value[row : row + 1] for name, value in inputs.items()})
        torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=1e-5)


def test_a_single_row_serves_any_batch(model, inputs):
    u = table(model, 1, L0H1=0.4, L1H0=1.0)
    with perturb(model, u):
        one = predict(model, inputs)
    with perturb(model, u.expand(6, -1, -1)):
        assert torch.equal(predict(model, inputs), one)


def test_nested_strengths_compose(model, inputs):
    with perturb(model, table(model, 6, L0H1=0.5)), perturb(model, table(model, 6, L0H1=0.6, L1H1=0.3)):
        nested = predict(model, inputs)
    with perturb(model, table(model, 6, L0H1=1 - 0.5 * 0.4, L1H1=0.3)):
        torch.testing.assert_close(nested, predict(model, inputs), atol=1e-5, rtol=1e-5)


def test_leaving_an_inner_block_restores_the_outer_one(model, inputs):
    with perturb(model, table(model, 6, L0H1=0.5)):
        outer = predict(model, inputs)
        with perturb(model, table(model, 6, L0H1=1.0)):
            pass
        assert torch.equal(predict(model, inputs), outer)


def test_nothing_stays_after_an_exception(model, inputs):
    plain, before = predict(model, inputs), [module.processor for module in attention_modules(model)]
    with pytest.raises(RuntimeError, match="stop"), perturb(model, table(model, 6, L0H1=1.0)):
        raise RuntimeError("stop")
    with pytest.raises(RuntimeError, match="stop"), capture_attention(model, head_set("L0H1")):
        raise RuntimeError("stop")
    assert torch.equal(predict(model, inputs), plain)
    assert [module.processor for module in attention_modules(model)] == before


@pytest.mark.parametrize(
    ("strength", "message"),
    [
        (torch.zeros(1, 2, 5), r"must be \[batch, 2, 4\] for this model, got \[1, 2, 5\]"),
        (torch.zeros(2, 4), r"must be \[batch, 2, 4\]"),
        (torch.full((1, 2, 4), 1.1), r"must be in \[0, 1\]"),
        (torch.full((1, 2, 4), -0.1), r"must be in \[0, 1\]"),
        (torch.full((1, 2, 4), float("nan")), r"must be in \[0, 1\]"),
    ],
)
def test_table_of_wrong_shape_or_range_is_refused(model, strength, message):
    with pytest.raises(ValueError, match=message), perturb(model, strength):
        pass


def test_strength_table_sets_the_heads_of_each_row(model):
    u = strength_table(model, [None, Perturbation("L0H1,L1H3", 0.5), Perturbation("L0H0")])
    expected = torch.zeros(3, 2, 4)
    expected[1, 0, 1] = expected[1, 1, 3] = 0.5
    expected[2, 0, 0] = 1
    assert torch.equal(u, expected)


def test_captured_maps_are_those_that_attention_used(model, inputs):
    heads = head_set("L0H0,L0H3,L1H2")
    plain = predict(model, inputs)
    values = []
    handles = [
        layer.value.register_forward_hook(lambda module, args, out: values.append(out))
        for layer in attention_modules(model)
    ]
    with capture_attention(model, heads) as maps, head_outputs(model) as outputs:
        assert torch.equal(predict(model, inputs), plain)  # looking changes nothing
    for handle in handles:
        handle.remove()
    assert set(maps) == set(heads)
    for (layer, head), attention in maps.items():
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:2]))
        v = values[layer].unflatten(-1, (4, -1))[:, :, head]
        torch.testing.assert_close(attention @ v, outputs[layer][:, head], atol=1e-5, rtol=1e-5)
