import dataclasses

import pytest
import torch

from physnb.checkpoint import fingerprint
from physnb.config import ModelConfig, TextConfig, TrainConfig
from physnb.grow import finer_by, grow, repeat_pixels
from physnb.model import VideoDiT
from physnb.train import TrainState, train

SMALL = ModelConfig(frames=4, size=16, patch=(2, 8, 8), width=32, depth=2, heads=4)
FINER = dataclasses.replace(SMALL, size=32, patch=(2, 16, 16))


def model_of(config, seed=0, vocabulary=("a", "disc"), **more) -> VideoDiT:
    """A model in which every weight matters: none is zero, as some are before training."""
    torch.manual_seed(seed)
    model = VideoDiT(**dataclasses.asdict(config), vocabulary=vocabulary, **more)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs(config, caption=((1, 2), (0, 0))):
    torch.manual_seed(3)
    shape = (2, config.channels, config.frames, config.size, config.size)
    given = torch.zeros(2, config.frames)
    given[:, :1] = 1
    return dict(
        sample=torch.randn(shape), sigma=torch.tensor([0.3, 0.9]), start=torch.randn(shape), given=given,
        caption=torch.tensor(caption),
    )  # fmt: skip


def upsampled(clip, times):
    return clip.repeat_interleave(times, 3).repeat_interleave(times, 4)


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize("times", [1, 2, 3])
@torch.no_grad()
def test_grown_model_predicts_the_same_clip_with_repeated_pixels(times, depth):
    small = model_of(SMALL)
    shape = dataclasses.replace(SMALL, size=16 * times, patch=(2, 8 * times, 8 * times), depth=depth)
    large = model_of(shape, seed=1)
    grow(small, large)
    known = inputs(SMALL)
    expected = upsampled(small(**known).sample, times)
    finer = known | {name: upsampled(known[name], times) for name in ("sample", "start")}
    torch.testing.assert_close(large(**finer).sample, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_words_are_found_by_name_and_new_ones_stay_as_made():
    small, large = model_of(SMALL, vocabulary=("a", "disc")), model_of(SMALL, 1, vocabulary=("a", "blue", "disc"))
    blue = large.words.weight[2].clone()
    grow(small, large)
    known = inputs(SMALL)
    torch.testing.assert_close(
        large(**known | dict(caption=torch.tensor([[1, 3], [0, 0]]))).sample, small(**known).sample
    )
    assert torch.equal(large.words.weight[2], blue)


@torch.no_grad()
def test_pretrained_encoders_and_readers_are_copied_whole():
    for text in (TextConfig(encoder="tiny", width=6), TextConfig(layers=1)):
        small, large = (model_of(SMALL, seed, text=dataclasses.asdict(text)) for seed in (0, 1))
        grow(small, large)
        for name, value in small.state_dict().items():
            assert torch.equal(value, large.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"reader.* has no place in the larger: do both read captions in the same way"):
        grow(small, model_of(SMALL))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(width=48), "in size, depth and words alone, not in width"),
        (dict(frames=8, heads=2), "not in frames, heads"),
        (dict(depth=1), "a model of 2 layers does not shrink to 1"),
        (dict(size=32), r"size 16 with patch \(2, 8, 8\) does not grow to size 32 with patch \(2, 8, 8\)"),
        (dict(size=24, patch=(2, 12, 12)), "must be a whole number of times larger"),
        (dict(size=8, patch=(2, 4, 4)), "must be a whole number of times larger"),
    ],
)
def test_shapes_that_do_not_grow_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        finer_by(SMALL, dataclasses.replace(SMALL, **change))


def test_models_of_other_ground_are_refused():
    with pytest.raises(ValueError, match="differ in their usual pixel"):
        grow(model_of(SMALL), model_of(SMALL, pixel_mean=0.0))


def test_repeated_pixels_keep_their_place():
    rows = torch.arange(8.0)[None]  # one channel, one frame, 2 x 4 pixels
    assert repeat_pixels(rows, (1, 2, 4), 2).view(4, 8)[:2].tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2


def test_training_goes_on_finer_deeper_and_with_more_words(tmp_path):
    short = dict(steps=3, batch=2, warmup_steps=1)
    small = train(TrainConfig(model=SMALL, sources=("uniform",), source_weights=(1.0,), **short), tmp_path / "a")
    shape = dataclasses.replace(FINER, depth=3)
    sources = dict(sources=("uniform", "orbit"), source_weights=(1.0, 1.0))
    config = TrainConfig(model=shape, start=fingerprint(small), **sources, **short)
    begun = TrainState(config, small).model
    assert len(begun.config.vocabulary) > len(small.config.vocabulary)
    assert torch.equal(begun.blocks[1].mlp[0].weight, small.blocks[1].mlp[0].weight)
    grown = train(config, tmp_path / "b", start=small, progress=False)
    assert grown.config.size == 32 and not torch.equal(grown.embed.weight, begun.embed.weight)
    assert (grown.blocks[2].modulation.weight != 0).any()  # the gates of the new layer open
