import io
import multiprocessing
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import av
import h5py
import numpy as np
import pytest
import torch

from physnb.config import SCENARIOS
from physnb.data import phyworld
from physnb.data.clips import WORLD_SIZE, Clip
from physnb.data.phyworld import PhyworldSource, simulate_phyworld, write_phyworld
from physnb.data.worlds import frame_times, simulate_world
from physnb.metrics import parse_discs

FRAMES, SIZE = 16, 64
WORST_PIXEL, MEAN_LOSS = 200, 0.6  # grey levels that 4:2:0 colour may cost: edges of discs lose much, areas nothing
WORST_SMALL_PIXEL = 30  # the same after shrinking to an eighth


def clips(scenario: str, count: int = 3, split: str = "id", size: int = SIZE) -> Clip:
    return simulate_world(scenario, split, range(count), frames=FRAMES, size=size, edge="phyworld")


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """A file of three clips for every scenario; shared, so never changed."""
    folder = tmp_path_factory.mktemp("phyworld")
    for scenario in SCENARIOS:
        write_phyworld(folder / f"{scenario}.hdf5", [clips(scenario)])
    return folder


@pytest.fixture
def change(files, tmp_path):
    """change(edit) is a copy of the collision file that `edit` has worked on, or that of another scenario."""

    def edited(edit, scenario="collision"):
        path = shutil.copy(files / f"{scenario}.hdf5", tmp_path / "changed.hdf5")
        with h5py.File(path, "r+") as file:
            edit(file)
        return path

    return edited


def put(group, values):
    """An edit that puts other values in place of chunk 00000 of a group."""

    def edit(file):
        del file[group]["00000"]
        file[group].create_dataset("00000", data=values)

    return edit


def read_as_published(path, chunk, index):
    """Frames, positions and init by nothing but h5py and PyAV."""
    with h5py.File(path, "r") as file:
        stream, positions, init = (file[group][chunk][index] for group in phyworld.GROUPS)
    with av.open(io.BytesIO(stream.tobytes())) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    return frames, positions, init


def same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.nan_to_num(-9), other.nan_to_num(-9))


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_round_trip_keeps_every_digit_of_the_state(files, scenario):
    clip = clips(scenario)
    read = PhyworldSource(files / f"{scenario}.hdf5", frames=FRAMES, size=SIZE).clips(range(3))
    assert same_values(read.state.positions, clip.state.positions)
    assert same_values(read.state.radii, clip.state.radii)
    assert same_values(read.state.velocities[:, 0], clip.state.velocities[:, 0])
    if scenario != "collision":  # whose velocity after impact is a difference of float32 positions
        assert same_values(read.state.velocities, clip.state.velocities)
    torch.testing.assert_close(read.state.velocities, clip.state.velocities, atol=1e-4, rtol=0, equal_nan=True)
    torch.testing.assert_close(read.state.impact_time_s, clip.state.impact_time_s, atol=1e-5, rtol=0, equal_nan=True)
    for name in ("captions", "scenarios", "buckets", "fps"):
        assert getattr(read, name) == getattr(clip, name), name
    for found, true in zip(read.parameters, clip.parameters, strict=True):
        assert found == pytest.approx(true)


