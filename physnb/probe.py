"""Learning an unknown video transformer by running it: where its heads are, how the video lies in their sequence.

    learn_family(model, inputs)    # once; heads_of, perturb, HeadGuidance and the rest then know its class
    self_test(model, inputs)       # that every layer is called, fits its layout and has an effect

Nothing is known of the model but that it calls scaled dot product attention from modules with a `processor`, in lists
of blocks. In the first block only the tokens of the video move when the latent clip moves, and one latent frame, row or
column moves its own tokens alone: that tells the video apart from text and history, and gives the order of its tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from physnb.attention import AttentionCall, HeadTensor
from physnb.config import HeadId, Perturbation, require
from physnb.families import FAMILIES, Family, Inputs, attention_layers, video_of
from physnb.hooks import perturb_rows, replaced_attention

MOVED = 1e-5  # a token has moved if a query changed by more than this share of the largest query
STEP = 1.0  # what is added to a part of the latent clip


@dataclass(frozen=True)
class SeenCall:
    """Queries [row, head, token, channel] and keys of one attention call, and the module that made it."""

    path: str
    query: Tensor
    key: Tensor

    @property
    def place(self) -> tuple[str, int, str] | None:
        """The block list, the number of the block and the path in it; None outside of any list."""
        found = re.fullmatch(r"([\w.]+?)\.(\d+)\.([\w.]+)", self.path)
        return None if found is None else (found[1], int(found[2]), found[3])


@dataclass(frozen=True)
class LayerTest:
    """What the self-test saw of one layer: attention calls in a forward, tokens of a call, largest change it makes."""

    path: str
    calls: int
    tokens: int
    effect: float


def learn_family(model: nn.Module, inputs: Inputs) -> Family:
    """The `probe_family` of a model, which the whole package knows from now on; the model has passed `self_test`."""
    model = getattr(model, "_orig_mod", model)
    name = type(model).__name__
    require(name not in FAMILIES, f"{name} is known already; see physnb.families.FAMILIES")
    FAMILIES[name] = probe_family(model, inputs)
    try:
        self_test(model, inputs)
    except (ValueError, RuntimeError):
        del FAMILIES[name]
        raise
    return FAMILIES[name]


def probe_family(model: nn.Module, inputs: Inputs) -> Family:
    """The family of a model, found by six forwards with these keyword arguments of its forward.

    Raises ValueError, saying what was found, for a model whose latent clip is not five-dimensional `hidden_states`,
    whose video self-attention is not scaled dot product attention over whole clips, or whose tokens are not one run in
    the order time, height, width.
    """
    name, latent = type(model).__name__, inputs.get("hidden_states")
    require(
        isinstance(latent, Tensor) and latent.ndim == 5,
        f"{name} cannot be probed: its hidden_states are no latent clip of five dimensions; add its Family by hand",
    )
    base = attention_calls(model, inputs)
    everywhere = attention_calls(model, {**inputs, "hidden_states": latent + STEP})
    require(
        [call.path for call in base] == [call.path for call in everywhere],
        f"{name} cannot be probed: which attention it calls depends on the latent clip",
    )
    lists: dict[tuple[str, str], list[int]] = {}  # (block list, path in a block) -> calls of its video self-attention
    for number, (before, after) in enumerate(zip(base, everywhere, strict=True)):
        if before.place is not None and len(before.query) == len(latent) and is_self_attention(before, after):
            lists.setdefault(before.place[::2], []).append(number)
    require(
        len(lists) > 0,
        f"{name} cannot be probed: no scaled dot product self-attention over whole clips moves with the latent clip",
    )
    first = min(number for numbers in lists.values() for number in numbers)
    video = moved_tokens(base[first], everywhere[first])
    places = video.nonzero().flatten()
    start, count = int(places[0]), len(places)
    require(int(places[-1]) - start == count - 1, f"{name} cannot be probed: its video tokens are not one run")
    lists = {key: numbers for key, numbers in lists.items() if base[numbers[0]].query.shape[2] == len(video)}

    axes, grid = latent_axes(model, inputs, base[first], places)
    sides = [latent.shape[axes.index(axis)] for axis in "THW"]
    others = "none" if count == len(video) else "first" if start + count == len(video) else "last"
    if start > 0 and others == "last":  # on both sides
        others = constant(start)
    order = sorted((number, key) for key, numbers in lists.items() for number in numbers)
    sequence = [key for _, key in order]
    in_turn = sequence == [key for key in lists for _ in lists[key]]
    require(
        in_turn or sequence == list(lists) * (len(sequence) // len(lists)),
        f"{name} cannot be probed: its block lists run neither one after the other nor in turns",
    )
    patch = tuple(math.ceil(side / tokens) for side, tokens in zip(sides, grid, strict=True))
    return Family(tuple(lists), axes, others, interleaved=not in_turn, patch=patch)


def constant(count: int):
    """A function of the inputs that counts the tokens before the video: as many as the probe saw."""
    return lambda inputs: count


def latent_axes(model: nn.Module, inputs: Inputs, base: SeenCall, places: Tensor) -> tuple[str, tuple[int, int, int]]:
    """The names of the latent clip's axes, such as "BCTHW", and the token grid; raises ValueError for another order."""
    latent, name = inputs["hidden_states"], type(model).__name__
    moved = []
    for axis in range(1, 5):
        changed = latent.clone()
        changed.select(axis, 0).add_(STEP)
        call = next(c for c in attention_calls(model, {**inputs, "hidden_states": changed}) if c.path == base.path)
        moved.append(moved_tokens(base, call)[places])
    whole = [axis for axis, tokens in enumerate(moved) if tokens.all()]
    require(len(whole) == 1, f"{name} cannot be probed: {len(whole)} axes of its latent clip move every token")
    rest = [tokens for axis, tokens in enumerate(moved) if axis != whole[0]]
    grid = tuple(len(places) // max(int(tokens.sum()), 1) for tokens in rest)
    index = torch.arange(len(places))
    _, height, width = grid
    expected = (index < height * width, index // width % height == 0, index % width == 0)
    require(
        math.prod(grid) == len(places) and all(torch.equal(*pair) for pair in zip(rest, expected, strict=True)),
        f"{name} cannot be probed: its {len(places)} video tokens are not in the order time, height, width",
    )
    names = list("THW")
    names.insert(whole[0], "C")
    return "B" + "".join(names), grid


def is_self_attention(before: SeenCall, after: SeenCall) -> bool:
    """Whether queries and keys are of the same tokens, and both move with the latent clip."""
    same = before.key.shape[2] == before.query.shape[2]
    keys = SeenCall(before.path, before.key, before.key), SeenCall(after.path, after.key, after.key)
    return same and bool(moved_tokens(before, after).any()) and bool(moved_tokens(*keys).any())


def moved_tokens(before: SeenCall, after: SeenCall) -> Bool[Tensor, " token"]:
    """Which tokens have another query in any row and head."""
    change = (after.query - before.query).abs().amax((0, 1, 3))
    return change > MOVED * before.query.abs().max()


class Watch(TorchFunctionMode):
    """Keeps the inputs of every attention call, with the module that is running."""

    def __init__(self):
        super().__init__()
        self.running: list[str] = []
        self.calls: list[SeenCall] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention and self.running:
            query, key = (args[i] if len(args) > i else kwargs[name] for i, name in enumerate(("query", "key")))
            self.calls.append(SeenCall(self.running[-1], query.detach().float(), key.detach().float()))
        return function(*args, **kwargs)


def attention_calls(model: nn.Module, inputs: Mapping[str, Any]) -> list[SeenCall]:
    """Every attention call of one forward that a module with a `processor` makes, in order."""
    watch = Watch()
    with ExitStack() as stack, torch.no_grad():
        for path, module in model.named_modules():
            if hasattr(module, "processor"):
                enter = module.register_forward_pre_hook(lambda *_, path=path: watch.running.append(path))
                leave = module.register_forward_hook(lambda *_: watch.running.pop() and None)
                stack.callback(enter.remove)
                stack.callback(leave.remove)
        with watch:
            model(**inputs)
    return watch.calls


def self_test(model: nn.Module, inputs: Inputs) -> list[LayerTest]:
    """What every layer does in a forward with these keyword arguments, after checking that its heads can be broken.

    Takes one forward a layer and one more. Raises ValueError naming the first layer that is not called, has another
    number of heads than it says, sees tokens that do not fit the family's grid, or changes nothing when all its heads
    are broken (an untrained model's zero gates; attention over one token); RuntimeError from a layer that never runs.
    """
    layers = attention_layers(model)
    tokens: dict[int, list[int]] = {}  # of every call of a layer

    def count(number: int):
        def look(call: AttentionCall, output: HeadTensor) -> HeadTensor:
            tokens.setdefault(number, []).append(call.query.shape[2])
            return output

        return look

    with torch.no_grad():
        # The layout is worked out, and refused if it does not fit, at every call.
        with replaced_attention(model, {number: count(number) for number in range(len(layers))}, needs_layout=True):
            plain = video_of(model(**inputs))
        rows = []
        for number, layer in enumerate(layers):
            with perturb_rows(model, Perturbation([HeadId(number, head) for head in range(layer.heads)])):
                effect = float((video_of(model(**inputs)) - plain).abs().max())
            require(
                effect > 0,
                f"breaking all heads of {layer.path} changes nothing: an untrained model's zero gates or output "
                "projections hide its attention, or it attends over a single token",
            )
            rows.append(LayerTest(layer.path, len(tokens[number]), tokens[number][0], effect))
    return rows
