"""Captions as vectors of a frozen text encoder of transformers, each computed once and kept in memory and on disk."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer, PreTrainedTokenizerBase

from physnb.checkpoint import fingerprint
from physnb.config import require
from physnb.hub import INDEX, LOADING_ERRORS, TINY, check_source, first_line
from physnb.store import Database
from physnb.tiny_pipelines import tiny_pipeline

MEMORY_BYTES = 2**28  # of vectors kept in memory; those not used for longest go first
CLIP_TYPES = ("clip", "clip_text_model")  # both of its halves, the text half


class CaptionCache(Database):
    """A SQLite file of caption vectors, known by encoder, kind and caption; several processes may share it.

    Raises ValueError if the file is of another program. It grows by 4 bytes a number and is never cleared: leave it out
    where captions hardly repeat.
    """

    kind = "caption cache"
    tables = frozenset({"captions"})
    schema = """
CREATE TABLE IF NOT EXISTS captions (
    encoder TEXT NOT NULL,   -- fingerprint of weights, configuration and tokenizer
    kind TEXT NOT NULL,      -- "sentence": one vector, or "words": one a token
    caption TEXT NOT NULL,
    vectors BLOB NOT NULL,   -- float32, little-endian, a row a vector
    PRIMARY KEY (encoder, kind, caption)
);
"""

    def read(self, encoder: str, kind: str, captions: Iterable[str], width: int) -> dict[str, np.ndarray]:
        """The vectors [row, width] of those captions that are there; raises ValueError for damaged ones."""
        query = "SELECT vectors FROM captions WHERE encoder = ? AND kind = ? AND caption = ?"
        found = {}
        for caption in captions:
            with self._named():
                row = self.connection.execute(query, (encoder, kind, caption)).fetchone()
            if row is not None:
                whole = len(row[0]) % (4 * width) == 0
                require(whole, f"vectors of {caption!r} in {self.path} are damaged; delete the file")
                found[caption] = np.frombuffer(row[0], dtype="<f4").reshape(-1, width)
        return found

    def write(self, encoder: str, kind: str, vectors: dict[str, np.ndarray]) -> None:
        """Keep vectors [row, width] by caption, in one transaction; what is there already stays."""
        rows = [(encoder, kind, caption, sqlite3.Binary(v.astype("<f4").tobytes())) for caption, v in vectors.items()]
        with self._named(), self.connection:
            self.connection.executemany("INSERT OR IGNORE INTO captions VALUES (?, ?, ?, ?)", rows)


class TextEncoder:
    """A frozen text encoder with its tokenizer.

    pooling: how a caption becomes one vector: "pooled", the model's own output, for CLIP, which is trained to have its
    meaning there; else "mean" over the tokens, as sentence encoders are trained. width: numbers of a vector.
    limit: tokens that the encoder reads.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, cache: str | Path | None = None):
        """cache: the SQLite file of a CaptionCache; without one, vectors are kept in memory only."""
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.width = int(model.config.hidden_size)
        self.pooling = "pooled" if isinstance(model, transformers.CLIPTextModel) else "mean"
        self.limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", np.inf))
        self.cache = None if cache is None else CaptionCache(cache)
        self._known: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()  # least recently used first
        self._bytes = 0

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: torch.device | str) -> TextEncoder:
        """The same encoder on another device; vectors stay on the CPU."""
        self.model.to(device)
        return self

    @cached_property
    def fingerprint(self) -> str:
        """12 hex digits of weights, configuration and tokenizer."""
        config = {name: value for name, value in self.model.config.to_dict().items() if not name.startswith("_")}
        config.pop("transformers_version", None)
        words = self.tokenizer.backend_tokenizer.to_str()
        text = json.dumps([fingerprint(self.model), config, words], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def embed(self, captions: Sequence[str]) -> Float[Tensor, "batch width"]:
        """One vector of length 1 a caption, on the CPU; an empty caption is the zero vector: no caption.

        A caption's vector is the same to the bit in any batch. Raises ValueError for no captions and for one that is
        longer than the encoder reads.
        """
        return torch.from_numpy(np.concatenate(self._vectors(captions, "sentence")))

    def embed_tokens(self, captions: Sequence[str], words: int) -> Float[Tensor, "batch word width"]:
        """The last hidden state of every token, zeros behind a caption's last; an empty caption is all zeros.

        Raises ValueError as `embed` does, and for a caption of more than `words` tokens.
        """
        require(words > 0, f"words must be positive, got {words}")
        rows = self._vectors(captions, "words")
        longest = max(range(len(rows)), key=lambda row: len(rows[row]))
        require(
            len(rows[longest]) <= words,
            f"caption {captions[longest]!r} has {len(rows[longest])} tokens, more than words = {words}",
        )
        return torch.from_numpy(np.stack([np.pad(row, ((0, words - len(row)), (0, 0))) for row in rows]))

    def _vectors(self, captions: Sequence[str], kind: str) -> list[np.ndarray]:
        """The vectors [row, width] of each caption: from memory, else from disk, else computed."""
        require(not isinstance(captions, str) and len(captions) > 0, "captions must be a list of at least one text")
        captions = list(captions)
        found = {caption: self._known[kind, caption] for caption in captions if (kind, caption) in self._known}
        unknown = [caption for caption in dict.fromkeys(captions) if caption not in found]
        if unknown and self.cache is not None:
            found |= self.cache.read(self.fingerprint, kind, unknown, self.width)
        made = {caption: self._compute(caption, kind) for caption in unknown if caption not in found}
        if made and self.cache is not None:
            self.cache.write(self.fingerprint, kind, made)
        found |= made
        for caption in found:
            self._remember((kind, caption), found[caption])
        return [found[caption] for caption in captions]

    def _remember(self, key: tuple[str, str], vectors: np.ndarray) -> None:
        if key not in self._known:
            self._bytes += vectors.nbytes
        self._known[key] = vectors
        self._known.move_to_end(key)
        while self._bytes > MEMORY_BYTES:
            self._bytes -= self._known.popitem(last=False)[1].nbytes

    @torch.no_grad()
    def _compute(self, caption: str, kind: str) -> np.ndarray:
        """Vectors [row, width] of one caption; alone, because padding and other rows would change its last bits."""
        if not caption.strip():
            return np.zeros((1 if kind == "sentence" else 0, self.width), dtype=np.float32)
        tokens = self.tokenizer(caption, return_tensors="pt").to(self.device)
        count = tokens["input_ids"].shape[1]
        require(0 < count <= self.limit, f"caption {caption!r} has {count} tokens; the encoder reads 1 to {self.limit}")
        output = self.model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        words = output.last_hidden_state[0].float()  # [token, width]
        require(bool(words.isfinite().all()), f"caption {caption!r} gives no finite numbers; use float32")
        if kind == "words":
            return words.cpu().numpy()
        sentence = output.pooler_output[0].float() if self.pooling == "pooled" else words.mean(0)
        return nn.functional.normalize(sentence, dim=0)[None].cpu().numpy()


@lru_cache(maxsize=4)
def load_text_encoder(where: str | Path, cache: str | Path | None = None) -> TextEncoder:
    """The text encoder of a folder or hub id of transformers, of a pipeline's folder, or of `tiny:NAME`.

    T5, UMT5, BERT and its relatives, and CLIP's text half; of a pipeline its first encoder. cache: see TextEncoder.
    Asked again it gives the same object. Weights are safetensors; nothing is unpickled.
    Raises ValueError saying what is wrong with the source.
    """
    source = str(where)
    if source.startswith(TINY):
        pipe = tiny_pipeline(source.removeprefix(TINY))
        kind = type(pipe.text_encoder)
        require(is_text_encoder(pipe.text_encoder.config), f"{source} reads text by a {kind.__name__}, no text encoder")
        return TextEncoder(pipe.text_encoder, pipe.tokenizer, cache)
    pipeline = (check_source(source) / INDEX).exists()
    model_part, tokenizer_part = ("text_encoder", "tokenizer") if pipeline else ("", "")
    try:
        config = AutoConfig.from_pretrained(source, subfolder=model_part)
        require(is_text_encoder(config), f"it is a {config.model_type}, which is no text encoder")
        kind = transformers.CLIPTextModel if config.model_type in CLIP_TYPES else AutoModelForTextEncoding
        model, report = kind.from_pretrained(
            source, subfolder=model_part, use_safetensors=True, output_loading_info=True
        )
        missing = sorted(report["missing_keys"])
        require(not missing, f"weights are missing, for example {', '.join(missing[:2])}")
        tokenizer = AutoTokenizer.from_pretrained(source, subfolder=tokenizer_part)
        known = len(tokenizer) > len(tokenizer.all_special_tokens)  # without its files it is made empty, and no error
        require(known, "its tokenizer knows no words; copy the tokenizer's files again")
    except LOADING_ERRORS as error:
        message = f"no text encoder could be loaded from {source}: {first_line(error)} (pickled weights are never read)"
        raise ValueError(message) from None
    return TextEncoder(model, tokenizer, cache)


def is_text_encoder(config: transformers.PretrainedConfig) -> bool:
    """Whether transformers has an encoder of text for this configuration."""
    return config.model_type in CLIP_TYPES or type(config) in transformers.MODEL_FOR_TEXT_ENCODING_MAPPING
