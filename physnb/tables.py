"""Result rows as cells of text: for the report and for the terminal."""

from __future__ import annotations

from typing import Any


def format_cell(value: Any) -> str:
    """Numbers to three digits, estimates as mean [low, high], nothing as a dash."""
    if isinstance(value, dict) and "mean" in value:
        if value["mean"] is None:
            return "–"
        return f"{value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
    if value is None:
        return "–"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def flatten_row(row: dict[str, Any]) -> dict[str, str]:
    """Cells by column, each estimate's paired difference to unguided in a column of its own."""
    flat = {}
    for name, value in row.items():
        name = name.replace("_", " ")
        flat[name] = format_cell(value)
        if isinstance(value, dict) and "difference" in value:
            flat[f"Δ {name}"] = format_cell(value["difference"])
    return flat


def text_table(rows: list[dict[str, Any]]) -> str:
    """Rows as aligned lines under a header; nothing for no rows."""
    flat = [flatten_row(row) for row in rows]
    if not flat:
        return ""
    lines = [list(flat[0]), *([row.get(name, "–") for name in flat[0]] for row in flat)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
