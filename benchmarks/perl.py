"""The questions of PERL (2403.10704), each answered by one command: low rank against full tuning, over seeds, with intervals.

    python benchmarks/perl.py QUESTION [KEY=VALUE ...] [--seeds 0 1 2] [--rates 1e-3 3e-3] [--runs runs/perl] [--threads 1]

Every arm of a question runs once per seed, two runs side by side in processes of their own, so arms share whatever the machine
does meanwhile; `--rates` gives every arm each learning rate instead of its own, to find that out on other seeds first. What is
finished is not run again. KEY=VALUE changes all of them alike, but not the lessons that come before. The table says what is
judged per arm: mean over seeds with Student's interval, and the difference from the yardstick, paired by seed; a difference whose
interval holds 0 is a tie. Rows go to results/perl-DATE.jsonl, and RUNS/QUESTION/report.html is the page.

Questions on Taskmaster read files below the folder in the environment variable LORALAB_ASSETS.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from _measured import Record

import loralab
from loralab.console.screen import console, table
from loralab.evals.judgement import areas_apart
from loralab.evals.stats import noise_floor
from loralab.lab.engines import train_all
from loralab.lab.result import Result
from loralab.run.folder import RunFolder
from loralab.spec.spec import RunSpec

ASSETS = Path(os.environ.get("LORALAB_ASSETS", "assets"))
QUIET = ["probes.source=[]", "probes.spectra=false"]
POLICY = [*QUIET, "probes.every=0.5", "probes.samples=8"]
SCORED = ["probes.spectra=false"]
FIRST = "FIRST"
LESSON = ("pocket-reward-close", *SCORED)
RANKS = {
    "rank 1": ["method.rank=1", "optimizer.learning_rate=2e-3"],
    "rank 8": ["method.rank=8"],
    "full": ["method={name: full}", "optimizer.learning_rate=3e-4"],
}


@dataclass(frozen=True)
class Question:
    """What is asked: runs of one recipe that differ by their arm and their seed, judged by one score."""

    asks: str
    recipe: str
    arms: dict[str, list[str]]
    """Changes of each; the last is the yardstick that the others are held against."""
    judged: str
    """Name of the score; where it has a paired change, that is shown too."""
    also: tuple[str, ...] = ()
    shared: list[str] = field(default_factory=list)
    first: tuple[tuple[str, ...], ...] = ()
    """Recipe and changes of runs that come before; `FIRST` in a change stands for what the one before it learned."""


def _thumbs(year: str) -> Question:
    files = sorted((ASSETS / "data" / f"taskmaster_tm{year}_reward").glob("*.json"))
    shared = [
        f"model.path={ASSETS / 'models' / 'stories3M'}",
        "model.dtype=float32",
        "model.device=cpu",  # so that arms run side by side
        "data.max_length=128",
        "train.epochs=4",
    ]
    return Question(
        f"is a LoRA reward model as good as a full one on thumbs of agents (Taskmaster TM-{year})?",
        "reward-taskmaster-lora",
        {
            "all linear, rank 1": ["method.targets=all-linear", "method.rank=1", "optimizer.learning_rate=2e-3"],
            "all linear, rank 8": ["method.targets=all-linear", "optimizer.learning_rate=1e-3"],
            "full": ["method={name: full}", "optimizer.learning_rate=3e-4"],
        },
        "target/auc",
        ("target/balanced_accuracy", "target/accuracy", "target/majority", "target/calibration_error"),
        [
            *shared,
            f"data.train=[{', '.join(str(file) for file in files)}]",
            "probes.every=0.34",
            "checkpoints.every=0.34",
            *SCORED,
        ],
    )


def _graded(task: str) -> Question:
    tuned = [
        "method={name: full}",
        "optimizer.learning_rate=1e-3",
        "train.steps=300",
        "train.batch_size=2",
        f"data.train=pocket:{task}?items=8000&difficulty=2",
        f"data.validation=pocket:{task}/validation?items=50&difficulty=2",
        "data.general=null",
        f"probes.target=pocket:{task}?items=100&difficulty=2",
        "probes.every=300",
        "checkpoints.every=300",
        *QUIET,
    ]
    shared = [
        "model.path=FIRST",
        "method.rank=8",
        "optimizer.learning_rate=2e-3",
        f"data.train=pocket:{task}?difficulty=2",
        f"data.validation=pocket:{task}/test?items=400&difficulty=2",
        "data.general=pocket:source/validation?items=200",
        "objective.reward=grade",
        "objective.max_tokens=48",
        "objective.samples=8",
        "objective.beta=0.01",
        "train.batch_size=24",
        "train.steps=100",
        *POLICY,
    ]
    return Question(
        f"does reinforcement on graded answers improve a policy that was tuned on {task}?",
        "pocket-rl",
        {"rank 8": []},
        "policy/reward",
        ("policy/kl", "policy/entropy", "policy/distinct", "general/loss_rise"),
        shared,
        (("pocket-lora", f"name=tuned-{task}", *tuned),),
    )


QUESTIONS = {
    "reward": Question(
        "how good is a LoRA reward model on stories against a full one, both after the same first lesson?",
        "pocket-reward",
        {"rank 16": [], "full": ["method={name: full}", "optimizer.learning_rate=3e-4"]},
        "target/accuracy",
        ("target/loss", "target/calibration_error", "target/length_correlation"),
        ["model.delta=FIRST", *SCORED],
        (LESSON,),
    ),
    "proxy": Question(
        "what does a policy earn that is trained on a learned reward, beside one that is trained on the true one?",
        "pocket-rl",
        {"learned reward": ["objective.reward=FIRST"], "true reward": []},
        "policy/held_out",
        ("policy/reward", "policy/kl", "general/loss_rise", "policy/distinct"),
        ["objective.held_out=pocket:true", "train.steps=80", *POLICY, "probes.every=0.125"],
        (LESSON, ("pocket-reward", "model.delta=FIRST", *SCORED)),
    ),
    "policy-ranks": Question(
        "does a LoRA policy earn as much true reward on stories as a full one, from rank 1 on?",
        "pocket-rl",
        RANKS,
        "policy/reward",
        ("policy/kl", "general/loss_rise", "policy/distinct"),
        ["train.steps=80", *POLICY],
    ),
}
QUESTIONS |= {name: _graded(name) for name in ("calc", "stack")}
QUESTIONS |= {f"taskmaster-{year}": _thumbs(year) for year in ("3", "4")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=list(QUESTIONS))
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=[])
    parser.add_argument("--arms", nargs="+")
    parser.add_argument("--runs", default="runs/perl")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_intermixed_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    torch.set_num_threads(asked.threads)
    question, root = QUESTIONS[asked.question], Path(asked.runs) / asked.question
    learned = ""
    for recipe, *before in question.first:
        (made,) = train_all([loralab.recipe(recipe, _after(learned, before))], root.with_name("first"))
        learned = str(made.delta)
    arms = _arms(question, asked.arms or list(question.arms), asked.rates)
    specs = {
        (arm, seed): loralab.recipe(
            question.recipe,
            [f"name={arm}", f"seed={seed}", *_after(learned, [*question.shared, *mine, *asked.changes])],
        )
        for seed in asked.seeds
        for arm, mine in arms.items()
    }
    train_all(list(specs.values()), root, look=_look)
    results = {key: loralab.train(spec, root) for key, spec in specs.items()}
    record = Record("perl", question=asked.question, asks=question.asks, changes=asked.changes)
    for (arm, seed), result in results.items():
        record.add(question=asked.question, arm=arm, seed=seed, **_found(question, specs[arm, seed], result))
    rows = [_summary(question, arm, list(arms)[-1], asked.seeds, results) for arm in arms]
    for row in rows:
        record.add(question=asked.question, **row)
    console().print(table(list(rows[0]), [list(row.values()) for row in rows], title=question.asks))
    print(f"page: {loralab.write_report(root)}")


def _after(learned: str, changes: Sequence[str]) -> list[str]:
    """Write what was learned before where changes ask for it."""
    return [change.replace(FIRST, learned) for change in changes]


def _arms(question: Question, names: Sequence[str], rates: Sequence[str]) -> dict[str, list[str]]:
    """Give the changes of each arm, at its own learning rate or at each of those asked."""
    if not rates:
        return {name: question.arms[name] for name in names}
    return {
        f"{name}, rate {rate}": [*question.arms[name], f"optimizer.learning_rate={rate}"]
        for name in names
        for rate in rates
    }


@cache
def _tell(done: int, runs: int) -> None:
    print(f"{done} of {runs} runs done", flush=True)  # cached: once for each number


def _look(folders: Sequence[RunFolder]) -> None:
    _tell(sum(folder.delta.exists() for folder in folders), len(folders))


def _found(question: Question, spec: RunSpec, result: Result) -> dict[str, Any]:
    """Give what one run found: its scores with standard errors, what it moved, and what it cost."""
    status = result.status
    names = (question.judged, f"{question.judged}_change", *question.also)
    scores = {name: score for name in names if (score := result.after.get(name)) is not None}
    steps = max(1, int(status["step"]))
    return {
        "run": spec.folder_name,
        "before": {name: score.value for name in names if (score := result.before.get(name)) is not None},
        "after": {name: [score.value, score.standard_error, score.n] for name, score in scores.items()},
        "learning_rate": spec.optimizer.learning_rate,
        "steps": steps,
        "kept_step": status.get("delta_step"),
        "end": status.get("end"),
        "trained": status["trained_parameters"],
        "trained_share": status["trained_parameters"] / status["all_parameters"],
        "peak_mib": status["peak_bytes"] / 2**20,
        "step_s": (status["wall_s"] - status["probe_s"]) / steps,
        "tokens": status["tokens"],
    }


def _summary(
    question: Question, arm: str, yardstick: str, seeds: Sequence[int], results: dict[tuple[str, int], Result]
) -> dict[str, Any]:
    """Give an arm's mean over seeds, and its difference from the yardstick, paired by seed."""
    after = list(_values(question.judged, arm, seeds, results))
    before = [results[arm, seed].before[question.judged].value for seed in seeds]
    apart = np.subtract(after, list(_values(question.judged, yardstick, seeds, results))).tolist()
    return {
        "arm": arm,
        "score": question.judged,
        "seeds": len(seeds),
        "before": _spread(before),
        "after": _spread(after),
        "rise": _spread(np.subtract(after, before).tolist()),
        f"less {yardstick}": "–" if arm == yardstick else _spread(apart),
        **_on_the_same_rows(question, arm, yardstick, seeds, results),
    } | {name: _spread(list(_values(name, arm, seeds, results))) for name in question.also}


