import os
import signal
import subprocess
import tempfile
import threading
import time
from contextlib import closing
from fractions import Fraction
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from video_files import CODECS, DAMAGES, MAX_PIXELS, cut, frame_of, noise, ramp, write_sound, write_video

from physnb.data import decoding
from physnb.data.decoding import REASONS, ClipSettings, Job, Unusable, decode_files, read_video

SETTINGS = ClipSettings(frames=8, size=16, fps=10.0, max_pixels=MAX_PIXELS)


def read(path, *draws, **changes):
    chosen = ClipSettings(**vars(SETTINGS) | changes)
    return read_video(Job("it", str(path), draws or (0.0,)), chosen)


@pytest.mark.parametrize(
    ("suffix", "codec"),
    [*CODECS.items(), (".mp4", "mpeg4"), (".mkv", "libvpx-vp9"), (".webm", "libvpx-vp9"), (".ts", "mpeg2video")],
)
def test_frames_are_those_of_their_moment(tmp_path, suffix, codec):
    outcome = read(write_video(tmp_path / f"it{suffix}", ramp(), codec=codec), 0.5)
    first = frame_of(outcome.frames)[0, 0]
    assert 20 < first < 30  # half way through the 52 possible starts
    assert frame_of(outcome.frames).tolist() == [[first + 3 * k for k in range(8)]]
    if suffix != ".ts":  # whose clock starts anywhere
        assert outcome.start_s == pytest.approx((first / 30,), abs=1e-3)
    assert outcome.frames.dtype == np.uint8 and outcome.frames.shape == (1, 8, 16, 16, 3)
    assert outcome.notes == ()


def shown_at(times_s, moments_s):
    """The frame on display at each moment, by definition."""
    return [max(k for k, time_s in enumerate(times_s) if time_s <= moment + 1e-3) for moment in moments_s]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@settings(max_examples=15, deadline=None)
@given(
    gaps_ms=st.lists(st.integers(5, 130), min_size=40, max_size=70),
    draw=st.floats(0, 0.999),
    fps=st.sampled_from([7.5, 10.0, 24.0]),
    suffix=st.sampled_from([".mp4", ".mkv"]),
)
def test_variable_rate_is_resampled_by_time_stamps(folder, gaps_ms, draw, fps, suffix):
    times_s = np.concatenate([[0], np.cumsum(gaps_ms)]) / 1000
    path = write_video(folder / f"variable{suffix}", ramp(len(times_s)), times_s=times_s)
    if times_s[-1] < 8 / fps:
        return
    outcome = read(path, draw, fps=fps)
    wanted_s = outcome.start_s[0] + np.arange(8) / fps
    assert frame_of(outcome.frames)[0].tolist() == shown_at(times_s, wanted_s)
    assert outcome.start_s[0] == pytest.approx(times_s[frame_of(outcome.frames)[0, 0]], abs=1e-3)
    if max(gaps_ms) > 3 * np.median(gaps_ms):
        assert "variable rate" in dict(outcome.notes)


@pytest.mark.parametrize("fps", [4.0, 10.0, 12.0, 29.97, 30.0, 60.0])
def test_any_rate_can_be_asked_for(tmp_path, fps):
    outcome = read(write_video(tmp_path / "it.mp4", ramp(), fps=25), 0.37, fps=fps)
    wanted_s = outcome.start_s[0] + np.arange(8) / fps
    assert frame_of(outcome.frames)[0].tolist() == shown_at(np.arange(75) / 25, wanted_s)
    repeats = 8 - len(set(frame_of(outcome.frames)[0].tolist()))
    assert dict(outcome.notes) == ({"frames repeated": f"{repeats} of 8"} if fps > 25 else {})


def test_draw_decides_the_start_between_the_first_and_the_last_that_fits(tmp_path):
    path = write_video(tmp_path / "it.mp4", ramp())
    assert frame_of(read(path, 0.0).frames)[0, 0] == 0
    assert frame_of(read(path, 0.999999).frames)[0].tolist() == list(range(51, 75, 3))
    exact = write_video(tmp_path / "exact.webm", ramp(24))  # just as long as a clip
    assert frame_of(read(exact, 0.7).frames)[0].tolist() == list(range(0, 24, 3))


def test_clips_of_one_file_share_no_moment_and_fewer_come_if_fewer_fit(tmp_path):
    path = write_video(tmp_path / "it.mkv", ramp(75), g="12")
    outcome = read(path, 0.9, 0.1, 0.5, clips_per_video=3)
    frames = frame_of(outcome.frames)
    assert len(frames) == 3 and (np.diff(frames.ravel()) > 0).all()
    short = write_video(tmp_path / "short.mkv", ramp(50))
    assert len(read(short, 0.9, 0.1, 0.5, clips_per_video=3).frames) == 2


