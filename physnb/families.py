"""Where the attention heads of a video transformer are: ours, and every family in diffusers.

A model is a chain of layers, numbered in the order in which they run. Video self-attention is found by its path in the
model: cross-attention, text refiners and audio streams also call attention, and none of them belongs to the video.
In every family the video tokens are one run of a sequence, flattened time first, then rows, then columns.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from physnb.attention import TokenLayout
from physnb.config import HeadId, HeadSet, require

Inputs = Mapping[str, Any]  # what a model's forward was called with, by argument name


@dataclass(frozen=True)
class Family:
    """How one class of models is built.

    blocks: block lists in the order in which they run, with the path of the video self-attention in a block.
    latent: order of the axes of `hidden_states`; "packed" for [batch, token, channel] with the grid in other arguments.
    others: where other tokens lie in the sequence: "none", "first", "last", or a function of the inputs that counts
    those before the video.
    rows: what the attention's batch dimension holds: "clips"; "folded", the frames or places of each clip as rows of
    their own; or "calls", one attention call a clip.
    interleaved: whether the block lists run in turns, one block each.
    patch: latent frames, rows and columns of one token; None where the model's config tells.
    """

    blocks: tuple[tuple[str, str], ...]
    latent: str = "BCTHW"
    others: str | Callable[[Inputs], int] = "none"
    rows: str = "clips"
    interleaved: bool = False
    patch: tuple[int, int, int] | None = None


def _framepack_history(inputs: Inputs) -> int:
    """Tokens of the history frames, which lie before the video: embedded in patches of 2, 4 and 8 pixels."""
    count = 0
    for name, (frames, pixels) in dict(
        latents_clean=(1, 2), latents_history_2x=(2, 4), latents_history_4x=(4, 8)
    ).items():
        if inputs.get(name) is not None:
            time, height, width = inputs[name].shape[2:]
            count += math.ceil(time / frames) * math.ceil(height / pixels) * math.ceil(width / pixels)
    return count


WAN = Family((("blocks", "attn1"),))
COGVIDEOX = Family((("transformer_blocks", "attn1"),), latent="BTCHW", others="first")
HUNYUAN = Family((("transformer_blocks", "attn"), ("single_transformer_blocks", "attn")), others="last")
PURE = Family((("transformer_blocks", "attn1"),))

FAMILIES: dict[str, Family] = {
    "VideoDiT": Family((("blocks", "attn"),)),
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": Family((("vace_blocks", "attn1"), ("blocks", "attn1"))),
    "WanAnimateTransformer3DModel": WAN,
    "SkyReelsV2Transformer3DModel": WAN,
    "ChronoEditTransformer3DModel": WAN,
    "HeliosTransformer3DModel": Family((("blocks", "attn1"),), others="first"),  # the others are history frames
    "AnyFlowTransformer3DModel": Family((("blocks", "attn1"),), latent="BTCHW"),
    "CogVideoXTransformer3DModel": COGVIDEOX,
    "ConsisIDTransformer3DModel": COGVIDEOX,
    "EasyAnimateTransformer3DModel": Family((("transformer_blocks", "attn1"),), others="first"),
    "LTXVideoTransformer3DModel": Family((("transformer_blocks", "attn1"),), latent="packed"),
    "LTX2VideoTransformer3DModel": Family((("transformer_blocks", "attn1"),), latent="packed"),
    "HunyuanVideoTransformer3DModel": HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": Family(HUNYUAN.blocks, others=_framepack_history),
    "HunyuanVideo15Transformer3DModel": Family((("transformer_blocks", "attn"),), others="last"),
    "MochiTransformer3DModel": Family((("transformer_blocks", "attn1"),), others="last", rows="calls"),
    "LatteTransformer3DModel": Family(
        (("transformer_blocks", "attn1"), ("temporal_transformer_blocks", "attn1")), rows="folded", interleaved=True
    ),
    "AllegroTransformer3DModel": PURE,
    "CosmosTransformer3DModel": PURE,
    "Cosmos3OmniTransformer": Family((("layers", "self_attn"),), latent="cosmos3"),
    "Kandinsky5Transformer3DModel": Family((("visual_transformer_blocks", "self_attention"),), latent="BTHWC"),
    "MotifVideoTransformer3DModel": HUNYUAN,
    "MiniMaxH3Transformer3DModel": Family(
        (("transformer_blocks", "attn"),), latent="minimax", others=lambda inputs: int(inputs["video_indices"][0])
    ),
}
REFUSED = {
    "SanaVideoTransformer3DModel": "its self-attention is linear: there is no attention map to break",
    "SanaWMTransformer3DModel": "its self-attention is a gated delta rule: there is no attention map to break",
    "AnyFlowFARTransformer3DModel": "it calls flex attention, which the perturbations do not reach",
    "Kandinsky6SRTransformer3DModel": "it calls sparse attention, which the perturbations do not reach",
    "WanAnimate2Transformer3DModel": "it calls flex attention, which the perturbations do not reach",
}


@dataclass(frozen=True)
class AttentionLayer:
    """One video self-attention: its dotted path in the model, its module, and how many heads it has.

    axes: the grid axes that its tokens run over: "thw", or "hw" and "t" where attention is factorised.
    """

    path: str
    module: nn.Module
    heads: int
    axes: str = "thw"


def family_of(model: nn.Module) -> Family | None:
    """The family of a model, also of a subclass or a compiled one; None if it is in no list.

    Raises ValueError for a model whose heads cannot be perturbed.
    """
    for kind in type(model).__mro__:
        require(kind.__name__ not in REFUSED, f"{kind.__name__} cannot be perturbed: {REFUSED.get(kind.__name__)}")
        if kind.__name__ in FAMILIES:
            return FAMILIES[kind.__name__]
    return None


def attention_layers(model: nn.Module) -> tuple[AttentionLayer, ...]:
    """Every video self-attention of a model, in the order in which they run.

    Raises ValueError for a model that cannot be perturbed or is not known.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile wraps the model
    family = family_of(model)
    require(
        family is not None,
        f"{type(model).__name__} is not a known video transformer; call physnb.probe.learn_family(model, inputs), or "
        "add its Family to physnb.families.FAMILIES",
    )
    lists = []
    for name, path in family.blocks:
        folded = {"transformer_blocks": "hw", "temporal_transformer_blocks": "t"} if family.rows == "folded" else {}
        blocks = getattr(model, name, None) or ()
        lists.append(
            [
                AttentionLayer(f"{name}.{i}.{path}", module := block.get_submodule(path), head_count(module), axes)
                for axes in [folded.get(name, "thw")]
                for i, block in enumerate(blocks)
            ]
        )
    if family.interleaved:
        return tuple(layer for layers in zip(*lists, strict=True) for layer in layers)
    return tuple(layer for layers in lists for layer in layers)


