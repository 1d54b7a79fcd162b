"""Every phenomenon, lawful or not, with what is said of it and what its law leaves unexplained."""

from __future__ import annotations

import ipywidgets

from physnb.config import CAPTION_LEVELS, SIMULATED
from physnb.data import simulate, write_captions
from physnb.data.variants import kinds_for, make_impossible
from physnb.metrics.law import state_residual
from physnb.pictures import draw_film, encode_png
from physnb.widgets.browsing import browse

LAWFUL = "lawful"


def browse_phenomena(*, frames: int = 16, size: int = 64, seed: int = 0) -> ipywidgets.VBox:
    """A clip beside a variant of it that breaks the law, with true paths, a caption, and the residual of the law."""

    def show(scenario: str, split: str, number: int, kind: str, level: str) -> tuple[bytes, str]:
        true = simulate(scenario, split, [number], frames=frames, size=size, seed=seed)
        if kind != LAWFUL and kind not in kinds_for(scenario):
            kind = LAWFUL
        found = None if kind == LAWFUL else make_impossible(true, kind, seed=seed)
        reason = None if found is None else found.reasons[0]
        shown = true if found is None or reason else found.clip
        residual = state_residual(scenario, true.parameters, shown.state)
        films = dict(true=true, **({} if shown is true else {kind.replace("_", " "): shown}))
        paths = {name: clip.state.positions[0] for name, clip in films.items()}
        film = draw_film({name: clip.frames[0] for name, clip in films.items()}, paths, height=256)
        said = write_captions(true, level, seed)[0] or "(nothing)"
        law = f"unexplained by its law: {residual.nan_to_num(0).max():.1e} units/s"
        law += " until a disc is gone" if bool(residual.isnan().any()) else ""
        law += f"; {kind} not shown: {reason}" if reason else ""
        return encode_png(film), f"{said}. {law}"

    options = [LAWFUL, *dict.fromkeys(kind for scenario in SIMULATED for kind in kinds_for(scenario))]
    return browse(
        show,
        scenario=ipywidgets.Dropdown(options=SIMULATED, value="pendulum", description="scenario"),
        split=ipywidgets.Dropdown(options=("id", "ood"), description="split"),
        number=ipywidgets.IntSlider(0, 0, 31, description="clip", continuous_update=False),
        kind=ipywidgets.Dropdown(options=options, description="variant"),
        level=ipywidgets.Dropdown(options=CAPTION_LEVELS, value="law", description="captions"),
    )
