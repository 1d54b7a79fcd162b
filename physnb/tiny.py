"""The smallest random model of every video transformer family, with inputs for one forward pass.

For tests, for `tiny:FAMILY` on the command line and for trying things without a download.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from physnb.config import choose, require
from physnb.model import VideoDiT

TIME, HEIGHT, WIDTH = GRID = (3, 4, 5)  # video tokens: all different, so that axes which change places show
TOKENS = TIME * HEIGHT * WIDTH
TEXT = 6  # text tokens
FILL = 0.2  # standard deviation of what takes the place of zero matrices


class Draw:
    """The source of a family's inputs: `batch` rows, all from one seed."""

    def __init__(self, batch: int, seed: int):
        self.batch = batch
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        """[batch, *shape], every row another draw."""
        return torch.randn(self.batch, *shape, generator=self.generator)

    def integers(self, below: int, *shape: int) -> Tensor:
        """Whole numbers from 0, [batch, *shape]."""
        return torch.randint(below, (self.batch, *shape), generator=self.generator)

    def latents(self, channels: int = 4, time: int = TIME, patch=(1, 2, 2), axes: str = "cthw") -> Tensor:
        """A latent clip of time x HEIGHT x WIDTH patches, [batch, *axes]: channel, time, height, width in any order."""
        clip = self.normal(channels, time * patch[0], HEIGHT * patch[1], WIDTH * patch[2])
        return clip.permute(0, *(1 + "cthw".index(axis) for axis in axes)).contiguous()

    def level(self, value: float, *shape: int) -> Tensor:
        """The same noise level everywhere, [batch, *shape]."""
        return torch.full((self.batch, *shape), value)

    def keep_all(self, *shape: int) -> Tensor:
        """A mask that hides nothing, [batch, *shape]."""
        return torch.ones(self.batch, *shape, dtype=torch.bool)

    def keep_text(self) -> Tensor:
        """A mask that hides the padding behind the text, [batch, TEXT]; two tokens, one in every second row."""
        lengths = TEXT - 2 + torch.arange(self.batch) % 2
        return torch.arange(TEXT) < lengths[:, None]


@dataclass(frozen=True)
class TinyFamily:
    """A family's smallest model; `layers` counts the self-attentions of the video tokens, in all blocks together."""

    name: str
    class_name: str  # in diffusers, or VideoDiT
    config: dict[str, Any]
    draw_inputs: Callable[[Draw], dict[str, Any]]
    grid: tuple[int, int, int] = GRID
    layers: int = 2
    heads: int = 2
    one_clip: bool = False  # the official model takes no batch

    def inputs(self, batch: int = 1, seed: int = 0) -> dict[str, Any]:
        """Keyword arguments of one forward pass on `batch` clips; the same seed and batch give the same ones."""
        require(batch > 0, f"batch must be positive, got {batch}")
        require(batch == 1 or not self.one_clip, f"{self.name} takes one clip at a time, got batch {batch}")
        return self.draw_inputs(Draw(batch, seed))


def tiny_model(slug: str, seed: int = 0) -> nn.Module:
    """The family's model with random weights, ready to run; the global random state stays as it was."""
    family = FAMILIES[choose("tiny family", slug, FAMILIES)]
    model_class = VideoDiT if family.class_name == "VideoDiT" else getattr(diffusers, family.class_name)
    return random_module(model_class, seed=seed, **family.config)


def random_module(kind: type[nn.Module], *args: Any, seed: int, **config: Any) -> nn.Module:
    """A module with random weights, also where its class begins with zeros; the global random state stays as it was.

    VideoDiT and Kandinsky 5 start with zero gates: attention then has exactly no effect, and no test of it could fail.
    Mochi and Cosmos start with zero positions.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind(*args, **config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, FILL, generator=generator)
    return module.eval()


def first_tensor(output: Any) -> Tensor:
    """The video prediction in whatever a forward pass returned: its first tensor, however deep."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    elif dataclasses.is_dataclass(output):
        output = [getattr(output, field.name) for field in dataclasses.fields(output)]
    require(isinstance(output, (list, tuple)), f"no tensor in a model output of type {type(output).__name__}")
    present = [part for part in output if part is not None]
    require(len(present) > 0, "no tensor in an empty model output")
    return first_tensor(present[0])


# Inputs; what fits in a line or two stands in the table below.