def head_count(attention: nn.Module) -> int:
    """How many (query) heads an attention module has."""
    for name in ("heads", "num_heads", "num_attention_heads"):
        if isinstance(getattr(attention, name, None), int):
            return getattr(attention, name)
    raise ValueError(f"{type(attention).__name__} does not say how many heads it has")


def heads_of(model: nn.Module) -> HeadSet:
    """Every video self-attention head of a model, layer by layer."""
    return tuple(
        HeadId(number, head) for number, layer in enumerate(attention_layers(model)) for head in range(layer.heads)
    )


def check_heads(model: nn.Module, heads: HeadSet) -> HeadSet:
    """`heads`, if the model has all of them; otherwise a ValueError naming the first that it lacks."""
    layers = attention_layers(model)
    for layer, head in heads:
        require(
            0 <= layer < len(layers) and 0 <= head < layers[layer].heads,
            f"head {HeadId(layer, head)} does not exist: the model has layers 0 to {len(layers) - 1} "
            f"with heads 0 to {layers[0].heads - 1}",
        )
    return heads


def forward_inputs(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Inputs:
    """The arguments of a call of the model, by name."""
    return inspect.signature(model.forward).bind(*args, **kwargs).arguments


def video_of(output: Any) -> Tensor:
    """The video prediction in what a transformer returned: a tuple's first element, `sample`, or all of it."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.sample


def token_grid(model: nn.Module, inputs: Inputs) -> tuple[int, int, int]:
    """Video tokens along time, height and width for these inputs; raises ValueError where they do not tell."""
    family = family_of(model)
    if hasattr(model, "grid"):  # VideoDiT
        return model.grid
    if family.latent == "packed":
        grid = tuple(inputs.get(name) for name in ("num_frames", "height", "width"))
        require(
            all(isinstance(side, int) for side in grid) and math.prod(grid) == inputs["hidden_states"].shape[1],
            f"{type(model).__name__} was not told the grid of its {inputs['hidden_states'].shape[1]} packed tokens "
            "(num_frames, height, width); conditioning tokens in the sequence are not supported",
        )
        return grid
    if family.latent == "cosmos3":
        shapes = inputs["vision_token_shapes"]
        require(len(shapes) == 1, f"Cosmos 3 with {len(shapes)} clips in one sequence is not supported; pass one")
        return tuple(int(side) for side in shapes[0])
    if family.latent == "minimax":
        places = inputs["position_ids"][inputs["video_indices"]]
        grid = tuple(int(places[:, axis].unique().numel()) for axis in range(3))
        require(math.prod(grid) == len(places), "the position_ids of the video tokens do not form a grid")
        return grid
    shape = inputs["hidden_states"].shape
    sides = [shape[family.latent.index(axis)] for axis in "THW"]
    return tuple(side // patch for side, patch in zip(sides, patch_size(model), strict=True))


def patch_size(model: nn.Module) -> tuple[int, int, int]:
    """Latent frames, rows and columns of one token."""
    patch = family_of(model).patch or model.config.patch_size
    if isinstance(patch, int):
        return getattr(model.config, "patch_size_t", None) or 1, patch, patch
    return tuple(patch)


def token_layout(model: nn.Module, layer: AttentionLayer, inputs: Inputs, queries: int) -> TokenLayout:
    """How the video lies among `queries` tokens of a layer; raises ValueError if they do not fit the family."""
    family = family_of(model)
    time, height, width = token_grid(model, inputs)
    grid = {"thw": (time, height, width), "hw": (1, height, width), "t": (time, 1, 1)}[layer.axes]
    extra = queries - math.prod(grid)
    before = family.others(inputs) if callable(family.others) else extra if family.others == "first" else 0
    require(
        (extra == 0 or family.others != "none") and 0 <= before <= extra,
        f"{layer.path} sees {queries} tokens, which do not hold a grid of {' x '.join(map(str, grid))} as expected of "
        f"{type(model).__name__}",
    )
    return TokenLayout(grid, before)
