"""A little world with suites and tasks of lm-eval's catalogue as files, for tests of runs that probe them."""

import random
from pathlib import Path
from typing import Any

from little_world import make_world, overrides, rows, write_rows
from loralab.lab.watch import Silent
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec

COUNTS = {"hellaswag": 7, "arc_challenge": 6, "winogrande": 5}
BACKWARDS = """
task: backwards
dataset_path: json
test_split: test
output_type: generate_until
doc_to_text: "reverse {{word}} = "
doc_to_target: "{{word[::-1]}}"
generation_kwargs: {until: ["."], max_gen_toks: 8}
metric_list: [{metric: exact_match}]
metadata: {version: 3}
"""
ROLLING = """
task: whole_texts
dataset_path: json
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{word}}"
metric_list: [{metric: word_perplexity}]
"""


def write_tasks(folder: Path) -> None:
    """Write the three tasks of `forgetting` in the columns of their data sets, and two tasks of our own."""
    rng = random.Random(0)

    def words(count: int) -> list[str]:
        return ["".join(rng.sample("abcdef", rng.randint(2, 5))) + str(i) for i in range(count)]

    made: dict[str, list[Any]] = {name: [] for name in COUNTS}
    for i in range(COUNTS["hellaswag"]):
        about = {"activity_label": words(1)[0], "ctx_a": f"a {words(1)[0]}.", "ctx_b": "it"}
        made["hellaswag"].append({**about, "endings": words(4), "label": i % 4})
    for i in range(COUNTS["arc_challenge"]):
        choices = {"text": words(4), "label": [*"ABCD"]}
        made["arc_challenge"].append({"question": f"what {i}", "choices": choices, "answerKey": "ABCD"[i % 4]})
    for i in range(COUNTS["winogrande"]):
        a, b = words(2)
        row = {"sentence": f"{a} beat {b} so _ won.", "option1": a, "option2": b, "answer": str(1 + i % 2)}
        made["winogrande"].append(row)
    for name, found in made.items():
        write_rows(folder / f"{name}.jsonl", found)
    write_rows(folder / "words.jsonl", [{"word": row["completion"]} for row in rows(4, seed=6)])
    (folder / "own").mkdir()
    (folder / "own" / "backwards.yaml").write_text(BACKWARDS)
    (folder / "own" / "whole_texts.yaml").write_text(ROLLING)


def files(world: Path, *names: str) -> dict[str, str]:
    return {name: str(world / f"{name}.jsonl") for name in names or COUNTS}


def forgetting(world: Path, **keys: Any) -> dict[str, Any]:
    return {"path": "forgetting", "data": files(world), **keys}


def backwards(world: Path, task: str = "backwards") -> dict[str, Any]:
    return {"path": task, "include": [str(world / "own")], "data": {task: str(world / "words.jsonl")}}


def spec(world: Path, **keys: Any) -> RunSpec:
    usual = {
        "method__rank": 4,
        "method__dropout": 0.1,
        "checkpoints__every": 2,
        "probes__every": 3,
        "probes__samples": 2,
    }
    return read("sft-lora", overrides(world, **{**usual, **keys}))


def probed(world: Path, **keys: Any) -> RunSpec:
    """Give a run with items and a task that is written as target, a suite and items with choices as source."""
    target = [{"path": str(world / "tasks.jsonl")}, backwards(world)]
    source = [forgetting(world), {"path": "pocket:copy", "items": 5}]
    return spec(world, **{"probes__target": target, "probes__source": source, **keys})


def make_probe_world(folder: Path) -> Path:
    """Make a little world with these tasks, and a file of items."""
    made = make_world(folder)
    write_tasks(made)
    write_rows(made / "tasks.jsonl", rows(6, seed=3))
    return made


class StopAt(Silent):
    def __init__(self, step: int, error: BaseException) -> None:
        self.at, self.error = step, error

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        if line["step"] == self.at:
            raise self.error
