"""A model whose heads are known because they were written by hand, and clips that it understands."""

import math

import torch

from physnb.config import HeadId, Perturbation
from physnb.data import VOCABULARY, Clip, DiscState
from physnb.data.random import uniform_draws
from physnb.data.worlds import frame_times, render
from physnb.model import VideoDiT
from physnb.objectives import objective_named
from physnb.subjects import ModelSubject
from physnb.trials import Trials

FRAMES, SIZE, PATCH, HEADS = 6, 16, 2, 4
SPEED = 12.5  # world units/s: one patch a frame
MOTION_HEAD, STAY_HEAD = HeadId(1, 2), HeadId(0, 1)
CONTENT = torch.tensor([4, 5, 6, 7]) + 4 * PATCH**2 - 4  # green of the clean start frames, pixel by pixel
DARKNESS = 0.1  # how loud a wholly dark pixel is in the residual stream, against places of loudness 1
SHARPNESS = 30.0  # attention logits of the place a head looks at
FREQUENCY = math.pi / 8  # turns of a place code a patch: eight patches are half a turn, none is mistaken for another


def moving_discs(numbers, seed: int = 0) -> Clip:
    """Clips number `numbers` of one red disc that moves to the right by one patch a frame."""
    numbers = torch.as_tensor(list(numbers))
    x, y, radius = (
        torch.from_numpy(uniform_draws(seed, f"moving disc/{name}", numbers.numpy(), *limits))
        for name, limits in dict(x=(1.2, 2.3), y=(1.5, 8.5), radius=(0.9, 1.2)).items()
    )
    times = torch.from_numpy(frame_times(FRAMES))
    absent = torch.full((len(numbers), FRAMES, 2), torch.nan)
    place = torch.stack([x[:, None] + SPEED * times, y[:, None].expand(-1, FRAMES)], -1)
    speed = torch.tensor([SPEED, 0.0]).expand(len(numbers), FRAMES, 2)
    state = DiscState(
        positions=torch.stack([place, absent], 2).float(),
        velocities=torch.stack([speed, absent], 2).float(),
        radii=torch.stack([radius, absent[:, 0, 0]], 1).float(),
        impact_time_s=absent[:, 0, 0],
    )
    names = dict(captions="a red disc moves", scenarios="uniform", buckets="id")
    names = {name: (value,) * len(numbers) for name, value in names.items()}
    return Clip(frames=render(state, SIZE), indices=numbers, state=state, **names)


def turns(angle: torch.Tensor) -> torch.Tensor:
    """[token] -> [token, 2]: cos and sin of a place's code."""
    return torch.stack([(FREQUENCY * angle).cos(), (FREQUENCY * angle).sin()], -1)


def motion_model(motion: float = 0.5, stay: float = 0.5, decoys: float = 0.02) -> VideoDiT:
    """A VideoDiT that draws a half-dark disc where the disc of frame 0 has moved to, and another where it was.

    MOTION_HEAD looks at frame 0, as many patches to the left as frames have passed, and is the only one that moves
    anything; STAY_HEAD looks at frame 0 in its own place. Both copy the darkness that they see to the output. The other
    six attend at random and add `decoys` of random mixtures of all they see. There is no noise in it: the model reads
    start frames alone. Residual stream: pairs of channels (f, -f), so that norms subtract nothing.
    """
    model = VideoDiT(FRAMES, SIZE, (1, PATCH, PATCH), width=48, depth=2, heads=HEADS, vocabulary=VOCABULARY)
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.zero_()
    model.rotary.copy_(torch.tensor([1.0, 0.0]))  # places are told by their codes alone
    seen, drawn, codes = range(0, 4), range(4, 8), range(8, 20)  # pairs of channels: channel c and c + 24
    time, row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, model.grid), indexing="ij"))
    zero = torch.zeros_like(time)
    pairs = torch.zeros(len(time), 24)
    looks = dict(time=time, row=row, column=column, first=zero, moved=column - time, stayed=column)
    place = {name: codes[2 * number : 2 * number + 2] for number, name in enumerate(looks)}
    for name, angle in looks.items():
        pairs[:, list(place[name])] = turns(angle)
    model.places.copy_(torch.cat([pairs, -pairs], 1))
    scale = model.places.std(1, unbiased=False).mean()  # what the norms divide by, since all else is faint

    def read(pair: int) -> torch.Tensor:
        """What a linear map has to be to read a pair behind a norm."""
        weights = torch.zeros(48)
        weights[pair], weights[pair + 24] = 0.5 * scale, -0.5 * scale
        return weights

    for pixel, pair in enumerate(seen):  # green is 0 on white and -2 in a disc, once the ground is subtracted
        model.embed.weight[pair, CONTENT[pixel]], model.embed.weight[pair + 24, CONTENT[pixel]] = -DARKNESS / 2, DARKNESS / 2
    width = 48 // HEADS
    for layer, block in enumerate(model.blocks):
        block.modulation.bias[2 * 48 : 3 * 48] = 1.0  # attention counts in full, the MLP not at all
        query, key = block.attn.query_key.weight.unflatten(0, (2, HEADS, width))
        value, out = block.attn.value.weight.unflatten(0, (HEADS, width)), block.attn.out.weight.unflatten(1, (HEADS, width))
        for head in range(HEADS):
            if (layer, head) in (MOTION_HEAD, STAY_HEAD):
                aim = "moved" if (layer, head) == MOTION_HEAD else "stayed"
                wanted = zip((*place["first"], *place["row"], *place[aim]), (*place["time"], *place["row"], *place["column"]), strict=True)
                for channel, (mine, theirs) in enumerate(wanted):
                    query[head, channel], key[head, channel] = SHARPNESS * read(mine) * width**0.5, SHARPNESS * read(theirs)
                gain = motion if aim == "moved" else stay
                for channel, (source, target) in enumerate(zip(seen, drawn, strict=True)):
                    value[head, channel] = read(source)
                    out[target, head, channel], out[target + 24, head, channel] = gain, -gain
            else:
                for weight in (query[head], key[head], value[head]):
                    weight.copy_(torch.randn(weight.shape, generator=generator))
                mixture = decoys * DARKNESS * torch.randn(len(drawn), width, generator=generator)
                out[list(drawn), head], out[[pair + 24 for pair in drawn], head] = mixture, -mixture
    model.head.bias.fill_(1.0)
    for pixel, pair in enumerate(drawn):
        for colour in (1, 2):  # a disc is red: it takes green and blue away
            model.head.weight[colour * PATCH**2 + pixel] = -2 / DARKNESS * read(pair)
    return model


def motion_trials(model: VideoDiT, numbers, objective: str = "tracking_error", others=None) -> Trials:
    """Trials of the model on clips that it understands; a single step, for its prediction does not depend on noise."""
    subject = ModelSubject(model, moving_discs(numbers), objective_named(objective), steps=1, others=others)
    return Trials(subject, progress=False)
