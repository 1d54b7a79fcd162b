"""Clips that break one law of motion after the start frames, and lawful ones that look just as different.

A variant is rendered anew from an edited DiscState, so that it differs from its clip in motion alone (`radius_change`
and `vanish`: in the disc itself). The edit, its moment and its disc are drawn by (seed, scenario, kind, index) among
those that show and that keep as many whole discs in view as the clip has; where there is none, the row is not judged.

The laws of all three worlds hold backwards in time, so `time_reversal` is impossible only because of the start frames,
after which the discs jump to the end of their paths. A parabola's `reversal` turns the velocity and leaves gravity.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from physnb.config import choose, require
from physnb.data.clips import WORLD_SIZE, Clip, DiscState
from physnb.data.laws import GRAVITY
from physnb.data.random import hash_draws
from physnb.data.worlds import EDGES, frame_times, render

VISIBLE_EDIT = 0.5  # world units: a disc that is never further from its lawful place than this has not broken a law
SAME_AREA = 0.05  # how far the covered area of a variant may be from that of its clip, as a share
RESIZE = 1.5  # what radius_change multiplies or divides by
APPEARANCES = ("swap_colours", "dim")
LAWFUL_KINDS = ("mirror", "shift", "smaller")
SHIFTS = (-2.0, -1.5, -1.0, 1.0, 1.5, 2.0)  # world units
SMALLER = 1.25  # what the lawful control "smaller" divides every radius by: seldom out of the training range
FAR_OUT = -10 * WORLD_SIZE  # where a disc is put that must not be drawn

# The edited state of one clip, the first frame that differs, None; or the state as it was, None, why it is not judged.
Edit = tuple[DiscState, int | None, str | None]


@dataclass(frozen=True)
class Variants:
    """One variant of every clip of a batch, in the same order.

    clip: edited frames and state; a row that is not judged holds the clip as it was.
    reasons: why a row is not judged, None where it is.
    area_ratio: area covered by discs in the generated frames over that of the clip, NaN where not judged. A loss per
    pixel is smaller for a smaller disc, whatever its motion: read matched pairs first.
    """

    kind: str
    clip: Clip
    reasons: tuple[str | None, ...]
    area_ratio: Float[Tensor, " clip"]
    frames_given: int

    def __getitem__(self, rows: list[int]) -> Variants:
        """The variants of some of the clips."""
        reasons = tuple(self.reasons[row] for row in rows)
        return replace(self, clip=self.clip[rows], reasons=reasons, area_ratio=self.area_ratio[rows])

    @property
    def matched(self) -> Bool[Tensor, " clip"]:
        """Where the variant covers as much area as its clip."""
        return (self.area_ratio - 1).abs() <= SAME_AREA


@dataclass(frozen=True)
class Break:
    """Several ways, one a row, to break a law of one clip: after `moment`, as `option` says."""

    state: DiscState  # the same lawful motion in every row
    moment: Float[Tensor, " row"]  # s
    option: Float[Tensor, "row value"]
    gravity: float

    @cached_property
    def since(self) -> Float[Tensor, "row time"]:
        """Seconds since the moment."""
        return torch.from_numpy(frame_times(self.state.positions.shape[1]))[None] - self.moment[:, None]

    @cached_property
    def after(self) -> Bool[Tensor, "row time"]:
        """The frames that the break changes."""
        return self.since > 0

    @property
    def first(self) -> Int[Tensor, " row"]:
        """The first frame that the break changes."""
        return (~self.after).sum(1)

    def at_frame(self, values: Float[Tensor, "row time disc axis"], frame: Tensor) -> Float[Tensor, "row disc axis"]:
        return values[torch.arange(len(frame)), frame].double()

    def lawful_velocity(self) -> Float[Tensor, "row disc axis"]:
        """The velocity that each disc should have right after the moment, which is an impact or the time of a frame."""
        has_impact = ~self.state.impact_time_s.isnan()
        return self.at_frame(self.state.velocities, torch.where(has_impact, self.first, self.first - 1))

    def chosen_disc(self) -> Bool[Tensor, "row disc"]:
        """The disc that the first value of the option names."""
        return torch.arange(2)[None] == self.option[:, :1]

    def relaunch(self, velocity: Float[Tensor, "row disc axis"], gravity: float) -> DiscState:
        """The motion with `velocity` from the moment on, under `gravity`."""
        before = self.at_frame(self.state.velocities, self.first - 1)
        lag = self.since.gather(1, self.first[:, None] - 1)[:, :, None]  # from the last unchanged frame, <= 0
        start = self.at_frame(self.state.positions, self.first - 1) - before * lag
        since = self.since[:, :, None, None]
        fall = torch.tensor([0.0, gravity]).double()
        positions = start[:, None] + velocity[:, None] * since - fall / 2 * since**2
        return self.change(positions, velocity[:, None] - fall * since)

    def change(self, positions: Tensor, velocities: Tensor, **more: Tensor) -> DiscState:
        """The motion with other positions and velocities after the moment."""
        after = self.after[:, :, None, None]
        return replace(
            self.state,
            positions=torch.where(after, positions.float(), self.state.positions),
            velocities=torch.where(after, velocities.float(), self.state.velocities),
            **more,
        )


def teleport(b: Break) -> DiscState:
    """A disc jumps and goes on as if nothing had happened; option: disc, x, y."""
    jump = b.chosen_disc()[:, None, :, None] * b.option[:, None, None, 1:]
    return b.change(b.state.positions + jump, b.state.velocities)


def reversal(b: Break) -> DiscState:
    """Discs turn back by themselves; option: the factor of each one's velocity, 1 or -1."""
    return b.relaunch(b.lawful_velocity() * b.option[:, :, None], b.gravity)


