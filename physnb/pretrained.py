"""Loading any video transformer by folder, hub id or `tiny:FAMILY`, and saying what its heads are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from diffusers import AutoModel
from torch import nn

from physnb.checkpoint import CONFIG, load_model
from physnb.config import HeadId, require
from physnb.families import FAMILIES, REFUSED, attention_layers, family_of
from physnb.hooks import check_model
from physnb.store import read_json
from physnb.tiny import tiny_model

TINY = "tiny:"
OTHERS = {"none": "video only", "first": "others, then video", "last": "video, then others"}


def load_transformer(source: str | Path) -> nn.Module:
    """The video transformer of a model folder (ours, a diffusers model or pipeline), a hub id or `tiny:FAMILY`.

    Weights are safetensors; nothing is unpickled. Raises ValueError saying what is wrong with the source.
    """
    source = str(source)
    if source.startswith(TINY):
        return tiny_model(source.removeprefix(TINY))
    folder = Path(source)
    is_model = folder.is_dir() and not (folder / "model_index.json").exists()  # rather than a pipeline or a hub id
    if not folder.is_dir():
        require(
            re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not folder.exists(),
            f"model {source} does not exist; name a folder, a hub id (owner/name) or {TINY}FAMILY",
        )
    elif is_model:
        config = read_json(folder / CONFIG)
        kind = config.get("_class_name") if isinstance(config, dict) else None
        if kind == "VideoDiT":
            return load_model(folder)
        require(
            kind in FAMILIES or kind in REFUSED,
            f"{folder / CONFIG} describes a {kind}, which is no known video transformer; choose another checkpoint",
        )
    try:
        model = AutoModel.from_pretrained(source, subfolder=None if is_model else "transformer", use_safetensors=True)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no transformer could be loaded from {source}: {reason}") from None
    return model.eval()


def head_report(model: nn.Module) -> dict[str, Any]:
    """The heads of a model: its layers with their paths and tokens, or the reason why they cannot be broken."""
    report: dict[str, Any] = dict(model=type(model).__name__, supported=True, reason="")
    try:
        layers = attention_layers(model)
        check_model(model)
    except ValueError as error:
        return report | dict(supported=False, reason=str(error), layers=[], heads=[])
    family = family_of(model)
    tokens = OTHERS.get(family.others, "video among others")
    axes = dict(thw="time x height x width", hw="height x width", t="time")
    rows = [dict(path=layer.path, heads=layer.heads, tokens=tokens, grid=axes[layer.axes]) for layer in layers]
    names = [str(HeadId(number, head)) for number, layer in enumerate(layers) for head in range(layer.heads)]
    return report | dict(layers=rows, heads=names)
