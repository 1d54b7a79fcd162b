"""Sources by name: every one opens, its captions can be read at every level, and mixtures of all train and resume."""

import dataclasses

import h5py
import numpy as np
import pytest
import torch
from video_files import ramp, write_video

from physnb.config import CAPTION_LEVELS, TextConfig, preset
from physnb.data import encode_captions, simulate, write_captions
from physnb.data.catalogue import NAMES, open_source, words_of_sources
from physnb.data.phyworld import simulate_phyworld
from physnb.train import make_batch, train, training_stream

SHAPE = dict(frames=8, size=16)
SMOKE = preset("smoke").train


@pytest.fixture(scope="module", autouse=True)
def fluid_cache(tmp_path_factory):
    """Fluids are cached in a folder of this file's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """Three videos of 3 s in two class folders."""
    folder = tmp_path_factory.mktemp("videos")
    for name in ("riding_a_bike", "JumpRope"):
        (folder / name).mkdir()
    for name in ("riding_a_bike/one.mp4", "riding_a_bike/two.mp4", "JumpRope/three.webm"):
        write_video(folder / name, ramp(75), fps=25)
    return folder


@pytest.fixture(scope="module")
def phyworld(tmp_path_factory):
    path = tmp_path_factory.mktemp("phyworld") / "uniform.hdf5"
    simulate_phyworld(path, "uniform", 5, frames=8, size=32)
    return path


@pytest.fixture
def where(videos, phyworld):
    """The catalogue's names with a file and a folder that there are."""
    return {"phyworld:FILE": f"phyworld:{phyworld}", "videos:FOLDER": f"videos:{videos}"}


def check_source(source, frames: int, size: int, numbers: list[int]) -> None:
    """Shape, dtype and captions of some clips, and that each is the same alone."""
    clip = source.clips(np.array(numbers))
    assert clip.frames.shape == (len(numbers), frames, size, size, 3) and clip.frames.dtype == torch.uint8
    assert clip.indices.tolist() == numbers and clip.fps == 10
    assert set(clip.captions) <= set(source.captions)
    assert torch.equal(source.clips(np.array(numbers[-1:])).frames[0], clip.frames[-1])
    for level in CAPTION_LEVELS:
        words = words_of_sources([source], level)
        assert words == tuple(sorted(set(words))) and (level == "none") == (words == ())
        for seed in (None, 0, 1):
            encode_captions(write_captions(clip, level, seed), words)  # refuses any other word


@pytest.mark.parametrize("name", NAMES)
def test_every_source_opens_by_its_name(name, where):
    source = open_source(where.get(name, name), **SHAPE, seed=2)
    check_source(source, 8, 16, [2, 0, 2, 1])


@pytest.mark.parametrize("name", ["orbit", "templates"])
def test_split_and_seed_reach_the_source(name):
    train_, ood, other = (
        open_source(name, frames=4, size=16, split=split, seed=seed).clips(np.arange(3))
        for split, seed in (("train", 0), ("ood", 0), ("train", 1))
    )
    assert not torch.equal(train_.frames, ood.frames) and not torch.equal(train_.frames, other.frames)


def test_a_simulated_source_has_as_many_clips_as_asked_for():
    assert open_source("spring", **SHAPE).count is None
    few = open_source("spring", **SHAPE, seed=3, count=4)
    assert few.count == 4
    assert torch.equal(few.clips(np.arange(4)).frames, simulate("spring", "train", range(4), **SHAPE, seed=3).frames)
    config = dataclasses.replace(SMOKE, sources=("spring", "wave"), source_weights=(1.0, 1.0), clips=4)
    stream = training_stream(config)
    assert [source.count for source in stream.sources] == [4, 4]
    shown = stream.examples(range(64))
    assert set(zip(shown.scenarios, shown.indices.tolist(), strict=True)) == {
        (name, number) for name in ("spring", "wave") for number in range(4)
    }


