"""The page of a repair: one edit of a delta, or a sweep of edits between learning and forgetting."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from loralab.lab.measured import finite
from loralab.lab.repaired import Repaired, Sweep
from loralab.report import provenance
from loralab.report.drawing import marker_path
from loralab.report.inside_tables import Grid
from loralab.report.provenance import plain
from loralab.report.read import printable
from loralab.report.rendering import inlined, rendered
from loralab.report.repair_figures import Curve, curves_of, figures, label
from loralab.report.tables import EMPTY, Cell
from loralab.report.wording import duration, number, share, whole


def render(found: Repaired | Sweep, name: str) -> str:
    """Give the page as text; `name` is what the person calls the folder."""
    curves = curves_of(found.points) if isinstance(found, Sweep) else []
    owners = {curve.name: _owner(curve) for curve in curves}
    grids = _of_sweep(found, curves) if isinstance(found, Sweep) else [("Matrix by matrix", _matrices(found.matrices))]
    first = {"Matrix by matrix": "matrix"}
    return rendered(
        "repaired.html.j2",
        name=name,
        kind="repair",
        chips=[(curve.name, curve.label, curve.colour) for curve in curves],
        chips_of="families of edits",
        said=[printable(line) for line in found.said()],
        figures=inlined(figures(found)) if isinstance(found, Sweep) else [],
        grids=[(title, first.get(title, "edit"), grid) for title, grid in grids],
        owners=owners | {"": {"folder": "", "method": "", "label": "", "icon": "", "colour": "none", "state": ""}},
        notes=[printable(str(note)) for note in _list(found.facts.get("notes"))],
        facts=_facts(found),
    )


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _owner(curve: Curve) -> dict[str, Any]:
    looks = {"icon": marker_path(curve.marker), "colour": curve.colour, "state": ""}
    return {"folder": curve.name, "method": curve.name, "label": curve.label, **looks}


# Tables


def _of_sweep(found: Sweep, curves: Sequence[Curve]) -> list[tuple[str, Grid]]:
    owners = {str(edit): curve.name for curve in reversed(curves) for edit in curve.rows["edit"]}
    grids = [
        ("Beside uniform scaling", _verdicts(found.verdicts, owners)),
        ("Beside the controls", _controls(found.controls, owners)),
        ("Every edit", _points(found, owners)),
    ]
    return [(title, grid) for title, grid in grids if grid.rows]


def _number(value: Any, *, signed: bool = False, decimals: int = 3) -> Cell:
    known = finite(value)
    return EMPTY if known is None else Cell(number(known, decimals, signed=signed), known)


def _interval(row: Mapping[str, Any], low: str, high: str) -> Cell:
    ends = [finite(row.get(key)) for key in (low, high)]
    if ends[0] is None or ends[1] is None:
        return EMPTY
    return Cell(f"{number(ends[0], signed=True)} to {number(ends[1], signed=True)}", ends[1] - ends[0])


VERDICTS = (
    (
        "verdict",
        "better or worse: the interval of the difference does not hold 0; beyond the curve: it learns more than any scale",
    ),
    ("learned", "the edit's learning"),
    ("forgotten", "the edit's forgetting"),
    ("scale", "the uniform scale with the least forgetting that learns as much"),
    ("forgets", "what is forgotten there"),
    ("difference", "the edit's forgetting minus that of the scale; below 0 the edit is better"),
    ("95 % interval", "of the difference; the intervals of one claim hold together"),
)
_WORDS = {"better": -1.0, "tie": 0.0, "worse": 1.0, "beyond the curve": -2.0}


def _verdicts(verdicts: Sequence[Mapping[str, Any]], owners: Mapping[str, str]) -> Grid:
    rows = []
    for row in verdicts:
        word = str(row.get("verdict") or "")
        cells = [
            Cell(word, _WORDS.get(word)),
            *(_number(row.get(key), signed=True) for key in ("learning", "forgetting")),
        ]
        cells += [_number(row.get("scale_strength"), decimals=2), _number(row.get("scale_forgetting"), signed=True)]
        cells += [_number(row.get("difference"), signed=True), _interval(row, "low", "high")]
        rows.append((owners.get(str(row["edit"]), ""), printable(str(row["edit"])), cells))
    return Grid(list(VERDICTS), rows)


CONTROLLED = (
    ("learns", "the edit's learning minus the control's"),
    ("95 % interval", "of that"),
    ("forgets", "the edit's forgetting minus the control's; below 0 the edit is better"),
    ("of it, 95 %", "the interval of that"),
)


def _controls(controls: Sequence[Mapping[str, Any]], owners: Mapping[str, str]) -> Grid:
    rows = []
    for row in controls:
        cells = []
        for side in ("learning", "forgetting"):
            cells.append(_number(row.get(f"{side}_difference"), signed=True))
            cells.append(_interval(row, f"{side}_low", f"{side}_high"))
        said = printable(f"{row['edit']} beside {row.get('control')}")
        rows.append((owners.get(str(row["edit"]), ""), said, cells))
    return Grid(list(CONTROLLED), rows)


POINTS = (
    ("learned", "paired with the base"),
    ("95 % interval", "of what is learned"),
    ("forgotten", "paired with the base"),
    ("of it, 95 %", "the interval of what is forgotten"),
    ("size", "the norm of the edited change, as a share of the unedited one's"),
    ("more rank", "ranks that the edited pairs have beyond the unedited ones, all matrices together"),
    ("scaled", "singular triplets that the edit scaled"),
)
_LOST = ("discarded", "norm that compression lost, as a share of the edited change's")


def _points(found: Sweep, owners: Mapping[str, str]) -> Grid:
    table = found.points
    lost = "discarded" in table and bool((pd.to_numeric(table["discarded"], errors="coerce") > 0).any())
    best = plain(found.best).get("edit")
    rows = []
    for row in table.to_dict("records"):
        cells = []
        for side in ("learning", "forgetting"):
            cells += [_number(row[side], signed=True), _interval(row, f"{side}_low", f"{side}_high")]
        norm, extra, touched = (finite(row[key]) for key in ("norm_share", "rank_extra", "intruders"))
        cells += [Cell(share(norm), norm), Cell(whole(extra), extra), Cell(whole(touched), touched)]
        if lost:
            cells.append(Cell(share(finite(row["discarded"])), finite(row["discarded"])))
        said = str(row["edit"]) + (" ★ chosen" if row["edit"] == best else "")
        same = row.get("same_as")
        said += f" (equals {same})" if isinstance(same, str) and same else ""
        rows.append((owners.get(str(row["edit"]), ""), printable(said), cells))
    return Grid([*POINTS, *([_LOST] if lost else [])], rows)


MATRICES = (
    ("intruders", "intruders", "among the leading left vectors of the tuned weight"),
    ("touched", "scaled", "singular triplets that the edit scaled"),
    ("rank_before", "rank before", "of the change"),
    ("rank", "rank", "of the edited change"),
    ("norm_before", "norm before", "‖ΔW‖_F"),
    ("norm", "norm", "‖ΔW‖_F of the edited change"),
    ("discarded_norm", "discarded norm", "what compression lost"),
    ("discarded", "of the change", "the same as a share"),
)


def _matrices(table: pd.DataFrame) -> Grid:
    kept = [
        part for part in MATRICES if part[0] in table and pd.to_numeric(table[part[0]], errors="coerce").notna().any()
    ]
    rows = []
    for row in table.to_dict("records"):
        cells = []
        for column, _, _ in kept:
            value = finite(row[column])
            text = share(value) if column == "discarded" else f"{value:.4g}" if value is not None else ""
            cells.append(EMPTY if value is None else Cell(text, value))
        rows.append(("", printable(str(row["layer"])), cells))
    return Grid([(head, meaning) for _, head, meaning in kept], rows)


# Where it comes from


def _facts(found: Repaired | Sweep) -> list[tuple[str, str, bool]]:
    """Give what stands at the end of the page: a word, its value, whether the value is written as code."""
    facts = found.facts
    where = provenance.of_environment(plain(facts.get("environment")))
    cost = {key: finite(value) for key, value in plain(facts.get("cost")).items()}
    epsilon = finite(facts.get("epsilon"))
    rows = [("Base", str(facts.get("base") or ""), True), ("Delta", str(facts.get("delta") or ""), True)]
    rows += [("Edit", str(facts.get("edit") or ""), True), ("Kind", str(facts.get("kind") or ""), False)]
    rows += [("k", str(facts.get("k") or ""), False), ("ε", "" if epsilon is None else f"{epsilon:g}", False)]
    rows += [("To be learned", _side(facts, "target"), False), ("To be kept", _side(facts, "source"), False)]
    for key, word, write in (
        ("seconds", "Time", duration),
        ("forwards", "Forward passes", whole),
        ("tokens", "Tokens read", whole),
    ):
        rows.append((word, write(cost[key]) if cost.get(key) is not None else "", False))
    rows += [("Command", where["command"], True), ("Date", where["date"], False), ("Machine", where["hardware"], False)]
    rows += [("Versions", where["versions"], False), ("Commit", where["commit"], True)]
    return [(word, printable(value), code) for word, value, code in rows if value]


def _side(facts: Mapping[str, Any], side: str) -> str:
    """Name what was measured: its parts with their items and the base's score."""
    said = []
    for part in _list(plain(facts.get(side)).get("parts")):
        base, n = finite(plain(part).get("base")), finite(plain(part).get("n"))
        said.append(f"{plain(part).get('name')} (n = {whole(n)}, base {number(base)})")
    unit = label(side, {side: {"unit": plain(facts.get(side)).get("unit")}})
    return "; ".join(said) + (f"; {unit}" if said and unit else "")