@pytest.mark.parametrize("codec", phyworld.CODECS)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_codec_loss_is_at_the_edges_only(scenario, codec):
    frames = clips(scenario, 1, size=256).frames[0].numpy()
    decoded = np.stack([*phyworld.decode_mp4(phyworld.encode_mp4(frames, codec), FRAMES, FRAMES)])
    loss = np.abs(decoded.astype(int) - frames)
    assert phyworld.encode_mp4(frames, codec) == phyworld.encode_mp4(frames, codec)
    assert loss.mean() < MEAN_LOSS and loss.max() < WORST_PIXEL
    small, true = (np.stack([phyworld.resize(p, 32) for p in pictures]).astype(int) for pictures in (decoded, frames))
    assert np.abs(small - true).max() < WORST_SMALL_PIXEL
    assert loss.max() > 0  # lossy: if it ever is not, this file's numbers say too much


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_frames_of_the_source_show_the_discs_where_the_state_says(tmp_path, scenario):
    simulate_phyworld(tmp_path / "file.hdf5", scenario, 2, frames=8)
    clip = PhyworldSource(tmp_path / "file.hdf5", frames=8, size=32).clips([0, 1])
    offset = (parse_discs(clip.frames).positions - clip.state.positions)[clip.state.inside]
    assert len(offset) and offset.abs().max() < 0.02 * WORLD_SIZE / 32 * 10  # a fifth of a pixel
    # undoing the published pixel map leaves no bias; a plain resize is off by up to 0.02 units, the sign of 5 - x
    assert (offset * (clip.state.positions[clip.state.inside] - 5)).mean().abs() < 0.008


@pytest.mark.parametrize(("source", "size"), [(256, 32), (256, 100), (64, 48), (16, 8)])
def test_resizing_averages_over_areas(source, size):
    weights = phyworld.resize_weights(source, size)
    np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
    # a ramp that is linear in the box keeps its values at the new pixels, but where the outermost pixel is cut in half
    ramp = np.arange(source) / (source - 1)
    np.testing.assert_allclose((weights @ ramp)[1:-1], ((np.arange(size) + 0.5) / size)[1:-1], atol=0.3 / source)
    assert (phyworld.resize(np.full((source, source, 3), 77, np.uint8), size) == 77).all()
    picture = np.random.default_rng(0).integers(0, 256, (source, source, 3), np.uint8)
    plain = np.einsum("yr,rcd,xc->yxd", *(a.astype(np.float64) for a in (weights, picture, weights)))
    assert np.abs(phyworld.resize(picture, size) - plain).max() < 0.501


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_layout_is_the_published_one(files, scenario):
    with h5py.File(files / f"{scenario}.hdf5", "r") as file:
        assert set(file) == {"video_streams", "position_streams", "init_streams"}
        assert all(list(group) == ["00000"] for group in file.values())
        positions, init, videos = (file[f"{name}_streams"]["00000"] for name in ("position", "init", "video"))
        two = scenario == "collision"
        assert positions.shape == ((3, FRAMES, 2, 2) if two else (3, FRAMES, 2)) and positions.dtype == np.float64
        assert init.shape == (3, 4 if two else 2) and init.dtype == np.float64
        assert videos.shape == (3,) and h5py.check_vlen_dtype(videos.dtype) == np.uint8


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_published_way_of_reading_works(files, scenario):
    clip = clips(scenario)
    frames, positions, init = read_as_published(files / f"{scenario}.hdf5", "00000", 1)
    assert frames.shape == (FRAMES, SIZE, SIZE, 3)
    assert np.abs(frames.astype(int) - clip.frames[1].numpy()).mean() < 4 * MEAN_LOSS  # more of a small frame is edge
    discs = 2 if scenario == "collision" else 1
    true = clip.state.positions[1, :, :discs].double().numpy()
    assert np.array_equal(positions, true if discs == 2 else true[:, 0])
    speeds = clip.state.velocities[1, 0, :discs, 0].abs().double().numpy()
    assert np.array_equal(init, np.concatenate([clip.state.radii[1, :discs].double().numpy(), speeds]))


def test_chunks_are_numbered_through(tmp_path, monkeypatch):
    monkeypatch.setattr(phyworld, "CHUNK_CLIPS", 3)
    path = tmp_path / "seven.hdf5"
    assert simulate_phyworld(path, "uniform", 7, frames=4, size=16, batch=2) == 7
    with h5py.File(path, "r") as file:
        lengths = {name: len(file["init_streams"][name]) for name in file["video_streams"]}
    assert lengths == {"00000": 3, "00001": 3, "00002": 1}
    source = PhyworldSource(path, frames=4, size=16)
    true = simulate_world("uniform", "train", range(7), frames=4, size=16)
    assert source.count == 7
    assert same_values(source.clips(range(7)).state.positions, true.state.positions)
    assert same_values(source.clips([6, 2, 3]).state.positions, true.state.positions[[6, 2, 3]])


