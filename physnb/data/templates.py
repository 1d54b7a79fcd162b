"""Combinatorial scenes: a red ball arrives in one of 5 ways at one of 7 things, alone or near a blue ball.

After phyworld's combinatorial data (Kang et al. 2024, section 5; PHYRE scenes): 70 templates fix which kinds of bodies
meet how, a clip draws their places, sizes and angles. 60 are for training ("train", and other clips of them, "id"); 10
are held out ("ood"): each arrival, thing and company, and each pair of them, is trained on, these triples are not.

The box has a floor and walls 0.3 units thick. Gravity is 10 units/s^2, so that a fall of 2 units takes 0.63 s and the
first impact comes within the 1.5 s of 16 frames. Static bodies are black, moving ones grey or green: no other body has
an excess of red or blue, by which the two balls are found. Bodies are simulated by pymunk in steps of 5 ms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from itertools import product

import numpy as np
import pymunk
import torch
from jaxtyping import Float, Int, UInt8

from physnb.config import SPLITS, choose, require
from physnb.data.clips import FRAME_STEP_S, WORLD_SIZE, Clip, DiscState
from physnb.data.worlds import FIRST_FRAME_S, Draws

ARRIVALS = {
    "fall": "falls on", "flight": "flies into", "roll": "rolls into", "ledge": "rolls off onto", "ramp": "rolls down to"
}  # fmt: skip
THINGS = {
    "ball": "a ball", "bar": "a bar", "pole": "a pole", "dominoes": "dominoes", "stack": "a stack", "jar": "a jar",
    "seesaw": "a seesaw",
}  # fmt: skip
COMPANIES = {"alone": "", "blue": "near a blue ball"}
GRAVITY = 10.0  # world units / s^2, downward
STEP_S, SOLVER_ITERATIONS = 0.005, 20
EDGE = 0.3  # world units, thickness of floor and walls
LOW, HIGH = EDGE, WORLD_SIZE - EDGE  # where the free box begins and ends, along x; LOW is the floor too
MAX_ATTEMPTS = 100  # draws of a scene before giving up: most are refused because the blue ball overlaps something
OVERLAP = 0.005  # world units that bodies may overlap in a resting contact, and at the start
FRICTION = 0.8  # the engine multiplies those of both bodies, as it does elasticities
ELASTICITY = {"disc": 0.8, "polygon": 0.4, "fixed": 0.8}
RED, BLUE, GREEN, GREY, BLACK = (255, 0, 0), (0, 0, 255), (0, 160, 0), (128, 128, 128), (0, 0, 0)

Draw = Callable[[str, float, float], float]  # a number in [low, high), by name
Corners = Float[np.ndarray, "corner axis"]


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
class Body:
    """A rigid body at t = 0: a disc, or convex polygons whose corners are given around its centre of mass.

    position, velocity: world units and units/s; angle, spin: rad and rad/s, counter-clockwise. Fixed bodies never move.
    """

    colour: tuple[int, int, int]
    position: tuple[float, float]
    radius: float = 0.0  # of a disc, else 0
    polygons: tuple[Corners, ...] = ()
    angle: float = 0.0
    velocity: tuple[float, float] = (0.0, 0.0)
    spin: float = 0.0
    fixed: bool = False

    def corners(self) -> Corners:
        """All corners where the body is, of a disc those of the square around it."""
        if self.radius:
            return np.array(self.position) + self.radius * np.array([[-1, -1], [1, 1]])
        return np.concatenate(self.polygons) @ rotation(self.angle).T + self.position

    def mirrored(self) -> Body:
        """The body as a mirror at the box's middle shows it."""
        (x, y), (vx, vy) = self.position, self.velocity
        polygons = tuple(polygon[::-1] * [-1, 1] for polygon in self.polygons)
        moved = replace(self, position=(WORLD_SIZE - x, y), velocity=(-vx, vy), polygons=polygons)
        return replace(moved, angle=-self.angle, spin=-self.spin)


@dataclass(frozen=True)
class Scene:
    """Bodies of a clip: the red ball first, then the blue one if there is one; without floor and walls."""

    template: Template
    bodies: tuple[Body, ...]


@dataclass(frozen=True)
class Motion:
    """Where the bodies of a scene are in each frame, and how fast."""

    positions: Float[np.ndarray, "time body axis"]
    angles: Float[np.ndarray, "time body"]
    velocities: Float[np.ndarray, "time body axis"]
    spins: Float[np.ndarray, "time body"]
    first_impact_s: float  # of the red ball with a moving body, NaN if there is none


