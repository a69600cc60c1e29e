"""Commands about this machine."""

from typing import Any

from loralab.cli.options import AsJson
from loralab.console.screen import console, print_json, shown, table


def doctor(as_json: AsJson = False) -> None:
    """Report facts of this machine and its packages that decide what can run."""
    from loralab.base.device import facts
    from loralab.evals.sandbox import protection

    found = facts() | {"programs are run": str(protection())}
    if as_json:
        print_json(found)
    else:
        console().print(table(("fact", "value"), [(key, shown(value)) for key, value in _flat(found)]))


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, item in value.items():
        rows += _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else [(prefix + key, item)]
    return rows
