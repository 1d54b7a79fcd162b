from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.data import Clip, simulate
from physnb.data.takes import second_take
from physnb.metrics.physics_iq import (
    IOUS,
    TERMS,
    Motion,
    MotionMasker,
    common_size,
    compare,
    find_motion,
    measure_takes,
    metric_physics_iq,
    official_points,
    verified_points,
)
from physnb.metrics.physics_iq_files import (
    VIEWS,
    generated_name,
    open_video,
    read_frames,
    real_name,
    score_folders,
    split_clip,
    write_video,
)
from physnb.standings import plain_physics_iq

GIVEN = 3


def cases(clips: int = 2, size: int = 64, frames: int = 16) -> Clip:
    return Clip.concatenate(
        [simulate(name, "id", range(clips), frames=frames, size=size) for name in ("uniform", "parabola", "collision")]
    )


def with_frames(clip: Clip, frames: torch.Tensor) -> Clip:
    return replace(clip, frames=frames, state=None)


def grey_clip(levels: list[int], size: int = 32) -> np.ndarray:
    """Frames of one grey level each."""
    return np.stack([np.full((size, size, 3), level, np.uint8) for level in levels])


def squares_clip(shift: int, frames: int = 8, contrast: int = 255, size: int = 64) -> Clip:
    """One clip of a square of 16 pixels that starts `shift` pixels to the right and moves 3 a frame."""
    video = torch.full((1, frames, size, size, 3), 255, dtype=torch.uint8)
    for t in range(frames):
        left = shift + 3 * t
        video[0, t, 20:36, left : left + 16] -= contrast
    return Clip(video, ("",), ("square",), ("id",), torch.tensor([0]))


# --- masks and terms


@pytest.mark.parametrize(("step", "seen"), [(14, False), (-14, False), (16, True), (-16, True), (100, True)])
def test_only_steps_above_the_threshold_are_seen(step, seen):
    masker = MotionMasker()
    before, after = grey_clip([120, 120 + step])
    assert not masker(before).any()
    assert (masker(after) == 255 * seen).all()


def test_a_pixel_that_was_left_counts_for_some_frames():
    masker = MotionMasker()
    # a flash of 100 leaves averages 30, 21, 14.7, 10.3: rounded, the last is not above 10
    seen = [bool(masker(frame).any()) for frame in grey_clip([0, 100, 0, 0, 0])]
    assert seen == [False, True, True, True, False]


def test_terms_of_hand_made_masks():
    one, two = np.zeros((2, 2, 8, 8), bool)
    one[0, :4], two[0, :2] = True, True  # 32 and 16 pixels, 16 in common
    two[1, :4] = True  # nothing in common with an empty mask
    black, grey = np.zeros((2, 8, 8, 3), np.uint8), np.full((2, 8, 8, 3), 51, np.uint8)
    terms = compare(Motion(one, black), Motion(two, grey))
    assert terms.spatiotemporal_iou.tolist() == [0.5, 0.0]
    assert float(terms.spatial_iou) == 1.0
    assert float(terms.weighted_spatial_iou) == 32 / 48  # frames of motion: 1 against 2 in two rows, 1 against 1 in two
    assert terms.mse == pytest.approx([0.04, 0.04])
    empty = Motion(np.zeros_like(one), black)
    assert compare(empty, empty).spatiotemporal_iou.tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(Motion(one[:1], black), Motion(two, grey))


def test_scores_of_hand_made_terms():
    model = dict(spatiotemporal_iou=0.4, spatial_iou=0.9, weighted_spatial_iou=0.3, mse=0.02)
    variance = dict(spatiotemporal_iou=0.8, spatial_iou=0.6, weighted_spatial_iou=0.6, mse=0.01)
    model, variance = ({name: np.array(value) for name, value in terms.items()} for terms in (model, variance))
    assert float(official_points(model, variance)) == pytest.approx(100 * ((0.5 + 1.5 + 0.5) / 3 - 0.01))
    assert float(verified_points(model, variance)) == pytest.approx(100 * (0.5 + 1 + 0.5 + 0.5) / 4, abs=1e-4)


