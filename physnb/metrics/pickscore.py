"""PickScore (Kirstain et al. 2023, arXiv 2305.01569): how well frames fit a prompt in the eyes of people, not physics.

The published weights (yuvalkirstain/PickScore_v1, a fine-tuned CLIP-H of a billion parameters) were not run here: the
code is tested on small CLIP models of the same format. Use it on clips with natural prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from physnb.config import require
from physnb.data import Clip
from physnb.metrics.scores import Scores, scores

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # the published model comes without its own
TEXT_TOKENS = 77
NO_CAPTION = "the clip has no caption"


class PickScore:
    """score(text, image) = exp(logit_scale) e_text . e_image, both embeddings of length 1; 18 to 24 is usual.

    model, processor: a folder or a hub id each, the processor with tokenizer and image-processor files. Weights are
    safetensors, held in float32: half precision moves the third digit. Images are resized by PIL, as published.
    Raises ValueError saying what could not be loaded, or that the two do not belong together.
    """

    def __init__(
        self, model: str | Path = MODEL, processor: str | Path = PROCESSOR, *, device: str | torch.device = "cpu"
    ):
        self.tokenizer = _load(CLIPTokenizer, processor, "tokenizer")
        self.image_processor = _load(CLIPImageProcessorPil, processor, "image processor")
        settings = dict(use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        loaded, report = _load(CLIPModel, model, "CLIP model", **settings)
        absent = sorted(report["missing_keys"])  # transformers would fill these with random numbers
        require(not absent, f"model {model} lacks {', '.join(absent[:2])}; it is no complete CLIP model")
        self.model = loaded.eval().requires_grad_(False).to(device)
        text, vision = self.model.config.text_config, self.model.config.vision_config
        crop = self.image_processor.crop_size
        fits = (
            text.max_position_embeddings == TEXT_TOKENS
            and len(self.tokenizer) <= text.vocab_size
            and crop["height"] == crop["width"] == vision.image_size
        )
        require(
            fits,
            f"processor {processor} ({len(self.tokenizer)} tokens, {crop['height']} x {crop['width']} pixels) does not "
            f"fit model {model} ({text.vocab_size} tokens, {TEXT_TOKENS} at a time, {vision.image_size} pixels)",
        )

    @torch.inference_mode()
    def embed_texts(self, prompts: Sequence[str]) -> Float[Tensor, "prompt embedding"]:
        """Embeddings of length 1; prompts are padded and truncated to 77 tokens."""
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        )
        found = self.model.get_text_features(**tokens.to(self.model.device)).pooler_output
        return found / found.norm(dim=-1, keepdim=True)

    @torch.inference_mode()
    def embed_images(self, images: UInt8[Tensor, "image height width 3"]) -> Float[Tensor, "image embedding"]:
        """Embeddings of length 1 of RGB images."""
        pixels = self.image_processor(
            list(images.cpu().numpy()), input_data_format="channels_last", return_tensors="pt"
        )
        found = self.model.get_image_features(pixels["pixel_values"].to(self.model.device)).pooler_output
        return found / found.norm(dim=-1, keepdim=True)

    @property
    def scale(self) -> float:
        """exp(logit_scale), about 100 in the published model."""
        return float(self.model.logit_scale.exp())


def _load(kind: type, source: str | Path, name: str, **settings):
    """`kind` from a folder or hub id; whatever goes wrong is one ValueError."""
    try:
        return kind.from_pretrained(str(source), **settings)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"no {name} could be loaded from {source}: {reason}") from None


def metric_pickscore(
    generated: Clip, scorer: PickScore, prompts: Sequence[str] | None = None, *, frames: int = 8
) -> Scores:
    """PickScore of each clip, mean over `frames` frames spread evenly from first to last; higher is better.

    prompts: one a clip; None takes the clips' captions. A clip without a caption is not judged.
    The unit is that of exp(logit_scale) e_text . e_image: other tools leave out the scale, or divide by 26 or 100.
    Raises ValueError for no clip, a wrong number of prompts, or more frames than there are.
    Leaves out motion: frames are judged one by one, so their order does not count. Scores of different prompts are not
    comparable; compare clips of one prompt, or use prefer_within_prompt.
    """
    prompts = generated.captions if prompts is None else tuple(prompts)
    time, pixels = generated.frames.shape[1], min(generated.frames.shape[2:4])
    require(len(generated) > 0 and pixels > 0, f"there is nothing to score in frames {list(generated.frames.shape)}")
    require(len(prompts) == len(generated), f"{len(generated)} clips need as many prompts, got {len(prompts)}")
    require(1 <= frames <= time, f"frames to score must be in [1, {time}], the frames of a clip, got {frames}")
    numbers = np.linspace(0, time - 1, frames).round().astype(int)
    values = torch.full((len(generated),), torch.nan)
    texts = {prompt: scorer.embed_texts([prompt])[0] for prompt in dict.fromkeys(prompts) if prompt.strip()}
    for row, prompt in enumerate(prompts):
        if prompt in texts:
            cosines = scorer.embed_images(generated.frames[row, numbers]) @ texts[prompt]
            values[row] = scorer.scale * cosines.mean().cpu()
    found = scores("pickscore", f"exp(logit_scale) x cosine, mean of {frames} frames", values, NO_CAPTION)
    return replace(found, lower_is_better=False)


def prefer_within_prompt(found: Scores, prompts: Sequence[str]) -> Scores:
    """Chance that each clip is the one preferred among the k clips of its prompt: softmax over their PickScores.

    Judged where at least two clips of a prompt have a score; chance level is 1 / k.
    Raises ValueError for a wrong number of prompts.
    Leaves out how k differs between prompts: compare with 1 / k, not across prompts.
    """
    require(len(prompts) == len(found.values), f"{len(found.values)} scores need as many prompts, got {len(prompts)}")
    values = torch.full_like(found.values, torch.nan)
    for prompt in set(prompts):
        rows = torch.tensor([other == prompt for other in prompts]) & ~found.values.isnan()
        if rows.sum() >= 2:
            values[rows] = found.values[rows].softmax(0)
    reasons = tuple(
        None if value == value else why or "no other clip of its prompt has a score"
        for value, why in zip(values.tolist(), found.reasons, strict=True)
    )
    return Scores("pickscore_preference", "probability among the clips of a prompt", values, reasons, False)