def test_clip_alone_is_the_clip_in_a_batch(files):
    source = PhyworldSource(files / "collision.hdf5", frames=8, size=32)
    batch = source.clips(np.array([2, 0, 2]))
    assert batch.indices.tolist() == [2, 0, 2] and batch.frames.shape == (3, 8, 32, 32, 3)
    assert torch.equal(batch.frames[0], batch.frames[2])
    for row, number in enumerate([2, 0, 2]):
        alone = source.clips([number])
        assert torch.equal(alone.frames[0], batch.frames[row])
        assert same_values(alone.state.velocities[0], batch.state.velocities[row])


@pytest.mark.parametrize("numbers", [[3], [-1], []])
def test_numbers_out_of_range_are_refused(files, numbers):
    with pytest.raises(ValueError, match=r"clip numbers of .*uniform.hdf5 are in \[0, 3\)"):
        PhyworldSource(files / "uniform.hdf5", frames=8, size=32).clips(numbers)


def read_in_a_worker(source, queue):
    queue.put(source.clips([1]).frames.numpy().tobytes())


def test_open_file_is_not_shared_with_a_forked_worker(files):
    source = PhyworldSource(files / "parabola.hdf5", frames=4, size=16)
    here = source.clips([1]).frames.numpy().tobytes()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    worker = context.Process(target=read_in_a_worker, args=(source, queue))
    worker.start()
    assert queue.get(timeout=60) == here
    worker.join(timeout=60)
    assert source.clips([1]).frames.numpy().tobytes() == here


def test_source_can_be_sent_to_a_spawned_worker(files):
    source = PhyworldSource(files / "parabola.hdf5", frames=4, size=16)
    sent = pickle.loads(pickle.dumps(source))  # what multiprocessing does
    assert torch.equal(sent.clips([1]).frames, source.clips([1]).frames)


def test_threads_read_the_same_file(files):
    source = PhyworldSource(files / "collision.hdf5", frames=4, size=16)
    expected = source.clips([0, 1, 2]).frames
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: source.clips([number % 3]).frames[0], range(24)))
    assert all(torch.equal(frames, expected[number % 3]) for number, frames in enumerate(found))


def test_ranges_decide_the_bucket(tmp_path):
    clip = clips("uniform", 40, split="ood", size=16)
    write_phyworld(tmp_path / "ood.hdf5", [clip])
    read = PhyworldSource(tmp_path / "ood.hdf5", frames=FRAMES, size=16).clips(range(40))
    assert read.buckets == clip.buckets and set(read.buckets) == {"r", "v", "rv"}


def test_third_value_of_init_is_a_colour(change):
    def colour(file):
        init = file["init_streams"]["00000"][:]
        put("init_streams", np.column_stack([init, [1.0, 0.0, 1.0]]))(file)

    clip = PhyworldSource(change(colour, "uniform"), frames=8, size=16).clips([0, 1])
    assert clip.captions == ("a blue disc moves at constant speed", "a red disc moves at constant speed")
    assert clip.state.present.tolist() == [[False, True], [True, False]]
    assert same_values(clip.state.positions[0, :, 1], clips("uniform").state.positions[0, :8, 0])


def test_slow_impact_of_box2d_is_read_as_it_is_stored(change):
    """Below 1 unit/s Box2D's discs stick together: the law says otherwise, the positions decide."""

    def stick(file):
        file["init_streams"]["00000"][0] = [1.0, 1.0, 0.4, 0.4]
        time = frame_times(FRAMES)
        x = np.stack([3 + 0.4 * time, 5.4 - 0.4 * time], 1)
        x[time > 0.5] = [3.2, 5.2]
        file["position_streams"]["00000"][0] = np.stack([x, np.full_like(x, 5.0)], -1)

    state = PhyworldSource(change(stick), frames=FRAMES, size=16).clips([0]).state
    assert state.impact_time_s.item() == pytest.approx(0.5)
    assert state.velocities[0, 0, :, 0].tolist() == pytest.approx([0.4, -0.4])
    assert state.velocities[0, -1, :, 0].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