def test_clip_after_a_seek_is_the_clip_without_one(tmp_path):
    for suffix, codec in ((".mkv", "libx264"), (".mpg", "mpeg2video"), (".webm", "libvpx")):
        path = write_video(tmp_path / f"it{suffix}", ramp(), codec=codec, g="10")
        by_start = frame_of(read(path, 0.0).frames)[0, 0]
        late = frame_of(read(path, 0.9).frames)[0]
        assert np.diff(late).tolist() == [3] * 7 and late[0] > by_start + 40


def test_centre_is_cut_out_and_shorter_side_fits(tmp_path):
    wide = np.zeros((30, 48, 96, 3), dtype=np.uint8)
    wide[:, :, :24], wide[:, :, 24:72], wide[:, :, 72:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    for name, frames in (("wide", wide), ("tall", wide.transpose(0, 2, 1, 3))):
        seen = read(write_video(tmp_path / f"{name}.mp4", frames)).frames[0, 0].astype(int)
        inner = seen[1:-1, 1:-1]
        assert (inner[..., 1] > 245).all() and (inner[..., [0, 2]] < 10).all(), name


def test_scaling_averages_areas(tmp_path):
    grid = np.indices((64, 64)).sum(0) % 2 * 255  # squares of one pixel: any point sample is black or white
    frames = np.broadcast_to(grid[None, :, :, None], (30, 64, 64, 3)).astype(np.uint8)
    seen = read(write_video(tmp_path / "it.mp4", frames, qp="0")).frames
    assert np.abs(seen.astype(int) - 127.5).max() < 4


def test_oblong_pixels_are_honoured(tmp_path):
    frames = np.zeros((30, 48, 48, 3), dtype=np.uint8)  # shown twice as wide as high: the middle half is cut out
    frames[:, :, 12:36] = 255
    path = write_video(tmp_path / "it.mp4", frames, pixel_aspect=Fraction(2, 1))
    assert read(path).frames[0, 0, :, 1:-1].min() > 245


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_rotated_file_is_read_as_ffmpeg_shows_it(tmp_path, rotation):
    frames = np.zeros((30, 48, 64, 3), dtype=np.uint8)
    frames[:, :24, :32], frames[:, :24, 32:], frames[:, 24:, :32] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    path = write_video(tmp_path / "it.mp4", frames, rotation=rotation)
    outcome = read(path, size=48)
    assert dict(outcome.notes) == {"rotated": f"{rotation % 360} degrees"}
    width, height = (64, 48) if rotation == 180 else (48, 64)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", path, "-frames:v", "1", "-f", "rawvideo"]
    raw = subprocess.run([*command, "-pix_fmt", "rgb24", "-"], capture_output=True, check=True).stdout
    shown = np.frombuffer(raw, dtype=np.uint8).reshape(height, width, 3)
    top, left = (height - 48) // 2, (width - 48) // 2
    difference = np.abs(shown[top : top + 48, left : left + 48].astype(int) - outcome.frames[0, 0])
    assert difference.mean() < 4  # chroma is interpolated in another way at the edges


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_named_by_its_reason(tmp_path, damage):
    reason, write = DAMAGES[damage]
    write(tmp_path / "it.mp4")
    with pytest.raises(Unusable) as caught:
        read(tmp_path / "it.mp4", 0.5)
    assert caught.value.reason == reason and caught.value.detail
    assert reason in REASONS


def test_rest_of_a_truncated_file_is_used_if_a_clip_fits_in(tmp_path):
    for suffix in CODECS:
        index_first = {"movflags": "faststart"} if suffix == ".mp4" else None
        path = write_video(tmp_path / f"it{suffix}", noise(75), container=index_first)
        whole = read(path, 0.2).frames
        outcome = read(cut(path, 0.8), 0.2)
        assert outcome.frames.shape == whole.shape
        # of AVI, ffmpeg takes the length from the size of the file
        assert ("truncated" in dict(outcome.notes)) == (suffix != ".avi"), suffix
        with pytest.raises(Unusable, match=r"too short" if suffix == ".avi" else r"truncated: .* of 2.50 s are there"):
            read(cut(path, 0.3))


def test_sound_that_goes_on_makes_no_video_truncated(tmp_path):
    for suffix in (".mp4", ".webm", ".mkv"):
        path = write_video(tmp_path / f"it{suffix}", ramp(30), sound_s=4.0)
        assert read(path).notes == (), suffix
        with pytest.raises(Unusable, match="too short"):
            read(path, frames=16)


def test_cover_picture_is_no_video(tmp_path):
    sound, picture = write_sound(tmp_path / "sound.mp4"), tmp_path / "cover.jpg"
    Image.new("RGB", (64, 64), "red").save(picture)
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", sound, "-i", picture, "-map", "0", "-map", "1"]
    subprocess.run([*command, "-c", "copy", "-disposition:v:0", "attached_pic", tmp_path / "it.mp4"], check=True)
    with pytest.raises(Unusable, match="no video: it holds audio, video"):
        read(tmp_path / "it.mp4")


def test_frames_out_of_order_in_time_are_refused(tmp_path):
    # AVI holds the order of decoding only, which is another one in H.264 with B-frames
    path = write_video(tmp_path / "it.avi", ramp(), codec="libx264", preset="medium", bf="3")
    with pytest.raises(Unusable, match="time stamps: frames have no time or go back"):
        read(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_tags_that_are_no_text_or_no_time_do_no_harm(tmp_path, suffix):
    path = write_video(tmp_path / f"it{suffix}", ramp(), title="name of letters")
    data = path.read_bytes()
    assert b"name of letters" in data
    path.write_bytes(data.replace(b"name of letters", b"n\xe4me \xffof letter").replace(b"00:00:02.5", b"as long as"))
    assert read(path).notes == ()


def test_playlist_called_mp4_is_not_followed(tmp_path):
    (tmp_path / "it.mp4").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nhttp://127.0.0.1:9/clip.ts\n")
    with pytest.raises(Unusable, match="unreadable"):
        read(tmp_path / "it.mp4")


@pytest.mark.usefixtures("read_only_folder")  # whose user is not above permissions
def test_file_without_permission():
    with tempfile.TemporaryDirectory() as name:
        path = write_video(Path(name) / "it.mp4", ramp())
        path.chmod(0)
        with pytest.raises(Unusable, match="unreadable: no permission"):
            read(path)


def test_every_job_has_its_outcome_and_they_are_those_of_this_process(tmp_path):
    good = [write_video(tmp_path / f"good{i}{suffix}", ramp(60 + i)) for i, suffix in enumerate(CODECS)]
    bad = []
    for name, (_, write) in DAMAGES.items():
        write(tmp_path / f"{name}.mp4")
        bad.append(tmp_path / f"{name}.mp4")
    jobs = [Job(path.name, str(path), (0.4, 0.6)) for path in good + bad]
    outcomes = {outcome.name: outcome for outcome in decode_files(jobs, SETTINGS, workers=2, timeout_s=60)}
    assert len(outcomes) == len(jobs)
    for path in good:
        expected = read(path, 0.4, 0.6)
        assert np.array_equal(outcomes[path.name].frames, expected.frames)
        assert outcomes[path.name].start_s == expected.start_s and outcomes[path.name].notes == expected.notes
    assert {outcomes[path.name].reason for path in bad} == {reason for reason, _ in DAMAGES.values()}


def test_file_that_blocks_costs_its_time_and_no_other_file(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    good = write_video(tmp_path / "b.mp4", ramp())
    jobs = [Job("blocks", str(tmp_path / "a.mp4"), (0.5,)), *(Job(f"good{i}", str(good), (0.5,)) for i in range(3))]
    before = time.monotonic()
    outcomes = {outcome.name: outcome for outcome in decode_files(jobs, SETTINGS, workers=1, timeout_s=1.5)}
    assert time.monotonic() - before < 60
    assert (outcomes["blocks"].reason, outcomes["blocks"].detail) == ("timeout", "more than 1.5 s")
    assert all(outcomes[f"good{i}"].frames is not None for i in range(3))
    assert not psutil.Process().children()


def test_decoder_that_dies_costs_its_file_alone(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    good = write_video(tmp_path / "b.mp4", ramp())
    paths = {"good": good, "dies": tmp_path / "a.mp4", "next": good}
    jobs = [Job(name, str(path), (0.5,)) for name, path in paths.items()]
    outcomes = []
    with closing(decode_files(jobs, SETTINGS, workers=1, timeout_s=60)) as running:
        outcomes.append(next(running))
        (worker,) = psutil.Process().children()
        threading.Timer(0.5, worker.send_signal, [signal.SIGSEGV]).start()
        outcomes += running
    assert [(outcome.name, outcome.reason, outcome.detail) for outcome in outcomes] == [
        ("good", "", ""),
        ("dies", "crash", "SIGSEGV"),
        ("next", "", ""),
    ]


def test_processes_are_replaced_after_many_files(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "FILES_A_PROCESS", 2)
    good, seen = write_video(tmp_path / "b.mp4", ramp()), []
    for outcome in decode_files([Job(str(k), str(good), (0.5,)) for k in range(5)], SETTINGS, workers=1):
        assert outcome.frames is not None
        seen.append([child.pid for child in psutil.Process().children()])
    assert [len(pids) for pids in seen] == [1, 0, 1, 0, 1] and len({pid for pids in seen for pid in pids}) == 3


def test_closing_ends_the_processes(tmp_path):
    good = write_video(tmp_path / "b.mp4", ramp())
    with closing(decode_files((Job("g", str(good), (0.5,)) for _ in range(10)), SETTINGS, workers=2)) as running:
        next(running)
        assert psutil.Process().children()
    assert not psutil.Process().children()


def test_processes_that_cannot_start_are_an_error_not_a_damaged_file(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding.sys, "executable", "/bin/false")
    with pytest.raises(OSError, match="a video decoding process did not start: exit status 1"):
        list(decode_files([Job("g", str(tmp_path), (0.5,))], SETTINGS))