def rotation(angles: Float[np.ndarray, "*rows"]) -> Float[np.ndarray, "*rows 2 2"]:
    """Matrices that turn by angles in rad, counter-clockwise."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def _box(width: float, height: float, x: float = 0.0, y: float = 0.0) -> Corners:
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2] + [x, y]


def _standing(width: float, height: float, x: float, y: float = LOW, colour=GREY, **more) -> Body:
    """A box on height y."""
    return Body(colour, (x, y + height / 2), polygons=(_box(width, height),), **more)


BORDER = (
    _standing(WORLD_SIZE + 4, LOW + 2, WORLD_SIZE / 2, -2, BLACK, fixed=True),
    _standing(2 + EDGE, 3 * WORLD_SIZE, LOW / 2 - 1, -WORLD_SIZE, BLACK, fixed=True),
    _standing(2 + EDGE, 3 * WORLD_SIZE, WORLD_SIZE + 1 - EDGE / 2, -WORLD_SIZE, BLACK, fixed=True),
)


def draw_thing(kind: str, draw: Draw) -> list[Body]:
    """What the red ball meets, on the floor around x = 0."""
    if kind == "ball":
        radius = draw("thing/radius", 0.4, 0.8)
        return [Body(GREEN, (0, LOW + radius), radius)]
    if kind == "bar":
        return [_standing(draw("thing/length", 1.6, 2.8), draw("thing/thickness", 0.3, 0.5), 0)]
    if kind == "pole":
        return [_standing(draw("thing/thickness", 0.3, 0.45), draw("thing/length", 1.6, 2.6), 0)]
    if kind == "dominoes":
        height, spacing = draw("thing/length", 1.0, 1.6), draw("thing/spacing", 0.55, 0.8)
        return [_standing(0.28, height, place * spacing) for place in (-1, 0, 1)]
    if kind == "stack":
        sides = [draw(f"thing/side{i}", 0.6, 0.9) for i in range(3)]
        offsets = [draw(f"thing/offset{i}", -0.1, 0.1) for i in range(3)]
        return [_standing(sides[i], sides[i], offsets[i], LOW + sum(sides[:i])) for i in range(3)]
    if kind == "jar":
        width, height, wall = draw("thing/width", 2.0, 2.6), draw("thing/height", 1.0, 1.6), 0.22
        sides = [_box(wall, height - wall, side * (width - wall) / 2, (height + wall) / 2) for side in (-1, 1)]
        centre = (width * wall * wall / 2 + wall * (height**2 - wall**2)) / (width * wall + 2 * wall * (height - wall))
        polygons = tuple(polygon - [0, centre] for polygon in (_box(width, wall, 0, wall / 2), *sides))
        return [Body(GREEN, (0, LOW + centre), polygons=polygons)]
    # a seesaw: a bar that touches a fixed half-disc with its middle and the floor with its left end
    length, radius, thickness = draw("thing/length", 3.0, 4.0), draw("thing/radius", 0.5, 0.8), 0.25
    angle = np.arctan(2 * radius / length)
    x, y = (radius + thickness / 2) * np.array([-np.sin(angle), np.cos(angle)])
    bar = Body(GREY, (x, LOW + y), polygons=(_box(length, thickness),), angle=angle)
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
        supports = [_standing(end - LOW, 0.25, (LOW + end) / 2, top + drop - 0.25, BLACK, fixed=True)]
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


def deepest_overlap(bodies: Sequence[Body]) -> float:
    """By how many world units any two of the bodies, or one and the border, overlap; two fixed ones may."""
    space, depths = _space([*bodies, *BORDER]), [0.0]
    space.on_collision(begin=lambda arbiter, *_: depths.extend(-p.distance for p in arbiter.contact_point_set.points))
    space.step(1e-9)
    return max(depths)


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


def _space(bodies: Sequence[Body]) -> pymunk.Space:
    """The engine's world with these bodies, in this order. Collision types: 1 the red ball, 2 moving, 0 fixed."""
    space = pymunk.Space()
    space.gravity, space.iterations, space.collision_slop = (0, -GRAVITY), SOLVER_ITERATIONS, OVERLAP
    for body in bodies:
        engine = pymunk.Body(body_type=pymunk.Body.STATIC if body.fixed else pymunk.Body.DYNAMIC)
        engine.position, engine.angle = body.position, body.angle
        disc = [pymunk.Circle(engine, body.radius)] if body.radius else []
        shapes = [*disc, *(pymunk.Poly(engine, polygon.tolist()) for polygon in body.polygons)]
        for shape in shapes:
            shape.density, shape.friction = 1.0, FRICTION
            shape.elasticity = ELASTICITY["fixed" if body.fixed else "disc" if body.radius else "polygon"]
            shape.collision_type = 0 if body.fixed else 1 if body.colour == RED else 2
        space.add(engine, *shapes)
        if not body.fixed:
            # The engine moves bodies by the velocity of half a step later: with this, free flight is exact.
            engine.velocity = (body.velocity[0], body.velocity[1] - GRAVITY * STEP_S / 2)
            engine.angular_velocity = body.spin
    return space


