"""Model folders: weights as safetensors, config and measured result as JSON, written whole or not at all."""

from __future__ import annotations

import hashlib
from pathlib import Path

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


def model_hash(folder: str | Path) -> str:
    """First 12 hex digits of the SHA-256 of a model folder's weights and config."""
    digest = hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        digest.update((Path(folder) / name).read_bytes())
    return digest.hexdigest()[:12]
