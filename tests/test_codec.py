import json
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from physnb.codec import (
    SHARD,
    TOGETHER,
    Codec,
    LatentCache,
    disc_images,
    latent_examples,
    load_codec,
    reconstruction_floor,
    signal_to_noise,
    train_small_codec,
)
from physnb.data import Clip, Mixture, simulate
from physnb.metrics import metric_trajectory
from physnb.tiny import random_module

WEIGHTS = "diffusion_pytorch_model.safetensors"
IMAGE_KINDS = {
    "AutoencoderTiny": dict(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ),
    "VQModel": dict(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        num_vq_embeddings=16,
    ),
    "AutoencoderDC": dict(
        latent_channels=4,
        encoder_block_out_channels=(8, 16, 32),
        decoder_block_out_channels=(8, 16, 32),
        encoder_layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        attention_head_dim=8,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_qkv_multiscales=((), (), ()),
        decoder_qkv_multiscales=((), (), ()),
    ),
}
VIDEO_KINDS = {
    "AutoencoderKLMochi": dict(
        latent_channels=4,
        out_channels=3,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
        latents_mean=[1.0, 0.0, 0.0, 0.0],
        latents_std=[2.0, 1.0, 1.0, 1.0],
    ),
    "AutoencoderKLCosmos": dict(
        latent_channels=4,
        encoder_block_out_channels=(8, 8, 8, 8),
        decode_block_out_channels=(8, 8, 8, 8),
        num_layers=1,
        resolution=64,
        attention_resolutions=(8,),
        latents_mean=None,
        latents_std=None,
    ),
    "AutoencoderKLHunyuanVideo15": dict(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8, 16),
        layers_per_block=1,
        spatial_compression_ratio=16,
        temporal_compression_ratio=4,
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small codec after a few steps: good enough for everything but its pictures."""
    folder = tmp_path_factory.mktemp("codec") / "small"
    train_small_codec(folder, steps=12, progress=False)
    return folder


@pytest.fixture(scope="module")
def codec(folder):
    return load_codec(folder)


@pytest.fixture(scope="module")
def discs() -> Clip:
    return Clip.concatenate([simulate(name, "id", range(2), frames=8, size=32) for name in ("uniform", "collision")])


def video_codec(name: str) -> Codec:
    if name in VIDEO_KINDS:
        return Codec(random_module(getattr(diffusers, name), seed=0, **VIDEO_KINDS[name]))
    return load_codec(f"tiny:{name}")


def noise(frames: int, size: int = 32, batch: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.rand(batch, 3, frames, size, size, generator=generator) * 2 - 1


def test_small_codec_is_an_ordinary_autoencoder_folder(folder, codec, discs):
    model = diffusers.AutoencoderKL.from_pretrained(folder)
    assert 100_000 < sum(p.numel() for p in model.parameters()) < 300_000
    assert not any(p.requires_grad for p in codec.model.parameters()) and not codec.model.training
    assert (codec.time_factor, codec.space_factor, codec.channels) == (1, 4, 4)
    pixels = discs.pixels()
    latents = codec.encode(pixels)
    assert latents.shape == (4, 4, 8, 8, 8) == (4, *codec.latent_shape(8, 32))
    # what diffusers itself gives, frame by frame, with the numbers of the configuration
    with torch.no_grad():
        raw = model.encode(pixels[:, :, 3]).latent_dist.mode()
    mean, std = (torch.tensor(model.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
    torch.testing.assert_close(latents[:, :, 3], (raw - mean) / std)
    with torch.no_grad():
        decoded = model.decode(raw).sample
    torch.testing.assert_close(codec.decode(latents, 8)[:, :, 3], decoded, atol=1e-4, rtol=1e-4)


def test_latents_have_about_unit_variance(codec):
    images = disc_images(seed=5, batch=4, size=32)
    latents = codec.encode(torch.cat([next(images) for _ in range(8)])[:, :, None])
    assert latents.mean(dim=(0, 2, 3, 4)).abs().max() < 0.3
    assert ((latents.std(dim=(0, 2, 3, 4)) > 0.7) & (latents.std(dim=(0, 2, 3, 4)) < 1.4)).all()


def test_training_lowers_the_error(tmp_path, codec, discs):
    worse = train_small_codec(tmp_path / "worse", steps=1, progress=False)
    pixels = discs.pixels()
    error = [(c.decode(c.encode(pixels), 8) - pixels).square().mean() for c in (worse, codec)]
    assert error[1] < 0.5 * error[0]


def test_same_seed_same_codec_and_no_other_random_state(tmp_path):
    state = torch.get_rng_state()
    one, other = (train_small_codec(tmp_path / n, steps=2, batch=2, progress=False) for n in ("one", "other"))
    assert one.fingerprint == other.fingerprint
    assert train_small_codec(tmp_path / "seed", steps=2, batch=2, seed=1, progress=False).fingerprint != one.fingerprint
    assert torch.equal(torch.get_rng_state(), state)


@settings(max_examples=10, deadline=None)
@given(order=st.permutations(range(4)))
def test_a_clip_is_coded_alike_in_any_batch_and_stays_as_it_was(codec, discs, order):
    pixels = discs.pixels()[:, :, :2]
    before, latents = pixels.clone(), codec.encode(pixels)
    torch.testing.assert_close(codec.encode(pixels[order]), latents[order], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(codec.encode(pixels[:1]), latents[:1], atol=1e-5, rtol=1e-5)
    assert torch.equal(codec.encode(pixels), latents) and torch.equal(pixels, before)


def test_work_is_cut_into_parts_that_fit(codec, discs, monkeypatch):
    seen = []
    encode = type(codec.model).encode
    monkeypatch.setattr(type(codec.model), "encode", lambda self, x: seen.append(len(x)) or encode(self, x))
    whole = codec.encode(discs.pixels())
    monkeypatch.setattr("physnb.codec.PIXELS_AT_ONCE", 5 * 32 * 32)
    parts = codec.encode(discs.pixels())
    assert seen == [32, *(5,) * 6, 2]
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", IMAGE_KINDS)
def test_image_autoencoders_of_every_kind(kind):
    codec = Codec(random_module(getattr(diffusers, kind), seed=0, **IMAGE_KINDS[kind]))
    pixels = noise(3)
    latents = codec.encode(pixels)
    assert latents.shape == (1, *codec.latent_shape(3, 32)) and latents.isfinite().all()
    assert codec.decode(latents, 3).shape == pixels.shape
    alone = torch.cat([codec.encode(pixels[:, :, t : t + 1]) for t in range(3)], dim=2)
    torch.testing.assert_close(latents, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "k", "space"),
    [
        ("wan", 4, 8),
        ("cogvideox", 4, 8),
        ("ltx", 8, 32),
        ("hunyuan", 4, 8),
        ("AutoencoderKLMochi", 6, 8),
        ("AutoencoderKLCosmos", 8, 8),
        ("AutoencoderKLHunyuanVideo15", 4, 16),
    ],
)
def test_video_autoencoders_of_every_kind(name, k, space):
    codec = video_codec(name)
    assert (codec.time_factor, codec.space_factor) == (k, space)
    frames = 1 + 2 * k
    pixels = noise(frames, size=space * 2)
    latents = codec.encode(pixels)
    assert latents.shape == (1, *codec.latent_shape(frames, space * 2)) == (1, 4, 3, 2, 2)
    assert codec.decode(latents, frames).shape == pixels.shape
    # no latent frame sees a later pixel frame, unless the codec leaks; and the start never does
    later = pixels.clone()
    later[:, :, 1 + k :] *= -1
    change = (codec.encode(later) - latents)[:, :, :2].abs().max()
    assert bool(change > 1e-3) == codec.leaks, change
    start = codec.encode_start(pixels, 2 * k)  # the frames after 1 + k do not fill a latent frame
    assert start.shape[2] == codec.given_frames(2 * k) == 2
    assert torch.equal(start, codec.encode_start(later, 2 * k))
    if not codec.leaks:
        torch.testing.assert_close(start, latents[:, :, :2], atol=1e-5, rtol=1e-5)
    assert codec.encode_start(pixels, 0).shape == (1, 4, 0, 2, 2)


def test_numbers_of_the_configuration_are_applied():
    mochi = video_codec("AutoencoderKLMochi")
    pixels = noise(1, 16)
    with torch.no_grad():
        raw = mochi.model.encode(pixels).latent_dist.mode()
    torch.testing.assert_close(mochi.encode(pixels)[:, 0], (raw[:, 0] - 1) / 2)
    torch.testing.assert_close(mochi.encode(pixels)[:, 1:], raw[:, 1:])
    ltx = load_codec("tiny:ltx")  # its numbers are buffers
    ltx.model.latents_mean += 0.5
    moved = Codec(ltx.model)
    torch.testing.assert_close(moved.encode(noise(1, 32)), ltx.encode(noise(1, 32)) - 0.5)
    image = random_module(diffusers.AutoencoderKL, seed=0, norm_num_groups=4, block_out_channels=(8,))
    image.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    codec = Codec(image)
    with torch.no_grad():
        raw = image.encode(pixels[:, :, 0]).latent_dist.mode()
    torch.testing.assert_close(codec.encode(pixels)[:, :, 0], (raw - 0.25) * 0.5)


def test_given_frames_counts_whole_latent_frames():
    wan, frames = load_codec("tiny:wan"), [0, 1, 2, 3, 4, 5, 8, 9]
    assert [wan.given_frames(n) for n in frames] == [0, 1, 1, 1, 1, 2, 2, 3]
    assert [wan.start_frames(n) for n in range(4)] == [0, 1, 5, 9]
    assert [wan.latent_frames(n) for n in (1, 5, 33)] == [1, 2, 9]


@pytest.mark.parametrize("frames", [2, 4, 32])
def test_frames_that_do_not_fit_are_named(frames):
    fit = {2: "1 or 5", 4: "1 or 5", 32: "29 or 33"}[frames]
    wan = load_codec("tiny:wan")
    for call in (lambda: wan.encode(noise(frames)), lambda: wan.decode(torch.zeros(1, 4, 1, 4, 4), frames)):
        with pytest.raises(ValueError, match=rf"{frames} frames do not fit AutoencoderKLWan, .* use {fit}"):
            call()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.zeros(1, 3, 2, 30, 32), "size 30 must be a multiple of 4"),
        (torch.zeros(1, 3, 2, 32, 33), "size 33 must be a multiple of 4"),
        (torch.zeros(1, 3, 0, 32, 32), "frames must be positive, got 0"),
        (torch.zeros(0, 3, 2, 32, 32), "pixels must be floats"),
        (torch.zeros(1, 1, 2, 32, 32), "pixels must be floats"),
        (torch.zeros(1, 3, 32, 32), "pixels must be floats"),
        (torch.zeros(1, 3, 2, 32, 32, dtype=torch.uint8), "pixels must be floats"),
        (torch.full((1, 3, 2, 32, 32), torch.nan), "no finite numbers"),
    ],
)
def test_bad_pixels_are_named(codec, pixels, message):
    with pytest.raises(ValueError, match=message):
        codec.encode(pixels)


@pytest.mark.parametrize("shape", [(1, 3, 2, 8, 8), (1, 4, 3, 8, 8), (0, 4, 2, 8, 8), (4, 2, 8, 8)])
def test_bad_latents_are_named(codec, shape):
    with pytest.raises(ValueError, match="latents of 2 frames must be"):
        codec.decode(torch.zeros(shape), 2)
    with pytest.raises(ValueError, match="no finite numbers"):
        codec.decode(torch.full((1, 4, 2, 8, 8), torch.inf), 2)


def test_bad_counts_are_named(codec, tmp_path, folder):
    with pytest.raises(ValueError, match="frames given must not be negative"):
        codec.given_frames(-1)
    with pytest.raises(ValueError, match="9 frames given of clips of 8"):
        codec.encode_start(noise(8), 9)
    with pytest.raises(ValueError, match="exists; choose another name"):
        train_small_codec(folder)
    with pytest.raises(ValueError, match="steps and batch must be positive"):
        train_small_codec(tmp_path / "new", steps=0)
    assert not (tmp_path / "new").exists()


def damage(folder, how: str) -> None:
    weights, config = folder / WEIGHTS, folder / "config.json"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:2000])
    elif how == "incomplete":
        tensors = load_file(weights)
        tensors.pop("decoder.conv_in.bias")
        save_file(tensors, weights)
    elif how == "pickled":
        torch.save(load_file(weights), weights.with_suffix(".bin"))
        weights.unlink()
    elif how == "no config":
        config.unlink()
    elif how == "no JSON":
        config.write_text("{")
    elif how == "transformer":
        config.write_text(json.dumps(dict(_class_name="WanTransformer3DModel")))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", "[Uu]nable to load weights"),
        ("incomplete", "weights are missing, for example decoder.conv_in.bias"),
        ("pickled", f"no file named {WEIGHTS} .*pickled weights are never read"),
        ("no config", "no file named config.json"),
        ("no JSON", "not a valid JSON"),
        ("transformer", "unknown autoencoder 'WanTransformer3DModel'; choose one of AutoencoderKL"),
    ],
)
def test_damaged_folder_is_named(folder, tmp_path, how, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    damage(copy, how)
    with pytest.raises(ValueError, match=f"no codec could be loaded from {copy}.*{message}"):
        load_codec(copy)


def test_other_sources(tmp_path, codec):
    with pytest.raises(ValueError, match="does not exist; name a folder"):
        load_codec(tmp_path / "nothing")
    with pytest.raises(ValueError, match="unknown autoencoder 'Linear'"):
        Codec(torch.nn.Linear(1, 1))
    # of a pipeline its vae
    (tmp_path / "model_index.json").write_text("{}")
    codec.model.save_pretrained(tmp_path / "vae")
    assert load_codec(tmp_path).fingerprint == codec.fingerprint


def test_floor_is_that_of_the_decoded_clips(codec, discs):
    floor = reconstruction_floor(codec, discs)
    decoded = discs.with_pixels(codec.decode(codec.encode(discs.pixels()), 8))
    found, own = metric_trajectory(decoded, discs), metric_trajectory(discs, discs)
    for name in ("position_error", "missing_rate"):
        assert floor[name] == found[name].estimate().to_dict() | dict(floor=own[name].estimate().mean)
    assert floor["position_error"]["floor"] < 0.02 and floor["missing_rate"]["floor"] == 0
    assert floor["psnr"]["judged"] == 4 and 5 < floor["psnr"]["mean"] < 60
    assert reconstruction_floor(codec, discs, mode="compat").keys() != floor.keys()
    with pytest.raises(ValueError, match="unknown mode"):
        reconstruction_floor(codec, discs, mode="other")


def test_signal_to_noise_of_a_known_error(discs):
    off = discs.frames.clone()
    off[0] ^= 1  # one grey level everywhere
    score = signal_to_noise(Clip(**vars(discs) | dict(frames=off)), discs)
    assert score.values[0] == pytest.approx(20 * np.log10(255)) and not score.lower_is_better
    assert score.values[1:].isnan().all() and "identical" in score.reasons[1]


class Finite:
    """A source of so many simulated clips that counts how often it is asked."""

    def __init__(self, count: int, name: str = "uniform", size: int = 16, seed: int = 0):
        self.name, self.count, self.size, self.seed, self.asked = name, count, size, seed, []

    def clips(self, numbers) -> Clip:
        self.asked.append(len(numbers))
        return simulate(self.name, "train", numbers, frames=4, size=self.size, seed=self.seed)


def test_cache_encodes_each_clip_once(codec, tmp_path):
    source = Finite(SHARD + 3)
    cache = LatentCache(codec, source, tmp_path)
    numbers = [SHARD + 1, 0, 5, 0]
    batch = cache.read(numbers)
    asked = [1, 3, *(TOGETHER,) * (SHARD // TOGETHER)]  # the first clip for the key, then whole files
    assert source.asked == asked
    assert torch.equal(cache.read(numbers).latents, batch.latents) and source.asked == asked
    clips = source.clips(np.array(numbers))
    torch.testing.assert_close(batch.latents, codec.encode(clips.pixels()), atol=1e-5, rtol=1e-5)
    assert batch.clips.captions == clips.captions and batch.clips.parameters == clips.parameters
    assert torch.equal(batch.clips.indices, clips.indices) and batch.clips.frames.shape[1] == 0
    # another process finds it done
    again = Finite(SHARD + 3)
    assert torch.equal(LatentCache(codec, again, tmp_path).read(numbers).latents, batch.latents)
    assert again.asked == [1]


def test_cache_is_filled_by_several_processes_in_parts(codec, tmp_path):
    for part, clips in ((1, SHARD), (0, SHARD + 1)):
        source = Finite(2 * SHARD + 1, size=8)
        LatentCache(codec, source, tmp_path).fill(part=part, parts=2, progress=False)
        assert sum(source.asked) == 1 + clips
    files = sorted(path.name for path in next(tmp_path.iterdir()).glob("*.npy"))
    assert files == ["latents-00000.npy", "latents-00001.npy", "latents-00002.npy"]


def test_cache_of_other_content_has_another_folder(codec, tmp_path):
    def folder_of(source, **settings):
        return LatentCache(codec, source, tmp_path, settings).folder

    usual = folder_of(Finite(4))
    assert folder_of(Finite(4)) == usual and usual.name.startswith("uniform-")
    others = [
        folder_of(Finite(5)),
        folder_of(Finite(4, seed=1)),
        folder_of(Finite(4, size=32)),
        folder_of(Finite(4), k=1),
    ]
    assert len({usual, *others}) == 5
    odd = Finite(4)
    odd.name, clips = "videos:/a/b c", odd.clips(np.arange(4))
    odd.clips = lambda numbers: clips[numbers.tolist()]
    assert folder_of(odd).name.startswith("videos-a-b-c-") and folder_of(odd).parent == tmp_path


@pytest.mark.parametrize("how", ["truncated", "foreign", "pickled", "without what is known"])
def test_damaged_cache_file_is_named(codec, tmp_path, how):
    cache = LatentCache(codec, Finite(2), tmp_path)
    cache.fill(progress=False)
    path = cache.folder / "latents-00000.npy"
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "foreign":
        np.save(path, np.zeros((2, 1, 1, 1, 1), dtype=np.float32))
    elif how == "pickled":
        np.save(path, np.array([{}, {}], dtype=object), allow_pickle=True)
    else:
        path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=f"{path} is damaged .* delete it"):
        cache.read([0])


def test_cache_refuses_what_it_cannot_hold(codec, tmp_path):
    with pytest.raises(ValueError, match="uniform is endless"):
        LatentCache(codec, SimpleNamespace(name="uniform", count=None), tmp_path)
    with pytest.raises(ValueError, match="no clip in uniform"):
        LatentCache(codec, SimpleNamespace(name="uniform", count=0), tmp_path)
    for numbers in ([], [-1], [4]):
        with pytest.raises(ValueError, match=r"clip numbers of uniform .* lie in \[0, 3\]"):
            LatentCache(codec, Finite(4), tmp_path).read(numbers)


def test_examples_of_a_mixture_are_its_clips_in_latents(codec, tmp_path):
    finite, endless = Finite(6), Finite(None, name="parabola")
    mixture = Mixture((finite, endless), (1.0, 1.0), seed=2)
    numbers = np.arange(10, 22)
    clips = mixture.examples(numbers)
    caches = {"uniform": LatentCache(codec, finite, tmp_path)}
    for given_caches in (None, caches):
        batch = latent_examples(mixture, numbers, codec, given_caches)
        torch.testing.assert_close(batch.latents, codec.encode(clips.pixels()), atol=1e-5, rtol=1e-5)
        assert batch.clips.scenarios == clips.scenarios and batch.clips.captions == clips.captions
        assert torch.equal(batch.clips.indices, clips.indices)
    assert len(set(clips.scenarios)) == 2
    with pytest.raises(ValueError, match="example numbers"):
        latent_examples(mixture, [-1], codec)