def energy_gain(b: Break) -> DiscState:
    """Speeds grow by the option: of one disc, or of both against their common centre, which keeps momentum."""
    velocity, mass = b.lawful_velocity(), b.state.radii[:, :, None].double() ** 2
    centre = ((mass * velocity).sum(1, keepdim=True) / mass.sum(1, keepdim=True)).nan_to_num(0.0)  # one disc: 0
    return b.relaunch(centre + b.option[:, :, None] * (velocity - centre), b.gravity)


def gravity_off(b: Break) -> DiscState:
    """The disc goes on in a straight line."""
    return b.relaunch(b.lawful_velocity(), 0.0)


def pass_through(b: Break) -> DiscState:
    """Neither disc notices the other."""
    before = b.at_frame(b.state.velocities, b.first - 1)
    return replace(b.relaunch(before, 0.0), impact_time_s=torch.full_like(b.state.impact_time_s, torch.nan))


def time_reversal(b: Break) -> DiscState:
    """The frames after the moment in reverse order."""
    time = torch.arange(b.state.positions.shape[1])
    order = torch.where(b.after[0], len(time) - 1 + b.first[0] - time, time)  # the moment is the same in every row
    turned = frame_times(len(time))[[int(b.first[0]), -1]].sum() - b.state.impact_time_s
    impact = torch.where(b.state.impact_time_s > b.moment, turned, b.state.impact_time_s)
    return b.change(b.state.positions[:, order], -b.state.velocities[:, order], impact_time_s=impact.float())


def vanish(b: Break) -> DiscState:
    """A disc is gone: its positions are NaN; option: disc."""
    gone = torch.where(b.chosen_disc(), torch.nan, 0.0)[:, None, :, None]
    return b.change(b.state.positions + gone, b.state.velocities + gone)


def radius_change(b: Break) -> DiscState:
    """A disc changes its size; option: disc, factor. The state, which has one radius a disc, has the new one."""
    radii = torch.where(b.chosen_disc(), b.state.radii * b.option[:, 1:].float(), b.state.radii)
    return replace(b.state, radii=radii)


