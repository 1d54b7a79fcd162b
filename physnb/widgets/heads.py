"""A layer x head map to click, and everything known of the head that was clicked."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import ipywidgets
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from physnb.analysis import HeadAttention
from physnb.attention_pictures import attention_picture, queries_along
from physnb.config import HeadId, HeadSet, HuntConfig, require
from physnb.pictures import encode_png
from physnb.plots import effect_colours, plot_profile, text_colour
from physnb.profiles import Profile, measure_profiles, profile_rows
from physnb.trials import Trials
from physnb.widgets.actions import Report, long_action, tell
from physnb.widgets.browsing import View, labelled
from physnb.widgets.strength import BATCH, Films

Maps = Mapping[str, Float[Tensor, "layer head"]]
CHOSEN, FRAMED, PLAIN = "3px solid #0072b2", "2px solid black", "1px solid lightgrey"


class HeadMap:
    """A grid of buttons, one a head, coloured by one of several maps; `head` is the one pressed last.

    Buttons rather than a plot: they take Tab and Enter, and say their name and value to a screen reader.
    """

    def __init__(self, maps: Maps, heads: HeadSet, framed: HeadSet = ()):
        require(len(maps) > 0 and len(heads) > 0, "a head map needs a map and heads")
        self.maps, self.heads, self.framed, self.head = maps, heads, framed, (*framed, *heads)[0]
        self.listeners: list[Callable[[], None]] = []
        self.choice = labelled(ipywidgets.Dropdown(options=list(maps), description="colour by"), "420px")
        self.legend = ipywidgets.HTML()
        self.buttons = {head: ipywidgets.Button(description=str(head), tabbable=True) for head in heads}
        for head, button in self.buttons.items():
            button.layout = ipywidgets.Layout(width="64px", height="30px", padding="0px", margin="1px")
            button.on_click(lambda _, head=head: self.press(head))
        rows = [
            ipywidgets.HBox([button for head, button in self.buttons.items() if head.layer == layer])
            for layer in sorted({head.layer for head in heads})
        ]
        self.box = ipywidgets.VBox([self.choice, *rows, self.legend])
        self.box.add_class("physnb-map")
        self.choice.observe(lambda _: self.colour(), names="value")
        self.colour()

    def colour(self) -> None:
        """Colour the buttons by the chosen map."""
        name = self.choice.value
        values = [float(self.maps[name][head.layer, head.head]) for head in self.heads]
        for (head, button), value, colour in zip(
            self.buttons.items(), values, effect_colours(values), strict=True
        ):  # fmt: skip
            button.style.button_color, button.style.text_color = colour, text_colour(colour)
            button.tooltip = f"{head}: {name} {value:.3f}" if value == value else f"{head}: not measured"
        signed = any(value < 0 for value in values)
        scale = "orange is below zero, purple above" if signed else "darker is more"
        self.legend.value = html.escape(f"{scale}; black frame: hunted, blue frame: shown below")
        self._frame()

    def press(self, head: HeadId) -> None:
        """Show another head."""
        self.head = head
        self._frame()
        for listener in self.listeners:
            listener()

    def _frame(self) -> None:
        for head, button in self.buttons.items():
            button.layout.border = CHOSEN if head == self.head else FRAMED if head in self.framed else PLAIN


def browse_heads(
    maps: Maps,
    attention: HeadAttention,
    trials: Mapping[str, Trials],
    hunt: HuntConfig,
    show: Sequence[int],
    profiles: Mapping[HeadId, Profile],
    *,
    framed: HeadSet = (),
    describe: Callable[[HeadId], str] = str,
    a_scenario: int | None = None,
) -> ipywidgets.VBox:
    """Press a head of the map: its effects, its attention from the disc's token, and its clips, with sentences.

    maps: what buttons can be coloured by. trials: by split, as `profiles.measure_profiles` takes them. attention: of
    all heads on the cases `show` of the first of them. profiles: what is known of each head; the button measures the
    rest, on `a_scenario` cases of each scenario. describe: what to say of a head. The slider and its play button move
    the query along the red disc's path.
    """
    first, known = next(iter(trials.values())), dict(profiles)
    clips, films = first.subject.cases[list(show)], Films(first, show)
    heads = HeadMap(maps, attention.heads, framed)
    names = [(first.subject.case_names[case], place) for place, case in enumerate(show)]
    clip = labelled(ipywidgets.Dropdown(options=names, description="clip (scenario, case)"), "330px")
    paths = [queries_along(clips, attention.grid, place) for place in range(len(clips))]
    last = max(map(len, paths)) - 1
    step = labelled(
        ipywidgets.IntSlider(min=0, max=last, value=last // 2, description="query: the disc at time"), "460px"
    )
    play = ipywidgets.Play(
        min=0, max=last, value=last // 2, interval=500, description="Play", tooltip="Move the query along the path"
    )
    ipywidgets.jslink((play, "value"), (step, "value"))

    def draw_effects() -> tuple[str, list[Figure]]:
        rows = profile_rows({heads.head: known[heads.head]})
        return describe(heads.head), [plot_profile(rows, f"{first.subject.objective.name} minus unguided")]

    def draw_attention() -> tuple[str, list[bytes]]:
        query = paths[clip.value][min(step.value, len(paths[clip.value]) - 1)]
        place, frames = attention.heads.index(heads.head), clips.frames[clip.value]
        centres = clips.state.positions[clip.value]
        drawn = attention_picture(attention, place, clip.value, query, frames, centres=centres)
        past = float(attention.from_query(place, clip.value, query)[: query[0]].sum())
        text = (
            f"{heads.head}: the disc's token at token time {query[0]} gives {past:.0%} of its attention to earlier ones"
        )
        return text, [encode_png(drawn)]

    def draw_film() -> tuple[str, list[bytes]]:
        film = films(hunt.guidance((heads.head,)), show[clip.value], str(heads.head))
        return f"The clip without guidance, and guided away from {heads.head} alone:", [film]

    def measure(report: Report) -> str:
        head, on_rows = heads.head, tell(report)
        with ExitStack() as stack:
            twins = {name: stack.enter_context(part.twin(on_rows, BATCH)) for name, part in trials.items()}
            known.update(measure_profiles(twins, hunt, (head,), a_scenario=a_scenario))
        effects.update()
        return f"computed {head}"

    effects, looks, film = View(draw_effects), View(draw_attention), View(draw_film)
    looks.follow([clip, step])
    film.follow([clip])
    for view in (effects, looks, film):
        heads.listeners.append(view.update)
        view.update()
    action = long_action("Measure this head", measure, "Its effect by noise level, split and strength, where not known")
    controls = ipywidgets.HBox([clip, step, play], layout={"flex_flow": "row wrap"})
    shown = [effects.sentence, *effects.pictures, action, controls, looks.sentence, *looks.pictures]
    box = ipywidgets.VBox([heads.box, *shown, film.sentence, *film.pictures])
    box.add_class("physnb-browser")
    return box