@pytest.mark.parametrize(("width", "height", "common"), [(64, 64, (256, 256)), (96, 64, (384, 256)), (640, 360, None)])
def test_only_small_clips_are_enlarged(width, height, common):
    assert common_size(width, height, 256) == (common or (width, height))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([3, 13, 16, 17, 20, 25, 150]), st.sampled_from([32, 32, 64, 48]))
def test_masks_around_what_changes_are_those_of_whole_frames(seed, contrast, size):
    random = np.random.default_rng(seed)
    frames = np.repeat(random.integers(0, 90, (1, size, size, 3), np.uint8), 5, axis=0)
    left, top, width, height = random.integers(0, size - 12, 2).tolist() + random.integers(3, 13, 2).tolist()
    frames[2:, top : top + height, left : left + width] += np.uint8(contrast)
    frames[:, top, left] += random.integers(0, 10, (5, 3), np.uint8)
    masker = MotionMasker()
    whole = [cv2.resize(masker(cv2.resize(frame, (256, 256))), (64, 64)) > 127 for frame in frames]
    assert np.array_equal(find_motion(frames, (256, 256), 0).masks, np.stack(whole[1:]))


@pytest.mark.parametrize("size", [64, 40])  # enlarged by a whole number, and not
def test_terms_are_those_of_the_plain_procedure(size):
    true = cases(size=size)
    second, generated = second_take(true, 0), second_take(true, 1)
    found = metric_physics_iq(generated, true, second)
    for name, values in plain_physics_iq(generated, true, second).items():
        assert found[name].values.tolist() == pytest.approx(values, abs=1e-7), name


# --- clips


def rungs(true: Clip) -> dict[str, torch.Tensor]:
    """Frames of the sanity ladder; all keep the given frames."""
    frames, random = true.frames, torch.Generator().manual_seed(0)
    given, made = frames[:, :GIVEN], frames[:, GIVEN:]
    tails = dict(
        copy=made,
        third_take=second_take(true, 2).frames[:, GIVEN:],
        reversed=made.flip(1),
        shuffled=made[:, torch.randperm(made.shape[1], generator=random)],
        swapped=made.roll(1, 0),
        static=given[:, -1:].expand_as(made),
        noise=torch.randint(0, 256, made.shape, generator=random, dtype=torch.uint8),
    )
    return {name: torch.cat([given, tail], 1) for name, tail in tails.items()}


@pytest.mark.parametrize("scenario", ["uniform", "parabola", "collision"])
def test_sanity_ladder_holds_for_the_verified_score(scenario):
    true = simulate(scenario, "id", range(6), frames=16, size=64)
    takes = measure_takes(true, second_take(true, 1))
    found = {name: takes.compare(with_frames(true, frames)).of_set() for name, frames in rungs(true).items()}
    verified = {name: values["verified"] for name, values in found.items()}
    assert found["copy"]["judged"] == 6
    assert verified["copy"] == 100
    assert 80 < verified["third_take"] < 99
    for name in ("reversed", "shuffled", "swapped", "noise", "static"):
        assert verified[name] < verified["third_take"] - 10, (name, verified)
    assert verified["static"] == min(verified.values())
    assert found["static"]["physics_iq_raw"] < 0 == found["static"]["physics_iq"]


def test_second_take_itself_has_full_marks_and_larger_jitter_inflates():
    true = cases()
    second, third = second_take(true, 1), second_take(true, 2)
    found = metric_physics_iq(second, true, second)
    torch.testing.assert_close(found["physics_iq_raw"].values, torch.full((6,), 100.0).double())
    assert found["verified"].values.min() > 99.99
    wide = second_take(true, 1, speed_jitter=0.05, position_jitter=0.6)
    narrow_score, wide_score = (measure_takes(true, two).compare(third).of_set() for two in (second, wide))
    assert wide_score["verified"] > narrow_score["verified"]
    assert all(wide_score[f"variance_{name}"] < narrow_score[f"variance_{name}"] for name in IOUS)


def test_direction_is_part_of_every_score_and_raw_is_not_clipped():
    true = cases()
    found = metric_physics_iq(true, true, second_take(true, 1))
    assert {name for name, s in found.items() if s.lower_is_better} == {"mse", "variance_mse"}
    assert (found["physics_iq_raw"].values > 100).all() and (found["moving_share"].values == 1).all()
    assert (found["mse"].values == 0).all() and (found["spatial_iou"].values == 1).all()


