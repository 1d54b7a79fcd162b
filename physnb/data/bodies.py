"""Rigid bodies in a box with a floor and walls: how they move, by pymunk, and how they look.

Bodies are simulated in steps of 5 ms. Static ones are black, moving ones grey or green: but for two balls none has an
excess of red or blue, by which those are found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pymunk
from jaxtyping import Float, UInt8

from physnb.data.clips import FRAME_STEP_S, WORLD_SIZE
from physnb.data.worlds import FIRST_FRAME_S

GRAVITY = 10.0  # world units / s^2, downward
STEP_S, SOLVER_ITERATIONS = 0.005, 20
EDGE = 0.3  # world units, thickness of floor and walls
LOW, HIGH = EDGE, WORLD_SIZE - EDGE  # where the free box begins and ends, along x; LOW is the floor too
OVERLAP = 0.005  # world units that bodies may overlap in a resting contact, and at the start
FRICTION = 0.8  # the engine multiplies those of both bodies, as it does elasticities
ELASTICITY = {"disc": 0.8, "polygon": 0.4, "fixed": 0.8}
RED, BLUE, GREEN, GREY, BLACK = (255, 0, 0), (0, 0, 255), (0, 160, 0), (128, 128, 128), (0, 0, 0)

Corners = Float[np.ndarray, "corner axis"]


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
class Motion:
    """Where bodies are in each frame, and how fast."""

    positions: Float[np.ndarray, "time body axis"]
    angles: Float[np.ndarray, "time body"]
    velocities: Float[np.ndarray, "time body axis"]
    spins: Float[np.ndarray, "time body"]
    first_impact_s: float  # of the red ball with a moving body, NaN if there is none


def rotation(angles: Float[np.ndarray, "*rows"]) -> Float[np.ndarray, "*rows 2 2"]:
    """Matrices that turn by angles in rad, counter-clockwise."""
    cos, sin = np.cos(angles), np.sin(angles)
    return np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)


def box(width: float, height: float, x: float = 0.0, y: float = 0.0) -> Corners:
    """Corners of a box around (x, y)."""
    return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * [width / 2, height / 2] + [x, y]


def standing(width: float, height: float, x: float, y: float = LOW, colour=GREY, **more) -> Body:
    """A box on height y."""
    return Body(colour, (x, y + height / 2), polygons=(box(width, height),), **more)


BORDER = (
    standing(WORLD_SIZE + 4, LOW + 2, WORLD_SIZE / 2, -2, BLACK, fixed=True),
    standing(2 + EDGE, 3 * WORLD_SIZE, LOW / 2 - 1, -WORLD_SIZE, BLACK, fixed=True),
    standing(2 + EDGE, 3 * WORLD_SIZE, WORLD_SIZE + 1 - EDGE / 2, -WORLD_SIZE, BLACK, fixed=True),
)


def deepest_overlap(bodies: Sequence[Body]) -> float:
    """By how many world units any two of the bodies, or one and the border, overlap; two fixed ones may."""
    space, depths = make_space([*bodies, *BORDER]), [0.0]
    space.on_collision(begin=lambda arbiter, *_: depths.extend(-p.distance for p in arbiter.contact_point_set.points))
    space.step(1e-9)
    return max(depths)


def make_space(bodies: Sequence[Body]) -> pymunk.Space:
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


def simulate_bodies(moving: Sequence[Body], frames: int) -> Motion:
    """How bodies move in the box, the red ball first; frame k is at 0.01 s + 0.1 k s, as in the worlds."""
    space = make_space([*moving, *BORDER])
    bodies = list(space.bodies)[: len(moving)]
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


def draw_bodies(bodies: Sequence[Body], motion: Motion, size: int) -> UInt8[np.ndarray, "time size size 3"]:
    """Pictures of the motion: pixel (i + 1/2) / size, shaded by the share that bodies cover; the balls are on top."""
    canvas = np.full((1, size, size, 3), 255, np.float32)
    for body in (*BORDER, *(body for body in bodies if body.fixed)):
        _paint(canvas, body, np.array([body.position]), np.array([body.angle]))
    canvas = np.repeat(canvas, len(motion.positions), 0)
    for number in reversed(range(len(bodies))):
        if not bodies[number].fixed:
            _paint(canvas, bodies[number], motion.positions[:, number], motion.angles[:, number])
    return np.rint(canvas).astype(np.uint8)