@dataclass(frozen=True)
class Kind:
    """How a law is broken, the worlds where it can be, the ways to choose from and the moments to choose from.

    moment: "any" frame, "first" (right after the start frames), "impact" or "after impact" (in worlds that have one).
    """

    edit: Callable[[Break], DiscState]
    scenarios: tuple[str, ...]
    options: tuple[tuple[float, ...], ...] = ((),)
    moment: str = "any"


ALL = ("uniform", "parabola", "collision")
JUMPS = tuple(
    (disc, length * np.cos(angle), length * np.sin(angle))
    for disc, length, angle in product((0, 1), (1.5, 2.5), np.arange(8) * np.pi / 4)
)
KINDS = {
    "teleport": Kind(teleport, ALL, JUMPS),
    "reversal": Kind(reversal, ALL, ((-1, -1), (-1, 1), (1, -1)), "after impact"),
    "energy_gain": Kind(energy_gain, ALL, ((1.25,), (1.5,), (2.0,)), "impact"),
    "time_reversal": Kind(time_reversal, ALL, moment="first"),
    "gravity_off": Kind(gravity_off, ("parabola",)),
    "pass_through": Kind(pass_through, ("collision",), moment="impact"),
    "radius_change": Kind(radius_change, ALL, tuple(product((0, 1), (RESIZE, 1 / RESIZE)))),
    "vanish": Kind(vanish, ALL, ((0,), (1,))),
}


def kinds_for(scenario: str) -> tuple[str, ...]:
    """The kinds that apply to a scenario; raises ValueError for one that is not there."""
    choose("scenario", scenario, ALL)
    return tuple(name for name, kind in KINDS.items() if scenario in kind.scenarios)


def make_impossible(clip: Clip, kind: str, *, frames_given: int = 3, seed: int = 0) -> Variants:
    """Each clip with its first `frames_given` frames as they are and a law broken later: a function of (seed, index).

    In a batch of several worlds, rows of a world without this kind are not judged.
    Raises ValueError for a kind that applies to none of the clips, for clips without a state or not rendered from it,
    and for start frames that leave fewer than 2 to break.
    """
    require(len(clip) > 0, "there is no clip to break a law in")
    worlds = dict.fromkeys(clip.scenarios)
    choose(f"kind for {', '.join(worlds)}", kind, dict.fromkeys(name for world in worlds for name in kinds_for(world)))

    def edit(state: DiscState, scenario: str, index: int) -> Edit:
        return break_law(state, kind, scenario, index, frames_given, seed)

    return make_variants(clip, kind, edit, frames_given)


def make_lawful(clip: Clip, kind: str, *, frames_given: int = 3, seed: int = 0) -> Variants:
    """A lawful companion of each clip, which a judge of laws alone prefers as often as not: error 0.5.

    mirror: upside down (not of a throw); shift: moved sideways by 1 to 2 units; smaller: radii divided by SMALLER, the
    contact where it was. An error far above 0.5 on "smaller" says how much a loss reads area instead of laws.
    The start frames differ too, or the clip would not be lawful. Raises what `make_impossible` does.
    """
    require(len(clip) > 0, "there is no clip to make a companion of")
    choose("lawful kind", kind, LAWFUL_KINDS)

    def edit(state: DiscState, scenario: str, index: int) -> Edit:
        if kind == "mirror" and scenario == "parabola":
            return state, None, "a throw upside down is unlawful"
        if kind == "mirror":
            return mirror(state), 0, None
        if kind == "smaller":
            return shrink(state), 0, None
        return shift(state, hash_draws(seed, f"shift/{scenario}/{index}", np.arange(len(SHIFTS))))

    return make_variants(clip, kind, edit, frames_given)


