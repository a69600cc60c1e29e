"""What a repair or a sweep of repairs found, in sentences; a gain is named only where it was measured. No torch here."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from loralab.lab.bar import BETTER, BEYOND, TIE, WORSE
from loralab.lab.measured import finite
from loralab.lab.tradeoff import CONTROLS, SCALE

FEW = 30
"""Items or documents below which an interval is a rough guess."""


def number(value: Any) -> str:
    """Write a number for people, `–` where there is none."""
    known = finite(value)
    return "–" if known is None else f"{known + 0.0:.3g}"


def signed(value: Any) -> str:
    """Write a difference for people, with its sign."""
    known = finite(value)
    return "–" if known is None else f"{known + 0.0:+.3g}"


def between(low: Any, high: Any) -> str:
    """Write a 95 % interval, "" where there is none."""
    return "" if finite(low) is None or finite(high) is None else f" [{signed(low)}, {signed(high)}]"


def setting(facts: Mapping[str, Any]) -> str:
    """Name what every count of intruders depends on."""
    return f"k = {facts.get('k')} and ε = {number(facts.get('epsilon'))}"


def has_no_intruder(facts: Mapping[str, Any]) -> bool:
    """Tell whether intruders were looked for and none was found."""
    found = facts.get("intruders")
    return isinstance(found, Mapping) and found.get("count") == 0


def intruder_line(facts: Mapping[str, Any]) -> str:
    """Count the intruders; "" where none were looked for."""
    found = facts.get("intruders")
    if not isinstance(found, Mapping):
        return ""
    if not found.get("count"):
        return f"The delta has no intruder in any of its {found.get('of')} matrices, at {setting(facts)}."
    word = "intruder" if found["count"] == 1 else "intruders"
    return f"{found['count']} {word} in {found.get('matrices')} of {found.get('of')} matrices, at {setting(facts)}."


def unedited_lines(points: pd.DataFrame, facts: Mapping[str, Any]) -> list[str]:
    """Say what the delta does as it was trained, and whether there is anything to mend."""
    rows = points[(points["family"] == SCALE) & (points["strength"] == 1)].to_dict("records")
    if not rows:
        return []
    (row,) = rows
    of_target, of_source = (f" ({unit})" if (unit := _unit(facts, side)) else "" for side in ("target", "source"))
    learned = f"{signed(row['learning'])}{between(row['learning_low'], row['learning_high'])}{of_target}"
    lost = f"{signed(row['forgetting'])}{between(row['forgetting_low'], row['forgetting_high'])}{of_source}"
    lines = [f"Unedited: learning {learned}, forgetting {lost}; 95 % over items, paired with the base."]
    low = finite(row["forgetting_low"])
    if low is not None and low <= 0:
        lines.append(
            "Unedited, it forgets nothing that stands out from the choice of items, so there is little to mend."
        )
    return lines


def _unit(facts: Mapping[str, Any], side: str) -> str:
    found = facts.get(side)
    return str(found.get("unit", "")) if isinstance(found, Mapping) else ""


def headline(repairs: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """Say whether shrinking intruders beats uniform scaling.

    Args:
        repairs: verdicts on edits that shrink intruders.
        facts: of the sweep.
    """
    if not repairs and has_no_intruder(facts):
        return "So no intruder repair changes it: uniform scaling, and scaling by depth, are what can mend it."
    if not repairs:
        return "No intruder repair was measured, so it was not compared with uniform scaling."
    counts = Counter(one["verdict"] for one in repairs)
    others = {TIE: "tie", WORSE: "forget more", BEYOND: "learn more than any scale"}
    rest = [f"{counts[word]} {said}" for word, said in others.items() if counts[word]]
    better = sorted((one for one in repairs if one["verdict"] == BETTER), key=lambda one: one["difference"])
    if better:
        one = better[0]
        gain = f"{one['edit']} by {number(-one['difference'])}{_turned(one)}, {against(one)}"
        share = f"{len(better)} of {len(repairs)}" + (f"; {', '.join(rest)}" if rest else "")
        return (
            f"Intruder repair forgets less than uniform scaling at equal learning: {gain} ({share}){_level(repairs)}."
        )
    if all(finite(one["low"]) is None for one in repairs):
        return "Too few items on one side: no intruder repair could be compared with uniform scaling."
    if counts[BEYOND] == len(repairs):
        return "Every intruder repair learns more than any scale, and none forgets less: none was compared at equal learning."
    nearest = min(repairs, key=lambda one: one["difference"])
    said = f"of {len(repairs)}, {' and '.join(rest)}" if len(repairs) > 1 else rest[0]
    difference = f"{nearest['edit']}, {signed(nearest['difference'])}{between(nearest['low'], nearest['high'])}"
    return (
        f"No intruder repair forgets less than uniform scaling at equal learning: {said}. Least difference in forgetting: "
        f"{difference}, {against(nearest)}{_level(repairs)}."
    )


def against(one: Mapping[str, Any]) -> str:
    """Name the scale that an edit is compared with."""
    return f"against scale {number(one.get('scale_strength'))}"


def _level(repairs: Sequence[Mapping[str, Any]]) -> str:
    """Say what an interval among several holds."""
    return f"; 95 % for all {len(repairs)} together" if len(repairs) > 1 else ""


def _turned(one: Mapping[str, Any]) -> str:
    """Write the interval of how much less is forgotten."""
    low, high = finite(one["low"]), finite(one["high"])
    return "" if low is None or high is None else f" [{number(-high)}, {number(-low)}]"


def control_lines(controls: Sequence[Mapping[str, Any]]) -> list[str]:
    """Say of each kind of control in how many comparisons the edit forgets less, or learns less, beyond the interval."""
    lines = []
    for family, what in CONTROLS.items():
        rows = [row for row in controls if row["family"] == family]
        if not rows:
            continue
        parts = []
        for key, less, more in (("forgetting", "forget less", "forget more"), ("learning", "learn less", "learn more")):
            below = sum((finite(row[f"{key}_high"]) or 0) < 0 for row in rows)
            above = sum((finite(row[f"{key}_low"]) or 0) > 0 for row in rows)
            parts.append(f"{below} {less}, {above} {more}")
        lines.append(f"Against {what} ({family}), of {len(rows)}: {'; '.join(parts)}; the others tie.")
    return lines


def budget_line(choice: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """Name the best edit within the budget, or say that there is none."""
    limit = f"{choice.get('budget')}"
    if "%" in limit:
        limit += f" ({number(choice.get('limit'))})"
    unit = _unit(facts, "source")
    limit = f"{limit} {unit}".strip() if "%" not in limit else limit
    best = choice.get("best")
    if not best:
        return f"No edit that learns anything forgets no more than {limit}: nothing is chosen."
    sure = "" if best.get("surely") else "; the upper end of its interval is not within"
    lost = f"{signed(best['forgetting'])}{between(best.get('forgetting_low'), best.get('forgetting_high'))}"
    return f"Best within a budget of {limit}: {best['edit']}, learning {signed(best['learning'])}, forgetting {lost}{sure}."


def few_line(facts: Mapping[str, Any]) -> str:
    """Warn of few items; "" where there are enough."""
    sizes = {}
    for side in ("target", "source"):
        found = facts.get(side)
        parts = found.get("parts", []) if isinstance(found, Mapping) else []
        sizes[side] = sum(int(part.get("clusters") or part.get("n") or 0) for part in parts)
    few = [f"{size} of the {side}" for side, size in sizes.items() if 0 < size < FEW]
    return f"Few items, {' and '.join(few)}: the intervals are rough." if few else ""
