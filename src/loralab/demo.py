"""The demo: one small base, two new tasks, six ways to teach each, and one page that shows what came of it.

Everything is real training through the same calls that a person would use, on the pocket world, on a CPU in a few minutes.
"""

from collections.abc import Sequence
from pathlib import Path

from loralab.console.progress import Board
from loralab.console.screen import console, table
from loralab.lab.engines import train_all
from loralab.report.compare import compare
from loralab.report.page import write
from loralab.report.read import runs_below
from loralab.report.tables import results
from loralab.report.verdict import verdict
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec

RECIPE = "pocket-lora"
ARMS: dict[str, list[str]] = {
    "full": ["method.name=full"],
    "lora-r1": ["method.rank=1"],
    "lora-r4": ["method.rank=4"],
    "lora-r16": ["method.rank=16"],
    "lora-plus-r4": ["method.name=lora_plus", "method.rank=4", "method.ratio=4"],
    "cola-3x4": ["method.name=cola", "method.rank=4", "method.links=3"],
}
"""What each way to teach changes in the recipe: never the learning rate, so that nothing but the method differs."""
TASKS: dict[str, list[str]] = {
    "calc": [],
    "cipher": [
        "data.train=pocket:cipher?items=4000&difficulty=5",
        "data.validation=pocket:cipher/validation?items=200&difficulty=5",
        "probes.target.0.path=pocket:cipher?difficulty=5",
    ],
}
"""What each new task changes in the recipe."""
STEPS = 400


def spec(task: str, arm: str, *, steps: int = STEPS, changes: Sequence[str] = ()) -> RunSpec:
    """Give the spec of one run; all of a task read the same rows in the same order, so the same number of tokens."""
    return read(RECIPE, [f"name={task}-{arm}", *TASKS[task], *ARMS[arm], f"train.steps={steps}", *changes])


def tell(
    out: Path,
    *,
    steps: int = STEPS,
    tasks: Sequence[str] = tuple(TASKS),
    arms: Sequence[str] = tuple(ARMS),
    changes: Sequence[str] = (),
) -> Path:
    """Run the story in a folder and give the path of its page; what is finished there is not run again.

    Args:
        out: the folder.
        steps: optimizer steps of each run.
        tasks: of TASKS, what is taught.
        arms: of ARMS, the ways to teach.
        changes: overrides of the recipe that apply to all runs, for a smaller story.

    Raises:
        Interrupted: a stop was requested; the same command goes on.
    """
    say = console().print
    specs = {f"{task} {arm}": spec(task, arm, steps=steps, changes=changes) for task in tasks for arm in arms}
    say(
        "One small base (0.96M parameters, ten skills) is taught two new tasks in several ways, with the same data, the same\n"
        "number of tokens and the same learning rate: [bold]calc[/bold], arithmetic in worked steps, and [bold]cipher[/bold],\n"
        "stories in a foreign alphabet."
    )
    with Board(list(specs)) as board:
        train_all(list(specs.values()), out, look=lambda folders: board.look(folders))
    page = write(out)
    for comparison in compare(runs_below(out)):
        say(f"\n[bold]{comparison.name}[/bold]")
        for view in comparison.views[:1]:  # the others are on the page
            columns, rows = results(comparison, view, everything=True)
            heads = ["", *(column.head for column in columns)]
            say(table(heads, [(comparison.label(run), *(cell.text for cell in cells)) for run, cells in rows]))
        said = verdict(comparison)
        say(f"{said.learned} {said.forgot} {said.limit}")
    say(f"\nThe page: {page}", soft_wrap=True)
    say(
        "Next: loralab train pocket-lora data.train=pocket:stack data.validation=pocket:stack/validation "
        "probes.target=pocket:stack",
        soft_wrap=True,
    )
    return page