def make_variants(
    clip: Clip,
    kind: str,
    edit: Callable[[DiscState, str, int], Edit],
    frames_given: int,
    scene: Callable[[DiscState], UInt8[Tensor, "batch time height width 3"]] | None = None,
) -> Variants:
    """The clips with the state that edit(state, scenario, index) gives each of them, drawn where it says so.

    scene: how a state is drawn; None: discs on white, as the worlds draw them.
    """
    require(clip.state is not None, "variants are made from the true state; take the clip from a simulator")
    time, height, width = clip.frames.shape[1:4]
    require(1 <= frames_given <= time - 2, f"frames given must be in [1, {time - 2}], got {frames_given}")
    ways = {"coverage": scene} if scene else {edge: partial(draw, size=width, edge=edge) for edge in EDGES}
    own = (edge for edge, show in ways.items() if height == width and torch.equal(show(clip.state), clip.frames))
    edge = next(own, None)
    require(edge is not None, "variants are rendered anew: the clip must show its own state, as a simulator draws it")
    rows = zip(range(len(clip)), clip.scenarios, clip.indices.tolist(), strict=True)
    edits = [edit(clip.state[row : row + 1], scenario, index) for row, scenario, index in rows]
    states, first, reasons = zip(*edits, strict=True)
    state = DiscState.concatenate(list(states))
    begins = torch.tensor([time if reason else frame for frame, reason in zip(first, reasons, strict=True)])
    changed = torch.arange(time) >= begins[:, None]  # [clip, time]
    frames = torch.where(changed[:, :, None, None, None], ways[edge](state), clip.frames)
    discs = (draw(s, width, edge)[:, frames_given:] for s in (state, clip.state))
    area, true_area = ((255 - f.amin(-1).float()).sum((1, 2, 3)) for f in discs)
    ratio = torch.where(begins < time, area / true_area, torch.nan)
    return Variants(kind, replace(clip, frames=frames, state=state), reasons, ratio, frames_given)


def draw(state: DiscState, size: int, edge: str) -> UInt8[Tensor, "batch time height width 3"]:
    """Frames of a state in which discs may be gone or overlap; where they do blue is in front, as in phyworld."""
    overlap = overlapping(state)
    state = replace(state, positions=state.positions.nan_to_num(FAR_OUT))
    frames = render(state, size, edge)
    if overlap.any():
        hide = torch.tensor([[torch.nan, 0.0], [0.0, torch.nan]])
        blue, red = (render(replace(state, radii=state.radii + h), size, edge)[overlap].float() for h in hide)
        ground = blue[..., :1] / 255  # 1 - alpha of blue
        layered = red * ground + torch.tensor([0.0, 0.0, 255.0]) * (1 - ground)
        frames[overlap] = layered.round().to(torch.uint8)
    return frames


def overlapping(state: DiscState) -> Bool[Tensor, "batch time"]:
    """Where two discs share more than the point in which they touch; not where one is absent or gone."""
    distance = (state.positions[:, :, 0] - state.positions[:, :, 1]).norm(dim=-1)
    return distance < state.radii.sum(1, keepdim=True) - 1e-3


def alter_appearance(clip: Clip, how: str) -> Clip:
    """The clips with red and blue swapped ("swap_colours") or a fifth darker ("dim"): other looks, the same laws.

    For both members of a pair: a judge of laws prefers as before.
    """
    choose("appearance", how, APPEARANCES)
    if how == "swap_colours":
        return replace(clip, frames=clip.frames.flip(-1))
    return replace(clip, frames=(clip.frames.float() * 0.8).round().to(torch.uint8))


def mirror(state: DiscState) -> DiscState:
    """The motion upside down."""
    turn = torch.tensor([1.0, -1.0])
    return replace(
        state, positions=torch.tensor([0.0, WORLD_SIZE]) + turn * state.positions, velocities=turn * state.velocities
    )


def shrink(state: DiscState) -> DiscState:
    """The motion of smaller discs of the same mass ratio, which touch at the same moment in the same place."""
    radii = state.radii / SMALLER
    inward = (state.radii - radii) * torch.tensor([1.0, -1.0]) * state.present.all(1, keepdim=True)
    step = torch.stack([inward, torch.zeros_like(inward)], -1)
    return replace(state, positions=state.positions + step[:, None], radii=radii)


