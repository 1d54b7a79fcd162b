"""What a model is told of a clip in words: written at its caption level, encoded as it learnt to read them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from physnb.config import TextConfig
from physnb.data import Clip, encode_captions, write_captions
from physnb.model import VideoDiT
from physnb.text import load_text_encoder

Captions = Int[Tensor, "batch word"] | Float[Tensor, "batch channel"]  # word ids, or embeddings of whole captions


@dataclass(frozen=True)
class Captioner:
    """text: level and reader; vocabulary: the words of captions, where no pretrained encoder reads them."""

    text: TextConfig
    vocabulary: tuple[str, ...] = ()

    def write(self, clip: Clip, seed: int | None = None) -> tuple[str, ...]:
        """The caption of each clip; seed: of the phrasing, where the level has many."""
        return write_captions(clip, self.text.level, seed)

    def encode(self, captions: Iterable[str]) -> Captions:
        """Captions as the model takes them; the empty one is all zeros.

        Raises ValueError on a word that is not in the vocabulary.
        """
        captions = list(captions)
        if not self.text.encoder:
            return encode_captions(captions, self.vocabulary)
        return load_text_encoder(self.text.encoder).embed(captions)


def captioner_of(model: VideoDiT) -> Captioner:
    """How the captions of a model are written and encoded."""
    return Captioner(TextConfig(**(model.config.text or {})), tuple(model.config.vocabulary))