def clip_inputs(draw: Draw, text_width: int = 16, **latents: Any) -> dict[str, Any]:
    """What nearly all families take: latents, a noise level and embedded text."""
    text = draw.normal(TEXT, text_width)
    return dict(hidden_states=draw.latents(**latents), timestep=draw.level(500.0), encoder_hidden_states=text)


def wan_per_token_time_inputs(draw: Draw) -> dict[str, Any]:
    level = draw.level(500.0, TOKENS)
    level[:, : HEIGHT * WIDTH] = 0  # the first frame is given
    return clip_inputs(draw) | dict(timestep=level)


def wan_animate_inputs(draw: Draw) -> dict[str, Any]:
    return clip_inputs(draw, channels=12) | dict(  # noise, reference and mask; the first frame is the reference
        encoder_hidden_states_image=draw.normal(7, 16),
        pose_hidden_states=draw.latents(time=TIME - 1),
        face_pixel_values=draw.normal(3, 4 * (TIME - 2) + 1, 16, 16),  # frames before compression in time
    )


def helios_inputs(draw: Draw) -> dict[str, Any]:
    frames = torch.arange(6.0 + TIME).expand(draw.batch, -1)
    long, mid, short, noised = frames.split([4, 1, 1, TIME], dim=1)
    return clip_inputs(draw) | dict(
        indices_hidden_states=noised,
        indices_latents_history_short=short,
        indices_latents_history_mid=mid,
        indices_latents_history_long=long,
        latents_history_short=draw.latents(time=1),
        latents_history_mid=draw.latents(time=1),
        latents_history_long=draw.latents(time=4),
    )


def anyflow_inputs(draw: Draw) -> dict[str, Any]:
    levels = dict(timestep=draw.level(500.0, TIME), r_timestep=draw.level(250.0, TIME))  # from where to where it steps
    return clip_inputs(draw, axes="tchw") | levels


def cogvideox_inputs(draw: Draw, **latents: Any) -> dict[str, Any]:
    return clip_inputs(draw, text_width=8, axes="tchw", **latents)


def cogvideox_15_inputs(draw: Draw) -> dict[str, Any]:
    angles = torch.randn(TOKENS, 12, generator=draw.generator)
    return cogvideox_inputs(draw, patch=(2, 2, 2)) | dict(image_rotary_emb=(angles.cos(), angles.sin()))


def ltx_inputs(draw: Draw) -> dict[str, Any]:
    """Tokens instead of a clip, their grid beside them."""
    tokens = dict(hidden_states=draw.normal(TOKENS, 4), num_frames=TIME, height=HEIGHT, width=WIDTH)
    return clip_inputs(draw) | tokens | dict(encoder_attention_mask=draw.keep_text())


def ltx2_inputs(draw: Draw) -> dict[str, Any]:
    audio = dict(audio_hidden_states=draw.normal(9, 4), audio_encoder_hidden_states=draw.normal(TEXT, 16))
    return ltx_inputs(draw) | audio | dict(audio_num_frames=9, fps=25.0)


def hunyuan_inputs(draw: Draw) -> dict[str, Any]:
    text = dict(encoder_attention_mask=draw.keep_text(), pooled_projections=draw.normal(8))
    return clip_inputs(draw) | text | dict(guidance=draw.level(6000.0))


def framepack_inputs(draw: Draw) -> dict[str, Any]:
    history_4x, history_2x, clean, noised = torch.arange(12.0 + TIME).split([8, 2, 2, TIME])  # for all rows
    return hunyuan_inputs(draw) | dict(
        image_embeds=draw.normal(7, 16),
        indices_latents=noised,
        latents_clean=draw.latents(time=2),
        indices_latents_clean=clean,
        latents_history_2x=draw.latents(time=2),
        indices_latents_history_2x=history_2x,
        latents_history_4x=draw.latents(time=8),
        indices_latents_history_4x=history_4x,
    )


def hunyuan_15_inputs(draw: Draw) -> dict[str, Any]:
    return clip_inputs(draw, patch=(1, 1, 1)) | dict(
        encoder_attention_mask=draw.keep_text(),
        encoder_hidden_states_2=draw.normal(4, 8),
        encoder_attention_mask_2=draw.keep_all(4),
        image_embeds=torch.zeros(draw.batch, 3, 12),  # zeros: no image given
    )


def allegro_inputs(draw: Draw) -> dict[str, Any]:
    masks = dict(attention_mask=draw.keep_all(TIME, 2 * HEIGHT, 2 * WIDTH), encoder_attention_mask=draw.keep_text())
    return clip_inputs(draw, text_width=8) | masks