def shift(state: DiscState, order: np.ndarray) -> Edit:
    """The motion moved sideways by the first of SHIFTS, in this order, that keeps as many whole discs in view."""
    for step in np.array(SHIFTS)[np.argsort(order)]:
        moved = replace(state, positions=state.positions + torch.tensor([step, 0.0]).float())
        if bool((moved.inside.sum(1) >= state.inside.sum(1)).all()):
            return moved, 0, None
    return state, None, "the box leaves no room to shift the motion"


def break_law(state: DiscState, kind: str, scenario: str, index: int, frames_given: int, seed: int) -> Edit:
    """The state of one clip with a law broken in one of the ways that show and that the box can hold."""
    if scenario not in KINDS[kind].scenarios:
        return state, None, f"{kind} does not exist in {scenario}"
    ways = ways_to_break(state, KINDS[kind], scenario, frames_given)
    if ways is None:
        return state, None, "the impact lies within the frames given, or leaves no frame after it"
    return pick_way(ways, KINDS[kind].edit(ways), f"{kind}/{scenario}/{index}", seed, overlap=kind == "pass_through")


def pick_way(ways: Break, edited: DiscState, stream: str, seed: int, *, overlap: bool = False) -> Edit:
    """One of the ways that show and that the box can hold, drawn by (seed, stream); overlap: discs may."""
    shows, fits = visible(ways, edited), in_view(ways, edited)
    if not overlap:
        fits &= ~(overlapping(edited) & ways.after).any(1)
    if not (shows & fits).any():
        held = "the box cannot hold the edit"
        unshown = "the discs are too slow or too far out for it to show"
        return ways.state[:1], None, held if shows.any() else unshown
    order = np.argsort(hash_draws(seed, stream, np.arange(len(shows))))
    way = next(int(k) for k in order if shows[k] and fits[k])
    return edited[way : way + 1], int(ways.first[way]), None


def ways_to_break(state: DiscState, kind: Kind, scenario: str, frames_given: int) -> Break | None:
    """Every moment with every option; None where the impact comes too early or too late.

    Unless the moment is given, the last third of the generated frames, at least two, is kept to show what follows.
    """
    times, impact = frame_times(state.positions.shape[1]), float(state.impact_time_s[0])
    tail = max(2, (len(times) - frames_given) // 3)
    moments = times[frames_given - 1 : len(times) - tail]  # the last unchanged frame
    if kind.moment == "first":
        moments = moments[:1]
    elif kind.moment in ("impact", "after impact") and scenario == "collision":
        if not times[frames_given - 1] < impact < times[-1]:
            return None
        moments = np.array([impact]) if kind.moment == "impact" else times[:-1][times[:-1] >= impact]
    if len(moments) == 0:
        return None
    rows = list(product(moments, kind.options))
    many = DiscState(**{name: value.expand(len(rows), *value.shape[1:]) for name, value in vars(state).items()})
    option = torch.tensor([option for _, option in rows]).double()
    return Break(many, torch.tensor([moment for moment, _ in rows]), option, GRAVITY * (scenario == "parabola"))


def visible(ways: Break, edited: DiscState) -> Bool[Tensor, " row"]:
    """Where a disc that should be in view is moved by at least VISIBLE_EDIT, gone or resized in some frame."""
    should = (ways.state.positions >= 0) & (ways.state.positions <= WORLD_SIZE)
    moved = (edited.positions - ways.state.positions).norm(dim=-1) >= VISIBLE_EDIT
    gone, resized = edited.positions.isnan().any(-1), (edited.radii != ways.state.radii)[:, None]
    return ((moved | gone | resized) & should.all(-1) & ways.after[:, :, None]).any((1, 2))


def in_view(ways: Break, edited: DiscState) -> Bool[Tensor, " row"]:
    """Where every disc is wholly in the box for as many frames after the moment as it should be, or gone."""
    frames = [(state.inside & ways.after[:, :, None]).sum(1) for state in (ways.state, edited)]
    return ((frames[1] >= frames[0]) | edited.positions.isnan().any((1, 3))).all(1)
