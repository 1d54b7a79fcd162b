"""Breaking attention heads of any video transformer in `physnb.families` for a while, and looking at their maps.

Every attention module of diffusers (and ours) hands its work to a `processor`. Inside `perturb` the touched modules get
a copy of theirs in whose code the name of the attention function means another one, which calls the real function and
replaces the outputs of broken heads. Nothing is patched for others to see, torch.compile traces straight through, and
putting the processor back restores the model.
"""

from __future__ import annotations

import copy
import itertools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from jaxtyping import Float
from torch import Tensor, nn

from physnb.attention import AttentionCall, HeadTensor, broken_output
from physnb.config import HeadId, HeadSet, LayerSkip, Perturbation, require
from physnb.families import (
    AttentionLayer,
    Inputs,
    attention_layers,
    check_heads,
    family_of,
    forward_inputs,
    token_layout,
)

Strength = Float[Tensor, "batch layer head"]
Replace = Callable[[AttentionCall, HeadTensor], HeadTensor]  # (a call, its output) -> the output that the model sees
ATTENTION_NAMES = ("dispatch_attention_fn", "scaled_dot_product_attention")  # what processors call
IDENTITY = Perturbation(())
_numbers = itertools.count()


@dataclass
class Site:
    """One attention module whose calls are replaced: what is known of the forward it runs in."""

    model: nn.Module
    layer: AttentionLayer
    needs_layout: bool = False
    check_calls: bool = True
    inputs: Inputs | None = None  # of the model's present forward
    calls: int = 0  # of attention in that forward, counted where each clip has its own
    seen: bool = False  # whether any video attention was seen since this was last cleared


def strength_table(model: nn.Module, rows: Sequence[Perturbation | None]) -> Strength:
    """Strength u of every head in every batch row; a row that is None stays unperturbed."""
    layers = attention_layers(model)
    table = torch.zeros(len(rows), len(layers), max(layer.heads for layer in layers))
    for row, perturbation in zip(table, rows, strict=True):
        if perturbation is not None:
            for layer, head in check_heads(model, perturbation.heads):
                row[layer, head] = perturbation.strength
    return table


def strength_tables(model: nn.Module, rows: Sequence[Perturbation | None]) -> dict[Perturbation, Strength]:
    """The `strength_table` of the rows of each form, by form: what `perturb` takes."""
    forms = dict.fromkeys(row.form for row in rows if row is not None)
    return {
        form: strength_table(model, [row if row is not None and row.form == form else None for row in rows])
        for form in forms
    }


@contextmanager
def perturb(model: nn.Module, strength: Strength, form: Perturbation = IDENTITY) -> Iterator[None]:
    """Inside the block, row b of every batch sees lerp(O, O', strength[b, layer, head]) for each head's output O.

    strength: in [0, 1]; 0 changes no bit, 1 is the attention of `form`, whose own heads and strength are not read.
    A single row serves any batch. Blocks nest: an inner one acts on the outer one's output. Layers whose strength is 0
    throughout are not touched. What the model had before is back after the block, whatever happens inside.
    Raises ValueError for a table of the wrong shape or range and for a model that cannot be perturbed, RuntimeError if
    the model runs without calling the attention that was to be broken.
    """
    layers = attention_layers(model)
    heads = max(layer.heads for layer in layers)
    require(
        strength.ndim == 3 and strength.shape[1:] == (len(layers), heads),
        f"strength must be [batch, {len(layers)}, {heads}] for this model, got {list(strength.shape)}",
    )
    require(bool((strength >= 0).all() and (strength <= 1).all()), "perturbation strength u must be in [0, 1]")
    touched = [number for number in range(len(layers)) if bool(strength[:, number].any())]
    functions = {number: breaker(strength[:, number], form) for number in touched}
    with replaced_attention(model, functions, needs_layout=needs_layout(form)):
        yield


@contextmanager
def perturb_rows(model: nn.Module, rows: Sequence[Perturbation | None] | Perturbation) -> Iterator[None]:
    """Inside the block, row b of every batch has the heads of rows[b] broken; one perturbation serves every row.

    Rows may differ in heads, strength and form. Raises what `perturb` does.
    """
    rows = [rows] if isinstance(rows, Perturbation) else list(rows)
    with ExitStack() as stack:
        for form, strength in strength_tables(model, rows).items():
            stack.enter_context(perturb(model, strength, form))
        yield


def first_layer(model: nn.Module, weak: Perturbation | LayerSkip) -> int:
    """The first layer in which a weak model differs from the model itself; raises ValueError for one it lacks."""
    layers = len(attention_layers(model))
    if isinstance(weak, Perturbation):
        return min((head.layer for head in check_heads(model, weak.heads)), default=layers - 1)
    for layer in weak.layers:
        require(layer < layers, f"layer {layer} does not exist: the model has layers 0 to {layers - 1}")
    return min(weak.layers, default=layers - 1)


