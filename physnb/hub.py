"""Where weights of others come from: a folder, a hub id, or a tiny model made here."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError

from physnb.config import require

TINY = "tiny:"
INDEX = "model_index.json"  # what makes a folder a pipeline
# What diffusers, transformers and safetensors raise for a source that is not what they expect.
LOADING_ERRORS = (OSError, ValueError, AttributeError, KeyError, ImportError, TypeError, SafetensorError)


def check_source(source: str) -> Path:
    """`source` as a path; raises ValueError unless it is a folder or reads like a hub id."""
    folder = Path(source)
    require(
        folder.is_dir() or (re.fullmatch(r"[\w.-]+/[\w.-]+", source) is not None and not folder.exists()),
        f"model {source} does not exist; name a folder, a hub id (owner/name) or {TINY}NAME",
    )
    return folder


def first_line(error: Exception) -> str:
    """The first line of an error's message, or its type if it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
