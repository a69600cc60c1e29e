"""Commands that look inside a delta, and mend it: spectra, repair."""

from collections.abc import Callable
from typing import Annotated, Any

import typer

from loralab.cli.options import AsJson
from loralab.console.inside import spectra_lines, spectra_tables, sweep_tables
from loralab.console.screen import console, print_json
from loralab.errors import EvaluationError

Base = Annotated[str, typer.Argument(help="Folder or hub id of the base.")]
Vectors = Annotated[int, typer.Option("--k", help="Leading singular vectors of each tuned weight that are judged.")]
Epsilon = Annotated[float, typer.Option(help="Largest |cosine| with any base vector below which one is an intruder.")]
Exact = Annotated[bool, typer.Option("--exact", help="Two dense SVDs in float64 per matrix: the slow definition.")]
Revision = Annotated[str | None, typer.Option(help="Revision of a hub base.")]
RemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the base's own code.")]


def spectra(
    base: Base,
    deltas: Annotated[list[str], typer.Argument(metavar="DELTA...", help="PEFT folders, run folders or checkpoints.")],
    k: Vectors = 10,
    epsilon: Epsilon = 0.5,
    exact: Exact = False,
    checkpoints: Annotated[bool, typer.Option("--checkpoints", help="Every checkpoint of a run too.")] = False,
    links: Annotated[bool, typer.Option("--links", help="Every link of a chain too.")] = False,
    out: Annotated[
        str | None, typer.Option("--out", help="Folder for spectra.parquet, intruders.parquet and the page.")
    ] = None,
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Look inside deltas: spectrum, ranks, intruder dimensions, overlap with the base, matrix by matrix."""
    from loralab.lab.spectra import spectra as run_spectra

    found = run_spectra(
        base,
        *deltas,
        k=k,
        epsilon=epsilon,
        exact=exact,
        checkpoints=checkpoints,
        links=links,
        out=out,
        revision=revision,
        trust_remote_code=trust_remote_code,
        told=_progress(as_json),
    )
    if as_json:
        print_json(found.summary())
        return
    screen = console()
    for one in spectra_tables(found):
        screen.print(one)
    for line in spectra_lines(found):
        screen.print(line, markup=False, soft_wrap=True)
    if out is not None:
        from loralab.report.page import write

        screen.print(f"wrote {out}, and the page {write(out)}", markup=False, soft_wrap=True)


def repair(
    base: Base,
    delta: Annotated[str, typer.Argument(help="PEFT folder, run folder or checkpoint.")],
    out: Annotated[
        str | None, typer.Option("--out", help="New folder for the repaired delta and what was done.")
    ] = None,
    edit: Annotated[
        str | None,
        typer.Option(
            help='One edit: "top1 0.75", "all 0.75", "scale 0.5", "taper 0.5", "threshold 1", "neighbour 0.7".'
        ),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Measure many edits as learning against forgetting.")] = False,
    edits: Annotated[
        str | None, typer.Option(help="Edits of the sweep, with commas; a sensible grid if absent.")
    ] = None,
    target: Annotated[str, typer.Option(help="Tasks to be learned: names as `evaluate` takes them.")] = "",
    source: Annotated[str, typer.Option(help="Tasks to be kept.")] = "",
    target_text: Annotated[str | None, typer.Option("--target-text", help="Or a text to be learned.")] = None,
    source_text: Annotated[str | None, typer.Option("--source-text", help="Or a text to be kept.")] = None,
    tokens: Annotated[int | None, typer.Option(min=2, help="Most tokens of each text.")] = None,
    budget: Annotated[
        str | None, typer.Option(help="Largest forgetting allowed: 0.02, or 50% of the delta's own.")
    ] = None,
    rank: Annotated[
        int | None, typer.Option(min=1, help="Compress to this rank; the discarded norm is printed.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Most items of each task.")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", metavar="TASK[:SPLIT]=FILE", help="A task's data from a file.")
    ] = None,
    k: Vectors = 10,
    epsilon: Epsilon = 0.5,
    exact: Exact = False,
    seed: Annotated[int | None, typer.Option(help="Of the resampling; 0 if absent.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")] = "auto",
    revision: Revision = None,
    trust_remote_code: RemoteCode = False,
    as_json: AsJson = False,
) -> None:
    """Edit a delta: scale, taper by depth, shrink intruders; one edit saved, or a sweep with its measured trade-off."""
    from loralab.lab.questions import assignments, names
    from loralab.lab.repair import repair as run_repair
    from loralab.lab.repair import sweep as run_sweep

    screen = console()
    common: dict[str, Any] = {
        "k": k,
        "epsilon": epsilon,
        "exact": exact,
        "rank": rank,
        "dtype": dtype,
        "device": device,
    }
    common |= {"revision": revision, "trust_remote_code": trust_remote_code, "told": _progress(as_json)}
    if sweep == (edit is not None):
        fix = 'write --edit "top1 0.75" --out FOLDER, or --sweep --target TASKS --source TASKS'
        raise EvaluationError("either one edit is made, or many are measured", where="--edit, --sweep", fix=fix)
    measured: dict[str, Any] = {
        "--target": target,
        "--source": source,
        "--target-text": target_text,
        "--source-text": source_text,
    }
    measured |= {"--edits": edits, "--budget": budget, "--tokens": tokens, "--limit": limit, "--data": data}
    measured["--seed"] = None if seed is None else str(seed)
    if edit is not None and any(measured.values()):
        idle = ", ".join(name for name, value in measured.items() if value)
        raise EvaluationError("one edit is saved without measuring", where=idle, fix="leave it out, or say --sweep")
    if edit is not None:
        if out is None:
            raise EvaluationError("the repaired delta has no place", where="--out", fix="name a new folder")
        done = run_repair(base, delta, edit, out=out, **common)
        if as_json:
            print_json(done.summary())
            return
        for line in done.said():
            screen.print(line, markup=False, soft_wrap=True)
        screen.print(f"wrote {out}", markup=False, soft_wrap=True)
        return
    if tokens is not None:
        common["tokens"] = tokens
    found = run_sweep(
        base,
        delta,
        target=names(target),
        source=names(source),
        target_text=target_text,
        source_text=source_text,
        edits=None if edits is None else names(edits),
        budget=budget,
        out=out,
        seed=seed or 0,
        limit=limit,
        data=assignments(data or []),
        **common,
    )
    if as_json:
        print_json(found.summary())
        return
    for one in sweep_tables(found):
        screen.print(one)
    for line in found.said():
        screen.print(line, markup=False, soft_wrap=True)
    if out is not None:
        from loralab.report.page import write

        screen.print(f"wrote {out}, and the page {write(out)}", markup=False, soft_wrap=True)


def _progress(as_json: bool) -> Callable[[int, int, str], None]:
    """Count what is done on one line of a terminal; say nothing elsewhere."""
    screen = console()

    def told(done: int, total: int, name: str) -> None:
        if screen.is_terminal and not as_json:
            screen.print(f"{done}/{total} {name}\x1b[K", end="\n" if done == total else "\r", markup=False)

    return told
