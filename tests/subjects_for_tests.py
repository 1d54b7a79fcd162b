"""A model whose heads are known because they were written by hand, and clips that it understands."""

import math

import torch
from torch import Tensor

from physnb.config import HeadId, HuntConfig, head_set
from physnb.data import VOCABULARY, Clip, DiscState
from physnb.data.random import uniform_draws
from physnb.data.worlds import frame_times, render
from physnb.model import VideoDiT
from physnb.objectives import Objective, objective_named
from physnb.subjects import ModelSubject
from physnb.trials import Trials

FRAMES, SIZE, PATCH, WIDTH, HEADS = 6, 16, 2, 48, 4
SPEED = 12.5  # world units/s: one patch a frame
MOTION_HEAD, STAY_HEAD = HeadId(1, 2), HeadId(0, 1)
MOTION_HUNT = HuntConfig(top_k=1, weight=1.0, random_draws=2)
DARKNESS = 0.1  # how loud a dark pixel is in the residual stream, where codes of places have loudness 1
SHARPNESS = 100.0  # attention logit of the place that a head looks at, over that of one a quarter turn away
TURN = math.pi / 8  # of a place's code from patch to patch: all eight fit into half a turn
SEEN, DRAWN = [0, 1, 2, 3], [4, 5, 6, 7]  # channels: darkness of a patch's pixels in the start frames, in the output
CODES = {  # channels of the code of each token's time, row and column, and of where heads look
    name: [first, first + 1]
    for first, name in zip(range(8, 20, 2), ("time", "row", "column", "first frame", "before", "here"), strict=True)
}


def moving_discs(numbers, seed: int = 0) -> Clip:
    """Clips number `numbers` of one red disc that moves to the right by one patch a frame."""
    numbers = torch.tensor(list(numbers))
    x, y, radius = (
        torch.from_numpy(uniform_draws(seed, f"moving disc/{name}", numbers.numpy(), low, high)).float()
        for name, low, high in (("x", 2.3, 2.7), ("y", 1.5, 8.5), ("radius", 0.6, 0.7))
    )
    absent = torch.full((len(numbers), FRAMES, 2), torch.nan)
    centre = torch.stack([x[:, None] + SPEED * torch.from_numpy(frame_times(FRAMES)), y[:, None].expand(-1, FRAMES)], 2)
    velocity = torch.tensor([SPEED, 0.0]).expand_as(absent)
    state = DiscState(
        positions=torch.stack([centre.float(), absent], 2),
        velocities=torch.stack([velocity, absent], 2),
        radii=torch.stack([radius, absent[:, 0, 0]], 1),
        impact_time_s=absent[:, 0, 0],
    )
    names = {name: (value,) * len(numbers) for name, value in (("captions", ""), ("scenarios", "uniform"))}
    return Clip(frames=render(state, SIZE), buckets=("id",) * len(numbers), indices=numbers, state=state, **names)


