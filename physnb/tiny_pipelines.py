"""Whole text-to-video pipelines of diffusers at their smallest: every component real, every weight random.

For tests, for `tiny:NAME` and for trying the calls of a real pipeline without a download. What they show is noise: a
random decoder makes coloured grids, and no prompt means anything to a random text encoder.
"""

from __future__ import annotations

import json
import string
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn

from physnb.config import choose
from physnb.tiny import FAMILIES, random_module

LETTERS = string.ascii_letters + string.digits + string.punctuation
HEADS, LAYERS = 4, 3
SIZE = dict(num_attention_heads=HEADS, num_layers=LAYERS)


@dataclass(frozen=True)
class TinyPipeline:
    """A pipeline class with what it is made of, and the smallest clip that it makes sense to ask of it."""

    class_name: str
    build: Callable[[int], dict[str, Any]]  # components by name, from a seed
    clip: dict[str, int]  # height and width in pixels, frames


def tiny_pipeline(name: str, seed: int = 0) -> DiffusionPipeline:
    """A pipeline with small random components; the global random state stays as it was.

    The same name and seed give the same weights. Raises ValueError for a name that is not in PIPELINES.
    """
    tiny = PIPELINES[choose("tiny pipeline", name, PIPELINES)]
    return getattr(diffusers, tiny.class_name)(**tiny.build(seed))


def random_transformer(slug: str, seed: int, **more: Any) -> nn.Module:
    """The transformer of a family in `physnb.tiny`, with more layers and heads."""
    family = FAMILIES[slug]
    return random_module(getattr(diffusers, family.class_name), seed=seed, **family.config | SIZE | more)


# ---- text ----


def t5_tokenizer() -> transformers.T5Tokenizer:
    """A Unigram vocabulary of single letters behind the word mark: any English prompt is read, nothing is unknown."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]  # their places are fixed in T5
    return transformers.T5Tokenizer(vocab=[*special, ("▁", -2.0), *((letter, -3.0) for letter in LETTERS)], extra_ids=0)


def t5_encoder(kind: type[nn.Module], width: int, seed: int) -> nn.Module:
    """A T5 or UMT5 encoder of one layer for the vocabulary above."""
    sizes = dict(d_model=width, d_kv=width // 2, d_ff=2 * width, num_heads=2, num_layers=1)
    return random_module(kind, kind.config_class(**sizes, vocab_size=len(t5_tokenizer())), seed=seed)


def llama_tokenizer() -> transformers.LlamaTokenizer:
    """Byte pairs of the words that HunyuanVideo puts before a prompt.

    It cuts 95 tokens off the front, wherever they end: a vocabulary of letters would lose the prompt behind them.
    """
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Metaspace()
    words.train_from_iterator(
        [DEFAULT_PROMPT_TEMPLATE["template"]],
        trainers.BpeTrainer(
            vocab_size=200, special_tokens=special, initial_alphabet=["▁", *LETTERS], show_progress=False
        ),
    )
    model = json.loads(words.to_str())["model"]
    return transformers.LlamaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        pad_token="<pad>",
        padding_side="right",
    )


def clip_tokenizer() -> transformers.CLIPTokenizer:
    """Single lower-case letters, and the same at the end of a word."""
    letters = [letter for letter in LETTERS if letter not in string.ascii_uppercase]
    pieces = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


# ---- components ----


def wan_components(seed: int) -> dict[str, Any]:
    return dict(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(transformers.UMT5EncoderModel, 16, seed),
        vae=random_module(
            diffusers.AutoencoderKLWan,
            seed=seed,
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        transformer=random_transformer("wan", seed),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def cogvideox_components(seed: int) -> dict[str, Any]:
    return dict(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(transformers.T5EncoderModel, 8, seed),
        vae=random_module(
            diffusers.AutoencoderKLCogVideoX,
            seed=seed,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=1.0,
        ),
        # 226 text tokens, as its pipeline asks for
        transformer=random_transformer("cogvideox", seed, max_text_seq_length=226),
        scheduler=diffusers.CogVideoXDDIMScheduler(
            beta_schedule="scaled_linear",
            beta_start=0.00085,
            beta_end=0.012,
            clip_sample=False,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=3.0,
            timestep_spacing="trailing",
        ),
    )


def ltx_components(seed: int) -> dict[str, Any]:
    return dict(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_encoder(transformers.T5EncoderModel, 16, seed),
        vae=random_module(
            diffusers.AutoencoderKLLTXVideo,
            seed=seed,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
        ),
        transformer=random_transformer("ltx", seed, cross_attention_dim=32),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
    )


def hunyuan_components(seed: int) -> dict[str, Any]:
    llama, clip = llama_tokenizer(), clip_tokenizer()
    llama_config = transformers.LlamaConfig(
        vocab_size=len(llama),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,  # the pipeline skips the last two
        num_attention_heads=2,
        pad_token_id=llama.pad_token_id,
    )
    clip_config = transformers.CLIPTextConfig(
        vocab_size=len(clip),
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=clip.eos_token_id,
        bos_token_id=clip.bos_token_id,
        pad_token_id=clip.pad_token_id,
    )
    return dict(
        tokenizer=llama,
        text_encoder=random_module(transformers.LlamaModel, llama_config, seed=seed),
        tokenizer_2=clip,
        text_encoder_2=random_module(transformers.CLIPTextModel, clip_config, seed=seed),
        vae=random_module(
            diffusers.AutoencoderKLHunyuanVideo,
            seed=seed,
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            scaling_factor=1.0,
        ),
        transformer=random_transformer(
            "hunyuan", seed, num_single_layers=1, num_layers=LAYERS - 1, guidance_embeds=True
        ),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


PIPELINES: dict[str, TinyPipeline] = {
    "wan": TinyPipeline("WanPipeline", wan_components, dict(height=64, width=64, num_frames=9)),
    "cogvideox": TinyPipeline("CogVideoXPipeline", cogvideox_components, dict(height=64, width=64, num_frames=9)),
    "ltx": TinyPipeline("LTXPipeline", ltx_components, dict(height=96, width=128, num_frames=17)),
    "hunyuan": TinyPipeline("HunyuanVideoPipeline", hunyuan_components, dict(height=64, width=64, num_frames=9)),
}
