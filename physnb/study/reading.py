"""The study's tables in the forms that figures take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from physnb.config import HeadId, require
from physnb.ranking import head_table

Rows = Sequence[Mapping[str, Any]]


def nan_for_none(value: float | None) -> float:
    """A number of a table, NaN where it could not be judged."""
    return float("nan") if value is None else value


def head_maps(rows: Rows, objective: str) -> dict[str, Float[Tensor, "layer head"]]:
    """From the table `maps`: the effect of every head alone by one objective, a map for each form of breaking."""
    found: dict[str, dict[HeadId, float]] = {}
    for row in rows:
        if row["objective"] == objective:
            found.setdefault(row["form"], {})[HeadId.parse(row["head"])] = nan_for_none(row["mean"])
    require(len(found) > 0, f"the maps say nothing of {objective}")
    return {form: head_table(values, tuple(values)) for form, values in found.items()}


def agreement_matrices(rows: Rows, among: Sequence[str] = ()) -> tuple[list[str], Tensor, Tensor, Tensor]:
    """From the tables `kinds` and `objectives`: names, and rank correlations with both ends, all symmetric.

    among: the names to show, in order (default: all that have a pair). A pair that is not there is NaN.
    """
    pairs = {(row["first"], row["second"]): row["agreement"] for row in rows}
    names = list(among) or list(dict.fromkeys(name for pair in pairs for name in pair))
    tables = torch.full((3, len(names), len(names)), torch.nan)
    for (first, second), agreement in pairs.items():
        if first in names and second in names:
            i, j = names.index(first), names.index(second)
            for table, end in zip(tables, ("mean", "low", "high"), strict=True):
                table[i, j] = table[j, i] = nan_for_none(agreement[end])
    return names, *tables


def surfaces(rows: Rows, found_by: str, grid: str) -> dict[str, dict[tuple[float, float], Mapping[str, Any]]]:
    """From the table `surface`: effects by metric and point, of the heads that one objective found.

    grid: "strength", points (w, u); or "interval", points (start, stop).
    """
    own = [row for row in rows if row["found_by"] == found_by and row["grid"] == grid]
    require(len(own) > 0, f"the surface has no {grid} grid of heads found by {found_by}")
    metrics = [name for name, value in own[0].items() if isinstance(value, Mapping)]
    return {name: {(row["x"], row["y"]): row[name] for row in own} for name in metrics}