def kandinsky5_inputs(draw: Draw) -> dict[str, Any]:
    places = dict(visual_rope_pos=[torch.arange(tokens) for tokens in GRID], text_rope_pos=torch.arange(TEXT))
    return clip_inputs(draw, axes="thwc") | places | dict(pooled_projections=draw.normal(8))


def packed_places(before: int) -> Tensor:
    """Time, height and width of every token when `before` others precede the video in one sequence, [token, 3]."""
    axes = before + torch.arange(TIME), torch.arange(HEIGHT), torch.arange(WIDTH)
    video = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 2)
    return torch.cat([torch.arange(before)[:, None] * torch.tensor([1, 0, 0]), video])


def cosmos3_inputs(draw: Draw) -> dict[str, Any]:
    video = torch.arange(TEXT, TEXT + TOKENS)
    return dict(
        input_ids=draw.integers(32, TEXT)[0],
        text_indexes=torch.arange(TEXT),
        position_ids=packed_places(TEXT).T,
        und_len=TEXT,
        sequence_length=TEXT + TOKENS,
        vision_tokens=[draw.latents(2, patch=(1, 1, 1))],
        vision_token_shapes=[GRID],
        vision_sequence_indexes=video,
        vision_mse_loss_indexes=video,
        vision_timesteps=torch.ones(TOKENS),
        vision_noisy_frame_indexes=[torch.arange(TIME)],
    )


def minimax_h3_inputs(draw: Draw) -> dict[str, Any]:
    counts = [TEXT, 5, TOKENS]  # text, audio, video
    text, audio, video = torch.arange(sum(counts)).split(counts)
    return dict(
        hidden_states=draw.normal(TOKENS, 16),
        audio_hidden_states=draw.normal(len(audio), 6),
        encoder_hidden_states=draw.normal(TEXT, 8),
        timestep=torch.tensor([0.7, 0.3]),  # the levels there are; every token has the first
        timestep_indices=torch.zeros(sum(counts), dtype=torch.long),
        token_tags=torch.tensor([1, 2, 0]).repeat_interleave(torch.tensor(counts)),
        position_ids=packed_places(TEXT + len(audio)).float(),
        text_indices=text,
        audio_indices=audio,
        video_indices=video,
    )


def videodit_inputs(draw: Draw) -> dict[str, Any]:
    given = torch.zeros(draw.batch, 6)
    given[:, :2] = 1
    clips = dict(sample=draw.normal(3, 6, 20, 20), start=draw.normal(3, 6, 20, 20))
    return clips | dict(sigma=draw.level(0.5), given=given, caption=draw.integers(5, TEXT))


# fmt: off
# A row: name, class, config, inputs. One setting a line would fill ten pages.
SIZES = dict(in_channels=4, out_channels=4, num_attention_heads=2, num_layers=2)
WAN = SIZES | dict(attention_head_dim=12, text_dim=16, freq_dim=32, ffn_dim=32)  # heads split in three even parts
COGVIDEOX = SIZES | dict(
    attention_head_dim=8, time_embed_dim=2, text_embed_dim=8, max_text_seq_length=TEXT, patch_size=2,
    sample_width=2 * WIDTH, sample_height=2 * HEIGHT, sample_frames=4 * (TIME - 1) + 1)
LTX = SIZES | dict(attention_head_dim=8, cross_attention_dim=16, caption_channels=16)
HUNYUAN = SIZES | dict(  # a block with weights of its own for text, a block without
    num_layers=1, num_single_layers=1, num_refiner_layers=1, attention_head_dim=10, rope_axes_dim=(2, 4, 4),
    text_embed_dim=16, pooled_projection_dim=8)

