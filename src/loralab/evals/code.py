"""Programs as answers: problems with unit tests, as in HumanEval, graded in the sandbox, and pass@k.

A problem's program is prompt, completion, test and the call `check(entry_point)`, run as one text (Chen et al. 2021, "Evaluating
large language models trained on code", section 2.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from math import comb

import numpy as np

from loralab.base.sources import Rows, Source, read_rows
from loralab.errors import DataError, EvaluationError
from loralab.evals.sandbox import USUAL, Limits, Outcome, run_programs
from loralab.evals.stats import SHARE, Score, mean_score

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
"""Texts that end a completion, as the function is then over (the same paper, section 3.1)."""


@dataclass(frozen=True)
class CodeProblem:
    """A function to be written.

    Attributes:
        task_id: name of the problem.
        prompt: imports, signature and docstring.
        test: defines `check(candidate)`, which asserts.
        entry_point: name of the function.
        canonical_solution: a body that passes, or empty.
    """

    task_id: str
    prompt: str
    test: str
    entry_point: str
    canonical_solution: str = ""


def read_problems(path: str, split: str | None = None) -> list[CodeProblem]:
    """Read problems from a file, a folder or the hub, with columns named as the fields of `CodeProblem`.

    Raises:
        DataError: the source cannot be read, a column is missing, or a row holds something else than text.
    """
    rows = read_rows(Source(path, split=split))
    names = [field.name for field in fields(CodeProblem)]
    missing = [name for name in names[:-1] if name not in rows.columns]
    if missing:
        here = ", ".join(rows.columns)
        raise DataError(
            f"no column `{missing[0]}`", where=path, fix=f"rename the column that holds it; there are: {here}"
        )
    problems = [_problem(row, names, f"{path}: row {number}") for number, row in enumerate(_all(rows), 1)]
    seen: set[str] = set()
    for problem in problems:
        if problem.task_id in seen:
            raise DataError(f"two problems are named `{problem.task_id}`", where=path, fix="give each its own task_id")
        seen.add(problem.task_id)
    return problems


def _all(rows: Rows) -> list[dict[str, object]]:
    return [row for batch in rows.batches() for row in batch]


def _problem(row: dict[str, object], names: Sequence[str], where: str) -> CodeProblem:
    values = {name: row.get(name) for name in names}
    values["task_id"] = None if values["task_id"] is None else str(values["task_id"])
    values[names[-1]] = values[names[-1]] or ""
    for name, value in values.items():
        if not isinstance(value, str):
            raise DataError(f"`{name}` is no text", where=where, fix="write it as text, or take the row out")
    return CodeProblem(**{name: str(value) for name, value in values.items()})


def cut(completion: str) -> str:
    """Give a completion up to the first text of `STOPS` in it, as generation that knows them would have stopped there."""
    return completion[: min((at for stop in STOPS if (at := completion.find(stop)) >= 0), default=len(completion))]


def program(problem: CodeProblem, completion: str) -> str:
    """Write the program that passes if and only if the completion solves the problem."""
    return f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})\n"


def grade_code(
    problems: Sequence[CodeProblem],
    completions: Sequence[Sequence[str]],
    limits: Limits = USUAL,
    *,
    workers: int | None = None,
    unsafe: bool = False,
) -> list[list[Outcome]]:
    """Run the completions of each problem; those that make the same program run once.

    Raises:
        EvaluationError: see `run_programs`.
    """
    texts = [[program(problem, text) for text in mine] for problem, mine in zip(problems, completions, strict=True)]
    different = list(dict.fromkeys(text for mine in texts for text in mine))
    outcomes = dict(zip(different, run_programs(different, limits, workers=workers, unsafe=unsafe), strict=True))
    return [[outcomes[text] for text in mine] for mine in texts]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate without bias that at least one of k samples passes, from n samples of which c passed: 1 − C(n−c, k) / C(n, k).

    The difference of the whole numbers is divided once, so the result is right to the last bit.

    Source: Chen et al. 2021, equation 1.

    Raises:
        EvaluationError: not 1 ≤ k ≤ n, or not 0 ≤ c ≤ n.
    """
    if not 0 <= c <= n:
        raise EvaluationError(
            f"{c} of {n} samples passed", where="pass@k", fix="count passing samples among the samples"
        )
    if not 1 <= k <= n:
        raise EvaluationError(
            f"pass@{k} of {n} samples", where="pass@k", fix=f"take a k from 1 to {n}, or more samples"
        )
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def pass_at_k_curve(n: int, correct: Sequence[int]) -> list[Score]:
    """Estimate pass@k for every k from 1 to n: the mean over problems, with problems as clusters.

    Args:
        n: samples of each problem.
        correct: of each problem, how many of them passed.

    Raises:
        EvaluationError: there is no problem, no sample, or a count is not within 0 to n.
    """
    if n < 1 or not correct:
        raise EvaluationError(
            f"pass@k of {len(correct)} problems with {n} samples", where="pass@k", fix="give 1 or more of both"
        )
    curve = []
    for k in range(1, n + 1):
        of_count = {c: pass_at_k(n, c, k) for c in set(correct)}
        values = np.array([of_count[c] for c in correct])
        curve.append(mean_score(f"pass@{k}", SHARE, values, np.ones(len(values))))
    return curve
