"""Commands that take a base and its deltas: evaluate, merge."""

from typing import Annotated

import typer

from loralab.cli.options import AsJson
from loralab.console.found import MERGE_MEANINGS, evaluation_lines, evaluation_tables
from loralab.console.screen import console, print_json, shown, table


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
