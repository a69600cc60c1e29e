"""Suites: several tasks under one name, and which metric of each counts in their mean. No torch here."""

from dataclasses import dataclass
from pathlib import Path

OWN_TASKS = str(Path(__file__).parent / "superglue")
"""Folder of tasks in lm-eval's format that this package brings."""


@dataclass(frozen=True)
class Suite:
    """Tasks and the metric of each that counts.

    Attributes:
        what: a line for people.
        parts: task → metric.
        fewshot: examples before each item; None is each task's own number.
        include: folders of tasks that it needs.
    """

    what: str
    parts: dict[str, str]
    fewshot: int | None = None
    include: tuple[str, ...] = ()


SUITES = {
    # P1 names the tasks and says "accuracy", not which; here it is normalised for length where the task offers that.
    "forgetting": Suite(
        "HellaSwag, ARC-Challenge, WinoGrande: what a base knows (LoRA Learns Less and Forgets Less)",
        {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "winogrande": "acc"},
        fewshot=0,
    ),
    "math": Suite("GSM8K, 5 examples, greedy, strict match", {"gsm8k": "exact_match:strict-match"}, fewshot=5),
    "code": Suite("HumanEval, no examples, programs run in a sandbox", {"humaneval": "pass@1"}, fewshot=0),
    "superglue": Suite(
        "the seven tasks of Chain of LoRA with MeZO's prompts",
        {f"mezo_{name}": "acc" for name in ("sst2", "rte", "cb", "boolq", "wsc", "wic", "multirc")},
        fewshot=0,
        include=(OWN_TASKS,),
    ),
}
PROGRAMS = {"humaneval": "openai/openai_humaneval"}
"""Tasks of functions to be written → where their rows are on the hub."""