def _on_the_same_rows(
    question: Question, arm: str, yardstick: str, seeds: Sequence[int], results: dict[tuple[str, int], Result]
) -> dict[str, str]:
    """Give the difference of areas under the curve with the error that the choice of held-out rows makes (DeLong, paired).

    The rows are the same for all seeds, so the mean over seeds is taken to be no surer than one seed is.
    """
    if question.judged != "target/auc":
        return {}
    name = f"less {yardstick}, other rows"
    if arm == yardstick:
        return {name: "–"}
    found = []
    for seed in seeds:
        mine, theirs = (_judged_rows(results[key, seed]) for key in (arm, yardstick))
        rewards = mine["reward"].to_numpy(), theirs["reward"].reindex(mine.index).to_numpy()
        found.append(areas_apart(*rewards, mine["label"].to_numpy() > 0))
    known = [each for each in found if each is not None and each[1] is not None]
    if not known:
        return {name: "–"}
    mean, error = np.mean(known, axis=0)
    return {name: f"{mean:.4g} ± {1.96 * error:.2g}"}


def _judged_rows(result: Result) -> pd.DataFrame:
    """Read what was said of each held-out row, by its number."""
    rows = pd.read_parquet(result.folder.path / "items.parquet")
    return rows[rows["probe"] == "target"].set_index("item")


def _values(name: str, arm: str, seeds: Sequence[int], results: dict[tuple[str, int], Result]) -> Iterator[float]:
    return (results[arm, seed].after[name].value for seed in seeds)


def _spread(values: Sequence[float]) -> str:
    """Write mean, Student's 95 % interval over the seeds, lowest and highest."""
    if len(values) < 2:
        return f"{values[0]:.4g}"
    floor = noise_floor(values)
    low, high = floor.interval
    return f"{floor.mean:.4g} [{low:.4g}, {high:.4g}] ({min(values):.4g} to {max(values):.4g})"


if __name__ == "__main__":
    main()