def test_given_frames_are_not_judged():
    true = cases()
    frames = true.frames.clone()
    frames[:, : GIVEN - 1] = 0  # the last given frame starts the running average
    second = second_take(true, 1)
    changed, plain = (metric_physics_iq(with_frames(true, f), true, second) for f in (frames, true.frames))
    for name, expected in plain.items():
        assert torch.equal(changed[name].values, expected.values), name


def test_score_of_a_set_is_the_official_formula_of_mean_terms():
    true = cases()
    comparison = measure_takes(true, second_take(true, 1)).compare(second_take(true, 2))
    found, values = comparison.of_set(), comparison.scores()
    mean = {name: float(s.values.mean()) for name, s in values.items()}
    ratios = sum(mean[name] / mean[f"variance_{name}"] for name in IOUS) / 3
    assert found["physics_iq_raw"] == pytest.approx(100 * (ratios - mean["mse"] + mean["variance_mse"]))
    assert found["verified"] == pytest.approx(mean["verified"])


def test_motion_that_the_mask_cannot_see_is_not_judged():
    faint, still = squares_clip(4, contrast=8), squares_clip(4)
    still = with_frames(still, still.frames[:, :1].expand_as(still.frames))
    white = with_frames(still, torch.full_like(still.frames, 255))
    moving, far = squares_clip(4), with_frames(squares_clip(4), squares_clip(4).frames.roll(30, 2))
    for true, second, reason in (
        (faint, faint, "mask of take 1 is empty"),
        (white, white, "mask of take 1 is empty"),
        (white, moving, "mask of take 1 is empty"),
        (moving, still, "mask of take 2 is empty"),
        (moving, far, "does not overlap"),
    ):
        takes = measure_takes(true, second)
        found = takes.compare(true).scores()
        assert all(reason in s.reasons[0] for name, s in found.items() if name != "moving_share"), reason
        assert all(s.values.isnan().all() for name, s in found.items() if name != "moving_share")
        assert found["moving_share"].values.item() == (true is moving)
        of_set = takes.compare(true).of_set()
        assert of_set["judged"] == 0 and of_set["physics_iq"] is None and of_set["verified"] is None


@settings(max_examples=6, deadline=None)
@given(st.permutations(range(3)), st.integers(0, 2**32 - 1))
def test_order_of_the_batch_does_not_matter_and_inputs_stay(order, seed):
    true = cases(clips=1, size=32, frames=8)
    random = torch.Generator().manual_seed(seed)
    generated = with_frames(true, torch.randint(0, 256, true.frames.shape, generator=random, dtype=torch.uint8))
    second, before = second_take(true, 1), generated.frames.clone()
    found = metric_physics_iq(generated, true, second)
    rows = list(order)
    shuffled = metric_physics_iq(generated[rows], true[rows], second[rows])
    for name, s in found.items():
        torch.testing.assert_close(s.values[rows], shuffled[name].values, rtol=0, atol=0, equal_nan=True)
        assert all(value == value or reason for value, reason in zip(s.values.tolist(), s.reasons, strict=True))
    assert torch.equal(generated.frames, before)


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        (lambda c: c[0:2], {}, "do not match"),
        (lambda c: c[[1, 0, 2]], {}, "same cases in the same order"),
        (lambda c: with_frames(c, c.frames[:, :-1]), {}, "do not match"),
        (lambda c: with_frames(c, c.frames[:, :, :-1]), {}, "do not match"),
        (lambda c: replace(c, fps=8.0), {}, "frames/s"),
        (lambda c: c, dict(size=128), "at least 256"),
        (lambda c: c, dict(frames_given=7), "2 generated frames"),
        (lambda c: c, dict(frames_given=-1), "2 generated frames"),
    ],
)
def test_clips_that_do_not_belong_together_are_refused(change, settings, message):
    true = cases(clips=1, size=32, frames=8)
    with pytest.raises(ValueError, match=message):
        metric_physics_iq(change(true), true, true, **settings)


