"""Starting a larger model from a smaller one: it first computes what the smaller one did, and learns on from there.

The larger one may have pixels a whole number of times finer, with patches that grow as much so that the tokens stay the
same ones; more layers; and more words. Of a clip whose pixels are repeated it predicts what the smaller one predicts of
the clip, repeated: each row of the embedding is spread over the finer pixels of a patch, each row of the head is
repeated for them, and blocks that are added have closed gates (adaLN-Zero), so that they begin as the identity.
"""

from __future__ import annotations

from dataclasses import asdict

import torch
from torch import Tensor

from physnb.config import ModelConfig, require
from physnb.model import VideoDiT

SAME = ("frames", "channels", "width", "heads", "mlp_ratio")
RESHAPED = ("embed.weight", "head.weight", "head.bias", "words.weight")


def shape_config(model: VideoDiT) -> ModelConfig:
    """The sizes of a model."""
    return ModelConfig(**{name: getattr(model.config, name) for name in asdict(ModelConfig())})


def finer_by(small: ModelConfig, large: ModelConfig) -> int:
    """How many pixels of the larger model one pixel of the smaller becomes, along each side.

    Raises ValueError, naming what differs, where the smaller model cannot be grown to the larger.
    """
    differing = [name for name in SAME if getattr(small, name) != getattr(large, name)]
    require(not differing, f"a model grows in size, depth and words alone, not in {', '.join(differing)}")
    require(large.depth >= small.depth, f"a model of {small.depth} layers does not shrink to {large.depth}")
    times = large.size // small.size
    patch = (small.patch[0], small.patch[1] * times, small.patch[2] * times)
    require(
        large.size == times * small.size and large.patch == patch,
        f"size {small.size} with patch {small.patch} does not grow to size {large.size} with patch {large.patch}: the "
        "size must be a whole number of times larger, and so must the patch",
    )
    return times


@torch.no_grad()
def grow(small: VideoDiT, large: VideoDiT) -> None:
    """Give `large` the weights of `small`; words that `small` does not know, and layers beyond its own, stay as made.

    Raises ValueError where sizes, ground or the way captions are read do not allow it.
    """
    times = finer_by(shape_config(small), shape_config(large))
    require(
        small.config.pixel_mean == large.config.pixel_mean,
        f"the models differ in their usual pixel: {small.config.pixel_mean} and {large.config.pixel_mean}",
    )
    found, own = small.state_dict(), large.state_dict()
    for name, value in found.items():
        if name not in RESHAPED:
            require(
                name in own and own[name].shape == value.shape,
                f"{name} of the smaller model has no place in the larger: do both read captions in the same way?",
            )
            own[name].copy_(value)
    patch = small.patch
    own["embed.weight"].copy_(repeat_pixels(found["embed.weight"], patch, times) / times**2)
    own["head.weight"].copy_(repeat_pixels(found["head.weight"].T, patch, times).T)
    own["head.bias"].copy_(repeat_pixels(found["head.bias"][None], patch, times)[0])
    copy_words(small, large)
    for block in large.blocks[len(small.blocks) :]:  # also where `large` was trained before
        block.modulation.weight.zero_()
        block.modulation.bias.zero_()


def repeat_pixels(rows: Tensor, patch: tuple[int, int, int], times: int) -> Tensor:
    """Rows over the entries of patches, [row, channel * patch], with every pixel repeated along height and width."""
    patches = rows.unflatten(1, (-1, *patch))  # [row, channel, time, height, width]
    return patches.repeat_interleave(times, 3).repeat_interleave(times, 4).flatten(1)


def copy_words(small: VideoDiT, large: VideoDiT) -> None:
    """Embeddings of the words that both know; a projection of a pretrained encoder's embeddings as a whole."""
    mine, theirs = small.words.weight, large.words.weight
    if not isinstance(small.words, torch.nn.Embedding):
        theirs.copy_(mine)
        return
    places = {word: number for number, word in enumerate(("", *large.config.vocabulary))}  # 0: no caption
    for number, word in enumerate(("", *small.config.vocabulary)):
        if word in places:
            theirs[places[word]] = mine[number]
