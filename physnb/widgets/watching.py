"""A hunt while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable

import ipywidgets

from physnb.config import HeadSet
from physnb.plots import figure_png, plot_head_map
from physnb.ranking import Guide, effects_so_far
from physnb.trials import Trials


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
            picture.value = figure_png(plot_head_map(ranking.layer_map(), label=ranking.label))
        last = time.monotonic()

    return ipywidgets.VBox([bar, sentence, picture]), on_rows
