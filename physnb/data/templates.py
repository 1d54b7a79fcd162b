"""Combinatorial scenes: a red ball arrives in one of 5 ways at one of 7 things, alone or near a blue ball.

After phyworld's combinatorial data (Kang et al. 2024, section 5; PHYRE scenes): 70 templates fix which kinds of bodies
meet how, a clip draws their places, sizes and angles. 60 are for training ("train", and other clips of them, "id"); 10
are held out ("ood"): each arrival, thing and company, and each pair of them, is trained on, these triples are not.

The box has a floor and walls 0.3 units thick. Gravity is 10 units/s^2, so that a fall of 2 units takes 0.63 s and the
first impact comes within the 1.5 s of 16 frames. Static bodies are black, moving ones grey or green: no other body has
an excess of red or blue, by which the two balls are found.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from itertools import product

import numpy as np
import torch
from jaxtyping import Int

from physnb.config import SPLITS, choose, require
from physnb.data.bodies import (
    BLACK,
    BLUE,
    GRAVITY,
    GREEN,
    GREY,
    HIGH,
    LOW,
    OVERLAP,
    RED,
    Body,
    box,
    deepest_overlap,
    draw_bodies,
    simulate_bodies,
    standing,
)
from physnb.data.clips import Clip, DiscState
from physnb.data.worlds import Draws, check_request

ARRIVALS = {
    "fall": "falls on", "flight": "flies into", "roll": "rolls into", "ledge": "rolls off onto", "ramp": "rolls down to"
}  # fmt: skip
THINGS = {
    "ball": "a ball", "bar": "a bar", "pole": "a pole", "dominoes": "dominoes", "stack": "a stack", "jar": "a jar",
    "seesaw": "a seesaw",
}  # fmt: skip
COMPANIES = {"alone": "", "blue": "near a blue ball"}
MAX_ATTEMPTS = 100  # draws of a scene before giving up: most are refused because the blue ball overlaps something
Draw = Callable[[str, float, float], float]  # a number in [low, high), by name


@dataclass(frozen=True)
class Template:
    """Which kinds of bodies meet how: keys of ARRIVALS, THINGS and COMPANIES."""

    number: int
    arrival: str
    thing: str
    company: str

    @property
    def name(self) -> str:
        return f"{self.arrival}-{self.thing}-{self.company}"

    @property
    def caption(self) -> str:
        words = ("a red ball", ARRIVALS[self.arrival], THINGS[self.thing], COMPANIES[self.company])
        return " ".join(words).strip()

    @property
    def held_out(self) -> bool:
        """One thing for each arrival and company, shifted so that every pair is left for training."""
        arrival, thing, company = np.unravel_index(self.number, [len(k) for k in (ARRIVALS, THINGS, COMPANIES)])
        return bool(thing == (arrival + 3 * company) % len(THINGS))


TEMPLATES = tuple(Template(n, *kinds) for n, kinds in enumerate(product(ARRIVALS, THINGS, COMPANIES)))


def templates_of(split: str) -> tuple[Template, ...]:
    """The 60 templates of "train" and "id", or the 10 of "ood"."""
    choose("split", split, SPLITS)
    return tuple(template for template in TEMPLATES if template.held_out == (split == "ood"))


@dataclass(frozen=True)
class Scene:
    """Bodies of a clip: the red ball first, then the blue one if there is one; without floor and walls."""

    template: Template
    bodies: tuple[Body, ...]


def draw_thing(kind: str, draw: Draw) -> list[Body]:
    """What the red ball meets, on the floor around x = 0."""
    if kind == "ball":
        radius = draw("thing/radius", 0.4, 0.8)
        return [Body(GREEN, (0, LOW + radius), radius)]
    if kind == "bar":
        return [standing(draw("thing/length", 1.6, 2.8), draw("thing/thickness", 0.3, 0.5), 0)]
    if kind == "pole":
        return [standing(draw("thing/thickness", 0.3, 0.45), draw("thing/length", 1.6, 2.6), 0)]
    if kind == "dominoes":
        height, spacing = draw("thing/length", 1.0, 1.6), draw("thing/spacing", 0.55, 0.8)
        return [standing(0.28, height, place * spacing) for place in (-1, 0, 1)]
    if kind == "stack":
        sides = [draw(f"thing/side{i}", 0.6, 0.9) for i in range(3)]
        offsets = [draw(f"thing/offset{i}", -0.1, 0.1) for i in range(3)]
        return [standing(sides[i], sides[i], offsets[i], LOW + sum(sides[:i])) for i in range(3)]
    if kind == "jar":
        width, height, wall = draw("thing/width", 2.0, 2.6), draw("thing/height", 1.0, 1.6), 0.22
        sides = [box(wall, height - wall, side * (width - wall) / 2, (height + wall) / 2) for side in (-1, 1)]
        centre = (width * wall * wall / 2 + wall * (height**2 - wall**2)) / (width * wall + 2 * wall * (height - wall))
        polygons = tuple(polygon - [0, centre] for polygon in (box(width, wall, 0, wall / 2), *sides))
        return [Body(GREEN, (0, LOW + centre), polygons=polygons)]
    # a seesaw: a bar that touches a fixed half-disc with its middle and the floor with its left end
    length, radius, thickness = draw("thing/length", 3.0, 4.0), draw("thing/radius", 0.5, 0.8), 0.25
    angle = np.arctan(2 * radius / length)
    x, y = (radius + thickness / 2) * np.array([-np.sin(angle), np.cos(angle)])
    bar = Body(GREY, (x, LOW + y), polygons=(box(length, thickness),), angle=angle)
    return [bar, Body(BLACK, (0, LOW), radius, fixed=True)]


def draw_arrival(kind: str, draw: Draw, radius: float, thing: list[Body]) -> tuple[float, list[Body]] | None:
    """Where the thing stands along x, and the red ball with what it comes from; None where the box has no room."""
    corners = np.concatenate([body.corners() for body in thing])
    left, right, top = corners[:, 0].min(), corners[:, 0].max(), corners[:, 1].max()
    nearest, furthest = LOW + 0.1 - left, HIGH - 0.1 - right  # places at which the thing fits
    start, supports, spin = LOW + radius + draw("start", 0.1, 0.8), [], 0.0
    if kind == "fall":
        at = draw("at", nearest, furthest)
        side = at + draw("side", 0.6 * left, 0.6 * right)
        place, velocity = (side, top + radius + draw("gap", 0.8, 3.0)), (0.0, 0.0)
    elif kind in ("flight", "roll"):
        duration, way = draw("duration", 0.45, 0.8), draw("way", 2.0, 4.5)
        at = start + radius + way - left
        height = LOW + radius
        if kind == "flight":
            height = draw("aim", height, max(height, top)) + GRAVITY / 2 * duration**2
        place, velocity = (start, height), (way / duration, 0.0)
        spin = -way / duration / radius if kind == "roll" else 0.0
    elif kind == "ledge":
        speed, drop, duration = draw("speed", 2.0, 4.0), draw("drop", 0.7, 2.2), draw("duration", 0.1, 0.3)
        way = speed * np.sqrt(2 * drop / GRAVITY) - draw("side", 0.5 * left, 0.5 * right)  # from the ledge's end
        nearest = max(nearest, start + speed * duration + way)
        at = draw("at", nearest, furthest)
        end = at - way
        place, velocity, spin = (end - speed * duration, top + drop + radius), (speed, 0.0), -speed / radius
        supports = [standing(end - LOW, 0.25, (LOW + end) / 2, top + drop - 0.25, BLACK, fixed=True)]
    else:
        run, slope, speed = draw("run", 1.8, 2.8), draw("slope", 0.45, 0.65), draw("speed", 1.5, 3.5)
        along, normal = np.array([np.cos(slope), -np.sin(slope)]), np.array([np.sin(slope), np.cos(slope)])
        highest = run - radius * (1 - np.sin(slope)) - 0.05  # where the ball would touch the wall
        foot = np.array([LOW + run, LOW])
        place = foot - along * draw("height", 0.6 * highest, highest) / np.cos(slope) + radius * normal
        place, velocity, spin = tuple(place), tuple(speed * along), -speed / radius
        at = foot[0] + draw("gap", 0.2, 1.2) - left
        wedge = np.array([[0, 0], [run, 0], [0, run * np.tan(slope)]])
        supports = [Body(BLACK, (LOW, LOW), polygons=(wedge,), fixed=True)]
    if not nearest <= at <= furthest:
        return None
    return at, [Body(RED, place, radius, velocity=velocity, spin=spin), *supports]


def draw_scene(template: Template, split: str, seed: int, number: int) -> Scene:
    """Places, sizes and angles of clip `number`, a function of the arguments; half of all scenes are mirrored.

    Draws are refused where bodies overlap or find no room, and drawn again up to MAX_ATTEMPTS times.
    """
    for attempt in range(MAX_ATTEMPTS):
        draws = Draws(f"templates/{template.name}", split, seed, np.array([number]), attempt)

        def draw(name: str, low: float, high: float, draws: Draws = draws) -> float:
            return float(draws.uniform(name, low, high)[0])

        radius = draw("radius", 0.4, 0.65)
        thing = draw_thing(template.thing, draw)
        arrival = draw_arrival(template.arrival, draw, radius, thing)
        if arrival is None:
            continue
        at, (red, *supports) = arrival
        placed = (replace(body, position=(body.position[0] + at, body.position[1])) for body in thing)
        bodies = [red, *supports, *placed]
        if template.company == "blue":
            radius = draw("blue/radius", 0.4, 0.65)
            x = draw("blue/x", max(LOW + radius, at - 3), min(HIGH - radius, at + 3))
            bodies.insert(1, Body(BLUE, (x, LOW + radius + draw("blue/height", 0.3, 4.0)), radius))
        if deepest_overlap(bodies) > OVERLAP:
            continue
        if draw("mirror", 0, 1) < 0.5:
            bodies = [body.mirrored() for body in bodies]
        return Scene(template, tuple(bodies))
    raise ValueError(f"no scene of template {template.name} fits the box for clip {number}; use another number")


@dataclass(frozen=True)
class TemplateSource:
    """As many clips as one likes of templates drawn evenly; a function of (split, seed, number) alone.

    split: "train", "id" (other clips of the same 60 templates) or "ood" (the 10 held out, bucket "template").
    State: disc 0 is the red ball, disc 1 the blue one if there is one; impact_time_s is the first contact of the red
    ball with a moving body, NaN if none is seen. Parameters: number of the template, radius and speed at the start.
    Raises ValueError for an unknown split, a negative seed or number, fewer than 2 frames or 8 pixels.
    Leaves out, in the state, every body but the two balls.
    """

    _: KW_ONLY
    frames: int
    size: int
    split: str = "train"
    seed: int = 0
    name: str = "templates"
    count: None = None

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(template.caption for template in templates_of(self.split)))

    def __post_init__(self) -> None:
        check_request(self.split, self.seed, self.frames)
        require(self.size >= 8, f"frame size must be at least 8 pixels, got {self.size}")

    def clips(self, numbers: Int[np.ndarray, " batch"]) -> Clip:
        """Clips number `numbers`."""
        numbers = np.asarray(numbers, dtype=np.int64)
        require(len(numbers) > 0 and numbers.min() >= 0, "clip numbers must be given and not be negative")
        templates = templates_of(self.split)
        drawn = Draws("templates", self.split, self.seed, numbers).uniform("template", 0, len(templates)).astype(int)
        pairs = zip(drawn, numbers.tolist(), strict=True)
        scenes = ((draw_scene(templates[which], self.split, self.seed, number), number) for which, number in pairs)
        return Clip.concatenate([film(scene, number, frames=self.frames, size=self.size) for scene, number in scenes])


def film(scene: Scene, number: int, *, frames: int, size: int) -> Clip:
    """One clip of the scene, with this number."""
    motion, template, red = simulate_bodies(scene.bodies, frames), scene.template, scene.bodies[0]
    positions, velocities, radii = (np.full(shape, np.nan) for shape in ((frames, 2, 2), (frames, 2, 2), 2))
    for disc, ball in enumerate(scene.bodies[: 2 if template.company == "blue" else 1]):
        positions[:, disc], velocities[:, disc] = motion.positions[:, disc], motion.velocities[:, disc]
        radii[disc] = ball.radius
    state = (positions, velocities, radii, np.array(motion.first_impact_s))
    return Clip(
        frames=torch.from_numpy(draw_bodies(scene.bodies, motion, size))[None],
        captions=(template.caption,),
        scenarios=("templates",),
        buckets=("template" if template.held_out else "id",),
        indices=torch.tensor([number]),
        state=DiscState(*(torch.from_numpy(value[None]).float() for value in state)),
        parameters=({"template": float(template.number), "radius": red.radius, "speed": math.hypot(*red.velocity)},),
    )
