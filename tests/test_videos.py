import csv
import json
import multiprocessing
import os
import shutil
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from video_files import CODECS, DAMAGES, MAX_PIXELS, frame_of, ramp, write_video

from physnb.data import simulate
from physnb.data import videos as videos_module
from physnb.data.sources import Mixture
from physnb.data.videos import VideoSource, caption_of, index_videos

CLIPS = dict(frames=8, size=16, max_pixels=MAX_PIXELS, workers=1)
IDS = ("-3B32lodo2M", "--07WQ2iBlw", "_0O3eUZ8C_k")  # YouTube ids begin with anything


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    """One small good video, to be copied."""
    return write_video(tmp_path_factory.mktemp("video") / "it.mp4", ramp())


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> VideoSource:
    """A small prepared source: 6 videos of 2 clips, all different."""
    folder = tmp_path_factory.mktemp("prepared")
    for k in range(6):
        (folder / f"class_{k % 2}").mkdir(exist_ok=True)
        write_video(folder / f"class_{k % 2}" / f"v{k}.mp4", ramp(60 + k))
    source = VideoSource(folder, clips_per_video=2, seed=3, **CLIPS)
    source.prepare()
    return source


def lay(folder, video, *names) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(video, folder / name)


def write_csv(path, rows, header="label,youtube_id,time_start,time_end,split,is_cc") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_MINIMAL)
        writer.writerows([header.split(","), *rows])


KINETICS_ROWS = [
    ("riding a bike", IDS[0], 7, 17, "train", 0),
    ("tai chi", IDS[1], 120, 130, "train", 1),
    ("shooting goal (soccer)", IDS[2], 0, 10, "train", 0),
]
STEMS = [f"{row[1]}_{row[2]:06d}_{row[3]:06d}" for row in KINETICS_ROWS]
KINETICS_TREES = {
    "flat": [f"train/{stem}.mp4" for stem in STEMS],
    "class folders": [f"train/{row[0].replace(' ', '_')}/{s}.mp4" for row, s in zip(KINETICS_ROWS, STEMS, strict=True)],
    "spaces": [f"train/{row[0]}/{s}.mkv" for row, s in zip(KINETICS_ROWS, STEMS, strict=True)],
    "arranged": [f"videos/train/{row[0]}/{s}.webm" for row, s in zip(KINETICS_ROWS, STEMS, strict=True)],
    "beside the list": [f"{stem}.mp4" for stem in STEMS],
    "by id": [f"train/{row[1]}.mp4" for row in KINETICS_ROWS],
}


@pytest.mark.parametrize("tree", KINETICS_TREES)
@pytest.mark.parametrize("table", ["annotations/train.csv", "train.csv"])
def test_kinetics_trees(tmp_path, video, tree, table):
    lay(tmp_path, video, *KINETICS_TREES[tree], "val/other.mp4")
    write_csv(tmp_path / table, KINETICS_ROWS)
    index = index_videos(tmp_path)
    assert "Kinetics" in index.layout and table in index.layout
    assert {file.name: file.caption for file in index.files} == {
        name: row[0] for name, row in zip(KINETICS_TREES[tree], KINETICS_ROWS, strict=True)
    }
    assert all(file.path.is_file() for file in index.files)


def test_kinetics_files_named_but_absent_extra_and_replaced(tmp_path, video):
    replaced = f"replacement/replacement_for_corrupted_k400/{STEMS[1]}.mp4"
    lay(tmp_path, video, f"train/{STEMS[0]}.mp4", f"train/{STEMS[1]}.mp4", replaced, "train/extra_000001_000011.mp4")
    write_csv(tmp_path / "train.csv", KINETICS_ROWS)
    source = VideoSource(tmp_path, **CLIPS)
    report = source.prepare()
    assert source.count == 2 and report.files == 3 and report.reasons == {"missing": 1} and report.unlisted == 1
    assert report.skipped[0].file == f"train/{STEMS[2]}"
    assert [file.name for file in source.index.files if "replacement" in file.name] == [replaced]
    assert sorted(source.clips([0, 1]).captions) == ["riding a bike", "tai chi"]


def test_kinetics_test_list_has_no_labels(tmp_path, video):
    lay(tmp_path, video, f"test/{STEMS[0]}.mp4")
    write_csv(tmp_path / "test.csv", [KINETICS_ROWS[0][1:5]], "youtube_id,time_start,time_end,split")
    assert [file.caption for file in index_videos(tmp_path, "test").files] == [""]