def test_impact_after_the_last_frame_is_none(files):
    whole, start = (PhyworldSource(files / "collision.hdf5", frames=frames, size=16) for frames in (FRAMES, 4))
    assert not whole.clips([0]).state.impact_time_s.isnan().any()
    assert start.clips([0]).state.impact_time_s.isnan().all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda file: file.__delitem__("init_streams"), "has no group init_streams; phyworld's layout has video_"),
        (lambda file: file["video_streams"].__delitem__("00000"), "chunk 00000 is missing in video_streams"),
        (put("init_streams", np.zeros((2, 4))), r"videos \(3,\), positions .* and init \(2, 4\) are not of the same"),
        (put("init_streams", np.zeros((3, 5))), "are not of one disc or two"),
        (put("init_streams", np.zeros((3, 2))), "are not of one disc or two"),
        (put("position_streams", np.zeros((3, 4, 2, 2))), "chunk 00000: clips have 4 frames, 8 are asked for"),
        (put("position_streams", np.full((3, 16, 2, 2), np.nan)), "index 0: positions and init must be finite"),
        (lambda file: [group.__delitem__("00000") for group in file.values()], "holds no clip; use another file"),
    ],
)
def test_another_layout_is_named(change, edit, message):
    with pytest.raises(ValueError, match=message):
        PhyworldSource(change(edit), frames=8, size=16)


def test_chunks_of_two_scenarios_are_refused(change):
    def mix(file):
        for group, values in (("position_streams", np.zeros((3, 16, 2))), ("init_streams", np.ones((3, 2)))):
            file[group].create_dataset("00001", data=values)
        file.copy("video_streams/00000", file["video_streams"], name="00001")

    with pytest.raises(ValueError, match="chunk 00001: 1 discs a clip, unlike chunk 00000"):
        PhyworldSource(change(mix), frames=8, size=16)


def spoil(data: np.ndarray, way: str) -> np.ndarray:
    """An MP4's bytes after an accident."""
    middle = len(data) // 2
    if way == "cut":
        return data[:middle]
    if way == "empty":
        return data[:0]
    if way == "noise":
        return np.random.default_rng(0).integers(0, 256, len(data), dtype=np.uint8)
    if way == "scratch":  # inside the coded pictures
        start = bytes(data).find(b"mdat") + 4 + 800  # after the encoder's own 700 bytes of text
        data = data.copy()
        data[start : start + 200] = 0
        return data
    frames = np.stack([*phyworld.decode_mp4(data.tobytes(), FRAMES, FRAMES)])
    shapes = {"short": frames[:12], "wide": np.concatenate([frames, frames], 2), "tiny": frames[:, ::4, ::4]}
    return np.frombuffer(phyworld.encode_mp4(shapes[way]), dtype=np.uint8)


@pytest.mark.parametrize(
    ("way", "message"),
    [
        ("cut", "the video is damaged"),
        ("empty", "the video is damaged"),
        ("noise", "the video is damaged"),
        ("scratch", "the video is damaged"),
        ("short", r"damaged \(it has 12 frames, its state 16\)"),
        ("wide", "frames of 128 x 64 pixels do not shrink to squares of 32"),
        ("tiny", "frames of 16 x 16 pixels do not shrink to squares of 32"),
    ],
)
def test_damaged_video_is_named_and_the_others_are_read(change, way, message):
    def damage(file):
        videos = file["video_streams"]["00000"]
        videos[1] = spoil(videos[1], way)

    source = PhyworldSource(change(damage), frames=8, size=32)
    assert len(source.clips([0, 2])) == 2
    with pytest.raises(ValueError, match=f"changed.hdf5, chunk 00000, index 1: .*{message}"):
        source.clips([0, 1])


