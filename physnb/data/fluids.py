"""A smoke plume and a flame: buoyant incompressible flow, computed by PhiFlow and drawn so that it can be read back.

A closed box of 32 x 32 cells whatever the size of the frames, one step a frame, all in float64. A step is

1. transport of the density (of smoke, or of a flame's heat): finite volumes with van Leer's limiter, so that it is
   conserved; it is let in at the inlet, of a flame at a rate that flickers, and lost at the rate `cooling`;
2. velocity: MacCormack advection of PhiFlow's semi-Lagrangian steps on its staggered grid, plus `buoyancy` times the
   density, upwards. (PhiFlow's own `mac_cormack` limits it by the wrong cells between walls, which bends a plume.)
3. pressure: PhiFlow's divergence and gradient, with the Poisson equation solved exactly by the eigenvectors of its
   matrix. (PhiFlow's conjugate gradients take 110 iterations, and call some clips of a closed box diverged.)

So the total M of the density obeys dM/dt = inflow - cooling M to rounding, and the velocity has no divergence. A
draught, vortices of the size of the box drawn at random, breaks the symmetry.

The density c of a pixel covers a share a = 1 - exp(-opacity c) of it, and the palette turns that into colour. Back:
c = -log(1 - a) / opacity, with a from a sum of the channels that falls all along the palette; so 8 bits cost up to
0.002 exp(c) of grey smoke, and 0.02 of a flame's heat up to 1. `physnb.metrics.fluid_laws.read_density` does it.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from functools import cache, partial
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from physnb.config import choose, require
from physnb.data.captions import CAPTIONS
from physnb.data.clips import FRAME_STEP_S, WORLD_SIZE, Clip
from physnb.data.worlds import Draws, Ranges, check_request, draw_buckets
from physnb.store import cache_folder, prepare_folder, written_whole

VERSION = 1  # of all that decides pixels: clips cached under another are not read
GRID = 32  # cells a side
CELL = WORLD_SIZE / GRID
SUBSTEPS = 16  # of the transport in a frame: no flow crosses a whole cell in one
GROUP = 16  # clips computed together, numbers 16 k to 16 k + 15, so that rounding never depends on who asks
MODES = tuple(product((1, 2, 3), repeat=2))  # half waves of a draught across and up
DRAUGHT = 7.0  # units^2/s, strength of its stream function; a mode's falls with its wave number squared
FLICKER_HZ = (1.5, 3.0)
SOFT_EDGE = 0.15  # world units over which the inlet fades out

Parameters = Sequence[Mapping[str, float]]  # one a clip
NAMES = (
    "inlet_x",
    "inlet_y",
    "inlet_radius",
    "inflow",
    "buoyancy",
    "cooling",
    "flicker",
    "flicker_hz",
    "flicker_phase",
)


@dataclass(frozen=True)
class Fluid:
    """What is drawn for a phenomenon, and how it looks; lengths in world units, times in seconds, density in its own.

    warm_up: frames that are computed before the first one shown. palette: colours by covered share, from white.
    weights: of red, green and blue in the sum that falls along the palette.
    """

    radius: Ranges  # of the inlet
    buoyancy: Ranges  # acceleration of a density of 1
    inflow: tuple[float, float]  # density times area a second, on average
    flicker: tuple[float, float]  # share by which the inflow swings
    cooling: tuple[float, float]  # share lost a second
    inlet_y: float
    warm_up: int
    opacity: float
    weights: tuple[float, float, float]
    palette: tuple[tuple[float, tuple[float, float, float]], ...]


SETTINGS = {
    "smoke": Fluid(
        radius=Ranges((0.4, 0.8), (0.25, 0.35), (0.95, 1.2)),
        buoyancy=Ranges((5.0, 11.0), (1.0, 3.5), (14.0, 20.0)),
        inflow=(1.2, 2.4), flicker=(0.0, 0.0), cooling=(0.0, 0.0), inlet_y=0.8, warm_up=20,
        opacity=1.0, weights=(1 / 3, 1 / 3, 1 / 3), palette=((0.0, (1.0, 1.0, 1.0)), (1.0, (0.0, 0.0, 0.0))),
    ),
    "flame": Fluid(
        radius=Ranges((0.8, 1.3), (0.5, 0.7), (1.45, 1.8)),
        buoyancy=Ranges((12.0, 20.0), (3.0, 8.0), (25.0, 33.0)),
        inflow=(10.0, 15.0), flicker=(0.6, 0.9), cooling=(4.0, 6.0), inlet_y=0.6, warm_up=30,
        opacity=1.3, weights=(0.0, -1.0, 2.0), palette=(  # white, dark red, orange, yellow
            (0.0, (1.0, 1.0, 1.0)), (0.08, (0.8, 0.4, 0.34)), (0.2, (0.55, 0.05, 0.0)),
            (0.42, (0.95, 0.38, 0.0)), (0.7, (1.0, 0.8, 0.05)), (1.0, (1.0, 0.97, 0.05)),
        ),
    ),
}  # fmt: skip


def draw_fluid(phenomenon: str, split: str, seed: int, numbers: np.ndarray) -> tuple[Parameters, tuple[str, ...]]:
    """The parameters and buckets of clips: functions of (phenomenon, split, seed, number). Raises what `Draws` does."""
    fluid, draws = SETTINGS[phenomenon], Draws(phenomenon, split, seed, numbers)
    bucket = draw_buckets(phenomenon, split, seed, numbers)
    radius = draws.quantity("radius", fluid.radius, np.isin(bucket, ("r", "rv")))
    found = {
        "inlet_x": draws.uniform("inlet_x", 3.0, WORLD_SIZE - 3.0),
        "inlet_y": np.full(len(numbers), fluid.inlet_y),
        "inlet_radius": radius,
        "inflow": draws.uniform("inflow", *fluid.inflow),
        "buoyancy": draws.quantity("buoyancy", fluid.buoyancy, np.isin(bucket, ("v", "rv"))),
        "cooling": draws.uniform("cooling", *fluid.cooling),
        "flicker": draws.uniform("flicker", *fluid.flicker),
        "flicker_hz": draws.uniform("flicker_hz", *FLICKER_HZ),
        "flicker_phase": draws.uniform("flicker_phase", 0, 2 * np.pi),
    }
    for m, n in MODES:
        found[f"draught_{m}{n}"] = draws.uniform(f"draught_{m}{n}", -DRAUGHT, DRAUGHT) / (m**2 + n**2)
    rows = np.stack(list(found.values()), 1).tolist()
    return tuple(dict(zip(found, row, strict=True)) for row in rows), tuple(bucket.tolist())


@dataclass(frozen=True)
class Flow:
    """The fluids of a group at one moment. Cell [i, j] lies around x = (i + 1/2) CELL, y = (j + 1/2) CELL.

    density: what is carried. across, up: velocity through the faces between cells, units/s; none passes the walls.
    buoyancy: units/s^2 of a density of 1.
    """

    density: Float[Tensor, "clip x y"]
    across: Float[Tensor, "clip face y"]
    up: Float[Tensor, "clip x face"]
    buoyancy: Float[Tensor, " clip"]


Change = Callable[[int, Flow], Flow]  # (number of a step, the flow before it) -> the flow to go on with


def transport(density: Tensor, across: Tensor, up: Tensor, duration_s: float) -> Float[Tensor, "clip x y"]:
    """The density after the flow has carried it for a time in which nothing crosses a whole cell.

    Upwind fluxes with van Leer's limiter (1974): what leaves a cell enters its neighbour, and no new extremes appear.
    """
    carried = density.clone()
    for dim, speed in ((1, across), (2, up)):
        courant = speed * (duration_s / CELL)
        onward, back = courant.clamp(min=0), courant.clamp(max=0)
        rise = F.pad(density.diff(dim=dim), (1, 1) if dim == 2 else (0, 0, 1, 1))
        below, above = rise.narrow(dim, 0, GRID), rise.narrow(dim, 1, GRID)
        both = below + above
        bend = (below * above).clamp_(min=0).mul_(2).div_(both.masked_fill_(both == 0, 1.0))  # harmonic mean or 0
        first, last = ((slice(None),) * dim + (part,) for part in (slice(None, -1), slice(1, None)))
        flux = torch.addcmul(onward * density[first], back, density[last])
        flux.addcmul_(onward * (1 - onward), bend[first], value=0.5).addcmul_(back * (1 + back), bend[last], value=-0.5)
        carried[first] -= flux
        carried[last] += flux
    return carried


@cache
def compiled_step() -> Callable[..., list[Tensor]]:
    """A function (density, across, up, buoyancy) -> (across, up) that gives the velocity a frame later.

    Raises ValueError where PhiFlow is not installed.
    """
    try:
        from phi import math  # takes seconds, so only those wait who simulate
        from phi.field import CenteredGrid, StaggeredGrid, divergence, resample, spatial_gradient
        from phi.geom import Box
        from phi.physics.advect import semi_lagrangian
        from phiml.backend.torch import TORCH
    except ImportError as error:
        raise ValueError(f"smoke and flame need PhiFlow ({error}); pip install 'phiflow>=3.4,<4'") from None
    grid = dict(x=GRID, y=GRID, bounds=Box(x=WORLD_SIZE, y=WORLD_SIZE))
    free = math.extrapolation.ZERO_GRADIENT
    shapes = {1: [math.batch("clip")], 3: [math.batch("clip"), math.spatial("x,y")]}
    laplace = np.diff(np.pad(np.eye(GRID), ((1, 1), (0, 0)), mode="edge"), n=2, axis=0) / CELL**2  # closed at both ends
    values, vectors = (torch.from_numpy(part) for part in np.linalg.eigh(laplace))
    total = values[:, None] + values
    inverse = torch.where(total < -1e-9, 1 / total, 0.0)  # pressure is known up to a constant

    @math.jit_compile
    def step(density, across, up, buoyancy):
        velocity = StaggeredGrid(math.stack({"x": across, "y": up}, math.dual("vector")), 0, **grid)
        lift = CenteredGrid(density * buoyancy, free, **grid) * (0, FRAME_STEP_S)
        there = semi_lagrangian(velocity, velocity, FRAME_STEP_S)
        back = semi_lagrangian(there, velocity, -FRAME_STEP_S)
        velocity = there + (velocity - back) / 2 + resample(lift, to=velocity)
        modes = vectors.T @ divergence(velocity).values.native("clip,x,y") @ vectors * inverse
        pressure = CenteredGrid(math.wrap(vectors @ modes @ vectors.T, *shapes[3]), free, **grid)
        velocity = velocity - spatial_gradient(pressure, velocity.boundary, at="face")
        return velocity.vector["x"].values, velocity.vector["y"].values

    def advance(*inputs: Tensor) -> list[Tensor]:
        with TORCH, math.precision(64), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the tracer
            parts = step(*(math.wrap(tensor, *shapes[tensor.ndim]) for tensor in inputs))
            return [part.native("clip,x,y").contiguous() for part in parts]

    return advance


def parameter_columns(parameters: Parameters) -> dict[str, Float[Tensor, "clip 1 1"]]:
    """Every parameter of the clips in float64, to go with fields; raises ValueError for clips that lack one."""
    names = (*NAMES, *(f"draught_{m}{n}" for m, n in MODES))
    missing = [name for name in names if any(name not in row for row in parameters)]
    require(not missing, f"a clip of a fluid lacks its {', '.join(missing)}; take clips from the simulator")
    return {name: torch.tensor([row[name] for row in parameters], dtype=torch.float64)[:, None, None] for name in names}


def inlet_rate(column: Mapping[str, Float[Tensor, "clip 1 1"]], step: Tensor | int) -> Float[Tensor, "clip x y"]:
    """Density a second that the inlet gives each cell in the steps of these numbers; times CELL^2 they sum to inflow.

    inflow (1 + flicker sin(2 pi flicker_hz 0.1 s step + flicker_phase)).
    """
    centre = (torch.arange(GRID).double() + 0.5) * CELL
    distance = torch.hypot(centre[:, None] - column["inlet_x"], centre - column["inlet_y"])
    inlet = torch.sigmoid((column["inlet_radius"] - distance) / SOFT_EDGE)
    angle = 2 * torch.pi * column["flicker_hz"] * FRAME_STEP_S * step + column["flicker_phase"]
    inflow = column["inflow"] * (1 + column["flicker"] * torch.sin(angle))
    return inlet / inlet.sum((1, 2), keepdim=True) * inflow / CELL**2


def time_of_gain(cooling: Tensor, duration_s: float) -> Tensor:
    """(1 - exp(-k t)) / k: what a constant gain of 1 a second comes to after t seconds of cooling k; t without it."""
    return torch.where(cooling > 0, -torch.expm1(-cooling * duration_s) / cooling, duration_s)


def flow_frames(parameters: Parameters, change: Change | None = None) -> Iterator[Flow]:
    """The flow of GROUP clips, from rest but for the draught, after one step, two steps, and so on without end.

    change: applied before every step, from number 0 on.
    Raises ValueError for a flow so fast that it crosses a cell in a substep, or where PhiFlow is not installed.
    """
    require(len(parameters) == GROUP, f"{GROUP} clips are computed together, got {len(parameters)}")
    column = parameter_columns(parameters)
    wave = torch.arange(GRID + 1).double() / GRID * torch.pi
    substep_s = FRAME_STEP_S / SUBSTEPS
    kept = torch.exp(-column["cooling"] * substep_s)
    gain_s = time_of_gain(column["cooling"], substep_s)
    stream = sum(column[f"draught_{m}{n}"] * torch.sin(m * wave)[:, None] * torch.sin(n * wave) for m, n in MODES)
    across, up = stream.diff(dim=2)[:, 1:-1] / CELL, -stream.diff(dim=1)[:, :, 1:-1] / CELL
    flow, number = Flow(torch.zeros(GROUP, GRID, GRID).double(), across, up, column["buoyancy"][:, 0, 0]), 0
    advance = compiled_step()
    while True:
        if change is not None:
            flow = change(number, flow)
        courant = (flow.across.abs().max() + flow.up.abs().max()) * substep_s / CELL
        require(courant <= 1, f"the flow crosses {courant:.2f} cells in a substep; lower its buoyancy or inflow")
        density, source = flow.density, inlet_rate(column, number) * gain_s
        for _ in range(SUBSTEPS):
            density = transport(density, flow.across, flow.up, substep_s) * kept + source
        flow = Flow(density, *advance(density, flow.across, flow.up, flow.buoyancy), flow.buoyancy)
        yield flow
        number += 1


@cache
def pixel_weights(size: int) -> Float[np.ndarray, "pixel cell"]:
    """Shares of the cells along a side in each of `size` pixels: a linear course between cells, averaged over a pixel.

    Rows sum to 1 and columns to size / GRID, so that a frame has the same total density at every size.
    """
    fine = max(1, -(-size // GRID))  # parts that a cell is split into
    place = ((np.arange(GRID * fine) + 0.5) / fine - 0.5).clip(0, GRID - 1)  # in cells
    linear = (1 - np.abs(place[:, None] - np.arange(GRID))).clip(min=0)
    edges = np.arange(GRID * fine + 1) / (GRID * fine) * size
    first, last = np.arange(size)[:, None], np.arange(1, size + 1)[:, None]
    return (np.minimum(edges[1:], last) - np.maximum(edges[:-1], first)).clip(min=0) @ linear


def draw_density(density: Float[Tensor, "clip time x y"], phenomenon: str, size: int) -> UInt8[Tensor, "..."]:
    """Frames [clip, time, size, size, 3] of carried densities; row 0 is the top."""
    fluid, weights = SETTINGS[phenomenon], pixel_weights(size)
    pixels = (weights @ density.numpy() @ weights.T).swapaxes(2, 3)[:, :, ::-1]
    shares, colours = (np.array(part) for part in zip(*fluid.palette, strict=True))
    covered = 1 - np.exp(-fluid.opacity * pixels)
    colour = np.stack([np.interp(covered, shares, plane) for plane in colours.T], -1)
    return torch.from_numpy(np.rint(255 * colour).astype(np.uint8))


def simulate_group(
    parameters: Parameters, phenomenon: str, frames: int, size: int, change: Change | None = None
) -> UInt8[Tensor, "clip time height width 3"]:
    """Frames of up to GROUP clips of one phenomenon, computed together; frame k is there after step warm_up + k."""
    rows, start = [*parameters, *parameters[-1:] * (GROUP - len(parameters))], SETTINGS[phenomenon].warm_up
    flows = islice(flow_frames(rows, change), start, start + frames)
    return draw_density(torch.stack([flow.density[: len(parameters)] for flow in flows], 1), phenomenon, size)


def simulate_whole_group(
    phenomenon: str, split: str, seed: int, frames: int, size: int, k: int
) -> UInt8[Tensor, "clip time height width 3"]:
    """Frames of the clips number GROUP k to GROUP k + GROUP - 1."""
    parameters, _ = draw_fluid(phenomenon, split, seed, GROUP * k + np.arange(GROUP))
    return simulate_group(parameters, phenomenon, frames, size)


def check_fluid(phenomenon: str, split: str, seed: int, frames: int, size: int) -> None:
    """Raise ValueError unless a clip can be asked for like this."""
    choose("fluid", phenomenon, SETTINGS)
    check_request(split, seed, frames)
    require(size >= 8, f"frame size must be at least 8 pixels, got {size}")


def collect_clips(
    phenomenon: str, split: str, numbers: np.ndarray, seed: int, group: Callable[[int], np.ndarray | Tensor]
) -> Clip:
    """Clips number `numbers`, whose frames are in group(number // GROUP)."""
    groups = {int(k): group(int(k)) for k in np.unique(numbers // GROUP)}
    frames = [np.asarray(groups[number // GROUP][number % GROUP]) for number in numbers.tolist()]
    parameters, buckets = draw_fluid(phenomenon, split, seed, numbers)
    return Clip(
        frames=torch.from_numpy(np.stack(frames)),
        captions=(CAPTIONS[phenomenon],) * len(numbers),
        scenarios=(phenomenon,) * len(numbers),
        buckets=buckets,
        indices=torch.from_numpy(numbers),
        parameters=parameters,
    )


def simulate_fluid(phenomenon: str, split: str, numbers, *, frames: int, size: int, seed: int = 0) -> Clip:
    """Clips number `numbers` of "smoke" or "flame", computed anew: split "train", "id" or "ood" as in the worlds.

    Clip i is the same alone or in any batch, because its whole group is computed in any case; another number of threads
    or another processor rounds differently, by about 1e-14 of a density. state is None: the truth is in `parameters`.
    Raises ValueError for an unknown phenomenon or split, a bad number or size, or where PhiFlow is not installed.
    """
    check_fluid(phenomenon, split, seed, frames, size)
    numbers = np.asarray(numbers, dtype=np.int64)
    require(len(numbers) > 0 and numbers.min() >= 0, "clip numbers must be given and not be negative")

    group = partial(simulate_whole_group, phenomenon, split, seed, frames, size)
    return collect_clips(phenomenon, split, numbers, seed, group)


@dataclass(frozen=True)
class FluidSource:
    """`count` clips of a phenomenon as a source, each computed once and then read from a cache on disk.

    cache: the folder of all such caches; None is `physnb/fluids` in XDG_CACHE_HOME or ~/.cache. The groups that are
    asked for and not there yet are computed and written one by one, so that a killed process loses the one in flight.
    Raises ValueError for what `simulate_fluid` does, and naming a cached file that is damaged.
    """

    phenomenon: str
    _: KW_ONLY
    frames: int
    size: int
    split: str = "train"
    seed: int = 0
    cache: str | Path | None = None
    count: int = 512

    def __post_init__(self) -> None:
        check_fluid(self.phenomenon, self.split, self.seed, self.frames, self.size)
        require(self.count > 0, f"a source needs at least 1 clip, got {self.count}")

    @property
    def name(self) -> str:
        return self.phenomenon

    @property
    def captions(self) -> tuple[str, ...]:
        return (CAPTIONS[self.phenomenon],)

    @property
    def folder(self) -> Path:
        """Where these clips are cached; its name has a hash of all that decides their pixels."""
        root = self.cache or cache_folder("fluids")
        solver = (VERSION, GRID, SUBSTEPS, GROUP, MODES, DRAUGHT, FLICKER_HZ, SOFT_EDGE)
        facts = json.dumps([solver, self.seed, asdict(SETTINGS[self.phenomenon])])
        key = hashlib.sha256(facts.encode()).hexdigest()[:12]
        return Path(root) / f"{self.phenomenon}-{self.split}-{self.frames}x{self.size}-{key}"

    def clips(self, numbers: Int[np.ndarray, " batch"]) -> Clip:
        """Clips number `numbers`, in [0, count)."""
        numbers = np.asarray(numbers, dtype=np.int64)
        inside = len(numbers) > 0 and 0 <= numbers.min() and numbers.max() < self.count
        require(inside, f"clip numbers of {self.name} must be given and lie in [0, {self.count})")
        return collect_clips(self.phenomenon, self.split, numbers, self.seed, self._group)

    def _group(self, k: int) -> UInt8[np.ndarray, "clip time height width 3"]:
        path = self.folder / f"{k:06d}.npy"
        if not path.exists():
            made = simulate_whole_group(self.phenomenon, self.split, self.seed, self.frames, self.size, k)
            prepare_folder(self.folder, resume=True)
            with written_whole(path) as temporary, open(temporary, "wb") as file:
                np.save(file, made.numpy())
        try:
            shard = np.load(path, mmap_mode="r")
        except (ValueError, EOFError, OSError) as error:
            raise ValueError(f"{path} is damaged ({error}); delete it") from None
        shape = (GROUP, self.frames, self.size, self.size, 3)
        require(shard.shape == shape and shard.dtype == np.uint8, f"{path} does not hold frames {shape}; delete it")
        return shard