def test_ucf_class_folders_and_lists(tmp_path, video):
    names = [f"{label}/v_{label}_g0{g}_c01.avi" for label in ("ApplyEyeMakeup", "YoYo", "TaiChi") for g in (1, 2)]
    lay(tmp_path / "UCF-101", video, *names)
    captions = {file.caption for file in index_videos(tmp_path / "UCF-101").files}
    assert captions == {"apply eye makeup", "yo yo", "tai chi"}
    lists = tmp_path / "ucfTrainTestlist"
    lists.mkdir()
    (lists / "trainlist01.txt").write_text("".join(f"{name} {k}\r\n" for k, name in enumerate(names[::2], 1)))
    (lists / "testlist01.txt").write_text("".join(f"{name}\n" for name in [*names[1::2], "YoYo/v_gone.avi"]))
    train, test = index_videos(tmp_path), index_videos(tmp_path, "test")
    assert {file.name for file in train.files} == {f"UCF-101/{name}" for name in names[::2]}
    assert [file.name for file in test.files if not file.path] == ["YoYo/v_gone.avi"] and len(test.files) == 4
    with pytest.raises(ValueError, match="has UCF-101 lists, but none of split val"):
        index_videos(tmp_path, "val")


def test_folders_without_lists(tmp_path, video):
    lay(tmp_path / "flat", video, "b.mp4", "a.WEBM", "notes.txt", ".hidden.mp4")
    flat = index_videos(tmp_path / "flat")
    assert [(file.name, file.caption) for file in flat.files] == [("a.WEBM", ""), ("b.mp4", "")]
    assert flat.layout == "videos without classes below flat"
    lay(tmp_path / "split", video, "train/fly a kite/a.mp4", "val/fly a kite/b.mp4")
    assert [file.name for file in index_videos(tmp_path / "split", "val").files] == ["val/fly a kite/b.mp4"]


@pytest.mark.parametrize(
    ("label", "caption"),
    [
        ("riding_a_bike", "riding a bike"),
        ("RidingABike", "riding a bike"),
        ("tai chi", "tai chi"),
        ("YoYo", "yo yo"),
        ("playing TV", "playing TV"),
        ("using remote controller (not gaming)", "using remote controller (not gaming)"),
        ("", ""),
    ],
)
def test_captions(label, caption):
    assert caption_of(label) == caption


ROW = KINETICS_ROWS[0]
BAD_TABLES = {
    "no column": ([ROW], "name,youtube_id,time_start,time_end,split", "train.csv has no column label"),
    "empty": ([], "", "train.csv has no column youtube_id, time_start, time_end, label"),
    "no time": ([(*ROW[:2], "soon", 17, "train", 0)], None, "train.csv line 2 has no whole time_start"),
    "short row": ([ROW, ROW[:2]], None, "train.csv line 3 has no whole time_start"),
    "no file of it": ([(ROW[0], "nothing", 7, 17, "train", 0)], None, "there is no video in"),
}


