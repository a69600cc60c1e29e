"""What a person sees: live progress, plain lines where there is no terminal, and tables."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from loralab.errors import FolderError
from loralab.run.folder import RunFolder, read_lines

PLAIN_LINES = 20
"""About how many progress lines a run prints where there is no terminal."""

PLAIN_WIDTH = 160
UNDER_WAY = ("waiting", "new", "running")
BROKEN_OFF = ("interrupted", "diverged")
"""A run found like this at the first look ended in an earlier call, and goes on in this one."""
MERGE_MEANINGS = {
    "float32_error": "of the sum before rounding, as a share of the delta's norm (mean over layers)",
    "rounded_error": "share of the delta's norm that rounding to the dtype lost",
    "one_rounding_error": "what a single rounding of the exact sum must lose: no merge can lose less",
    "unchanged_share": "share of the weights' numbers that the delta was too small to move",
    "kl_nats": "mean KL(unmerged‖merged) per position of the probe text",
    "max_logit_difference": "largest change of a logit on the probe text",
}
"""What each line of a merge's report says."""


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


class LiveDisplay:
    """One block that stays in place: progress, loss, last scores, learning rate, memory, time left."""

    def __init__(self, out: Console | None = None) -> None:
        self.out = out or console()
        self._line: dict[str, Any] = {}
        self._scores: dict[str, float] = {}
        self._live: Live | None = None

    def begin(self, facts: dict[str, Any]) -> None:
        self.out.print(_facts_line(facts))
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.out,
        )
        self._task = self._progress.add_task("train", total=facts["total_steps"], completed=facts["step"])
        self._live = Live(self._block(), console=self.out, refresh_per_second=4)
        self._live.start()

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        self._line = line
        self._progress.update(self._task, completed=line["step"], total=total_steps)
        if self._live:
            self._live.update(self._block())

    def scores(self, step: int, scores: Sequence[Any]) -> None:
        self._scores = {score.name: score.value for score in scores}
        if self._live:
            self._live.update(self._block())

    def note(self, message: str) -> None:
        self.out.print(message)

    def end(self) -> None:
        if self._live:
            self._live.stop()

    def _block(self) -> Group:
        return Group(self._progress, Text(_step_text(self._line)), Text(_scores_text(self._scores)))