FAMILIES: dict[str, TinyFamily] = {
    "videodit": TinyFamily(
        "VideoDiT", "VideoDiT",
        dict(frames=6, size=20, patch=(2, 5, 4), width=24, depth=2, heads=2, vocabulary=("a", "red", "blue", "disc")),
        videodit_inputs),
    "wan": TinyFamily("Wan 2.1 and 2.2", "WanTransformer3DModel", WAN, clip_inputs),
    "wan-per-token-time": TinyFamily(
        "Wan 2.2 with a noise level per token", "WanTransformer3DModel", WAN, wan_per_token_time_inputs),
    "wan-i2v": TinyFamily(
        "Wan 2.1 from an image", "WanTransformer3DModel", WAN | dict(image_dim=8, added_kv_proj_dim=24),
        lambda draw: clip_inputs(draw) | dict(  # the last 512 tokens are text, whatever there is
            encoder_hidden_states=draw.normal(512, 16), encoder_hidden_states_image=draw.normal(7, 8))),
    "wan-vace": TinyFamily(
        "Wan VACE", "WanVACETransformer3DModel", WAN | dict(num_layers=3, vace_layers=[0, 2], vace_in_channels=8),
        lambda draw: clip_inputs(draw) | dict(control_hidden_states=draw.latents(channels=8)), layers=5),
    "wan-animate": TinyFamily(
        "Wan Animate", "WanAnimateTransformer3DModel",
        WAN | dict(
            in_channels=12, latent_channels=4, image_dim=16, motion_encoder_size=16, motion_style_dim=8, motion_dim=4,
            motion_encoder_channel_sizes={"4": 16, "8": 16, "16": 16}, motion_encoder_dim=16,
            face_encoder_hidden_dim=16, face_encoder_num_heads=2, inject_face_latents_blocks=2),
        wan_animate_inputs),
    "skyreels": TinyFamily("SkyReels V2", "SkyReelsV2Transformer3DModel", WAN, clip_inputs),
    "skyreels-causal": TinyFamily(
        "SkyReels V2, blocks of frames in order", "SkyReelsV2Transformer3DModel", WAN | dict(num_frame_per_block=TIME),
        lambda draw: clip_inputs(draw, time=2 * TIME), (2 * TIME, HEIGHT, WIDTH)),
    "chronoedit": TinyFamily("ChronoEdit", "ChronoEditTransformer3DModel", WAN, clip_inputs),
    "helios": TinyFamily("Helios", "HeliosTransformer3DModel", WAN | dict(rope_dim=(4, 4, 4)), helios_inputs),
    "anyflow": TinyFamily("AnyFlow", "AnyFlowTransformer3DModel", WAN, anyflow_inputs),
    "cogvideox": TinyFamily("CogVideoX 1.0", "CogVideoXTransformer3DModel", COGVIDEOX, cogvideox_inputs),
    "cogvideox-1.5": TinyFamily(
        "CogVideoX 1.5", "CogVideoXTransformer3DModel",
        COGVIDEOX | dict(attention_head_dim=12, patch_size_t=2, use_rotary_positional_embeddings=True),
        cogvideox_15_inputs),
    "consisid": TinyFamily(
        "ConsisID", "ConsisIDTransformer3DModel",
        COGVIDEOX | dict(
            cross_attn_interval=1, is_train_face=True, cross_attn_dim_head=1, cross_attn_num_heads=1, LFE_id_dim=2,
            LFE_vit_dim=2, LFE_depth=5, LFE_dim_head=8, LFE_num_heads=2, LFE_num_id_token=1, LFE_num_querie=1,
            LFE_output_dim=10, LFE_ff_mult=1, LFE_num_scale=1),
        lambda draw: cogvideox_inputs(draw) | dict(id_vit_hidden=[draw.normal(2, 2)], id_cond=draw.normal(2))),
    "easyanimate": TinyFamily(
        "EasyAnimate", "EasyAnimateTransformer3DModel",
        SIZES | dict(attention_head_dim=16, mmdit_layers=1, patch_size=2, text_embed_dim=16, time_embed_dim=8),
        clip_inputs),
    "ltx": TinyFamily("LTX-Video", "LTXVideoTransformer3DModel", LTX, ltx_inputs),
    "ltx2": TinyFamily(
        "LTX-2", "LTX2VideoTransformer3DModel",
        LTX | dict(
            audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=4,
            audio_cross_attention_dim=8, rope_double_precision=False),
        ltx2_inputs),
    "hunyuan": TinyFamily("HunyuanVideo", "HunyuanVideoTransformer3DModel", HUNYUAN, hunyuan_inputs),
    "hunyuan-i2v": TinyFamily(
        "HunyuanVideo from an image", "HunyuanVideoTransformer3DModel",
        HUNYUAN | dict(image_condition_type="token_replace"), hunyuan_inputs),
    "framepack": TinyFamily(
        "HunyuanVideo Framepack", "HunyuanVideoFramepackTransformer3DModel",
        HUNYUAN | dict(has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True), framepack_inputs),
    "hunyuan-1.5": TinyFamily(
        "HunyuanVideo 1.5", "HunyuanVideo15Transformer3DModel",
        SIZES | dict(
            attention_head_dim=8, rope_axes_dim=(2, 2, 4), num_refiner_layers=1, mlp_ratio=2.0, patch_size=1,
            text_embed_dim=16, text_embed_2_dim=8, image_embed_dim=12, target_size=16, task_type="t2v"),
        hunyuan_15_inputs),
    "mochi": TinyFamily(
        "Mochi", "MochiTransformer3DModel",
        SIZES | dict(
            out_channels=None, attention_head_dim=8, pooled_projection_dim=16, text_embed_dim=16, time_embed_dim=4,
            max_sequence_length=16),
        lambda draw: clip_inputs(draw) | dict(encoder_attention_mask=draw.keep_text())),
    "motif": TinyFamily(
        "Motif-Video", "MotifVideoTransformer3DModel",
        SIZES | dict(
            num_layers=1, num_single_layers=1, attention_head_dim=12, rope_axes_dim=(4, 4, 4), mlp_ratio=2.0,
            patch_size=1, text_embed_dim=16, image_embed_dim=4),
        lambda draw: clip_inputs(draw, patch=(1, 1, 1))),
    "latte": TinyFamily(  # one spatial and one temporal block
        "Latte", "LatteTransformer3DModel",
        SIZES | dict(
            num_layers=1, attention_head_dim=4, attention_bias=True, sample_size=8, video_length=TIME, patch_size=2,
            caption_channels=8, cross_attention_dim=8, num_embeds_ada_norm=1000, norm_type="ada_norm_single",
            norm_elementwise_affine=False, norm_eps=1e-6, activation_fn="gelu-approximate"),
        lambda draw: clip_inputs(draw, text_width=8)),
    "allegro": TinyFamily(
        "Allegro", "AllegroTransformer3DModel",
        SIZES | dict(
            attention_head_dim=12, cross_attention_dim=24, caption_channels=8, sample_width=2 * WIDTH,
            sample_height=2 * HEIGHT, sample_frames=TIME),
        allegro_inputs),
    "cosmos": TinyFamily(
        "Cosmos 1, 2 and 2.5", "CosmosTransformer3DModel",
        SIZES | dict(
            attention_head_dim=12, mlp_ratio=2.0, text_embed_dim=16, adaln_lora_dim=4, max_size=(4, 32, 32),
            concat_padding_mask=False),  # True needs torchvision
        lambda draw: clip_inputs(draw) | dict(attention_mask=draw.keep_text(), fps=30)),
    "cosmos3": TinyFamily(
        "Cosmos 3", "Cosmos3OmniTransformer",
        dict(
            num_attention_heads=4, num_key_value_heads=2, head_dim=6, num_hidden_layers=2, hidden_act="relu2",
            hidden_size=24, intermediate_size=24, latent_channel=2, latent_patch_size=1, patch_latent_dim=2,
            qk_norm_for_text=False, rms_norm_eps=1e-5, rope_axes_dim=[1, 1, 1], rope_theta=1e8, vocab_size=32),
        cosmos3_inputs, heads=4, one_clip=True),
    "kandinsky5": TinyFamily(
        "Kandinsky 5", "Kandinsky5Transformer3DModel",
        dict(
            in_visual_dim=4, out_visual_dim=4, in_text_dim=16, in_text_dim2=8, time_dim=16, patch_size=(1, 2, 2),
            model_dim=24, axes_dims=(4, 4, 4), ff_dim=32, num_text_blocks=1, num_visual_blocks=2),
        kandinsky5_inputs),
    "minimax-h3": TinyFamily(
        "MiniMax-H3", "MiniMaxH3Transformer3DModel",
        dict(
            num_attention_heads=2, attention_head_dim=16, num_layers=2, num_refiner_layers=1, hidden_size=24,
            ffn_dim=32, in_channels=4, audio_in_channels=6, patch_size=(1, 2, 2), text_dim=8, freq_dim=8,
            time_embed_hidden_dim=24, time_embed_dim=16, rope_freq_dim=2),
        minimax_h3_inputs),
    "sana-video": TinyFamily(
        "SANA-Video (linear attention)", "SanaVideoTransformer3DModel",
        SIZES | dict(
            attention_head_dim=12, num_cross_attention_heads=2, cross_attention_head_dim=12, cross_attention_dim=24,
            caption_channels=16, sample_size=8),
        clip_inputs),
}
# fmt: on
