"""Captions of simulated clips and the closed vocabulary that turns them into token ids."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from physnb.config import require

CAPTIONS = {
    "uniform": "a red disc moves at constant speed",
    "parabola": "a red disc is thrown and falls",
    "collision": "a red disc and a blue disc collide",
}
NO_CAPTION = ""
MAX_WORDS = 12
VOCABULARY = tuple(sorted({word for caption in CAPTIONS.values() for word in caption.split()}))


def encode_captions(
    captions: tuple[str, ...] | list[str], vocabulary: tuple[str, ...] = VOCABULARY
) -> Int[Tensor, "batch word"]:
    """Word ids, 1-based and padded with 0; the empty caption is all 0. Raises ValueError on a word not in the list."""
    ids = torch.zeros(len(captions), MAX_WORDS, dtype=torch.long)
    for row, caption in zip(ids, captions, strict=True):
        words = caption.split()
        require(len(words) <= MAX_WORDS, f"caption {caption!r} has more than {MAX_WORDS} words")
        for i, word in enumerate(words):
            require(
                word in vocabulary, f"caption word {word!r} is not in the model's vocabulary: {', '.join(vocabulary)}"
            )
            row[i] = vocabulary.index(word) + 1
    return ids