@pytest.mark.parametrize("frames", [0, 1])
def test_too_few_frames_are_refused(frames):
    true = cases(clips=1, size=32, frames=8)
    short = with_frames(true, true.frames[:, :frames])
    with pytest.raises(ValueError, match="nothing to judge" if frames == 0 else "2 generated frames"):
        metric_physics_iq(short, short, short, frames_given=0)


# --- folders: the toy set of six views on which the official scripts were run


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """Two scenarios as official folders: real, copy (of take 1), diff (another speed) and static (frame 0)."""
    root = tmp_path_factory.mktemp("physics-iq")
    random = np.random.default_rng(0)
    ground = cv2.GaussianBlur((random.random((96, 128, 3)) * 30 + 220).astype(np.uint8), (0, 0), 4)

    def video(y0: float, vy: float, vx: float) -> list[np.ndarray]:
        frames = []
        for t in range(40):
            frame = ground.copy()
            cv2.circle(frame, (round(14 + vx * t), round(y0 + vy * t)), 10, (0, 0, 255), -1, cv2.LINE_AA)
            frames.append(np.ascontiguousarray(frame[..., ::-1]))
        return frames

    for name in ("real", "copy", "diff", "static"):
        (root / name).mkdir()
    for s in range(2):
        for v, view in enumerate(VIEWS):
            number = f"{3 * s + v + 1:04d}"
            first = video(20 + 5 * v, 1.0 + 0.3 * s, 2.2)
            second = video(21 + 5 * v, 1.05 + 0.3 * s, 2.1)
            made = dict(copy=first, diff=video(24 + 5 * v, 0.6 + 0.3 * s, 1.9), static=first[:1] * 40)
            write_video(root / "real" / real_name(number, 8, view, "1", f"toy-{s}"), first, 8)
            write_video(root / "real" / real_name(f"{int(number) + 198:04d}", 8, view, "2", f"toy-{s}"), second, 8)
            for name, frames in made.items():
                write_video(root / name / generated_name(number, view, f"toy-{s}"), frames, 8)
    return root


@pytest.mark.parametrize(
    ("name", "printed", "raw", "mse", "st_iou", "sp_iou", "ws_iou", "verified"),
    [
        ("copy", 100.0, 131.16, 0.0, 1.0, 1.0, 1.0, 100.0),
        ("diff", 83.27, 83.27, 0.0116275, 0.560014, 0.698173, 0.671539, 70.064),
        ("static", 0.0, -0.834, 0.026158, 0.033333, 0.0, 0.0, 4.190),
    ],
)
def test_compat_is_the_official_score(toy, name, printed, raw, mse, st_iou, sp_iou, ws_iou, verified):
    found = score_folders(toy / "real", toy / name, fps=8, mode="compat")
    assert found["physics_iq"] == printed
    assert found["physics_iq_raw"] == pytest.approx(raw, abs=0.005)
    assert found["verified"] == pytest.approx(verified, abs=5e-4)
    terms = dict(zip(TERMS, (st_iou, sp_iou, ws_iou, mse), strict=True))
    assert {name: found[name] for name in TERMS} == pytest.approx(terms, abs=6e-7)
    assert [found[f"variance_{name}"] for name in TERMS] == [0.7599, 0.78054, 0.7529, 0.0032]
    assert found["variance_sum"] == 2.2901
    assert len(found["rows"]) == 6 and found["notes"] == found["not_judged"] == []


def test_clean_is_near_and_has_no_free_frame(toy):
    found = score_folders(toy / "real", toy / "diff", fps=8)
    assert found["mode"] == "clean" and found["judged"] == found["cases"] == 6
    assert 60 < found["verified"] < 80 and 70 < found["physics_iq_raw"] < 95
    assert [(row["scenario"], row["view"]) for row in found["rows"]] == [
        (f"toy-{s}", v) for s in range(2) for v in VIEWS
    ]
    assert found["verified"] == pytest.approx(np.mean([row["verified"] for row in found["rows"]]))
    assert all(row["reason"] is None and row["moving_share"] == 1 for row in found["rows"])