def test_videos_give_as_many_clips_of_a_file_as_asked_for(videos):
    one, three = (open_source(f"videos:{videos}{option}", **SHAPE) for option in ("", "?clips_per_video=3"))
    assert (one.count, three.count) == (3, 9)
    assert three.captions == ("jump rope", "riding a bike")
    clip = three.clips(np.arange(9))
    starts = [p["start_s"] for p in clip.parameters]
    assert clip.captions == ("jump rope",) * 3 + ("riding a bike",) * 6
    assert starts[:3] == sorted(starts[:3]) and len(set(starts)) > 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("melting", "unknown source 'melting'; choose one of uniform, parabola"),
        ("", "unknown source ''"),
        ("uniform:file", "unknown source 'uniform:file'"),
        ("videos", "unknown source 'videos'; choose one of .*videos:FOLDER"),
        ("videos:", "unknown source 'videos:'"),
        ("phyworld", "unknown source 'phyworld'"),
        ("phyworld:nowhere.hdf5", "nowhere.hdf5 does not exist"),
        ("videos:nowhere", "video folder nowhere does not exist"),
        ("videos:{videos}?fps=3", "must end in its folder or in .clips_per_video= and a whole number"),
        ("videos:{videos}?clips_per_video=0", "clips_per_video must be at least 1, got 0"),
        ("videos:{videos}?clips_per_video=many", "and a whole number"),
        ("videos:{videos}?clips_per_video=", "and a whole number"),
        ("phyworld:{videos}", "does not exist"),
    ],
)
def test_bad_names_are_named(name, message, videos):
    with pytest.raises(ValueError, match=message):
        open_source(name.format(videos=videos), **SHAPE)


def test_words_are_those_of_all_sources_together(videos, phyworld):
    names = ("orbit", f"phyworld:{phyworld}", f"videos:{videos}")
    sources = [open_source(name, **SHAPE) for name in names]
    assert words_of_sources(sources, "label") == tuple(sorted({
        "orbit", "uniform", "jump", "rope", "riding", "a", "bike", "blue", "disc", "moves", "at", "constant", "speed",
    }))  # fmt: skip
    assert words_of_sources(sources, "none") == words_of_sources([], "law") == ()
    assert words_of_sources(sources[2:], "law") == ("a", "bike", "jump", "riding", "rope")  # videos have no numbers


def test_blue_discs_of_a_file_are_called_blue_in_every_phrasing(tmp_path):
    path = tmp_path / "blue.hdf5"
    simulate_phyworld(path, "parabola", 40, frames=8, size=32)
    with h5py.File(path, "r+") as file:
        init = file["init_streams/00000"][:]
        del file["init_streams/00000"]
        file["init_streams"]["00000"] = np.column_stack([init, np.arange(40) % 2])
    source = open_source(f"phyworld:{path}", **SHAPE)
    clip = source.clips(np.arange(40))
    for level in CAPTION_LEVELS:
        captions = write_captions(clip, level, seed=0)
        encode_captions(captions, words_of_sources([source], level))
        for number, caption in enumerate(captions):
            assert ("blue", "red")[number % 2] not in caption.split()
    assert sum("blue" in caption for caption in captions) > 5  # of the augmented ones, which need not name a colour


@pytest.fixture(scope="module")
def mixed(videos, phyworld):
    """A training on all kinds of sources, with captions of many lengths that are read in order."""
    names = ("orbit", "templates", f"videos:{videos}?clips_per_video=2", f"phyworld:{phyworld}")
    text = TextConfig(level="augmented", layers=1)
    return dataclasses.replace(SMOKE, sources=names, source_weights=(1.0,) * 4, text=text, steps=3, seed=1)


def test_a_mixture_of_everything_trains_and_resumes_bit_for_bit(mixed, tmp_path):
    whole = train(mixed, tmp_path / "whole", progress=False)
    train(mixed, tmp_path / "parts", progress=False, stop_after=2)
    training_stream.cache_clear()  # as another process: all sources are opened again
    resumed = train(mixed, tmp_path / "parts", progress=False, resume=True)
    assert set(training_stream(mixed).examples(range(12)).scenarios) == {"orbit", "templates", "videos", "uniform"}
    assert whole.config.text == dict(level="augmented", encoder="", width=0, layers=1)
    for (name, one), (_, other) in zip(whole.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert one.isfinite().all() and torch.equal(one, other), name


def test_the_last_step_by_itself_would_see_other_padding(mixed):
    alone, together = (make_batch(mixed, np.arange(*ends)).caption for ends in ((8, 12), (0, 64)))
    assert alone.shape[1] < together.shape[1]  # so resuming must make the clips together that belong together
    assert torch.equal(together[8:12, : alone.shape[1]], alone)
