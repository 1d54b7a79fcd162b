"""Controls around plots, running hunts and stored choices: they show what is there and never call a model."""

from __future__ import annotations

import base64
import html
import io
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import ipywidgets
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor

from physnb.choices import ANSWERS, ChoiceStore, Pair
from physnb.config import HeadSet, require
from physnb.plots import plot_attention, plot_clips, plot_head_map, plot_surface, write_video
from physnb.search import Guide, effects_so_far
from physnb.trials import Trials


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return buffer.getvalue()


def browse(draw: Callable[..., tuple[Figure, str]], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """Controls over the figure and the sentence that `draw(**values)` returns; the first view is there at once.

    The picture is a plain image, so it shows wherever widgets show; an error appears in place of the sentence.
    """
    picture, sentence = ipywidgets.Image(format="png"), ipywidgets.HTML()

    def update(_=None) -> None:
        try:
            figure, text = draw(**{name: control.value for name, control in controls.items()})
        except Exception as error:  # the reader of the cell is the only one who can act on it
            text = f"{type(error).__name__}: {error}"
        else:
            picture.value = _png(figure)
        sentence.value = html.escape(text)

    for control in controls.values():
        control.style.description_width = "initial"
        control.layout.width = "480px"
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([*controls.values(), sentence, picture])


def watch_hunt(
    guide: Guide, heads: HeadSet, *, every_s: float = 2.0
) -> tuple[ipywidgets.VBox, Callable[[Trials], None]]:
    """A map of heads that fills in while trials land, with the time left; and the `on_rows` of the Trials to watch.

    guide: the trial of a head alone, as the hunt has it. The map is drawn anew every `every_s` seconds at most.
    """
    bar, sentence = ipywidgets.IntProgress(description="clips"), ipywidgets.HTML("waiting for the first clips")
    picture, last = ipywidgets.Image(format="png"), 0.0

    def on_rows(trials: Trials) -> None:
        nonlocal last
        bar.max = trials.rows_run + trials.pending
        bar.value = trials.rows_run
        minutes, seconds = divmod(round(trials.seconds_left), 60)
        sentence.value = f"{trials.rows_run} of {bar.max} clips, {minutes}:{seconds:02d} left of this part"
        if time.monotonic() - last < every_s and trials.pending:
            return
        ranking = effects_so_far(trials, guide, heads)
        if not bool(ranking.effects.isnan().all()):
            picture.value = _png(plot_head_map(ranking.layer_map(), label=ranking.label))
        last = time.monotonic()

    return ipywidgets.VBox([bar, sentence, picture]), on_rows


def browse_surface(surfaces: Mapping[str, Mapping[tuple[float, float], Mapping]]) -> ipywidgets.VBox:
    """Choose a metric and a point (w, u) of its surface, and read the effect there with its interval."""
    points = next(iter(surfaces.values()))
    weights, strengths = (sorted({point[i] for point in points}) for i in (0, 1))

    def draw(metric: str, w: float, u: float) -> tuple[Figure, str]:
        effect = surfaces[metric][w, u]
        figure = plot_surface(surfaces[metric], f"{metric} minus unguided", (w, u))
        sentence = (
            f"{metric} at w = {w:g}, u = {u:g}: {effect['mean']:+.3f} against unguided, "
            f"95 % interval [{effect['low']:+.3f}, {effect['high']:+.3f}], {effect['judged']} cases"
        )
        return figure, sentence

    return browse(
        draw,
        metric=ipywidgets.Dropdown(options=list(surfaces), description="metric"),
        w=ipywidgets.SelectionSlider(options=weights, value=weights[-1], description="guidance weight w (0 = off)"),
        u=ipywidgets.SelectionSlider(
            options=strengths, value=strengths[-1], description="perturbation strength u (0 = off)"
        ),
    )


def browse_attention(
    maps: Mapping[str, Mapping[int, tuple[Float[Tensor, "time height width"], tuple[int, int, int]]]],
    frames: Float[Tensor, "time height width 3"],
) -> ipywidgets.VBox:
    """Choose a head and a frame, and see where the disc's token at that frame looks.

    maps[head][frame] holds the attention on the token grid and the query token.
    """
    frame_numbers = list(next(iter(maps.values())))

    def draw(head: str, frame: int) -> tuple[Figure, str]:
        weights, query = maps[head][frame]
        past = float(weights[: query[0]].sum())
        sentence = (
            f"{head}: the disc's token at frame {frame} gives {100 * past:.0f} % of its attention to earlier tokens"
        )
        return plot_attention(weights, query, frames), sentence

    return browse(
        draw,
        head=ipywidgets.Dropdown(options=list(maps), description="head"),
        frame=ipywidgets.SelectionSlider(options=frame_numbers, description="query frame"),
    )


def draw_pair(clips: Mapping[str, UInt8[Tensor, "time height width 3"]], pair: Pair) -> Figure:
    """The pair as film strips, left above right: what choice_widget shows, without anything to press."""
    return plot_clips({"left": clips[pair.left_clip], "right": clips[pair.right_clip]})


def _video_html(clips: Mapping[str, UInt8[Tensor, "time height width 3"]], pair: Pair, fps: float, scale: int) -> str:
    """Both clips in one looping video: one file cannot drift apart, and each loop starts both at once."""
    sides = {"left": clips[pair.left_clip][None], "right": clips[pair.right_clip][None]}
    with tempfile.TemporaryDirectory() as folder:
        data = write_video(Path(folder) / "pair.mp4", sides, fps=fps, scale=scale).read_bytes()
    source = "data:video/mp4;base64," + base64.b64encode(data).decode()
    label = "Left and right clip side by side, playing in a loop"
    return f'<video autoplay loop muted playsinline controls aria-label="{label}" src="{source}"></video>'


def choice_widget(
    store: ChoiceStore,
    clips: Mapping[str, UInt8[Tensor, "time height width 3"]],
    rater: str,
    *,
    question: str = "Which clip moves more lawfully?",
    fps: float = 8.0,
    scale: int | None = None,
) -> ipywidgets.VBox:
    """Two clips side by side and the buttons Left, Right, Tie, Skip and Undo; every press is a row of `store` at once.

    clips: by the ids of the planned pairs (`method/case`); the rater sees no names. scale: screen pixels a pixel;
    None makes the clips about 240 high.
    Buttons take the keyboard: Tab moves, Enter or Space presses. Running the cell again goes on with the next pair.
    Raises ValueError before anything shows if no pair is planned or a clip is missing; later errors appear in the cell.
    """
    pairs = store.pairs()
    require(len(pairs) > 0, "no pair is planned; call store.plan(design_pairs(methods, cases)) first")
    require(bool(rater.strip()), "choices need the rater's name")
    missing = sorted({clip for pair in pairs for clip in (pair.left_clip, pair.right_clip)} - clips.keys())
    require(
        not missing, f"{len(missing)} clips of the planned pairs are not given, for example {', '.join(missing[:2])}"
    )
    shapes = {tuple(clips[clip].shape) for pair in pairs for clip in (pair.left_clip, pair.right_clip)}
    require(len(shapes) == 1 and 0 not in min(shapes), f"the clips must have one size and length, got {sorted(shapes)}")
    scale = scale or max(1, 240 // min(shapes)[1])

    video, progress, error_line = ipywidgets.HTML(), ipywidgets.HTML(), ipywidgets.HTML()
    tooltips = dict(
        left="The left clip (Enter or Space)",
        right="The right clip (Enter or Space)",
        tie="Neither is better (Enter or Space)",
        skip="Do not judge this pair (Enter or Space)",
        undo="Take back your last choice and judge that pair again (Enter or Space)",
    )
    buttons = {
        name: ipywidgets.Button(description=name.capitalize(), tooltip=tip, tabbable=True)
        for name, tip in tooltips.items()
    }
    shown: Pair | None = None
    shown_at_s = 0.0

    def show(pair: Pair | None) -> None:
        nonlocal shown, shown_at_s
        # The video comes first: making it may fail, and then the pair on screen must stay the pair that is judged.
        playing = "" if pair is None else _video_html(clips, pair, fps, scale)
        counts = store.counts(rater)
        done = sum(counts.values())
        shown, video.value = pair, playing
        place = f"{done + 1} of {len(pairs)}" if pair else f"All {len(pairs)} pairs are judged"
        tally = ", ".join(f"{answer} {count}" for answer, count in counts.items())
        progress.value = html.escape(f"{place}. So far: {tally}.")
        for answer in ANSWERS:
            buttons[answer].disabled = pair is None
        buttons["undo"].disabled = done == 0
        shown_at_s = time.monotonic()

    def press(button: ipywidgets.Button) -> None:
        name = button.description.lower()
        try:
            if name == "undo":
                show(store.undo(rater) or store.next_pair(rater))
            else:
                store.write(shown, name, rater, time.monotonic() - shown_at_s)
                show(store.next_pair(rater))
            error_line.value = ""
        except Exception as error:  # the rater at the cell is the only one who can act on it
            error_line.value = html.escape(f"{type(error).__name__}: {error}")

    for button in buttons.values():
        button.on_click(press)
    show(store.next_pair(rater))
    heading = ipywidgets.HTML(f"<b>{html.escape(question)}</b>")
    return ipywidgets.VBox([heading, video, ipywidgets.HBox(list(buttons.values())), progress, error_line])