# --- folders: one small scenario that each test may break


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Real and generated videos of one scenario: 5 s at 2 frames/s, a dark square on light ground."""
    real, generated = tmp_path / "real", tmp_path / "generated"
    real.mkdir()
    generated.mkdir()
    for v, view in enumerate(VIEWS):
        write_video(real / real_name(f"000{v}", 2, view, "1", "fall"), small_video(), 2)
        write_video(real / real_name(f"020{v}", 2, view, "2", "fall"), small_video(shift=1), 2)
        write_video(generated / generated_name(f"000{v}", view, "fall"), small_video(shift=2), 2)
    return real, generated


def small_video(shift: int = 0, frames: int = 10, width: int = 32, height: int = 24, contrast: int = 200) -> np.ndarray:
    video = np.full((frames, height, width, 3), 230, np.uint8)
    for t in range(frames):
        video[t, 6:16, shift + t : shift + t + 10] -= np.uint8(contrast)
    return video


REAL = real_name("0001", 2, VIEWS[1], "1", "fall")
SECOND = real_name("0201", 2, VIEWS[1], "2", "fall")
MADE = generated_name("0001", VIEWS[1], "fall")


def test_scenarios_can_be_chosen_and_have_categories(folders, tmp_path):
    real, generated = folders
    below = tmp_path / "data" / "split-videos" / "testing" / "2FPS"
    below.parent.mkdir(parents=True)
    real.rename(below)
    table = tmp_path / "descriptions.csv"
    table.write_text("scenario,description,category\n0000_perspective-left_take-1_fall.mp4,x,Solid Mechanics\n")
    found = score_folders(tmp_path / "data", generated, fps=2, scenarios=["fall"], descriptions=table)
    assert [row["category"] for row in found["rows"]] == ["Solid Mechanics"] * 3
    assert found["judged"] == 3
    with pytest.raises(ValueError, match="'melt'; choose one of fall"):
        score_folders(below, generated, fps=2, scenarios=["melt"])
    with pytest.raises(ValueError, match=r"scenario in .*descriptions\.csv 'melt'; choose one of fall"):
        score_folders(below, generated, fps=2, scenarios=["melt"], descriptions=table)
    table.write_text("name\nfall\n")
    with pytest.raises(ValueError, match="columns scenario and category"):
        score_folders(below, generated, fps=2, descriptions=table)


def test_view_without_visible_motion_is_not_judged_and_says_so(folders):
    real, generated = folders
    for name in (REAL, SECOND):
        write_video(real / name, small_video(contrast=5), 2)
    found = score_folders(real, generated, fps=2)
    assert (found["judged"], found["cases"]) == (2, 3)
    assert found["rows"][1]["verified"] is None and found["rows"][0]["verified"] is not None
    assert found["not_judged"] == [f"fall {VIEWS[1]}: {found['rows'][1]['reason']}"]
    compat = score_folders(real, generated, fps=2, mode="compat")
    assert compat["rows"][1]["variance_spatial_iou"] == 1 and len(compat["not_judged"]) == 1


def test_longer_videos_are_cut_only_where_the_official_code_cuts(folders):
    real, generated = folders
    plain = score_folders(real, generated, fps=2)
    write_video(real / REAL, small_video(frames=12), 2)
    cut = score_folders(real, generated, fps=2)
    assert cut["notes"] == [f"{REAL}: 12 frames, cut to the first 10"]
    assert cut["verified"] == pytest.approx(plain["verified"], abs=0.5)  # the codec sees other frames
    write_video(generated / MADE, small_video(shift=2, frames=16), 2)
    assert len(score_folders(real, generated, fps=2, mode="compat")["notes"]) == 2
    with pytest.raises(ValueError, match=rf"{MADE} has 16 frames, expected 10.*split_clip"):
        score_folders(real, generated, fps=2)


def test_generated_videos_of_another_size_are_resized_and_noted(folders):
    real, generated = folders
    write_video(generated / MADE, np.stack([cv2.resize(f, (64, 48)) for f in small_video(shift=2)]), 2)
    found = score_folders(real, generated, fps=2)
    assert found["notes"] == [f"{MADE}: 64 x 48, compared at 32 x 24"]
    assert found["rows"][1]["verified"] == pytest.approx(found["rows"][0]["verified"], abs=10)


def rename(name: str, other: str):
    return lambda real, generated: (real / name).rename(real / other)


def rewrite(name: str, video: np.ndarray, fps: int = 2):
    return lambda real, generated: write_video((generated if name == MADE else real) / name, video, fps)


@pytest.mark.parametrize(
    ("breakage", "settings", "message"),
    [
        (lambda r, g: (r / SECOND).unlink(), {}, f"{VIEWS[1]}_take-2_fall.mp4 is missing: take 2"),
        (lambda r, g: (r / REAL).unlink(), {}, f"{VIEWS[1]}_take-1_fall.mp4 is missing: take 1"),
        (lambda r, g: (g / MADE).unlink(), {}, f"{MADE} is missing: the generated video"),
        (lambda r, g: (g / MADE).write_bytes(b"no video"), {}, f"{MADE} cannot be read as a video"),
        (lambda r, g: (g / MADE).write_bytes(b""), {}, f"{MADE} cannot be read as a video"),
        (rewrite(MADE, small_video(frames=9)), {}, f"{MADE} has 9 frames; 5 s at 2 frames/s are 10"),
        (rewrite(SECOND, small_video(frames=9)), {}, f"{SECOND} has 9 frames"),
        (rewrite(MADE, small_video(frames=15), fps=3), {}, f"{MADE} has 3 frames/s, expected 2"),
        (rewrite(MADE, small_video(height=16)), dict(mode="compat"), f"{MADE} is 32 x 16; compat needs"),
        (rename(REAL, "0001_odd_name.mp4"), {}, "0001_odd_name.mp4 is not named"),
        (rename(REAL, REAL.replace("center", "above")), {}, "unknown view in .* 'perspective-above'"),
        (rename(SECOND, SECOND.replace("take-2", "take-1")), {}, "are the same view and take"),
        (lambda r, g: None, dict(fps=8), "no real videos of 8FPS; there are 2FPS"),
        (lambda r, g: None, dict(fps=0), "positive whole number"),
        (lambda r, g: None, dict(mode="strict"), "unknown mode 'strict'; choose one of clean, compat"),
        (lambda r, g: None, dict(size=64), "at least 256"),
        (lambda r, g: None, dict(descriptions="no.csv"), "no.csv does not exist"),
        (lambda r, g: [p.unlink() for p in r.iterdir()], {}, "there are none at all"),
    ],
)
def test_folders_that_do_not_fit_are_refused_by_name(folders, breakage, settings, message):
    breakage(*folders)
    with pytest.raises(ValueError, match=message):
        score_folders(*folders, **dict(fps=2) | settings)


def test_missing_folder_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        score_folders(folders[0], tmp_path / "nowhere", fps=2)


def test_video_round_trip_keeps_colours_and_header(tmp_path):
    path = tmp_path / "a.mp4"
    frames = np.zeros((4, 32, 48, 3), np.uint8)
    frames[..., 0] = 200
    write_video(path, frames, 5)
    video = open_video(path)
    assert (video.width, video.height, video.fps, video.frames) == (48, 32, 5.0, 4)
    read = np.stack(list(read_frames(path, 4)))
    assert np.abs(read.astype(int) - frames).max() < 12
    with pytest.raises(ValueError, match=r"a\.mp4 has only 4 frames that can be decoded; 5 are needed"):
        list(read_frames(path, 5))


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (np.zeros((0, 32, 32, 3), np.uint8), "no frames to write"),
        (np.zeros((2, 31, 32, 3), np.uint8), "even size"),
        ([np.zeros((32, 32, 3), np.uint8), np.zeros((34, 32, 3), np.uint8)], "in one video"),
    ],
)
def test_video_that_cannot_be_written_is_refused(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, 5)


def test_split_clip_cuts_after_three_seconds():
    conditioning, switch, test = split_clip(np.arange(64), 8)
    assert (len(conditioning), int(switch), len(test)) == (24, 23, 40)
    assert np.array_equal(np.concatenate([conditioning, test]), np.arange(64))
    with pytest.raises(ValueError, match="has 64 frames, got 40"):
        split_clip(np.arange(40), 8)
