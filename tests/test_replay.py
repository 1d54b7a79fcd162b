"""Blocks before the first broken layer run once, and the broken prediction is what it would have been."""

import pytest
import torch
from torch.utils._pytree import tree_map

from physnb.config import HeadId, Perturbation
from physnb.families import attention_layers
from physnb.hooks import perturb_rows
from physnb.replay import SharedBlocks
from physnb.tiny import FAMILIES, first_tensor, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:In CPU autocast")
SUPPORTED = [slug for slug in FAMILIES if slug != "sana-video"]

# of the pipelines that make U and C in one batch
BATCHED = "cogvideox cogvideox-1.5 consisid easyanimate ltx ltx2 mochi latte allegro anyflow".split()


def predict(model, inputs):
    with torch.no_grad():
        return first_tensor(model(**inputs))


def counted_attention(model):
    """How often each layer's module runs, by number, as it goes."""
    counts = [0] * len(attention_layers(model))

    def count(number):
        def hook(*_):
            counts[number] += 1

        return hook

    for number, layer in enumerate(attention_layers(model)):
        layer.module.register_forward_pre_hook(count(number))
    return counts


@pytest.mark.parametrize("slug", SUPPORTED)
def test_replayed_prediction_equals_a_whole_pass(slug):
    model, inputs = tiny_model(slug), FAMILIES[slug].inputs()
    plain, counts = predict(model, inputs), counted_attention(model)
    for layer in range(len(counts)):
        weak = Perturbation([HeadId(layer, 0)])
        with perturb_rows(model, weak):
            expected = predict(model, inputs)
        shared = SharedBlocks(model, layer)
        with shared.recording():
            assert torch.equal(predict(model, inputs), plain)
        counts[:] = [0] * len(counts)
        with shared.replaying(), perturb_rows(model, weak):
            replayed = predict(model, inputs)
        assert torch.equal(replayed, expected), layer
        blocks = [one.path.rpartition(".")[0] for one in attention_layers(model)]
        assert [n for n, count in enumerate(counts) if count == 0] == [
            n for n, block in enumerate(blocks) if block in blocks[:layer]
        ]
    assert torch.equal(predict(model, inputs), plain)


def later_row(value):
    """The second of two rows, in a list as well."""
    return tree_map(lambda x: x[1:] if isinstance(x, torch.Tensor) and x.ndim and len(x) == 2 else x, value)


@pytest.mark.parametrize("slug", BATCHED)
def test_the_later_half_of_the_rows(slug):
    model, inputs = tiny_model(slug), FAMILIES[slug].inputs(2)
    layer = len(attention_layers(model)) - 1
    weak, shared = Perturbation([HeadId(layer, 0)]), SharedBlocks(model, layer)
    with shared.recording(), perturb_rows(model, [None, weak]):
        both = predict(model, inputs)
    later = {name: later_row(value) for name, value in inputs.items()}
    with shared.replaying(later_half=True), perturb_rows(model, weak):
        alone = predict(model, later)
    torch.testing.assert_close(alone, both[1:], atol=1e-5, rtol=1e-5)


def test_nothing_is_shared_where_it_could_not_be():
    model = tiny_model("wan")
    assert SharedBlocks(model, 0).blocks == {} and list(SharedBlocks(model, 1).blocks) == ["blocks.0"]
    model.blocks[0].forward = model.blocks[0].forward  # what offloading does
    assert SharedBlocks(model, 1).blocks == {}
    compiled = tiny_model("wan")
    compiled.compile(backend="eager")
    assert SharedBlocks(compiled, 1).blocks == {}
    assert SharedBlocks(torch.compile(tiny_model("wan"), backend="eager"), 1).blocks == {}


def test_nothing_is_replayed_that_was_not_recorded():
    model, inputs = tiny_model("wan"), FAMILIES["wan"].inputs()
    plain = predict(model, inputs)
    with SharedBlocks(model, 1).replaying():
        assert torch.equal(predict(model, inputs), plain)


def test_blocks_are_whole_again_after_an_exception():
    model, inputs = tiny_model("wan"), FAMILIES["wan"].inputs()
    shared = SharedBlocks(model, 1)
    with shared.recording():
        predict(model, inputs)
    with pytest.raises(RuntimeError, match="stop"), shared.replaying():
        raise RuntimeError("stop")
    assert "forward" not in vars(model.blocks[0]) and not model.blocks[0]._forward_hooks
