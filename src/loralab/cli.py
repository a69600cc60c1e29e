"""Commands: parse, call, print. No logic lives here; everything done is one call of the public API."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from loralab.console import (
    MERGE_MEANINGS,
    check_lines,
    console,
    cost_line,
    display,
    evaluation_lines,
    evaluation_tables,
    print_json,
    shown,
    table,
)
from loralab.errors import Interrupted, LoralabError

app = typer.Typer(
    name="loralab",
    help="Fine-tune language models with low-rank methods; see what was learned, what was forgotten, and why.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
recipes_app = typer.Typer(help="Shipped recipes: list, show, copy, compare, schema.", no_args_is_help=False)
app.add_typer(recipes_app, name="recipes")

Recipe = Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides by dotted key.")]
Runs = Annotated[str, typer.Option("--runs", help="Folder that holds the run folders.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


@app.command()
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


@app.command()
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


@app.command()
def evaluate(
    model: Annotated[
        str, typer.Argument(help="Folder or hub id of the base, or a run folder (its base and its delta).")
    ],
    tasks: Annotated[
        str,
        typer.Option(
            help="Names, with commas: tasks of lm-eval's catalogue, suites (forgetting, math, code, superglue), "
            "pocket:NAME, or files of rows."
        ),
    ],
    delta: Annotated[
        list[str] | None, typer.Option("--delta", help="PEFT folder, run folder or checkpoint; may be repeated.")
    ] = None,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder for scores.jsonl, items.parquet and evaluation.json.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most items of each task.")] = None,
    fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each item; each task's own number if absent.")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="TASK[:SPLIT]=FILE", help="A task's data from a file.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="Folder with more tasks in lm-eval's format.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts through the chat template.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Answers to each prompt of tasks that are sampled (pass@k).")] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Of the samples; 0 is greedy. 0.2 if absent, 0 for a single sample.")
    ] = None,
    top_p: Annotated[float, typer.Option("--top-p", help="Of the samples.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Revision of a hub base.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the base's own code.")] = False,
    unsafe: Annotated[
        bool, typer.Option("--unsafe", help="Run programs even where this machine cannot confine them.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Score a base and its deltas on tasks and suites, paired item by item."""
    from loralab.lab.evaluate import evaluate as run_evaluation
    from loralab.lab.questions import assignments, names

    found = run_evaluation(
        model,
        names(tasks),
        deltas=delta or [],
        out=out,
        revision=revision,
        dtype=dtype,
        device=device,
        trust_remote_code=trust_remote_code,
        limit=limit,
        fewshot=fewshot,
        data=assignments(data or []),
        include=tuple(include or []),
        chat=chat,
        samples=samples,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        unsafe=unsafe,
    )
    if as_json:
        print_json(found.summary())
        return
    screen = console()
    for one in evaluation_tables(found):
        screen.print(one)
    for line in evaluation_lines(found):
        screen.print(line, markup=False, soft_wrap=True)
    if out is not None:
        screen.print(f"wrote {out}", markup=False, soft_wrap=True)


@app.command()
def merge(
    base: Annotated[str, typer.Argument(help="Folder or hub id of the base.")],
    delta: Annotated[str, typer.Argument(help="PEFT folder, or a run folder.")],
    out: Annotated[str, typer.Option("--out", help="New folder for the merged model.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the base file's own if absent.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Text file on which predictions are compared.")] = None,
    limit_kl: Annotated[float, typer.Option(help="Largest KL(unmerged‖merged), nats per position.")] = 0.01,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub base.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Run the base's own code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge a low-rank delta into its base, with proof."""
    from loralab.lab.merging import merge as run_merge

    report = run_merge(
        base,
        delta,
        out,
        dtype=dtype,
        text=text,
        limit_kl=limit_kl,
        revision=revision,
        trust_remote_code=trust_remote_code,
    ).summary()
    if as_json:
        print_json(report | {"folder": out})
    else:
        rows = [(key, shown(value), MERGE_MEANINGS.get(key, "")) for key, value in report.items()]
        console().print(table(("merged", "", ""), [*rows, ("folder", out, "")]))


@app.command()
def runs(root: Runs = "runs", as_json: AsJson = False) -> None:
    """List the runs."""
    from loralab.lab.index import index

    found = index(root)
    if as_json:
        print(found.to_json(orient="records", indent=2))
    elif found.empty:
        console().print(f"no runs in {root}")
    else:
        columns = ["folder", "method", "rank", "learning_rate", "state", "step", "learning", "forgetting", "wall_s"]
        columns = [name for name in columns if name in found]
        console().print(table(columns, found[columns].astype(object).values.tolist()))


@recipes_app.callback(invoke_without_command=True)
def recipes_main(context: typer.Context) -> None:
    """List the shipped recipes."""
    if context.invoked_subcommand is None:
        recipes_ls()


@recipes_app.command("ls")
def recipes_ls(as_json: AsJson = False) -> None:
    """List the shipped recipes."""
    from loralab.spec.recipes import shipped

    rows = shipped()
    if as_json:
        print_json([{"name": name, "description": text} for name, text in rows])
    else:
        console().print(table(("recipe", "what it is for"), rows))


@recipes_app.command("show")
def recipes_show(
    recipe: Recipe, overrides: Overrides = None, resolved: Annotated[bool, typer.Option("--resolved")] = False
) -> None:
    """Print a recipe; with --resolved, every key with its value, source and meaning."""
    from loralab.spec.recipes import explain, find, preview

    if not resolved:
        print(find(recipe).read_text(encoding="utf-8"), end="")
        return
    items = explain(recipe, preview(recipe, overrides or []))
    console().print(
        table(("key", "value", "from", "meaning"), [(i.key, shown(i.value), i.source, i.meaning) for i in items])
    )


@recipes_app.command("cp")
def recipes_cp(recipe: Recipe, to: Annotated[str, typer.Argument(help="New file.")]) -> None:
    """Copy a recipe, to own and change it."""
    from loralab.spec.recipes import copy

    console().print(f"wrote {copy(recipe, to)}")


@recipes_app.command("schema")
def recipes_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    from loralab.spec.recipes import schema

    print_json(schema())


@recipes_app.command("diff")
def recipes_diff(first: Recipe, second: Recipe, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Compare two recipes key by key; the overrides apply to both."""
    from loralab.spec.recipes import diff, find, preview, read

    for recipe in (first, second):
        find(recipe)
    a, b = (read(recipe, preview(recipe, overrides or [])) for recipe in (first, second))
    rows = diff(a, b)
    if as_json:
        print_json([{"key": key, first: a, second: b} for key, a, b in rows])
    else:
        console().print(table(("key", first, second), rows))


@app.command()
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


@app.command()
def report(
    path: Annotated[
        str,
        typer.Argument(help="A run folder, a folder of run folders, or an evaluation.", metavar="RUN|SWEEP|EVALUATION"),
    ],
    out: Annotated[
        str | None, typer.Option("--out", help="File of the page; report.html in the folder if absent.")
    ] = None,
) -> None:
    """Write one self-contained HTML page about a run, about many side by side, or about an evaluation."""
    from loralab.report.page import write

    console().print(f"wrote {write(path, out)}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[str, typer.Option(help="Folder for the runs and the page.")] = "runs/demo",
) -> None:
    """Tell the whole story in miniature, on a CPU: two new tasks, six ways to teach each, one page."""
    from loralab.demo import tell

    tell(Path(out))


def main() -> None:
    """Run the command line; errors meant for the person become a message and an exit code."""
    try:
        app(standalone_mode=True)
    except LoralabError as error:
        print(f"loralab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("loralab: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
