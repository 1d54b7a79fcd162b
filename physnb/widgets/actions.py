"""A button that runs something long: progress, time left, cancel, and errors where one pressed."""

from __future__ import annotations

import html
import threading
from collections.abc import Callable

import ipywidgets

from physnb.trials import Trials

Report = Callable[[int, int, float], None]  # done, total, seconds left


class Cancelled(Exception):
    """What a report raises once Cancel was pressed."""


def tell(report: Report) -> Callable[[Trials], None]:
    """The `on_rows` of trials that reports how far they are."""
    return lambda trials: report(trials.rows_run, trials.rows_run + trials.pending, trials.seconds_left)


def long_action(name: str, work: Callable[[Report], str], tooltip: str = "") -> ipywidgets.HBox:
    """A button `name` that runs `work(report)` beside the notebook, a Cancel button, a bar and a line of text.

    work calls report(done, total, seconds left) now and then, and returns the sentence to show at the end. After Cancel
    the next report raises Cancelled, so what work keeps must be whole at every report. It runs in a thread of its own:
    cells and other controls go on working meanwhile. One run at a time.
    """
    start = ipywidgets.Button(description=name, tooltip=tooltip, button_style="primary", layout={"width": "auto"})
    cancel = ipywidgets.Button(description="Cancel", disabled=True, tooltip="Stop; what was computed is kept")
    bar, line = ipywidgets.IntProgress(max=1, layout={"width": "200px"}), ipywidgets.HTML()
    asked_to_stop = threading.Event()

    def report(done: int, total: int, seconds_left: float) -> None:
        bar.max, bar.value = max(1, total), done
        minutes, seconds = divmod(round(seconds_left), 60)
        line.value = f"{done} of {total}, {minutes}:{seconds:02d} left"
        if asked_to_stop.is_set():
            raise Cancelled

    def run() -> None:
        try:
            text = work(report)
        except Cancelled:
            text = f"cancelled after {bar.value} of {bar.max}; what was computed is kept"
        except Exception as error:  # who pressed the button is the only one who can act on it
            text = f"{type(error).__name__}: {error}"
        line.value = html.escape(text)
        start.disabled, cancel.disabled = False, True

    def begin(_=None) -> None:
        start.disabled, cancel.disabled = True, False
        asked_to_stop.clear()
        bar.value, line.value = 0, "starting"
        threading.Thread(target=run, daemon=True, name=name).start()

    def stop(_=None) -> None:
        asked_to_stop.set()
        cancel.disabled, line.value = True, "cancelling after the present batch"

    start.on_click(begin)
    cancel.on_click(stop)
    return ipywidgets.HBox([start, cancel, bar, line])
