"""Any weight and strength of guidance: its clips at once, its effects with intervals, and new points on demand."""

from __future__ import annotations

from collections.abc import Sequence

import ipywidgets

from physnb.config import Guidance, HeadSet, HuntConfig, require
from physnb.confirm import ArmResult
from physnb.metrics import parse_discs
from physnb.pictures import draw_film, draw_frame, encode_png
from physnb.plots import cell_boxes, figure_pixels, plot_surface
from physnb.strength import SURFACE_UNITS, Point, effects_of, measure_arms, weight_grid
from physnb.trials import Trials
from physnb.widgets.actions import Report, long_action, tell
from physnb.widgets.browsing import View, labelled

BATCH = 12  # clips between two looks at Cancel: under a second for the reference model


class Films:
    """Animated pictures of cases, true beside unguided beside guided, with the parsed trajectories; each made once."""

    def __init__(self, trials: Trials, cases: Sequence[int]):
        self.trials, self.cases = trials, list(cases)
        self.true, self.drawn = trials.subject.cases.frames[self.cases], {}
        self.clips = trials.clips([Guidance()], self.cases)

    def load(self, guidances: Sequence[Guidance]) -> None:
        """Have the clips of these trials at hand."""
        missing = [trial for trial in dict.fromkeys(guidances) if trial not in self.clips]
        self.clips |= self.trials.clips(missing, self.cases)

    def __call__(self, guidance: Guidance, case: int, name: str = "guided") -> bytes:
        """A PNG animation of the case; `name` of the guided panel decides its colour."""
        if (guidance, case, name) not in self.drawn:
            self.drawn[guidance, case, name] = self._draw(guidance, case, name)
        return self.drawn[guidance, case, name]

    def _draw(self, guidance: Guidance, case: int, name: str) -> bytes:
        self.load([guidance])
        place = self.cases.index(case)
        shown = {"true": self.true[place], "unguided": self.clips[Guidance()][place], name: self.clips[guidance][place]}
        paths = {label: parse_discs(frames[None]).positions[0] for label, frames in shown.items()}
        return encode_png(draw_film(shown, paths))


class Surfaces:
    """The surface of every metric as a picture in which a point can be framed; each is drawn once until it changes."""

    def __init__(self, arms: dict[Point, ArmResult]):
        self.arms, self.drawn = arms, {}
        self.effects = effects_of(arms)

    def add(self, arms: dict[Point, ArmResult]) -> None:
        self.arms |= arms
        self.drawn, self.effects = {}, effects_of(self.arms)

    def axes(self) -> tuple[list[float], list[float]]:
        """All weights and all strengths."""
        return tuple(sorted({point[axis] for point in self.arms}) for axis in (0, 1))

    def __call__(self, metric: str, point: Point) -> bytes:
        if metric not in self.drawn:
            figure = plot_surface(self.effects[metric], f"{metric.replace('_', ' ')} minus unguided")
            self.drawn[metric] = figure_pixels(figure), cell_boxes(figure)
        pixels, boxes = self.drawn[metric]
        weights, strengths = self.axes()
        return encode_png(draw_frame(pixels, boxes[strengths.index(point[1])][weights.index(point[0])]))


def browse_strength(
    trials: Trials,
    hunt: HuntConfig,
    heads: HeadSet,
    arms: dict[Point, ArmResult],
    show: Sequence[int],
    *,
    cases: Sequence[int] | None = None,
) -> ipywidgets.VBox:
    """Move w and u: the clip plays at once, the surface frames the point, the sentence says its effect and interval.

    arms: what `strength.measure_arms` gave for a `weight_grid` on `cases`; show: numbers of the cases to play. Points
    between those of the grid are computed on demand, on the same cases and noise; Cancel keeps the clips scored so far.
    """
    require(len(arms) > 0 and len(show) > 0, "give the points of a surface and the cases to play")
    names = trials.subject.case_names
    films, surfaces = Films(trials, show), Surfaces(dict(arms))
    hunted = f"{len(heads)} hunted heads"

    def trial(w: float, u: float) -> Guidance:
        return weight_grid(hunt, heads, [w], [u])[w, u]

    films.load([trial(*point) for point in arms])
    weights, strengths = surfaces.axes()
    metric = labelled(ipywidgets.Dropdown(options=list(surfaces.effects), value="tracking_error", description="metric"))
    case = labelled(ipywidgets.Dropdown(options=[(names[n], n) for n in show], description="clip (scenario, case)"))
    slider = ipywidgets.SelectionSlider
    w = labelled(slider(options=weights, value=weights[-1], description="guidance weight w (0 = off)"))
    u = labelled(slider(options=strengths, value=strengths[-1], description="perturbation strength u (0 = off)"))

    def draw() -> tuple[str, list[bytes]]:
        point = w.value, u.value
        film, surface = films(trial(*point), case.value, hunted), surfaces(metric.value, point)
        where, effect = f"w = {point[0]:g}, u = {point[1]:g}", surfaces.effects[metric.value].get(point)
        if effect is None:
            new_w.value, new_u.value = point
            return f"{where} plays, but is not measured yet: press Compute this point.", [film, surface]
        place = list(cases if cases is not None else trials.cases)
        own = surfaces.arms[point]
        this = [float(v[metric.value][place.index(case.value)]) for v in (own.baseline, own.values)]
        unit = SURFACE_UNITS.get(metric.value, trials.subject.objective.unit)
        return (
            f"{metric.value} at {where}: {effect['mean']:+.3f} {unit} against unguided, 95 % interval "
            f"[{effect['low']:+.3f}, {effect['high']:+.3f}], {effect['judged']} cases; this clip: "
            f"{this[0]:.2f} unguided, {this[1]:.2f} guided."
        ), [film, surface]

    view = View(draw, pictures=2)
    other = dict(step=0.1, layout={"width": "170px"}, style={"description_width": "initial"})
    new_w = ipywidgets.BoundedFloatText(
        value=sum(weights[-2:]) / len(weights[-2:]), min=0, max=100, description="new w", **other
    )
    new_u = ipywidgets.BoundedFloatText(value=0.75, min=0, max=1, description="new u in [0, 1]", **other)

    def compute(report: Report) -> str:
        point = round(new_w.value, 6), round(new_u.value, 6)
        with trials.twin(tell(report), BATCH) as twin:
            found = measure_arms(twin, {point: trial(*point)}, cases)
            films.clips |= twin.clips([trial(*point)], show)
        surfaces.add(found)
        with view.quiet():
            w.options, u.options = surfaces.axes()
            w.value, u.value = point
        return f"computed w = {point[0]:g}, u = {point[1]:g}"

    action = long_action("Compute this point", compute, "Measure new w and new u on the cases of the surface")
    view.follow([metric, case, w, u])
    view.update()
    rows = [[metric, case], [w, u], [new_w, new_u, action]]
    wrapped = [ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in rows]
    box = ipywidgets.VBox([*wrapped, view.sentence, *view.pictures])
    box.add_class("physnb-browser")
    return box