@pytest.mark.parametrize(
    ("scenario", "init", "message"),
    [
        ("uniform", [1.0, 6.0], "units off a disc of 6 units/s"),
        ("parabola", [1.0, 0.0], "units off a disc of 0 units/s"),
        ("collision", [1.0, 1.0, 9.0, 1.0], "units off discs of 9 and 1 units/s"),
        ("collision", [5.0, 5.0, 1.0, 1.0], "the discs overlap by"),
        ("uniform", [-1.0, 1.0], "init not negative"),
    ],
)
def test_state_that_breaks_its_law_is_named(change, scenario, init, message):
    def lie(file):
        file["init_streams"]["00000"][1] = init

    with pytest.raises(ValueError, match=f"chunk 00000, index 1: .*{message}"):
        PhyworldSource(change(lie, scenario), frames=16, size=16).clips([1])


def test_missing_and_truncated_files_and_wrong_requests_are_named(files, tmp_path):
    with pytest.raises(ValueError, match=r"none.hdf5 does not exist"):
        PhyworldSource(tmp_path / "none.hdf5", frames=8, size=16)
    cut = tmp_path / "cut.hdf5"
    cut.write_bytes((files / "uniform.hdf5").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"cut.hdf5 is truncated or not an HDF5 file .*; fetch it again"):
        PhyworldSource(cut, frames=8, size=16)
    with pytest.raises(ValueError, match=r"uniform.hdf5 shows uniform, not parabola; leave the scenario out"):
        PhyworldSource(files / "uniform.hdf5", frames=8, size=16, scenario="parabola")
    for request, message in ((dict(frames=1, size=16), "2 frames"), (dict(frames=8, size=4), "8 pixels")):
        with pytest.raises(ValueError, match=f"at least {message}"):
            PhyworldSource(files / "uniform.hdf5", **request)


def bad_batches():
    clip = clips("uniform", 1, size=16)
    blue = replace(clip.state, positions=clip.state.positions.flip(2), radii=clip.state.radii.flip(1))
    return {
        "there is no clip to write": [],
        "phyworld's layout holds the true state": [replace(clip, state=None)],
        "a file holds one scenario, got uniform": [clip, clips("parabola", 1, size=16)],
        "frames must be squares of one even size, got 17 x 17": [clips("uniform", 1, size=17)],
        "frames must be squares of one even size, got 32 x 32": [clip, clips("uniform", 1, size=32)],
        "unknown scenario 'swimming'": [replace(clip, scenarios=("swimming",))],
        "the worlds have 10 frames/s, got 25": [replace(clip, fps=25.0)],
        "clips need 2 frames and a state for each, got 4 and 16": [replace(clip, frames=clip.frames[:, :4])],
        "the state of clip 0 has no red disc": [replace(clip, state=blue)],
    }


@pytest.mark.parametrize("message", bad_batches())
def test_what_cannot_be_written_leaves_no_file(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        write_phyworld(tmp_path / "out.hdf5", bad_batches()[message])
    assert list(tmp_path.iterdir()) == []


def test_interrupted_writing_keeps_the_old_file(files, tmp_path):
    path = tmp_path / "old.hdf5"
    shutil.copy(files / "uniform.hdf5", path)

    def batches():
        yield clips("uniform", 1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_phyworld(path, batches())
    assert path.read_bytes() == (files / "uniform.hdf5").read_bytes() and len(list(tmp_path.iterdir())) == 1


def test_full_disk_is_named(tmp_path, full_disk):
    with full_disk(20_000), pytest.raises(OSError, match=r"out.hdf5"):
        simulate_phyworld(tmp_path / "out.hdf5", "collision", 40, frames=8, size=64)
    assert list(tmp_path.iterdir()) == []


def test_read_only_folder_is_named(read_only_folder):
    with pytest.raises(OSError, match=r"out.hdf5"):
        simulate_phyworld(read_only_folder / "out.hdf5", "uniform", 1, frames=4, size=16)
