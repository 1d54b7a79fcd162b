import math
from dataclasses import replace
from itertools import combinations

import numpy as np
import pymunk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from physnb.data import bodies, templates
from physnb.data.bodies import GRAVITY, HIGH, LOW, Body, Motion, deepest_overlap, draw_bodies, simulate_bodies
from physnb.data.clips import WORLD_SIZE, Clip
from physnb.data.templates import (
    ARRIVALS,
    COMPANIES,
    TEMPLATES,
    THINGS,
    Scene,
    Template,
    TemplateSource,
    draw_scene,
    film,
    templates_of,
)
from physnb.data.worlds import frame_times
from physnb.metrics import parse_discs

DEEPEST = 0.05  # world units that bodies may overlap during an impact: what the fastest ball goes in a step
ENERGY_TOLERANCE = 0.002  # of the energy at the start
FRAMES = 16


def template(name: str) -> Template:
    return next(template for template in TEMPLATES if template.name == name)


@pytest.fixture(scope="session")
def played() -> list[tuple[Scene, Motion]]:
    """One scene of every template and how it goes; shared, so never changed."""
    scenes = [draw_scene(template, "train", 0, template.number) for template in TEMPLATES]
    return [(scene, simulate_bodies(scene.bodies, FRAMES)) for scene in scenes]


def moving(scene: Scene) -> list[int]:
    return [number for number, body in enumerate(scene.bodies) if not body.fixed]


def polygon_area(corners: np.ndarray) -> float:
    x, y = corners.T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2


def mass_and_moment(body: Body) -> tuple[float, float]:
    """At density 1, by textbook formulas."""
    if body.radius:
        mass = math.pi * body.radius**2
        return mass, mass * body.radius**2 / 2
    mass = moment = 0.0
    for corners in body.polygons:
        after = np.roll(corners, -1, 0)
        cross = corners[:, 0] * after[:, 1] - corners[:, 1] * after[:, 0]
        mass += polygon_area(corners)
        moment += float((cross * (corners**2 + corners * after + after**2).sum(1)).sum()) / 12
    return mass, moment


def energies(scene: Scene, motion: Motion) -> np.ndarray:
    """Kinetic and potential energy in every frame, with that of t = 0 in front."""
    total = np.zeros(len(motion.positions) + 1)
    for number in moving(scene):
        body = scene.bodies[number]
        mass, moment = mass_and_moment(body)
        speed2 = np.array([np.square(body.velocity).sum(), *np.square(motion.velocities[:, number]).sum(1)])
        height = np.array([body.position[1], *motion.positions[:, number, 1]])
        spin = np.array([body.spin, *motion.spins[:, number]])
        total += mass * (speed2 / 2 + GRAVITY * height) + moment * spin**2 / 2
    return total


# templates


def test_sixty_templates_train_and_ten_are_held_out():
    train, held_out = templates_of("train"), templates_of("ood")
    assert (len(train), len(held_out)) == (60, 10) and train == templates_of("id")
    assert not set(train) & set(held_out) and set(train) | set(held_out) == set(TEMPLATES)
    for kind in ("name", "caption", "number"):
        assert len({getattr(template, kind) for template in TEMPLATES}) == 70


def test_held_out_templates_hold_nothing_new_but_the_triple():
    def pairs(template):
        return set(combinations([template.arrival, template.thing, template.company], 2))

    train = templates_of("train")
    for kinds, name in ((ARRIVALS, "arrival"), (THINGS, "thing"), (COMPANIES, "company")):
        assert {getattr(template, name) for template in train} == set(kinds)
        assert {getattr(template, name) for template in templates_of("ood")} == set(kinds)
    trained = set().union(*(pairs(template) for template in train))
    for template in templates_of("ood"):
        assert pairs(template) <= trained


def test_captions_are_of_few_words():
    assert template("fall-bar-alone").caption == "a red ball falls on a bar"
    assert template("ramp-jar-blue").caption == "a red ball rolls down to a jar near a blue ball"
    words = {word for template in TEMPLATES for word in template.caption.split()}
    assert len(words) <= 30 and max(len(template.caption.split()) for template in TEMPLATES) <= 12


def test_clips_of_a_split_show_its_templates_only():
    for split, bucket in (("train", {"id"}), ("id", {"id"}), ("ood", {"template"})):
        clip = TemplateSource(frames=2, size=8, split=split).clips(range(60))
        shown = {int(parameters["template"]) for parameters in clip.parameters}
        assert shown <= {template.number for template in templates_of(split)}
        assert set(clip.buckets) == bucket
        assert len(shown) == 10 if split == "ood" else len(shown) > 30


