"""Tables of results as text and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any


def number(value: Any) -> str:
    """A value as a table shows it: 4 significant digits, thousands separated."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def columns(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys of all rows, in the order in which they first occur."""
    return list(dict.fromkeys(key for row in rows for key in row))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown; cells may hold any text."""
    rule = ["---"] * len(head)
    lines = [[_cell(text) for text in cells] for cells in (head, rule, *rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(text: str) -> str:
    """Text on one line in which no `|` ends the cell.

    Each `|` gets a backslash, and the backslashes before it are doubled.
    """
    return re.sub(r"(\\*)\|", r"\1\1\\|", " ".join(text.splitlines()))


def text_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as aligned text: the first column to the left, the others to the right."""
    names = columns(rows)
    cells = [
        names,
        *([number(row.get(name, "")) for name in names] for row in rows),
    ]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    lines = []
    for line in cells:
        others = [cell.rjust(width) for cell, width in zip(line[1:], widths[1:])]
        lines.append("  ".join([line[0].ljust(widths[0]), *others]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
