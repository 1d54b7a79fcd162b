import pytest
import torch
import torch.nn.functional as F

from physnb.linear import Linear, by_torch, product, takes

SHAPES = [((16, 128), 128, 384), ((2, 7, 512), 512, 128), ((3, 1, 5), 5, 2)]


def layer_and_input(shape, channels, features, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layer = Linear(channels, features)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.bias.copy_(torch.randn(layer.bias.shape, generator=generator))
    return layer, torch.randn(shape, generator=generator)


@pytest.mark.parametrize(("shape", "channels", "features"), SHAPES)
def test_equals_the_product_in_double_precision(shape, channels, features):
    layer, x = layer_and_input(shape, channels, features)
    exact = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), exact, atol=2e-6 * channels, rtol=0)
        torch.testing.assert_close(product(x, layer.weight, layer.bias), layer(x), atol=0, rtol=0)


@pytest.mark.parametrize(("shape", "channels", "features"), SHAPES)
@pytest.mark.parametrize("frozen", ["", "input", "weight", "bias"])
def test_gradients_equal_those_of_torch(shape, channels, features, frozen):
    found = []
    for context in (by_torch, torch.enable_grad):
        layer, x = layer_and_input(shape, channels, features)
        leaves = dict(input=x, weight=layer.weight, bias=layer.bias)
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != frozen)
        with context():
            layer(x).square().sum().backward()
        found.append({name: leaf.grad for name, leaf in leaves.items()})
    for name in found[0]:
        assert (found[1][name] is None) == (name == frozen)
        if name != frozen:
            torch.testing.assert_close(found[1][name], found[0][name], atol=1e-3, rtol=1e-4)


def test_a_row_does_not_depend_on_how_many_others_there_are():
    layer, x = layer_and_input((300, 128), 128, 768)
    with torch.no_grad():
        whole = layer(x)
        for count in (2, 3, 16, 128, 256):
            assert torch.equal(layer(x[:count]), whole[:count])


def test_leaves_other_types_to_torch():
    layer, x = layer_and_input((4, 8), 8, 8)
    assert takes(x, layer.weight)
    assert not takes(x.double(), layer.weight) and not takes(x[:0], layer.weight)
    assert layer.double()(x.double()).dtype == torch.float64
    assert Linear(8, 8)(x[:0]).shape == (0, 8) and Linear(8, 8)(x[0]).shape == (8,)
    with by_torch():
        assert not takes(x, Linear(8, 8).weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(8, 8)(x).dtype == torch.bfloat16