@pytest.mark.parametrize(("rows", "header", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_lists_are_named(tmp_path, video, rows, header, message):
    lay(tmp_path, video, f"train/{STEMS[0]}.mp4")
    write_csv(tmp_path / "train.csv", rows, *([header] if header is not None else []))
    with pytest.raises(ValueError, match=message):
        index_videos(tmp_path)


@pytest.mark.parametrize(
    ("names", "split", "message"),
    [
        ([], "train", "there is no video in"),
        (["notes.txt", "a/picture.jpg"], "train", "there is no video in"),
        (["a.mp4"], "val", "has no split val .* videos in no split are of split train"),
        (["val/a.mp4", "test/b.mp4"], "train", "has no split train .* only val, test"),
        (["a.mp4"], "all", "unknown split 'all'; choose one of train, val, test"),
    ],
)
def test_folder_without_the_videos_asked_for(tmp_path, video, names, split, message):
    lay(tmp_path, video, *names)
    with pytest.raises(ValueError, match=message):
        VideoSource(tmp_path, split=split, **CLIPS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("frames", 1, "frames must be at least 2, got 1"),
        ("size", 4, "size must be at least 8, got 4"),
        ("fps", 0, "fps must be positive, got 0"),
        ("fps", float("nan"), "fps must be positive, got nan"),
        ("seed", -1, "seed must be at least 0, got -1"),
        ("timeout_s", 0, "timeout_s must be positive, got 0"),
        ("clips_per_video", 0, "clips_per_video must be at least 1, got 0"),
        ("workers", 0, "workers must be at least 1, got 0"),
        ("max_pixels", 0, "max_pixels must be at least 1, got 0"),
    ],
)
def test_bad_numbers_are_named(tmp_path, video, name, value, message):
    lay(tmp_path, video, "a.mp4")
    with pytest.raises(ValueError, match=message):
        VideoSource(tmp_path, **CLIPS | {name: value})


def test_wrong_folder(tmp_path):
    with pytest.raises(ValueError, match="does not exist or is no folder"):
        VideoSource(tmp_path / "nowhere", **CLIPS)


def test_before_prepare_there_is_no_count(tmp_path, video):
    lay(tmp_path, video, "a.mp4", "b.mp4")
    source = VideoSource(tmp_path, **CLIPS)
    for use in (lambda: source.count, lambda: source.clips([0]), lambda: Mixture((source,), (1.0,))):
        with pytest.raises(ValueError, match=r"2 of 2 videos are not decoded yet; call prepare\(\) of source videos"):
            use()
    assert not (tmp_path / ".physnb").exists()


def test_clips_are_what_the_files_show(prepared):
    clip = prepared.clips(np.arange(prepared.count))
    assert len(clip) == 12 and clip.fps == 10.0 and set(clip.scenarios) == {"videos"} and set(clip.buckets) == {"id"}
    assert clip.state is None and clip.indices.tolist() == list(range(12))
    assert clip.captions == ("class 0",) * 6 + ("class 1",) * 6
    frames = frame_of(clip.frames.numpy())
    starts = [parameters["start_s"] for parameters in clip.parameters]
    assert frames[:, 0] / 30 == pytest.approx(starts, abs=1e-3)
    assert (np.diff(frames, axis=1) == 3).all()
    assert (frames[0::2, -1] < frames[1::2, 0]).all()  # the clips of a file, in order and apart
    assert len(set(frames[::2, 0].tolist())) > 2  # drawn for each file


@settings(max_examples=15, deadline=None)
@given(numbers=st.lists(st.integers(0, 11), min_size=1, max_size=20))
def test_clip_alone_is_the_clip_in_any_batch(prepared, numbers):
    batch = prepared.clips(np.array(numbers))
    for row, number in enumerate(numbers):
        alone = prepared.clips([number])
        assert torch.equal(alone.frames[0], batch.frames[row])
        assert (alone.captions[0], alone.parameters[0]) == (batch.captions[row], batch.parameters[row])


@pytest.mark.parametrize("numbers", [[], [-1], [12], [[0]]])
def test_bad_clip_numbers(prepared, numbers):
    with pytest.raises(ValueError, match=r"clip numbers of videos must be given and in \[0, 12\)"):
        prepared.clips(numbers)


def test_read_clips_can_be_changed_without_harm(prepared):
    clip = prepared.clips([0])
    before = clip.frames.clone()
    clip.frames.zero_()
    assert torch.equal(prepared.clips([0]).frames, before)


def test_source_mixes_with_others(prepared):
    class Discs:
        name, count = "discs", None

        def clips(self, numbers):
            return simulate("uniform", "train", numbers, frames=8, size=16)

    mixture = Mixture((prepared, Discs()), (1.0, 1.0), seed=5)
    stream = mixture.examples(range(60))
    drawn = zip(stream.indices.tolist(), stream.scenarios, strict=True)
    seen = [index for index, scenario in drawn if scenario == "videos"]
    assert sorted(seen[:12]) == list(range(12))  # each once in the first epoch
    assert torch.equal(mixture.examples([17]).frames, stream[[17]].frames)


def test_start_depends_on_seed_and_file_name_alone(tmp_path, video):
    def starts(folder, *names, seed=0):
        lay(tmp_path / folder, video, *names)
        source = VideoSource(tmp_path / folder, seed=seed, cache=tmp_path / "cache" / folder, **CLIPS)
        source.prepare()
        found = source.clips(np.arange(source.count)).parameters
        return {Path(file.name).name: p["start_s"] for file, p in zip(source.index.files, found, strict=True)}

    flat = starts("flat", *(f"v{k}.mp4" for k in range(8)))
    tree = starts("tree", *(f"c{k % 3}/v{k}.mp4" for k in range(8) if k != 2))
    assert tree == {name: start for name, start in flat.items() if name != "v2.mp4"}
    assert starts("flat", seed=1) != flat and len(set(flat.values())) > 3


@pytest.fixture
def decoded(monkeypatch) -> list[str]:
    """Names of the files that were given to the decoder, in order."""
    names, original = [], videos_module.decode_files

    def decode_files(jobs, *arguments, **options):
        jobs = list(jobs)
        names.extend(job.name for job in jobs)
        return original(jobs, *arguments, **options)

    monkeypatch.setattr(videos_module, "decode_files", decode_files)
    return names


def test_prepared_clips_are_not_decoded_again_and_other_settings_do_not_mix(tmp_path, video, decoded):
    lay(tmp_path, video, "a.mp4", "b.mp4")
    first = VideoSource(tmp_path, **CLIPS)
    first.prepare()
    assert decoded == ["a.mp4", "b.mp4"]
    same = VideoSource(tmp_path, **CLIPS)
    assert same.prepare().clips == same.count == 2 and len(decoded) == 2
    changes = [
        dict(frames=9),
        dict(size=24),
        dict(fps=5.0),
        dict(seed=1),
        dict(clips_per_video=2),
        dict(max_pixels=9999),
    ]
    others = [VideoSource(tmp_path, **CLIPS | change) for change in changes]
    assert len({source.cache.folder for source in (first, *others)}) == 7
    with pytest.raises(ValueError, match="2 of 2 videos are not decoded"):
        others[0].count  # noqa: B018
    others[0].prepare()
    assert len(decoded) == 4 and others[0].clips([0]).frames.shape == (1, 9, 16, 16, 3)


def test_changed_and_new_files_are_decoded_and_no_other(tmp_path, video, decoded):
    lay(tmp_path, video, "a.mp4", "b.mp4")
    VideoSource(tmp_path, **CLIPS).prepare()
    write_video(tmp_path / "a.mp4", ramp(70)[::-1])
    lay(tmp_path, video, "c.mp4")
    decoded.clear()
    source = VideoSource(tmp_path, **CLIPS)
    source.prepare()
    assert decoded == ["a.mp4", "c.mp4"]
    steps = np.diff(frame_of(source.clips([0, 1, 2]).frames.numpy()))
    assert (steps[0] == -3).all() and (steps[1:] == 3).all()


def test_report_names_every_file_that_is_skipped_or_unusual(tmp_path, video):
    lay(tmp_path, video, *(f"good{k}.mp4" for k in range(3)))
    write_video(tmp_path / "variable.mkv", ramp(40), times_s=np.cumsum([0.02, 0.1] * 20))
    write_video(tmp_path / "slow.mp4", ramp(30), fps=5)
    write_video(tmp_path / "turned.mp4", ramp(), rotation=90)
    for name, (_, write) in DAMAGES.items():
        write(tmp_path / f"{name}.mp4")
    source = VideoSource(tmp_path, **CLIPS)
    report = source.prepare()
    assert {note.file: note.kind for note in report.skipped} == {
        f"{name}.mp4": reason for name, (reason, _) in DAMAGES.items()
    }
    assert {(note.file, note.kind) for note in report.noted} == {
        ("variable.mkv", "variable rate"), ("slow.mp4", "frames repeated"), ("turned.mp4", "rotated")
    }  # fmt: skip
    assert report.clips == source.count == 6 and report.files == 6 + len(DAMAGES)
    told = json.loads(source.report_path.read_text())
    assert told["reasons"] == report.reasons and told["clips"] == 6 and len(told["skipped"]) == len(DAMAGES)
    text = str(report)
    counts = f"6 clips from 6 of {6 + len(DAMAGES)} files, {len(DAMAGES)} skipped"
    assert text.startswith(f"videos without classes below {tmp_path.name}: {counts}")
    assert all(f"{name}.mp4: " in text for name in DAMAGES) and "3 unreadable (no container" in text


def test_skipped_files_are_tried_again_on_request_only(tmp_path, video):
    lay(tmp_path, video, "a.mp4")
    os.mkfifo(tmp_path / "b.mp4")
    source = VideoSource(tmp_path, timeout_s=1.0, **CLIPS)
    assert source.prepare().reasons == {"timeout": 1}
    before = time.monotonic()
    assert VideoSource(tmp_path, timeout_s=60, **CLIPS).prepare().reasons == {"timeout": 1}
    assert time.monotonic() - before < 1
    feeder = threading.Thread(target=lambda: open(tmp_path / "b.mp4", "wb").close())  # what blocked comes to its end
    feeder.start()
    assert source.prepare(retry=True).reasons == {"unreadable": 1} and source.count == 1
    feeder.join()
    source.prepare()  # the last word counts, also after another look at all shards
    assert source.prepare(retry=False).reasons == {"unreadable": 1}
    assert VideoSource(tmp_path, **CLIPS).prepare().reasons == {"unreadable": 1}


def test_cache_that_cannot_be_written_is_named(read_only_folder):
    with tempfile.TemporaryDirectory() as name:
        write_video(Path(name) / "a.mp4", ramp(30))
        source = VideoSource(name, cache=read_only_folder / "cache", **CLIPS)
        with pytest.raises(ValueError, match="cannot be written"):
            source.prepare()


def test_file_name_that_is_no_text(tmp_path, video):
    lay(tmp_path, video, "a.mp4")
    shutil.copy(video, os.fsencode(tmp_path) + b"/b\xff.mp4")
    (tmp_path / os.fsdecode(b"c\xff.mp4")).touch()
    report = VideoSource(tmp_path, **CLIPS).prepare()
    assert [(note.file, note.kind) for note in report.skipped] == [("c\\xff.mp4", "empty")]
    assert "c\\xff.mp4" in str(report).encode().decode()
    assert VideoSource(tmp_path, **CLIPS).count == 2


def test_full_disk_is_named_and_leaves_no_half_shard(tmp_path, video, full_disk):
    lay(tmp_path, video, "a.mp4")
    source = VideoSource(tmp_path, **CLIPS | {"size": 64})  # 98 kB
    with full_disk(80_000), pytest.raises(OSError, match="shard-000001"):
        source.prepare()
    assert not list(source.cache.folder.glob("shard-*"))
    assert source.prepare().clips == 1


def test_damaged_cache_is_named(tmp_path, video):
    lay(tmp_path, video, "a.mp4")
    source = VideoSource(tmp_path, **CLIPS)
    source.prepare()
    (pixels,) = source.cache.folder.glob("*/clips.npy")
    os.truncate(pixels, 500)
    with pytest.raises(ValueError, match=r"clips.npy is damaged .* delete .* and prepare again"):
        VideoSource(tmp_path, **CLIPS).clips([0])
    shutil.rmtree(pixels.parent)
    again = VideoSource(tmp_path, **CLIPS)
    again.prepare()
    assert again.count == 1


@pytest.fixture
def prepare_elsewhere(monkeypatch):
    """prepare_elsewhere(folder) is another process that prepares it, in shards of 4 files; killed at the end."""
    monkeypatch.setattr(videos_module, "SHARD_FILES", 4)
    started = []

    def start(folder):
        source = VideoSource(folder, **CLIPS)
        started.append(multiprocessing.get_context("fork").Process(target=source.prepare))
        started[-1].start()
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.join()


def shards(folder):
    return sorted(folder.glob(".physnb/*/shard-*"))


def names_in(shard):
    return [told["outcome"]["name"] for told in json.loads((shard / "files.json").read_text())]


def alive(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def test_killed_preparation_goes_on_and_leaves_no_process(tmp_path, video, prepare_elsewhere):
    lay(tmp_path, video, *(f"{k:03d}.mp4" for k in range(30)))
    os.mkfifo(tmp_path / "zzz.mp4")  # keeps it busy until it is killed
    process = prepare_elsewhere(tmp_path)
    deadline = time.monotonic() + 60
    while len(shards(tmp_path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    (worker,) = psutil.Process(process.pid).children()
    process.kill()
    process.join()
    with suppress(OSError):  # where its worker had come to the pipe and waits, let it go on
        os.close(os.open(tmp_path / "zzz.mp4", os.O_WRONLY | os.O_NONBLOCK))
    (tmp_path / "zzz.mp4").unlink()
    kept = shards(tmp_path)
    (kept[0].parent / ".shard-000099.1.part").mkdir()  # what a kill in the middle of a shard leaves
    known = sum(len(names_in(shard)) for shard in kept)
    source = VideoSource(tmp_path, **CLIPS)
    with pytest.raises(ValueError, match=f"{30 - known} of 30 videos are not decoded"):
        source.count  # noqa: B018
    assert known >= 12 and source.prepare().clips == source.count == 30
    assert not list(source.cache.folder.glob(".*.part"))
    deadline = time.monotonic() + 60
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not alive(worker)


def test_two_processes_prepare_one_cache(tmp_path, video, prepare_elsewhere):
    lay(tmp_path, video, *(f"{k:03d}.mp4" for k in range(30)))
    other = prepare_elsewhere(tmp_path)
    while not shards(tmp_path) and other.is_alive():
        time.sleep(0.002)
    assert VideoSource(tmp_path, **CLIPS).prepare().clips == 30
    other.join(60)
    assert other.exitcode == 0
    named = [name for shard in shards(tmp_path) for name in names_in(shard)]
    assert sorted(named) == [f"{k:03d}.mp4" for k in range(30)]  # each decoded once


class Memory(threading.Thread):
    """Samples of resident memory while it runs, in MB: of this process, and the largest of its children."""

    def __init__(self):
        super().__init__(daemon=True)
        self.own, self.children, self.stop = [], [], threading.Event()

    def run(self) -> None:
        while not self.stop.wait(0.05):
            self.own.append(psutil.Process().memory_info().rss / 2**20)
            sizes = [0.0]
            for child in psutil.Process().children():
                with suppress(psutil.NoSuchProcess):
                    if child.cmdline() != psutil.Process().cmdline():  # between fork and exec it is a copy of this one
                        sizes.append(child.memory_info().rss / 2**20)
            self.children.append(max(sizes))


@pytest.mark.slow
def test_a_thousand_files_of_which_one_in_twenty_is_damaged(tmp_path):
    templates = tmp_path / "templates"
    templates.mkdir()
    good = [write_video(templates / f"good{suffix}", ramp(), codec=codec) for suffix, codec in CODECS.items()]
    good.append(write_video(templates / "vp9.webm", ramp(), codec="libvpx-vp9"))
    good.append(write_video(templates / "mpeg4.mp4", ramp(), codec="mpeg4"))
    good.append(write_video(templates / "sound.mp4", ramp(), sound_s=3.0))
    good.append(write_video(templates / "variable.mkv", ramp(), times_s=np.cumsum([0.02, 0.05, 0.03] * 25)))
    good.append(write_video(templates / "turned.mp4", ramp(), rotation=90))
    bad = []
    for name, (_, write) in DAMAGES.items():
        write(templates / f"{name}.mp4")
        bad.append((name, templates / f"{name}.mp4"))
    folder, expected = tmp_path / "videos", {}
    for k in range(1000):
        place = folder / f"class_{k % 7}" / f"{k:04d}{good[k % len(good)].suffix}"
        place.parent.mkdir(parents=True, exist_ok=True)
        if k == 500:
            place = place.with_suffix(".mp4")
            os.mkfifo(place)
            expected[place.relative_to(folder).as_posix()] = "timeout"
        elif k % 20 == 0:
            name, template = bad[k // 20 % len(bad)]
            place = place.with_suffix(".mp4")
            shutil.copy(template, place, follow_symlinks=False)
            expected[place.relative_to(folder).as_posix()] = DAMAGES[name][0]
        else:
            os.link(good[k % len(good)], place)
    others = set(psutil.Process().children())  # such as the resource tracker of multiprocessing
    memory = Memory()
    memory.start()
    source = VideoSource(folder, timeout_s=4.0, **CLIPS | {"workers": 2})
    report = source.prepare()
    memory.stop.set()
    memory.join()
    assert len(expected) == 50 and {note.file: note.kind for note in report.skipped} == expected
    assert report.clips == source.count == 950
    noted = Counter(note.kind for note in report.noted)
    assert set(noted) == {"variable rate", "rotated"} and min(noted.values()) > 90
    assert not set(psutil.Process().children()) - others
    seen = frame_of(source.clips(np.arange(950)).frames.numpy())
    assert (np.diff(seen) > 0).all()  # every clip moves, and forward
    third = len(memory.own) // 3
    assert max(memory.own) < np.median(memory.own[:third]) + 30 and max(memory.children) < 120
    assert np.median(memory.children[-third:]) < np.median(memory.children[third:-third]) + 5