def simulate_scene(scene: Scene, frames: int) -> Motion:
    """How the bodies move; frame k is at 0.01 s + 0.1 k s, as in the worlds."""
    space = _space([*scene.bodies, *BORDER])
    bodies = list(space.bodies)[: len(scene.bodies)]
    steps, impacts = 0, []
    space.on_collision(1, 2, begin=lambda *_: impacts.append(steps * STEP_S))

    def velocities() -> Float[np.ndarray, "body 3"]:
        return np.array([(*body.velocity, body.angular_velocity) for body in bodies])

    places, speeds = [], []
    for frame in range(frames):
        end = round((FIRST_FRAME_S + frame * FRAME_STEP_S) / STEP_S)
        while steps < end:
            before = velocities() if steps == end - 1 else None
            steps += 1
            space.step(STEP_S)
        after = velocities()
        places.append([(*body.position, body.angle) for body in bodies])
        # these are half a step before and after the frame; what changes more than by gravity has just had an impact
        hit = np.abs(after - before)[:, :2].max(1, keepdims=True) > 4 * GRAVITY * STEP_S
        speeds.append(np.where(hit, after, (before + after) / 2))
    places, speeds = np.array(places), np.array(speeds)
    return Motion(places[..., :2], places[..., 2], speeds[..., :2], speeds[..., 2], impacts[0] if impacts else np.nan)


def _paint(canvas: Float[np.ndarray, "time size size 3"], body: Body, positions, angles) -> None:
    """Colour each pixel by the share of it that the body covers; positions [time, axis], angles [time]."""
    size = canvas.shape[1]
    scale, turn = size / WORLD_SIZE, rotation(angles).swapaxes(1, 2)
    centre = np.stack([positions[:, 0], WORLD_SIZE - positions[:, 1]], -1)[:, None] * scale - 0.5  # in pixels, y down
    for polygon in body.polygons or (body.corners() - body.position,):
        corners = centre + (polygon @ turn if body.polygons else polygon) * [scale, -scale]
        # only the rectangle that the body crosses is looked at
        low, high = np.floor(corners.min((0, 1))) - 1, np.ceil(corners.max((0, 1))) + 2
        columns, rows = (slice(*np.clip([a, b], 0, size).astype(int)) for a, b in zip(low, high, strict=True))
        x, y = np.arange(size)[columns], np.arange(size)[rows, None]
        if body.radius:
            distance = np.hypot(x - centre[..., :1], y - centre[..., 1:])
            covered = np.clip(body.radius * scale - distance + 0.5, 0, 1)
        else:  # as far as the pixel lies on the inner side of every edge
            side = np.roll(corners, -1, 1) - corners
            outward = np.stack([-side[..., 1], side[..., 0]], -1) / np.linalg.norm(side, axis=-1, keepdims=True)
            nx, ny = np.moveaxis(outward, -1, 0)[..., None, None]
            offset = (outward * corners).sum(-1)[..., None, None]
            covered = np.clip(0.5 + offset - nx * x - ny * y, 0, 1).prod(1)
        region = canvas[:, rows, columns]
        region += covered[..., None] * (np.float32(body.colour) - region)


def draw_frames(scene: Scene, motion: Motion, size: int) -> UInt8[np.ndarray, "time size size 3"]:
    """Pictures of the motion: pixel (i + 1/2) / size, shaded by the share that bodies cover; the balls are on top."""
    canvas = np.full((1, size, size, 3), 255, np.float32)
    for body in (*BORDER, *(body for body in scene.bodies if body.fixed)):
        _paint(canvas, body, np.array([body.position]), np.array([body.angle]))
    canvas = np.repeat(canvas, len(motion.positions), 0)
    for number in reversed(range(len(scene.bodies))):
        if not scene.bodies[number].fixed:
            _paint(canvas, scene.bodies[number], motion.positions[:, number], motion.angles[:, number])
    return np.rint(canvas).astype(np.uint8)


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
        choose("split", self.split, SPLITS)
        require(self.seed >= 0, f"seed must not be negative, got {self.seed}")
        require(self.frames >= 2, f"a clip needs at least 2 frames, got {self.frames}")
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
    motion, template, red = simulate_scene(scene, frames), scene.template, scene.bodies[0]
    positions, velocities, radii = (np.full(shape, np.nan) for shape in ((frames, 2, 2), (frames, 2, 2), 2))
    for disc, ball in enumerate(scene.bodies[: 2 if template.company == "blue" else 1]):
        positions[:, disc], velocities[:, disc] = motion.positions[:, disc], motion.velocities[:, disc]
        radii[disc] = ball.radius
    state = (positions, velocities, radii, np.array(motion.first_impact_s))
    return Clip(
        frames=torch.from_numpy(draw_frames(scene, motion, size))[None],
        captions=(template.caption,),
        scenarios=("templates",),
        buckets=("template" if template.held_out else "id",),
        indices=torch.tensor([number]),
        state=DiscState(*(torch.from_numpy(value[None]).float() for value in state)),
        parameters=({"template": float(template.number), "radius": red.radius, "speed": math.hypot(*red.velocity)},),
    )
