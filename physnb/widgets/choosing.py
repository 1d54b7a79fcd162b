"""Two clips side by side, and which of them moves more lawfully: choices for a reward or a comparison of methods."""

from __future__ import annotations

import base64
import html
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import ipywidgets
from jaxtyping import UInt8
from matplotlib.figure import Figure
from torch import Tensor

from physnb.choices import ANSWERS, ChoiceStore, Pair
from physnb.config import require
from physnb.plots import plot_clips, write_video


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
    return f'<video autoplay loop muted playsinline aria-label="{label}" src="{source}"></video>'


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
