"""An evaluation for tests of its folder, tables and page: tasks as in the catalogue, items drawn from a seed.

Scores and changes follow from the items, as in a real evaluation.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import default_rng

from loralab.evals.paired import paired, paired_values, together
from loralab.evals.stats import Score, mean_score
from loralab.lab.evaluation import Evaluation, Measured

DELTAS = {"lora-r8": (0.03, 0.30), "full": (0.12, 0.45), "cola": (0.02, 0.02)}
"""What each delta loses of the old tasks and wins of the new one."""

TASKS: dict[str, tuple[int, float, float | None]] = {
    "hellaswag/acc": (400, 0.31, 0.25),
    "hellaswag/acc_norm": (400, 0.38, 0.25),
    "arc_challenge/acc_norm": (300, 0.27, 0.25),
    "winogrande/acc": (300, 0.52, 0.5),
    "gsm8k/exact_match": (200, 0.06, None),
}
"""Items, share that the base has right, and chance, by score."""

SUITES = {"forgetting": ["hellaswag/acc_norm", "arc_challenge/acc_norm", "winogrande/acc"]}
PROMPTS = {
    "hellaswag": "Removing ice from car: Then, the man writes over the snow covering the window of car {}, and",
    "arc_challenge": "Question: Which property of air does a barometer measure in place {}?\nAnswer:",
    "winogrande": "Sarah was a much better surgeon than Maria, so patient {} went to",
    "gsm8k": "Question: Natalia sold {} clips in April, and half as many in May. How many altogether?\nAnswer:",
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def make_evaluation(*, deltas: tuple[str, ...] = tuple(DELTAS), seed: int = 0) -> Evaluation:
    """Draw an evaluation of some deltas; markup stands in what the models wrote."""
    measured: list[Measured] = []
    items: list[dict[str, Any]] = []
    changes: dict[tuple[str, str], Any] = {}
    for name, (n, share, chance) in TASKS.items():
        task, _, metric = name.partition("/")
        luck = default_rng([seed, n, *name.encode()])
        base = (luck.random(n) < share).astype(float)
        fresh = luck.random(n)
        facts: dict[str, Any] = {
            "task": task,
            "metric": metric,
            "version": "1.0",
            "fewshot": 5 if task == "gsm8k" else 0,
        }
        facts |= {"prompt_hash": digest(name), "template_hash": digest(task), "chance": chance}
        measured.append(Measured(model="base", score=share_of(name, base), **facts))
        for delta in deltas:
            lost, won = DELTAS[delta]
            rng = default_rng([seed, n, *delta.encode()])
            gained = won if task == "gsm8k" else lost / 3
            tuned = np.where(base > 0, fresh > (0.05 if task == "gsm8k" else 3 * lost), fresh < gained).astype(float)
            changes[delta, name] = change = paired(base, tuned, chance=chance)
            measured.append(Measured(model=delta, score=share_of(name, tuned), change=change.as_dict(), **facts))
            items += [row(name, i, delta, base[i], tuned[i], int(rng.integers(8, 40))) for i in range(n)]
    for delta in ("base", *deltas):
        measured += [*suites(delta, measured, changes), perplexity(delta, seed)]
    facts = {
        "model": "org/tiny-3M",
        "fingerprint": digest("base"),
        "deltas": {d: {"path": f"runs/{d}-0123abcd/delta", "fingerprint": digest(d)} for d in deltas},
        "suites": SUITES,
        "limit": 400,
        "seed": 0,
        "environment": environment(),
        "cost": {"forwards": 412, "tokens": 81_250, "plain_tokens": 260_000, "seconds": 12.5, "truncated": 3},
    }
    models = ["base", *deltas]
    return Evaluation(models, measured, items, facts, curves(models), diversity(models))


def share_of(name: str, right: np.ndarray) -> Score:
    return mean_score(name, "share of items", right, np.ones(len(right)))


def row(name: str, i: int, delta: str, before: float, after: float, num_tokens: int) -> dict[str, Any]:
    task = name.partition("/")[0]
    wrote = {True: f"They sold {i + 3}.\n#### {i + 3}", False: "<script>alert(1)</script> 12"}
    written = task == "gsm8k"
    return {
        "probe": name,
        "item": i,
        "num_tokens": num_tokens,
        "base_loss_sum": None,
        "tuned_loss_sum": None,
        "skill": task,
        "base_right": before,
        "tuned_right": after,
        "prompt": PROMPTS[task].format(i),
        "model": delta,
        "reference": f"{i + 3}" if written else " Sarah <b>the surgeon</b>",
        "base_output": wrote[before > 0] if written else None,
        "tuned_output": wrote[after > 0] if written else None,
    }


def suites(delta: str, measured: list[Measured], changes: dict[tuple[str, str], Any]) -> list[Measured]:
    found = []
    for suite, parts in SUITES.items():
        scores = [one.score for one in measured if one.model == delta and one.name in parts]
        error = float(np.sqrt(sum((score.standard_error or 0) ** 2 for score in scores))) / len(scores)
        mean = float(np.mean([score.value for score in scores]))
        score = Score(suite, mean, "share of items", sum(score.n for score in scores), error)
        change = None if delta == "base" else together([changes[delta, name] for name in parts]).as_dict()
        found.append(Measured(suite, "mean", delta, score, change))
    return found


def perplexity(delta: str, seed: int) -> Measured:
    """Draw a score that is better when it is lower."""
    rng = default_rng([seed, 5])
    base = rng.normal(4.0, 0.3, 62)
    tuned = base + rng.normal(2 * DELTAS[delta][0], 0.05, 62) if delta != "base" else base
    score = mean_score("wikitext/word_loss", "nats/word", tuned, np.ones(62))
    change = None if delta == "base" else paired_values(base, tuned).as_dict()
    return Measured("wikitext", "word_loss", delta, score, change, version="2", higher_is_better=False)


def curves(models: list[str]) -> list[dict[str, Any]]:
    rows = []
    for number, model in enumerate(models):
        single = 0.08 + 0.06 * number
        for k in (1, 2, 5, 10, 20, 50):
            value = 1 - (1 - single) ** (k**0.7)
            rows.append({"model": model, "task": "humaneval", "k": k, "pass_at_k": value, "standard_error": 0.03})
    return rows


def diversity(models: list[str]) -> list[dict[str, Any]]:
    """Draw distinct outputs among 50 samples: the more a delta learned, the more alike what it writes."""
    rows = []
    for number, model in enumerate(models):
        for kind, distinct in (("all", 46.0 - 6 * number), ("passing", 7.25), ("failing", 40.0 - 6 * number)):
            facts = {"samples": 50, "distinct": distinct, "standard_error": 0.5}
            rows.append({"model": model, "task": "humaneval", "kind": kind, **facts})
    return rows


def environment() -> dict[str, Any]:
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "command": ["loralab", "evaluate", "org/tiny-3M", "--delta", "two words"],
        "python": "3.11.7",
        "platform": "Linux-x86_64",
        "host": "a-secret-host",
        "cores": 2,
        "memory_bytes": 8 * 2**30,
        "packages": {"loralab": "0.1.0", "lm-eval": "0.4.13"},
    }


def write_evaluation(folder: Path, **facts: Any) -> Path:
    return make_evaluation(**facts).write(folder)
