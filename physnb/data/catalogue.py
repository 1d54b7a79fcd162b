"""Sources by name, as the command line and configurations write them.

uniform, parabola, collision        phyworld's worlds
pendulum, spring, bounce, ...       phenomena, see physnb.data.phenomena
smoke, flame                        fluids, simulated once and cached
templates                           bodies that meet; 60 of 70 templates in training, the others out of distribution
phyworld:FILE.hdf5                  a file in phyworld's layout
videos:FOLDER                       real videos: Kinetics-400, class folders or a flat folder; decoded once
"""

from __future__ import annotations

from collections.abc import Iterable

from physnb.config import FLUIDS, SIMULATED, require
from physnb.data.captions import CAPTIONS, vocabulary_of, words_of
from physnb.data.simulators import SimulatedSource
from physnb.data.sources import Source

NAMES = (*SIMULATED, *FLUIDS, "templates", "phyworld:FILE", "videos:FOLDER")


def open_source(
    name: str,
    *,
    frames: int,
    size: int,
    split: str = "train",
    seed: int = 0,
    count: int | None = None,
    cache: str | None = None,
) -> Source:
    """The source called `name`, giving clips of `frames` frames of `size` x `size` pixels; videos are decoded now.

    count: how many clips a simulated source has; None: of scenarios as many as one likes, of fluids their default.
    cache: folder of what fluids and videos compute once, if not their own.
    Raises ValueError for an unknown name, and what the source says of its file or folder.
    """
    kind, _, where = name.partition(":")
    shape, drawn = dict(frames=frames, size=size), dict(split=split, seed=seed)
    # Engines and readers of files bring large libraries: each is imported where it is asked for.
    if kind == "phyworld" and where:
        from physnb.data.phyworld import PhyworldSource

        return PhyworldSource(where, **shape)
    if kind == "videos" and where:
        from physnb.data.videos import VideoSource

        folder, _, option = where.partition("?")
        option, _, number = option.partition("=")
        require(
            not option or (option == "clips_per_video" and number.isdigit()),
            f"source {name!r} must end in its folder or in ?clips_per_video= and a whole number",
        )
        many = {option: int(number)} if option else {}
        source = VideoSource(folder, **shape, **drawn, **many, cache=cache)
        source.prepare()
        return source
    require(not where and kind in NAMES, f"unknown source {name!r}; choose one of {', '.join(NAMES)}")
    if kind in FLUIDS:
        from physnb.data.fluids import FluidSource

        return FluidSource(kind, **shape, **drawn, cache=cache, **({} if count is None else dict(count=count)))
    if kind == "templates":
        from physnb.data.templates import TemplateSource

        return TemplateSource(**shape, **drawn)
    return SimulatedSource(kind, **shape, **drawn, count=count)


def words_of_sources(sources: Iterable[Source], level: str) -> tuple[str, ...]:
    """Every word that captions of these sources can have at a level, sorted."""
    captions = {caption for source in sources for caption in source.captions}
    known = tuple(name for name, caption in CAPTIONS.items() if caption in captions)
    others = captions.difference(CAPTIONS.values()) if level != "none" else ()
    return tuple(sorted({*vocabulary_of(known, level), *(word for caption in others for word in words_of(caption))}))