@contextmanager
def skip_layers(model: nn.Module, rows: Sequence[LayerSkip | None]) -> Iterator[None]:
    """Inside the block, the blocks of rows[b].layers pass on what they get in row b of every batch."""
    model = getattr(model, "_orig_mod", model)
    with ExitStack() as stack:
        for number, layer in enumerate(attention_layers(model)):
            skipped = [row for row, skip in enumerate(rows) if skip is not None and number in skip.layers]
            if skipped:
                block = model.get_submodule(layer.path.rpartition(".")[0])
                stack.callback(block.register_forward_hook(_pass_on(skipped), with_kwargs=True).remove)
        yield


def _pass_on(rows: list[int]):
    """A forward hook that puts a block's inputs in the place of its outputs, in some rows."""

    def hook(block: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        streams = forward_inputs(block, args, kwargs)
        streams = [value for value in streams.values() if isinstance(value, Tensor)]  # hidden states come first
        outputs = [output] if isinstance(output, Tensor) else list(output)
        for i, (before, after) in enumerate(zip(streams, outputs, strict=False)):
            require(
                isinstance(after, Tensor) and before.shape == after.shape,
                f"{type(block).__name__} cannot be skipped: what it returns is not what it gets",
            )
            outputs[i] = after.clone()
            outputs[i][rows] = before[rows]
        return outputs[0] if isinstance(output, Tensor) else type(output)(outputs)

    return hook


def needs_layout(form: Perturbation) -> bool:
    """Whether a form has to know where the video tokens are."""
    return form.kind == "blur" or form.axis != "all" or form.scope != "all"


def row_strength(strength: Float[Tensor, "batch head"], call: AttentionCall) -> Float[Tensor, "row head 1 1"]:
    """The strength of each row and head of a call: of its clip, where a clip is several rows or several calls."""
    u, rows = strength[:, : call.query.shape[1]], len(call.query)
    if call.clip is not None and len(u) > 1:
        u = u[call.clip : call.clip + 1]
    elif len(u) not in (1, rows):
        require(rows % len(u) == 0, f"strength has {len(u)} rows, the batch {rows}; give one row, or one a clip")
        u = u.repeat_interleave(rows // len(u), 0)
    return u.to(call.query)[:, :, None, None]


def breaker(strength: Float[Tensor, "batch head"], form: Perturbation) -> Replace:
    """The replacement that breaks the heads of one layer; it computes nothing for heads and rows of strength 0."""
    heads = strength.any(0).nonzero().flatten()

    def replace(call: AttentionCall, output: HeadTensor) -> HeadTensor:
        u = row_strength(strength, call)
        if form.kind == "identity" and not needs_layout(form):  # costs less than choosing
            return torch.lerp(output, call.own_value, u)
        rows = u.expand(len(output), -1, -1, -1).flatten(1).any(1).nonzero().flatten()
        part = call.select(rows, heads)
        normal = output[rows][:, heads]
        weights = u.expand(len(output), -1, -1, -1)[rows][:, heads]
        result = output.clone()
        result[rows[:, None], heads] = torch.lerp(normal, broken_output(part, form, normal), weights)
        return result

    return replace


class HeadSwitch:
    """Broken heads for a compiled model: strengths change in place, and nothing compiles again.

    `with HeadSwitch(model, form) as switch: fast = torch.compile(model); switch.strength.copy_(table)`
    The table has one row a clip of the batch and starts at 0. Every layer pays for its broken output at every call.
    """

    def __init__(self, model: nn.Module, form: Perturbation = IDENTITY, batch: int = 1):
        layers = attention_layers(model)
        device = next(model.parameters()).device
        self.strength = torch.zeros(batch, len(layers), max(layer.heads for layer in layers), device=device)
        self.context = replaced_attention(
            model,
            {number: self._breaker(number, form) for number in range(len(layers))},
            needs_layout=needs_layout(form),
            check_calls=False,
        )

    def _breaker(self, number: int, form: Perturbation) -> Replace:
        strength = self.strength[:, number]  # a view: it follows the table

        def replace(call: AttentionCall, output: HeadTensor) -> HeadTensor:
            return torch.lerp(output, broken_output(call, form, output), row_strength(strength, call))

        return replace

    def __enter__(self) -> HeadSwitch:
        self.context.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.context.__exit__(*error)


@contextmanager
def capture_attention(model: nn.Module, heads: HeadSet) -> Iterator[dict[HeadId, Float[Tensor, "batch query key"]]]:
    """A dict that fills with the attention map [batch, query, key] of each head at the next forward inside the block.

    Builds the maps explicitly, so for looking at single heads only. A later forward overwrites an earlier one.
    """
    maps: dict[HeadId, Tensor] = {}
    wanted: dict[int, list[int]] = {}
    for layer, head in check_heads(model, heads):
        wanted.setdefault(layer, []).append(head)

    def record(layer: int) -> Replace:
        def look(call: AttentionCall, output: HeadTensor) -> HeadTensor:
            for head in wanted[layer]:
                maps[HeadId(layer, head)] = call.attention_map(head).detach()
            return output

        return look

    with replaced_attention(model, {layer: record(layer) for layer in wanted}):
        yield maps


@contextmanager
def replaced_attention(
    model: nn.Module, functions: dict[int, Replace], *, needs_layout: bool = False, check_calls: bool = True
) -> Iterator[None]:
    """Inside the block, the attention of each layer in `functions` goes through its replacement."""
    model = getattr(model, "_orig_mod", model)
    layers = attention_layers(model)
    check_model(model)
    sites = {number: Site(model, layers[number], needs_layout, check_calls) for number in functions}

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        inputs = forward_inputs(module, args, kwargs) if needs_layout else None
        for site in sites.values():
            site.inputs, site.seen, site.calls = inputs, False, 0

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        blind = [site.layer.path for site in sites.values() if not site.seen]
        if blind:
            raise RuntimeError(f"{blind[0]} ran without calling the attention that was to be replaced")

    with ExitStack() as stack:
        if needs_layout or check_calls or family_of(model).rows == "calls":
            stack.callback(model.register_forward_pre_hook(before, with_kwargs=True).remove)
        if check_calls:
            stack.callback(model.register_forward_hook(after).remove)
        for number, site in sites.items():
            module, processor = site.layer.module, site.layer.module.processor
            stack.callback(setattr, module, "processor", processor)
            module.processor = rebound(processor, site, functions[number])
            # torch.compile looks a function's global names up in the module that its code says it is from.
            namespace = module.processor.namespace
            sys.modules[namespace.__name__] = namespace
            stack.callback(sys.modules.pop, namespace.__name__)
        yield


def rebound(processor: Any, site: Site, function: Replace) -> Any:
    """A copy of a processor in whose code the attention functions go through `function`."""
    kind = type(processor)
    original = kind.__call__ if not isinstance(processor, nn.Module) else kind.forward
    require(
        isinstance(original, types.FunctionType)
        and any(name in original.__code__.co_names for name in ATTENTION_NAMES),
        f"{site.layer.path} has a {kind.__name__}, which calls no scaled dot product attention that can be replaced",
    )
    family = family_of(site.model)
    namespace = types.ModuleType(f"{original.__module__}.replaced_{next(_numbers)}")
    namespace.__dict__.update(original.__globals__, __name__=namespace.__name__)
    dispatch = getattr(namespace, "dispatch_attention_fn", None)
    functional = getattr(namespace, "F", F)

    def replaced(query: Tensor, key: Tensor, value: Tensor, output: Tensor, mask, causal: bool, scale) -> Tensor:
        if family.latent == "cosmos3" and causal:
            return output  # the text's own attention
        require(
            query.shape[1] == site.layer.heads,
            f"{site.layer.path} runs {query.shape[1]} heads in place of its {site.layer.heads}; load the model unsplit",
        )
        layout = token_layout(site.model, site.layer, site.inputs, query.shape[2]) if site.needs_layout else None
        clip = site.calls if family.rows == "calls" else None
        if clip is not None:
            site.calls += 1
        if site.check_calls:  # not in a compiled model, which would compile again whenever this changes
            site.seen = True
        return function(AttentionCall(query, key, value, mask, causal, scale, layout, clip), output)

    def dispatched(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, *args, **kwargs):
        output = dispatch(query, key, value, attn_mask, dropout_p, is_causal, scale, *args, **kwargs)
        swapped = (x.transpose(1, 2) for x in (query, key, value, output))  # [batch, token, head, channel] there
        return replaced(*swapped, attn_mask, is_causal, scale).transpose(1, 2)

    def attended(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **kwargs):
        output = functional.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **kwargs
        )
        return replaced(query, key, value, output, attn_mask, is_causal, scale)

    shim = types.ModuleType(functional.__name__)
    shim.__dict__.update(functional.__dict__, scaled_dot_product_attention=attended)
    namespace.__dict__.update(F=shim, dispatch_attention_fn=dispatched)
    method = types.FunctionType(
        original.__code__, namespace.__dict__, original.__name__, original.__defaults__, original.__closure__
    )
    method.__kwdefaults__ = original.__kwdefaults__
    result = copy.copy(processor)
    result.__class__ = type(kind.__name__, (kind,), {original.__name__: method, "namespace": namespace})
    return result


def check_model(model: nn.Module) -> None:
    """Raise ValueError, with the reason and the fix, for a model set up so that heads could not be broken exactly."""
    name = type(model).__name__
    native = {member for member in AttentionBackendName if "native" in member.value} - {
        AttentionBackendName._NATIVE_NPU,
        AttentionBackendName._NATIVE_XLA,
    }
    active, _ = _AttentionBackendRegistry.get_active_backend()
    for layer in attention_layers(model):
        processor = layer.module.processor
        backend = getattr(processor, "_attention_backend", None) or active
        require(
            AttentionBackendName(backend) in native,
            f"{layer.path} uses the attention backend {AttentionBackendName(backend).value!r}; "
            "call model.set_attention_backend('native') first",
        )
        require(
            getattr(processor, "_parallel_config", None) is None,
            f"{layer.path} runs in context parallel, which splits heads or tokens; load {name} without it",
        )
    require(
        not getattr(model, "is_cache_enabled", False),
        f"{name} has a cache that reuses outputs between passes; call model.disable_cache() first",
    )