# clips


def same_clips(one: Clip, other: Clip) -> bool:
    states = zip(vars(one.state).values(), vars(other.state).values(), strict=True)
    return (
        torch.equal(one.frames, other.frames)
        and all(torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)) for a, b in states)
        and (one.captions, one.buckets, one.parameters) == (other.captions, other.buckets, other.parameters)
        and torch.equal(one.indices, other.indices)
    )


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=3), st.sampled_from(["train", "ood"]))
def test_clip_alone_is_the_clip_in_a_batch(numbers, split):
    source = TemplateSource(frames=5, size=16, split=split, seed=3)
    batch = source.clips(np.array([*numbers, numbers[0]]))
    for row, number in enumerate([*numbers, numbers[0]]):
        assert same_clips(source.clips([number]), batch[row : row + 1])


def test_same_bytes_in_another_process(start_python):
    code = """
import hashlib, torch
from physnb.data.templates import TemplateSource
for number in (7, 5, 6):
    clip = TemplateSource(frames=16, size=16).clips([number])
    print(number, hashlib.sha256(clip.frames.numpy().tobytes() + clip.state.positions.numpy().tobytes()).hexdigest())
"""
    printed, _ = start_python("-c", code).communicate(timeout=120)
    there = dict(line.split() for line in printed.splitlines())
    here: dict[str, str] = {}
    exec(code, {"print": lambda number, digest: here.update({str(number): digest})})
    assert here == there and len(here) == 3


def test_shorter_clip_is_the_beginning_of_a_longer_one():
    short, long = (TemplateSource(frames=frames, size=16).clips(range(6)) for frames in (4, 16))
    assert torch.equal(short.frames, long.frames[:, :4])
    assert torch.equal(short.state.positions.nan_to_num(-1), long.state.positions[:, :4].nan_to_num(-1))


def test_seeds_and_splits_give_other_clips():
    train, test, other = (
        TemplateSource(frames=2, size=8, split=split, seed=seed).clips(range(8)).state.positions[:, 0, 0]
        for split, seed in (("train", 0), ("id", 0), ("id", 1))
    )
    assert (train != test).any(1).all() and (test != other).any(1).all()


@pytest.mark.parametrize("size", [32, 33, 64])
def test_every_template_shows_its_balls_where_the_state_says(played, size):
    for scene, motion in played:
        frames = torch.from_numpy(draw_bodies(scene.bodies, motion, size))[None]
        assert frames.shape == (1, FRAMES, size, size, 3)
        found = parse_discs(frames)
        for disc in range(2):
            present = disc == 0 or scene.template.company == "blue"
            areas = found.areas[0, :, disc]
            if not present:
                assert areas.max() == 0  # nothing else is red or blue, mixed edges included
                continue
            true_area = math.pi * scene.bodies[disc].radius ** 2
            assert areas.min() > 0.75 * true_area and areas.max() < 1.15 * true_area
            offset = found.positions[0, :, disc] - torch.from_numpy(motion.positions[:, disc])
            assert offset.norm(dim=-1).max() < 0.25 * WORLD_SIZE / size  # less where nothing else touches the ball


def test_balls_stay_whole_in_the_box():
    state = TemplateSource(frames=FRAMES, size=8).clips(range(40)).state
    assert state.inside[state.present[:, None].expand(-1, FRAMES, -1)].all()
    assert state.present[:, 0].all() and 0.2 < state.present[:, 1].float().mean() < 0.8


def test_most_clips_show_the_impact_with_frames_before_and_after():
    impact = TemplateSource(frames=FRAMES, size=8, split="id").clips(range(60)).state.impact_time_s
    assert ((impact > 0.25) & (impact < 1.25)).float().mean() > 0.8


def test_impact_is_when_a_falling_ball_has_fallen():
    scene = draw_scene(template("fall-ball-alone"), "train", 0, 1)
    red, green = scene.bodies
    apart = red.position[0] - green.position[0]
    height = red.position[1] - green.position[1] - math.sqrt((red.radius + green.radius) ** 2 - apart**2)
    expected = math.sqrt(2 * height / GRAVITY)
    assert simulate_bodies(scene.bodies, FRAMES).first_impact_s == pytest.approx(expected, abs=2 * bodies.STEP_S)
    clip = film(scene, 1, frames=4, size=8)
    assert clip.state.impact_time_s.isnan().all()  # which these four frames do not reach