def motion_model(motion: float = 0.5, stay: float = 0.5, decoys: float = 0.5) -> VideoDiT:
    """A VideoDiT that draws a half-dark disc where that of frame 0 has moved to, and another where it was.

    MOTION_HEAD looks at frame 0, as many patches to the left as frames have passed; nothing else moves anything.
    STAY_HEAD looks at frame 0 in its own place. Both copy the darkness that they see to the output. The other six look
    at random places and add faint mixtures. The model reads nothing but start frames, so noise plays no part.
    Every quantity is a pair of channels c and c + 24 of opposite signs, from which norms subtract nothing.
    """
    model = VideoDiT(FRAMES, SIZE, (1, PATCH, PATCH), width=WIDTH, depth=2, heads=HEADS, vocabulary=VOCABULARY)
    model.eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.zero_()
    model.rotary.copy_(torch.tensor([1.0, 0.0]))  # places are told by their codes alone
    write_places(model)
    green_given = 4 * PATCH**2  # first input of the fifth channel: 0 on white, -2 in a disc
    for pixel, channel in enumerate(SEEN):
        model.embed.weight[:, green_given + pixel] = -0.5 * DARKNESS * pair(channel)
    model.head.bias.fill_(1.0)
    for pixel, channel in enumerate(DRAWN):
        for colour in (1, 2):  # a red disc takes green and blue away
            model.head.weight[colour * PATCH**2 + pixel] = -2 / DARKNESS * reader(model, channel)
    generator = torch.Generator().manual_seed(0)
    for layer, block in enumerate(model.blocks):
        block.modulation.bias[2 * WIDTH : 3 * WIDTH] = 1.0  # attention counts in full, the MLP not at all
        for head in range(HEADS):
            if (layer, head) == MOTION_HEAD:
                write_head(model, layer, head, look_at(model, "before"), motion * torch.eye(4))
            elif (layer, head) == STAY_HEAD:
                write_head(model, layer, head, look_at(model, "here"), stay * torch.eye(4))
            else:
                anywhere = torch.randn(2, WIDTH // HEADS, WIDTH, generator=generator)
                write_head(model, layer, head, anywhere, decoys * torch.randn(4, 4, generator=generator))
    return model


def pair(channel: int) -> Tensor:
    """[width]: what stands for 1 in a channel."""
    values = torch.zeros(WIDTH)
    values[channel], values[channel + WIDTH // 2] = 1.0, -1.0
    return values


def reader(model: VideoDiT, channel: int) -> Tensor:
    """[width]: weights that read a channel behind a norm, which divides by what codes of places amount to."""
    return pair(channel) / 2 * model.places.std(1, unbiased=False).mean()


def write_places(model: VideoDiT) -> None:
    time, row, column = (axis.flatten() for axis in torch.meshgrid(*map(torch.arange, model.grid), indexing="ij"))
    angles = (time, row, column, torch.zeros_like(time), column - time, column)
    for channels, angle in zip(CODES.values(), angles, strict=True):
        for channel, code in zip(channels, ((TURN * angle).cos(), (TURN * angle).sin()), strict=True):
            model.places += code[:, None] * pair(channel)


def look_at(model: VideoDiT, column: str) -> Tensor:
    """[2, channel, width]: queries and keys of a head that looks at frame 0, in its own row, and in `column`."""
    wanted, there = ("first frame", "row", column), ("time", "row", "column")
    weights = torch.zeros(2, WIDTH // HEADS, WIDTH)
    for weight, names in zip(weights, (wanted, there), strict=True):
        for number, channel in enumerate(channel for name in names for channel in CODES[name]):
            weight[number] = reader(model, channel)
    weights[0] *= SHARPNESS * (WIDTH // HEADS) ** 0.5
    return weights


def write_head(model: VideoDiT, layer: int, head: int, look: Tensor, mixture: Tensor) -> None:
    """Make a head look there and add `mixture` of the darkness that it sees to what is drawn."""
    attention, width = model.blocks[layer].attn, WIDTH // HEADS
    attention.query_key.weight.unflatten(0, (2, HEADS, width))[:, head] = look
    for number, channel in enumerate(SEEN):
        attention.value.weight.unflatten(0, (HEADS, width))[head, number] = reader(model, channel)
    columns = attention.out.weight.unflatten(1, (HEADS, width))[:, head]
    columns[:, : len(SEEN)] = torch.stack([pair(channel) for channel in DRAWN], 1) @ mixture


def motion_trials(
    model: VideoDiT, numbers, objective: Objective | str = "tracking_error", others=None, **settings
) -> Trials:
    """Trials on clips that the model understands; of one step, for what it predicts does not depend on noise."""
    objective = objective_named(objective) if isinstance(objective, str) else objective
    subject = ModelSubject(model, moving_discs(numbers), objective, steps=1, others=others)
    return Trials(subject, progress=False, **settings)


class TableSubject:
    """A subject whose scores are a table made up by a test: one row a head, guided by it alone, over `unguided` or 0.

    Sets of heads score the sum of their rows, less the product of `bonus` where all its heads are there.
    """

    def __init__(self, effects, objective=objective_named("tracking_error"), together=(), part="case", unguided=None):
        self.unguided = torch.zeros(effects.shape[1]) if unguided is None else unguided
        self.effects, self.objective, self.together = effects, objective, head_set(together)
        self.heads = head_set([(0, i) for i in range(len(effects))])
        self.case_names = tuple(f"{part} {i}" for i in range(effects.shape[1]))
        self.identity = dict(table=effects.tolist())
        self.rows = []

    def rows_that_fit(self):
        return 7

    def score(self, rows):
        self.rows += rows
        values = []
        for trial, case in rows:
            heads = [h for _, weak in trial.weak for h in weak.heads]
            bonus = -10.0 if self.together and set(self.together) <= set(heads) else 0.0
            values.append(sum(float(self.effects[h.head, case]) for h in heads) + bonus + float(self.unguided[case]))
        return {self.objective.name: torch.tensor(values)}


def table_trials(effects, **settings) -> Trials:
    return Trials(TableSubject(effects, **settings), progress=False)
