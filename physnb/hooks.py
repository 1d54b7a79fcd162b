"""Attention heads of a model: listing them, breaking some of them for a while, and looking at their maps.

Attention is linear in its map, so breaking a head needs no map: with O the output of a head and V its values,
the map (1 - u) A + u I gives exactly lerp(O, V, u) (PAG, Ahn et al. 2024; SoftPAG, HeadHunter 2025, eq. 7).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from physnb.config import HeadId, HeadSet, Perturbation, require

Strength = Float[Tensor, "batch layer head"]


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules of a model in order; raises ValueError if it has none that can be perturbed."""
    layers = [module for module in model.modules() if hasattr(module, "perturb_output")]
    require(len(layers) > 0, f"{type(model).__name__} has no attention that can be perturbed; use a VideoDiT")
    return layers


def heads_of(model: nn.Module) -> HeadSet:
    """Every head of a model, layer by layer."""
    layers = attention_layers(model)
    return tuple(HeadId(layer, head) for layer, module in enumerate(layers) for head in range(module.heads))


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


def strength_table(model: nn.Module, rows: Sequence[Perturbation | None]) -> Strength:
    """Strength u of every head in every batch row; a row that is None stays unperturbed."""
    layers = attention_layers(model)
    table = torch.zeros(len(rows), len(layers), layers[0].heads)
    for row, perturbation in zip(table, rows, strict=True):
        if perturbation is not None:
            for layer, head in check_heads(model, perturbation.heads):
                row[layer, head] = perturbation.strength
    return table


@contextmanager
def _outputs_replaced(layers: list[nn.Module], replacements: list) -> Iterator[None]:
    """Install one `perturb_output` a layer and put back what was there, whatever happens inside."""
    before = [layer.perturb_output for layer in layers]
    try:
        for layer, replacement in zip(layers, replacements, strict=True):
            layer.perturb_output = replacement
        yield
    finally:
        for layer, function in zip(layers, before, strict=True):
            layer.perturb_output = function


def _after(first, second):
    return second if first is None else lambda output, q, k, v: second(first(output, q, k, v), q, k, v)


@contextmanager
def perturb(model: nn.Module, strength: Strength) -> Iterator[None]:
    """Inside the block, row b of every batch sees lerp(O, V, strength[b, layer, head]) for each head's output O.

    strength: in [0, 1]; 0 changes no bit, 1 replaces attention by the identity (PAG). A single row serves any batch.
    Blocks nest: an inner one acts on the outer one's output. Layers whose strength is 0 throughout are not touched.
    Raises ValueError for a table of the wrong shape or range.
    """
    layers = attention_layers(model)
    require(
        strength.ndim == 3 and strength.shape[1:] == (len(layers), layers[0].heads),
        f"strength must be [batch, {len(layers)}, {layers[0].heads}] for this model, got {list(strength.shape)}",
    )
    require(bool((strength >= 0).all() and (strength <= 1).all()), "perturbation strength u must be in [0, 1]")

    def towards_identity(u: Float[Tensor, "batch head"]):
        def replace(output: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.lerp(output, v, u[:, :, None, None].to(v))

        return replace

    touched = [layer for layer, u in enumerate(strength.unbind(1)) if bool(u.any())]
    modules = [layers[layer] for layer in touched]
    functions = [_after(layers[layer].perturb_output, towards_identity(strength[:, layer])) for layer in touched]
    with _outputs_replaced(modules, functions):
        yield


@contextmanager
def capture_attention(model: nn.Module, heads: HeadSet) -> Iterator[dict[HeadId, Float[Tensor, "batch token token"]]]:
    """A dict that fills with the attention map [batch, query, key] of each head at the next forward inside the block.

    Builds the maps explicitly, so for looking at single heads only. A later forward overwrites an earlier one.
    """
    layers, maps = attention_layers(model), {}
    wanted: dict[int, list[int]] = {}
    for layer, head in check_heads(model, heads):
        wanted.setdefault(layer, []).append(head)

    def record(layer: int):
        def look(output: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            for head in wanted[layer]:
                logits = q[:, head] @ k[:, head].transpose(1, 2) * q.shape[-1] ** -0.5
                maps[HeadId(layer, head)] = logits.softmax(-1).detach()
            return output

        return look

    functions = [_after(layers[layer].perturb_output, record(layer)) for layer in wanted]
    with _outputs_replaced([layers[layer] for layer in wanted], functions):
        yield maps
