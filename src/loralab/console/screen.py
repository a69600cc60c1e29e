"""The screen: where lines go, and how tables and values look on it."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

PLAIN_WIDTH = 160


def console() -> Console:
    """Give the console on standard output; where there is no terminal, lines are wide."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def print_json(value: Any) -> None:
    """Print a value as JSON for other programs."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str | None = None) -> Table:
    """Make a table; numbers stand to the right."""
    made = Table(*[], title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
    rows = [list(row) for row in rows]
    for i, header in enumerate(headers):
        numeric = all(_is_numeric(row[i]) for row in rows)
        made.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*[shown(cell) for cell in row])
    return made


def _is_numeric(cell: Any) -> bool:
    return cell is None or (isinstance(cell, int | float) and not isinstance(cell, bool))


def shown(value: Any) -> str:
    """Write a value for a person: four significant digits, a dash for nothing."""
    if value is None or value != value:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def size(num_bytes: float) -> str:
    """Write a number of bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def escaped(cells: Iterable[Any]) -> list[Any]:
    """Keep names from being read as Rich's markup."""
    return [escape(cell) if isinstance(cell, str) else cell for cell in cells]
