"""What lies inside deltas, and what their repairs cost, for a person."""

from typing import Any

from rich.table import Table

from loralab.console.screen import escaped, table

MODULES = ("matrices", "rank90", "rank90_share", "effective_rank", "relative_norm", "intruders", "intruder_energy")
HEADS = ("matrices", "rank 90 %", "of its rank", "effective rank", "‖ΔW‖/‖W₀‖", "intruders", "their share of s²")


def spectra_tables(found: Any) -> list[Table]:
    """Make a table of `Spectra`: a row per delta and kind of module, and one of all."""
    rows = []
    summary = found.summary()
    for name, told in summary["deltas"].items():
        for module, mine in (*told["modules"].items(), ("all", told)):
            rows.append(escaped((name, module, *(mine[key] for key in MODULES))))
    return [table(("delta", "module", *HEADS), rows)]


def spectra_lines(found: Any) -> list[str]:
    """Write what stands below: what was counted, and how; what could not be measured."""
    summary = found.summary()
    k, epsilon, cost = summary["k"], summary["epsilon"], summary["facts"].get("cost", {})
    lines = []
    for name, told in summary["deltas"].items():
        lines.append(
            f"{name}: {told['intruders']} intruders in {told['matrices_with_intruders']} of {told['matrices']} matrices "
            f"(k = {k}, ε = {epsilon:g}): a measure among low-rank runs, not a meter of forgetting"
        )
    rows = found.matrices
    for _, row in rows[rows["problem"] != ""].iterrows():
        lines.append(f"not measured: {row['layer']} of {row['delta']}: {row['problem']}")
    for note, count in rows.loc[rows["note"] != "", "note"].value_counts().head(8).items():
        lines.append(f"note on {count} matrices: {note}" if count > 1 else f"note on one matrix: {note}")
    lines += [f"note: {note}" for note in summary["facts"].get("notes", ())]
    if cost.get("seconds") is not None:
        routes = ", ".join(f"{count} {route}" for route, count in (cost.get("routes") or {}).items())
        lines.append(f"{cost['seconds']:.1f} s; vectors by route: {routes or 'none'}")
    return lines


def sweep_tables(found: Any) -> list[Table]:
    """Make the tables of a `Sweep`: every edit in the plane, and each against the curve of uniform scaling."""
    placed = [
        escaped(
            (
                *(row["edit"], row["learning"], _span(row, "learning"), row["forgetting"], _span(row, "forgetting")),
                *(row["norm_share"], row["rank_extra"]),
            )
        )
        for _, row in found.points.iterrows()
    ]
    heads = ("edit", "learning", "95 % interval", "forgetting", "95 % interval", "norm", "extra rank")
    made = [table(heads, placed, title="every edit")]
    if found.verdicts:
        keys = ("edit", "learning", "forgetting", "scale_forgetting", "difference")
        rows = [escaped((*(one[key] for key in keys), _span(one, ""), one["verdict"])) for one in found.verdicts]
        heads = ("edit", "learning", "forgetting", "scaled, as much learned", "difference", "95 % interval", "verdict")
        made.append(table(heads, rows, title="against uniform scaling at equal learning"))
    return made


def _span(row: Any, name: str) -> str:
    low, high = (row[f"{name}_{end}" if name else end] for end in ("low", "high"))
    return "–" if low is None or low != low else f"{low:+.4g} to {high:+.4g}"
