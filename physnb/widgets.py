"""Controls around plots: they choose among results that are already there and never call a model."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Mapping

import ipywidgets
from jaxtyping import Float
from matplotlib.figure import Figure
from torch import Tensor

from physnb.plots import plot_attention, plot_surface


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
            buffer = io.BytesIO()
            figure.savefig(buffer, format="png", dpi=100)
            picture.value = buffer.getvalue()
        sentence.value = html.escape(text)

    for control in controls.values():
        control.style.description_width = "initial"
        control.layout.width = "480px"
        control.observe(update, names="value")
    update()
    return ipywidgets.VBox([*controls.values(), sentence, picture])


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