def test_a_bar_is_drawn_with_its_area_and_turned():
    bar = Body(bodies.GREY, (5.0, 5.0), polygons=(bodies.box(4.0, 1.0),), angle=math.pi / 6)
    red = Body(bodies.RED, (2.0, 8.5), 0.5)
    scene = Scene(TEMPLATES[0], (red, bar))
    places, turns = np.array([[red.position, bar.position]]), np.array([[0.0, bar.angle]])
    motion = Motion(places, turns, np.zeros_like(places), np.zeros_like(turns), math.nan)
    grey = (255 - draw_bodies(scene.bodies, motion, 64)[0].astype(float)) / 127
    grey[:20, :20] = 0  # the red ball
    grey[[0, 1, 2, -1, -2, -3]] = grey[:, [0, 1, 2, -1, -2, -3]] = 0  # the border
    area = grey[..., 0] * (WORLD_SIZE / 64) ** 2
    assert area.sum() == pytest.approx(4.0, rel=0.03)
    x = (np.arange(64) + 0.5) / 64 * WORLD_SIZE - 5
    y = -x[:, None]
    moments = [(area * value).sum() / area.sum() for value in (x, y, x * x, y * y, x * y)]
    along, across = 4**2 / 12, 1 / 12
    cos2, sin2 = math.cos(math.pi / 6) ** 2, math.sin(math.pi / 6) ** 2
    mixed = (along - across) * math.sqrt(cos2 * sin2)
    expected = [0, 0, along * cos2 + across * sin2, along * sin2 + across * cos2, mixed]
    assert moments == pytest.approx(expected, abs=0.05)


# laws


def test_energy_never_grows(played):
    for scene, motion in played:
        energy = energies(scene, motion)
        assert np.diff(energy).max() < ENERGY_TOLERANCE * energy[0], scene.template.name


def test_bodies_do_not_interpenetrate(played):
    for scene, motion in played:
        for frame in range(0, FRAMES, 3):
            places = zip(scene.bodies, motion.positions[frame].tolist(), motion.angles[frame].tolist(), strict=True)
            bodies = [replace(body, position=tuple(place), angle=angle) for body, place, angle in places]
            assert deepest_overlap(bodies) < DEEPEST, scene.template.name
        balls = [number for number in moving(scene) if scene.bodies[number].radius]
        for number in balls:
            radius, (x, y) = scene.bodies[number].radius, motion.positions[:, number].T
            assert (y - radius > LOW - DEEPEST).all() and (x - radius > LOW - DEEPEST).all()
            assert (x + radius < HIGH + DEEPEST).all()
        for one, other in combinations(balls, 2):
            distance = np.linalg.norm(motion.positions[:, one] - motion.positions[:, other], axis=1)
            assert (distance > scene.bodies[one].radius + scene.bodies[other].radius - DEEPEST).all()


def test_overlap_is_measured_in_world_units():
    one, other = Body(bodies.RED, (3.0, 5.0), 0.5), Body(bodies.BLUE, (3.9, 5.0), 0.5)
    assert deepest_overlap([one, other]) == pytest.approx(0.1, abs=1e-6)
    assert deepest_overlap([one, replace(other, position=(4.5, 5.0))]) == 0
    assert deepest_overlap([replace(one, position=(3.0, LOW + 0.3))]) == pytest.approx(0.2, abs=1e-6)


def test_free_flight_is_a_parabola_and_keeps_momentum_and_spin(played):
    seen = 0
    for scene, motion in played:
        if scene.template.arrival not in ("fall", "flight"):
            continue
        red, time = scene.bodies[0], frame_times(FRAMES)
        free = time < motion.first_impact_s - 2 * bodies.STEP_S
        # the floor, or in a flight to a low thing the last frames before it
        free &= red.position[1] + red.velocity[1] * time - GRAVITY / 2 * time**2 > LOW + red.radius + 0.02
        seen += free.sum()
        fall = np.outer(time, red.velocity) - np.outer(time**2, [0, GRAVITY / 2])
        np.testing.assert_allclose(motion.positions[free, 0], (red.position + fall)[free], atol=1e-9)
        velocity = np.array(red.velocity) - np.outer(time, [0, GRAVITY])
        np.testing.assert_allclose(motion.velocities[free, 0], velocity[free], atol=1e-9)
        np.testing.assert_allclose(motion.spins[free, 0], 0, atol=1e-12)
    assert seen > 100


