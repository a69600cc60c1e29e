"""Commands that train, and those that look at runs."""

from pathlib import Path
from typing import Annotated

import typer

from loralab.cli.options import AsJson, Overrides, Recipe, Runs
from loralab.console.found import check_lines
from loralab.console.progress import cost_line, display
from loralab.console.screen import console, print_json, shown, table


def train(
    recipe: Recipe,
    overrides: Overrides = None,
    runs: Runs = "runs",
    branch_from: Annotated[
        str | None, typer.Option("--from", metavar="RUN@STEP", help="Begin from a checkpoint of another run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Train one run; the same command again resumes it."""
    from loralab.lab.experiment import train as run_training
    from loralab.spec.recipes import read

    extra = [f"branch_from={branch_from}"] if branch_from else []
    spec = read(recipe, [*(overrides or []), *extra])
    result = run_training(spec, runs, display=None if as_json else display())
    if as_json:
        print_json(result.summary())
        return
    out = console()
    headers = ("", "base", "before", "after", "change", "95 % interval", "n")
    if result.after:
        out.print(table(headers, result.rows()))
    else:
        out.print("nothing was measured: give data.validation, a data.validation_share above 0, or data.general")
    out.print(cost_line(result.status), soft_wrap=True)
    out.print(f"delta: {result.folder.delta}", soft_wrap=True)


def check(
    recipe: Recipe,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(help="Examples to show.")] = 2,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run two real steps and report the measured peak.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Resolve and validate a recipe; show coverage, examples with their loss mask, and a memory estimate."""
    from loralab.lab.check import check as run_check
    from loralab.spec.recipes import explain, read

    spec = read(recipe, overrides or [])
    found = run_check(spec, num_examples=examples, measure=measure)
    if as_json:
        print_json(found.summary())
        return
    out = console()
    rows = [(item.key, shown(item.value), item.source) for item in explain(recipe, overrides or [])]
    out.print(table(("key", "value", "from"), rows))
    for line in check_lines(found, coloured=out.is_terminal):
        out.print(line)


def runs(root: Runs = "runs", as_json: AsJson = False) -> None:
    """List the runs."""
    from loralab.lab.index import index

    found = index(root)
    if as_json:
        print(found.to_json(orient="records", indent=2))
    elif found.empty:
        console().print(f"no runs in {root}")
    else:
        columns = ["folder", "method", "rank", "learning_rate", "state", "step", "learning", "learned_by", "forgetting"]
        columns = [name for name in [*columns, "wall_s"] if name in found]
        console().print(table(columns, found[columns].astype(object).values.tolist()))


def report(
    path: Annotated[
        str,
        typer.Argument(
            help="Folder of a run, of many runs, of an evaluation, of spectra, or of a repair.", metavar="FOLDER"
        ),
    ],
    out: Annotated[
        str | None, typer.Option("--out", help="File of the page; report.html in the folder if absent.")
    ] = None,
    figures: Annotated[str | None, typer.Option("--figures", help="Write the page's figures as files there.")] = None,
    format: Annotated[str, typer.Option("--format", help="Of these files: svg, png, or svg,png.")] = "svg,png",
) -> None:
    """Write one self-contained HTML page about a folder: its runs, an evaluation, spectra, or a repair."""
    from loralab.report.exports import write_figures
    from loralab.report.page import write

    screen = console()
    screen.print(f"wrote {write(path, out)}", markup=False, soft_wrap=True)
    if figures is not None:
        files = write_figures(path, figures, [ending.strip() for ending in format.split(",")])
        screen.print(f"wrote {len(files)} files into {figures}", markup=False, soft_wrap=True)


def demo(
    out: Annotated[str, typer.Option(help="Folder for the runs and the page.")] = "runs/demo",
) -> None:
    """Tell the whole story in miniature, on a CPU: two new tasks, six ways to teach each, one page."""
    from loralab.demo import tell

    tell(Path(out))
