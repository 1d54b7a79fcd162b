"""Controls over a picture and a sentence that follow them."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import ipywidgets
from matplotlib.figure import Figure

from physnb.plots import figure_png


def picture(value: Figure | bytes) -> bytes:
    """PNG bytes of a figure; bytes stay as they are."""
    return value if isinstance(value, bytes) else figure_png(value)


def labelled(control: ipywidgets.Widget, width: str = "380px") -> ipywidgets.Widget:
    """The control with its whole label shown."""
    control.style.description_width = "initial"
    control.layout.width = width
    return control


class View:
    """Pictures under a sentence, kept up with controls; an error appears in place of the sentence.

    draw() returns the sentence and the pictures in their order. A picture that did not change is not sent again.
    """

    def __init__(self, draw: Callable[[], tuple[str, Sequence[Figure | bytes]]], pictures: int = 1):
        self.draw, self.paused = draw, False
        self.sentence = ipywidgets.HTML()
        self.sentence.add_class("physnb-sentence")
        layout = {"max_width": "100%", "align_self": "flex-start"}  # as large as drawn, where there is room
        self.pictures = [ipywidgets.Image(format="png", layout=layout) for _ in range(pictures)]

    def update(self, _=None) -> None:
        if self.paused:
            return
        try:
            text, drawn = self.draw()
            for image, value in zip(self.pictures, map(picture, drawn), strict=True):
                if image.value != value:
                    image.value = value
        except Exception as error:  # the reader of the cell is the only one who can act on it
            text = f"{type(error).__name__}: {error}"
        self.sentence.value = html.escape(text)

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Controls may be changed together; the view follows once, at the end."""
        self.paused = True
        try:
            yield
        finally:
            self.paused = False
            self.update()

    def follow(self, controls: Iterable[ipywidgets.Widget]) -> None:
        """Update whenever a control's value changes."""
        for control in controls:
            control.observe(self.update, names="value")


def browse(draw: Callable[..., tuple[Figure | bytes, str]], **controls: ipywidgets.Widget) -> ipywidgets.VBox:
    """Controls over the picture and the sentence that `draw(**values)` returns; the first view is there at once."""

    def drawn() -> tuple[str, list]:
        figure, text = draw(**{name: control.value for name, control in controls.items()})
        return text, [figure]

    view = View(drawn)
    view.follow(labelled(control, "480px") for control in controls.values())
    view.update()
    box = ipywidgets.VBox([*controls.values(), view.sentence, *view.pictures])
    box.add_class("physnb-browser")
    return box
