"""Training and generating in latents: the whole way on a tiny codec, and what cannot fit is named."""

import dataclasses

import pytest
import torch

from physnb.config import ModelConfig, TrainConfig
from physnb.data import simulate
from physnb.generate import generate
from physnb.space import Space, latent_config, open_space, space_of
from physnb.train import make_batch, train

SHAPE = ModelConfig(frames=8, size=16, patch=(2, 8, 8), width=32, depth=2, heads=4)


@pytest.fixture(scope="module")
def codec(tmp_path_factory) -> str:
    """Folder of a frame-by-frame autoencoder with random weights: 2 x 2 pixels in 4 channels."""
    from diffusers import AutoencoderKL

    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    torch.manual_seed(0)
    model = AutoencoderKL(**blocks, block_out_channels=(4, 8), norm_num_groups=4, mid_block_add_attention=False)
    folder = tmp_path_factory.mktemp("codec") / "small"
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(codec) -> TrainConfig:
    model = latent_config(codec, SHAPE)
    weights = dict(sources=("uniform", "orbit"), source_weights=(1.0, 1.0))
    return TrainConfig(model=model, codec=codec, steps=3, batch=4, warmup_steps=1, frames_given=2, **weights)


def test_a_shape_in_pixels_becomes_one_in_latents(codec):
    assert latent_config(codec, SHAPE) == dataclasses.replace(SHAPE, size=8, channels=4, patch=(1, 4, 4))
    assert latent_config(codec, latent_config(codec, SHAPE)) == latent_config(codec, SHAPE)


def test_a_batch_is_the_latents_of_its_clips(config):
    batch, space = make_batch(config, torch.arange(4).numpy()), open_space(config.model, config.codec)
    assert batch.clean.shape == batch.noise.shape == (4, 4, 8, 8, 8) and (space.frames, space.size) == (8, 16)
    alone = make_batch(config, torch.tensor([2]).numpy())
    torch.testing.assert_close(alone.clean[0], batch.clean[2])


def test_a_model_trained_in_latents_generates_pixels_from_its_folder(config, tmp_path):
    from physnb.checkpoint import load_model, save_model

    model = train(config, tmp_path / "run", progress=False)
    assert model.config.pixel_mean == 0 and model.config.codec == config.codec
    save_model(model, tmp_path / "model")
    loaded, cases = load_model(tmp_path / "model"), simulate("orbit", "id", range(3), frames=8, size=16)
    made = generate(loaded, cases, frames_given=2, steps=2)
    assert made.frames.shape == cases.frames.shape and torch.equal(made.frames[:, :2], cases.frames[:, :2])
    again = generate(model, cases[1:2], frames_given=2, steps=2)
    assert (again.frames[0].int() - made.frames[1].int()).abs().max() <= 1


def test_pixels_are_the_space_of_a_model_without_a_codec(model):
    space = space_of(model)
    assert space == Space(model.config.frames, model.config.size) and space.given(3) == 3
    clip = simulate("uniform", "id", [0], frames=model.config.frames, size=model.config.size)
    assert torch.equal(space.encode_start(clip, 3), clip.pixels())
    assert torch.equal(space.decode(clip.pixels()), clip.pixels())


def test_sources_with_an_end_are_encoded_once(config, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    ended = dataclasses.replace(config, clips=6, seed=3)
    batch = make_batch(ended, torch.arange(8).numpy())
    assert len(list((tmp_path / "physnb" / "latents").glob("*/latents-*.npy"))) == 2
    space = open_space(config.model, config.codec)
    monkeypatch.setattr(type(space.codec), "encode", lambda *_: pytest.fail("encoded again"))
    assert torch.equal(make_batch(ended, torch.arange(8).numpy()).clean, batch.clean)


def test_a_codec_of_other_channels_is_refused(codec):
    with pytest.raises(ValueError, match="have 4 channels, the model has 3; choose another codec"):
        open_space(SHAPE, codec)


def test_start_frames_that_a_video_codec_would_lose_are_refused():
    space = open_space(ModelConfig(frames=3, size=8, patch=(1, 2, 2), channels=4), "tiny:wan")
    assert space.frames == 9 and space.given(5) == 2
    with pytest.raises(ValueError, match="3 start frames do not fill the latents of AutoencoderKLWan: use 1 or 5"):
        space.given(3)
