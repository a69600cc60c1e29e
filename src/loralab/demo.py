"""The demo: one small base, two new tasks, six ways to teach each, and one page that shows what came of it.

Everything is real training through the same calls that a person would use, on the pocket world, on a CPU in a few minutes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loralab.console import Board, console, table
from loralab.lab.engines import train_all
from loralab.report.compare import compare
from loralab.report.page import write
from loralab.report.read import runs_below
from loralab.report.tables import results
from loralab.report.verdict import verdict
from loralab.spec.spec import RunSpec

ARMS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora-r1": {"name": "lora", "rank": 1},
    "lora-r4": {"name": "lora", "rank": 4},
    "lora-r16": {"name": "lora", "rank": 16},
    "lora-plus-r4": {"name": "lora_plus", "rank": 4, "ratio": 4.0},
    "cola-3x4": {"name": "cola", "rank": 4, "links": 3},
}
RATES = {"full": 1e-3, "lora": 5e-3, "lora_plus": 2.5e-3, "cola": 5e-3}
"""Learning rates by method, the same for both tasks; docs/LOG.md says how they were found."""


@dataclass(frozen=True)
class Lesson:
    """A new task: training rows, held-out rows, and the items that are graded."""

    train: str
    validation: str
    graded: str


TASKS = {
    "calc": Lesson("pocket:calc?items=6000", "pocket:calc/validation?items=200", "pocket:calc"),
    "cipher": Lesson(
        "pocket:cipher?items=4000&difficulty=5",
        "pocket:cipher/validation?items=200&difficulty=5",
        "pocket:cipher?difficulty=5",
    ),
}
STEPS = 200


def spec(task: str, arm: str, *, steps: int = STEPS) -> RunSpec:
    """Give the spec of one run; all of a task read the same rows in the same order, so the same number of tokens."""
    method, lesson = ARMS[arm], TASKS[task]
    return RunSpec.model_validate(
        {
            "name": f"{task}-{arm}",
            "model": {"path": "pocket", "device": "cpu"},
            "data": {
                "train": lesson.train,
                "validation": lesson.validation,
                "general": "pocket:source/validation?items=400",
                "max_length": 256,
            },
            "method": method,
            "optimizer": {"name": "adamw", "learning_rate": RATES[method["name"]]},
            "schedule": {"name": "cosine", "warmup": 0.05},
            "train": {"steps": steps, "batch_size": 4},
            "probes": {
                "every": 0.25,
                "tokens": 8192,
                "target": [{"path": lesson.graded, "items": 100}],
                "source": [{"path": "pocket:source", "items": 20}],
            },
            "checkpoints": {"every": 0.5, "keep_last": 1, "keep_best": False},
        }
    )


def tell(out: Path, *, steps: int = STEPS, tasks: Sequence[str] = tuple(TASKS)) -> Path:
    """Run the story in a folder and give the path of its page; what is finished there is not run again.

    Raises:
        Interrupted: a stop was requested; the same command goes on.
    """
    say = console().print
    specs = {f"{task} {arm}": spec(task, arm, steps=steps) for task in tasks for arm in ARMS}
    say(
        "One small base (0.96M parameters, ten skills) is taught two new tasks, each in six ways, with the same data and the\n"
        "same number of tokens: [bold]calc[/bold], worked arithmetic in words, and [bold]cipher[/bold], text in a foreign alphabet."
    )
    with Board(list(specs)) as board:
        train_all(list(specs.values()), out, look=lambda folders: board.look(folders))
    page = write(out)
    for comparison in compare(runs_below(out)):
        say(f"\n[bold]{comparison.name}[/bold]")
        for view in comparison.views:
            columns, rows = results(comparison, view, everything=view is comparison.views[0])
            heads = ["", *(column.head for column in columns)]
            say(table(heads, [(comparison.label(run), *(cell.text for cell in cells)) for run, cells in rows]))
        said = verdict(comparison)
        say(f"{said.learned} {said.forgot} {said.limit}")
    say(f"\nThe page: {page}", soft_wrap=True)
    say(
        "Next: loralab train sft-lora model.path=pocket data.train=pocket:stack probes.target=pocket:stack",
        soft_wrap=True,
    )
    return page
