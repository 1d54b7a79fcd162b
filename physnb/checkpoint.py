"""Model folders: weights as safetensors, config and measured result as JSON, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from physnb.config import require
from physnb.memory import keep_freed_memory
from physnb.model import VideoDiT
from physnb.store import read_json, read_tensors, write_json, written_whole

WEIGHTS, CONFIG, RESULT = "diffusion_pytorch_model.safetensors", "config.json", "result.json"


def save_model(model: VideoDiT, folder: str | Path, result: dict | None = None) -> Path:
    """Write the model folder, with the measured `result` if there is one; raises ValueError if it exists."""
    folder = Path(folder)
    require(not folder.exists(), f"model folder {folder} exists; choose another name or delete it")
    with written_whole(folder) as temporary:
        model.save_pretrained(temporary)
        if result is not None:
            write_json(temporary / RESULT, result)
    return folder


def load_model(folder: str | Path) -> VideoDiT:
    """The model of a folder, ready to generate; raises ValueError naming the file that is missing or does not fit."""
    folder = Path(folder)
    require(folder.is_dir(), f"model folder {folder} does not exist; train one with `python -m physnb train`")
    config = read_json(folder / CONFIG)
    kind = config.get("_class_name") if isinstance(config, dict) else None
    require(kind == "VideoDiT", f"{folder / CONFIG} describes a {kind}, not a VideoDiT; choose another checkpoint")
    try:
        model = VideoDiT.from_config(config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} is not a usable VideoDiT config: {error}") from None
    tensors, _ = read_tensors(folder / WEIGHTS)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    differing = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    require(not differing, f"{folder / WEIGHTS} does not fit its config, for example at {', '.join(differing[:2])}")
    model.load_state_dict(tensors)
    keep_freed_memory()
    return model.eval()


def fingerprint(model: nn.Module) -> str:
    """12 hex digits of the SHA-256 of a model's class, weights and, if it is a model of diffusers, configuration."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256((type(model).__name__ + config_json(config)).encode())
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:12]


def config_json(config: Any) -> str:
    """A configuration of diffusers as canonical JSON, without what says where it came from; of others nothing.

    What is None is as if it were not there, so that a model stays what it was when its class learns a new option.
    """
    entries = config if isinstance(config, Mapping) else {}
    known = {name: value for name, value in entries.items() if not name.startswith("_") and value is not None}
    return json.dumps(known, sort_keys=True, default=str)