class PlainDisplay:
    """One line every so often: for logs and pipes."""

    def __init__(self, out: Console | None = None) -> None:
        self.out = out or console()

    def begin(self, facts: dict[str, Any]) -> None:
        self.out.print(_facts_line(facts))
        self._every = max(1, facts["total_steps"] // PLAIN_LINES)

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        if line["step"] % self._every == 0 or line["step"] == total_steps:
            self.out.print(f"step {line['step']}/{total_steps}  {_step_text(line)}")

    def scores(self, step: int, scores: Sequence[Any]) -> None:
        self.out.print(f"step {step}  {_scores_text({score.name: score.value for score in scores})}")

    def note(self, message: str) -> None:
        self.out.print(message)

    def end(self) -> None:
        pass


class Board:
    """Many runs at a glance, a line each, read from their folders; where there is no terminal, a line as each one ends."""

    def __init__(self, names: Sequence[str], out: Console | None = None) -> None:
        self.out, self.names = out or console(), list(names)
        self._said: dict[str, str] = {}
        self._live = Live(Text(""), console=self.out, refresh_per_second=2) if self.out.is_terminal else None

    def __enter__(self) -> "Board":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def look(self, folders: Sequence[RunFolder]) -> None:
        """Read the folders (in the order of the names) and show how far each run is."""
        found = [(name, *_progress(folder)) for name, folder in zip(self.names, folders, strict=True)]
        if self._live:
            lines = [[escape(cell) for cell in (name, *cells)] for name, _, *cells in found]
            self._live.update(table(("run", "state", "step", "loss", "last probe"), lines))
            return
        for name, mark, state, step, loss, scores in found:
            if name not in self._said:
                self._said[name] = mark if state in BROKEN_OFF else ""
            if state not in UNDER_WAY and self._said[name] != mark:
                self._said[name] = mark
                how_far = f", step {step}, loss {loss}  {scores}" if step else ""
                self.out.print(f"{name}: {state}{how_far}", markup=False)


def _progress(folder: RunFolder) -> tuple[str, str, str, str, str]:
    """Give a mark of the status as written, state, step, loss and last scores of a run as they stand on disk."""
    try:
        if not folder.status.exists():
            return "", "waiting", "", "", ""
        status = folder.read_status()
        steps, scores = _numbers(folder.metrics, "loss"), _numbers(folder.scores, "value")
    except FolderError as error:  # its own run says more; those of the other runs go on
        return error.what, "damaged", "", "", ""
    state = str(status["state"])
    mark = f"{state} {status.get('updated')}"
    last = {str(line.get("name")): line["value"] for line in scores if line["step"] == scores[-1]["step"]}
    said = _scores_text({name: value for name, value in last.items() if name.endswith(("/accuracy", "/loss"))})
    if not steps:
        return mark, state, "", "", said
    return mark, state, f"{steps[-1]['step']}/{status.get('total_steps', '?')}", f"{steps[-1]['loss']:.3f}", said


def cost_line(facts: Mapping[str, Any]) -> str:
    """Write what a finished run took, by its status."""
    line = f"{facts['step']} steps, {facts['tokens']:,} tokens in {facts['wall_s']:.1f} s"
    if facts.get("probe_s") and facts["wall_s"]:
        share = min(1.0, facts["probe_s"] / facts["wall_s"])
        line += f"; probes took {share:.1%} of the time ({facts['probe_tokens']:,} tokens)"
    return f"{line}; peak memory {size(facts['peak_bytes'])}"


def _numbers(path: Path, key: str) -> list[dict[str, Any]]:
    """Read the lines of a file that hold a number under a key, each of a step."""
    lines = read_lines(path)
    return [line for line in lines if isinstance(line.get(key), int | float) and isinstance(line.get("step"), int)]


def display() -> LiveDisplay | PlainDisplay:
    """Choose the live block on a terminal, plain lines elsewhere."""
    out = console()
    return LiveDisplay(out) if out.is_terminal else PlainDisplay()


def _facts_line(facts: dict[str, Any]) -> str:
    where = f"{facts['folder']}  {facts['method']} on {facts['model']} ({facts['device']}, {facts['dtype']})"
    share = f"{facts['trained_parameters']:,} of {facts['all_parameters']:,} numbers train ({facts['share']:.2%})"
    start = f", going on from step {facts['step']}" if facts["step"] else ""
    return f"{where}\n{share}, {facts['total_steps']} steps{start}"


def _step_text(line: dict[str, Any]) -> str:
    if not line:
        return ""
    rate = max(line["learning_rate"].values())
    return (
        f"loss {line['loss']:.4f}  |g| {line['gradient_norm']:.3g}  lr {rate:.2e}  "
        f"{line['tokens_per_s']:,.0f} tokens/s  {size(line['peak_bytes'])}"
    )


def _scores_text(scores: dict[str, float]) -> str:
    """Write the scores of whole texts and tasks; those of single skills, with two slashes, stand in the files."""
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.items() if name.count("/") < 2)


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
        kinds = () if derived else ("empty", "dropped", "truncated", "split")
        lost = ", ".join(f"{total[key]} {key}" for key in kinds if total[key])
        if not derived and total["dropped"] > 0.1 * total["rows"]:
            lost += f" [bold red](more than a tenth exceeds data.max_length={found.spec.data.max_length})[/bold red]"
        written.append(
            f"[bold]{name}[/bold] {total['examples']:,} examples of {total['rows']:,} rows, {total['tokens']:,} tokens, "
            f"{total['labelled']:,} with a loss" + (f"; {lost}" if lost else "")
        )
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
    written.append(
        f"[bold]memory[/bold] about {size(memory.total)}: weights {size(memory.weights)}, trained {size(memory.trained)}, "
        f"activations {size(memory.activations)}, logits {size(memory.logits)}"
        + (
            f"; measured peak of the process over two steps {size(found.measured_bytes)}"
            if found.measured_bytes
            else ""
        )
    )
    for runs in found.examples:
        where = "in green" if coloured else "between « and »"
        written += ["", f"[bold]example[/bold] (a loss is taken on what stands {where})", _marked(runs, coloured)]
    return written


def _marked(runs: list[tuple[str, bool]], coloured: bool) -> str:
    before, after = ("[green]", "[/green]") if coloured else ("«", "»")
    return "".join(f"{before}{escape(text)}{after}" if labelled else escape(text) for text, labelled in runs)


FEW_K = (1, 2, 5, 10, 20, 50, 100, 200)
"""The k whose pass@k the terminal shows; the folder holds all."""


def evaluation_tables(found: Any) -> list[Table]:
    """Make the tables of an `Evaluation`: scores and changes, then pass@k and diversity where outputs were sampled."""
    made = []
    if rows := found.rows():
        made.append(table(list(rows[0]), [_escaped(row.values()) for row in rows]))
    if found.curves:
        made.append(_pass_at_k(found))
    if found.diversity:
        order = list(found.models)
        lines = sorted(found.diversity, key=lambda row: (row["task"], row["kind"], order.index(row["model"])))
        heads = ("task", "outputs", "model", "of samples", "distinct", "standard error")
        keys = ("task", "kind", "model", "samples", "distinct", "standard_error")
        made.append(table(heads, [_escaped(row.get(key) for key in keys) for row in lines]))
    return made


def evaluation_lines(found: Any) -> list[str]:
    """Write what stands below the tables of an `Evaluation`: how changes are judged, what it cost, what limits it."""
    return [line for line in (found.how_judged(), *found.notes()) if line]


def _pass_at_k(found: Any) -> Table:
    """A row per task and model, a column per k that all have."""
    cells: dict[tuple[str, str], dict[int, float]] = {}
    for row in found.curves:
        cells.setdefault((row["task"], row["model"]), {})[row["k"]] = row["pass_at_k"]
    ks = [k for k in FEW_K if all(k in shares for shares in cells.values())]
    order = sorted(cells, key=lambda key: (key[0], list(found.models).index(key[1])))
    rows = [_escaped((task, model, *(cells[task, model][k] for k in ks))) for task, model in order]
    return table(("task", "model", *(f"pass@{k}" for k in ks)), rows)


def _escaped(cells: Iterable[Any]) -> list[Any]:
    """Keep names from being read as Rich's markup."""
    return [escape(cell) if isinstance(cell, str) else cell for cell in cells]