def test_things_rest_until_they_are_touched(played):
    for scene, motion in played:
        if scene.template.company == "blue":  # which may touch them before the red ball does
            continue
        still = frame_times(FRAMES) < np.nan_to_num(motion.first_impact_s, nan=np.inf)
        for number in moving(scene)[1:]:
            drift = np.linalg.norm(motion.positions[still, number] - scene.bodies[number].position, axis=1)
            assert drift.max() < 0.02, scene.template.name
            assert np.abs(motion.angles[still, number] - scene.bodies[number].angle).max() < 0.02
            assert np.linalg.norm(motion.velocities[still, number], axis=1).max() < 0.1


def test_rolling_ball_rolls(played):
    scene, motion = next((s, m) for s, m in played if s.template.name == "roll-pole-alone")
    red = scene.bodies[0]
    free = frame_times(FRAMES) < motion.first_impact_s
    assert free.sum() >= 4
    np.testing.assert_allclose(motion.positions[free, 0, 1], red.position[1], atol=0.01)
    np.testing.assert_allclose(motion.velocities[free, 0, 0], red.velocity[0], rtol=0.01)
    np.testing.assert_allclose(motion.spins[free, 0] * red.radius, -red.velocity[0], rtol=0.02)


def test_ball_rolling_down_gains_two_thirds_of_what_sliding_would():
    scene = draw_scene(template("ramp-ball-alone"), "train", 0, 0)
    motion, red = simulate_bodies(scene.bodies, 3), scene.bodies[0]
    wedge = next(body for body in scene.bodies if body.fixed).polygons[0]
    slope = math.atan2(np.ptp(wedge[:, 1]), np.ptp(wedge[:, 0]))
    speed = np.linalg.norm(motion.velocities[:, 0], axis=1)
    gained = (speed[1] - np.hypot(*red.velocity)) / frame_times(3)[1]
    assert gained == pytest.approx(2 / 3 * GRAVITY * math.sin(slope), rel=0.05)


def test_centres_of_mass_are_where_the_bodies_are(played):
    for scene, _ in played:
        for body in scene.bodies:
            if body.polygons and not body.fixed:
                areas = [polygon_area(corners) for corners in body.polygons]
                centres = [corners.mean(0) for corners in body.polygons]  # boxes
                assert min(areas) > 0
                np.testing.assert_allclose(np.average(centres, axis=0, weights=areas), 0, atol=1e-9)
                space = bodies.make_space([body])
                engine = next(iter(space.bodies))
                assert (engine.mass, engine.moment) == pytest.approx(mass_and_moment(body))
                assert engine.center_of_gravity == pytest.approx(pymunk.Vec2d(0, 0), abs=1e-9)


def test_mirrored_scene_goes_the_mirrored_way():
    scene = draw_scene(template("ledge-seesaw-alone"), "train", 0, 0)
    mirrored = Scene(scene.template, tuple(body.mirrored() for body in scene.bodies))
    motion, turned = (simulate_bodies(each.bodies, 8) for each in (scene, mirrored))
    np.testing.assert_allclose(turned.positions[:, 0], motion.positions[:, 0] * [-1, 1] + [WORLD_SIZE, 0], atol=1e-3)
    for body in scene.bodies:
        np.testing.assert_allclose(body.mirrored().mirrored().corners(), body.corners(), atol=1e-12)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (dict(split="test"), "unknown split 'test'; choose one of train, id, ood"),
        (dict(seed=-1), "seed must not be negative, got -1"),
        (dict(frames=1), "at least 2 frames, got 1"),
        (dict(size=4), "at least 8 pixels, got 4"),
    ],
)
def test_bad_request_is_named(request_, message):
    with pytest.raises(ValueError, match=message):
        TemplateSource(**(dict(frames=4, size=16) | request_))


@pytest.mark.parametrize("numbers", [[-1], []])
def test_bad_numbers_are_named(numbers):
    with pytest.raises(ValueError, match="clip numbers must be given and not be negative"):
        TemplateSource(frames=4, size=16).clips(numbers)


def test_a_scene_that_never_fits_is_named(monkeypatch):
    monkeypatch.setattr(templates, "deepest_overlap", lambda bodies: 1.0)
    with pytest.raises(ValueError, match="no scene of template fall-ball-blue fits the box for clip 3; use another"):
        draw_scene(template("fall-ball-blue"), "train", 0, 3)
