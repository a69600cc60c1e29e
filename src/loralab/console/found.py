"""What commands found, for a person: a check, a merge, an evaluation."""

from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table

from loralab.console.screen import escaped, size, table

MERGE_MEANINGS = {
    "float32_error": "of the sum before rounding, as a share of the delta's norm (mean over layers)",
    "rounded_error": "share of the delta's norm that rounding to the dtype lost",
    "one_rounding_error": "what a single rounding of the exact sum must lose: no merge can lose less",
    "unchanged_share": "share of the weights' numbers that the delta was too small to move",
    "kl_nats": "mean KL(unmerged‖merged) per position of the probe text",
    "max_logit_difference": "largest change of a logit on the probe text",
}
"""What each line of a merge's report says."""

MEMORY = {
    "weights": "weights",
    "trained": "trained",
    "reference": "copies of the weights that move",
    "rewards": "reward models",
}
"""What a step holds throughout, in words."""

FEW_K = (1, 2, 5, 10, 20, 50, 100, 200)
"""The k whose pass@k the terminal shows; the folder holds all."""


def data_warnings(report: Mapping[str, Any]) -> list[str]:
    """Write what is wrong with data that can be used all the same, by a data report: held-out examples that are trained on."""
    total = (report.get("validation") or {}).get("total") or {}
    if not (count := total.get("in_training")):
        return []
    are = "is" if count == 1 else "are"
    return [
        f"{count:,} of the {total['examples']:,} validation examples {are} trained on too: their scores say too much"
    ]


def check_lines(found: Any, *, coloured: bool) -> list[str]:
    """Write what `check` found, in Rich's markup."""
    attachment, memory = found.attachment, found.memory
    names = ", ".join(attachment.layers[:3]) + (" …" if len(attachment.layers) > 3 else "")
    written = [
        "",
        f"[bold]run[/bold] {found.spec.folder_name}: {found.total_steps} steps",
        f"[bold]targets[/bold] {len(attachment.layers)} ({names}), {attachment.trained_parameters:,} of "
        f"{attachment.all_parameters:,} numbers train ({attachment.share:.2%})",
    ]
    for name, counts in found.counts.items():
        total = counts["total"]
        derived = name == "validation" and found.spec.data.validation is None  # counted with the training rows
        kinds = () if derived else ("empty", "equal", "dropped", "truncated", "split")
        lost = ", ".join(f"{total[key]} {key}" for key in kinds if total.get(key))
        if not derived and total["dropped"] > 0.1 * total["rows"]:
            lost += f" [bold red](more than a tenth exceeds data.max_length={found.spec.data.max_length})[/bold red]"
        written.append(
            f"[bold]{name}[/bold] {total['examples']:,} examples of {total['rows']:,} rows, {total['tokens']:,} tokens, "
            f"{total['labelled']:,} with a loss" + (f"; {lost}" if lost else "")
        )
    written += [f"[bold red]warning[/bold red] {line}" for line in data_warnings(found.counts)]
    stop = ", ".join(f"{token} ×{count}" for token, count in found.stop.stops.items()) or "none"
    if found.stop.runs:
        verdict = (
            "every completion ends with a labelled stop token"
            if found.stop.holds
            else (
                "[bold red]not every completion ends with a labelled stop token: the model may not learn to stop[/bold red]"
            )
        )
        written.append(f"[bold]stop[/bold] {verdict} (of {found.stop.runs} looked at: {stop})")
    written.append(_memory_line(memory, found.measured_bytes))
    for runs in found.examples:
        where = "in green" if coloured else "between « and »"
        written += ["", f"[bold]example[/bold] (a loss is taken on what stands {where})", _marked(runs, coloured)]
    return written


def _memory_line(memory: Any, measured: int | None) -> str:
    """Write what memory will be needed for; updating and writing answers take turns."""
    parts = memory.parts()
    lasting = [f"{MEMORY[name]} {size(parts[name])}" for name in MEMORY if name in parts]
    passing = f"activations {size(memory.activations)}, logits {size(memory.logits)}"
    if memory.answers:
        passing = f"and the larger of an update ({passing}) and answers as they are written ({size(memory.answers)})"
    line = f"[bold]memory[/bold] about {size(memory.total)}: {', '.join([*lasting, passing])}"
    return line + (f"; measured peak of the process over two steps {size(measured)}" if measured else "")


def _marked(runs: list[tuple[str, bool]], coloured: bool) -> str:
    before, after = ("[green]", "[/green]") if coloured else ("«", "»")
    return "".join(f"{before}{escape(text)}{after}" if labelled else escape(text) for text, labelled in runs)


def evaluation_tables(found: Any) -> list[Table]:
    """Make the tables of an `Evaluation`: scores and changes, then pass@k and diversity where outputs were sampled."""
    made = []
    if rows := found.rows():
        made.append(table(list(rows[0]), [escaped(row.values()) for row in rows]))
    if found.curves:
        made.append(_pass_at_k(found))
    if found.diversity:
        order = list(found.models)
        lines = sorted(found.diversity, key=lambda row: (row["task"], row["kind"], order.index(row["model"])))
        heads = ("task", "outputs", "model", "of samples", "distinct", "standard error")
        keys = ("task", "kind", "model", "samples", "distinct", "standard_error")
        made.append(table(heads, [escaped(row.get(key) for key in keys) for row in lines]))
    return made


def evaluation_lines(found: Any) -> list[str]:
    """Write what stands below the tables of an `Evaluation`: how changes are judged, what was not heeded, what it cost."""
    unheeded = found.facts.get("unheeded") or {}
    warnings = [
        f"warning: {option} said nothing to {', '.join(tasks)}: these are asked as they stand"
        for option, tasks in unheeded.items()
    ]
    return [line for line in (found.how_judged(), *warnings, *found.notes()) if line]


def _pass_at_k(found: Any) -> Table:
    """A row per task and model, a column per k that all have."""
    cells: dict[tuple[str, str], dict[int, float]] = {}
    for row in found.curves:
        cells.setdefault((row["task"], row["model"]), {})[row["k"]] = row["pass_at_k"]
    ks = [k for k in FEW_K if all(k in shares for shares in cells.values())]
    order = sorted(cells, key=lambda key: (key[0], list(found.models).index(key[1])))
    rows = [escaped((task, model, *(cells[task, model][k] for k in ks))) for task, model in order]
    return table(("task", "model", *(f"pass@{k}" for k in ks)), rows)
