"""What an evaluation measures: a score of a model, its paired change from the base, and what the change comes to.

A change is called learned or forgotten if its p-value, corrected for the number of tasks, is below 5 %; else it is a tie.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from loralab.errors import FolderError
from loralab.evals.stats import Score, holm

LEVEL = 0.05
PROMPT_LENGTH = 600
AGAIN = "run the evaluation again"
LINE = {"model": str, "name": str, "value": float, "unit": str, "n": int, "task": str, "metric": str, "fewshot": int}
"""What every line of `scores.jsonl` must hold."""


@dataclass(frozen=True)
class Measured:
    """One score of one model.

    Attributes:
        task: its name in the catalogue; of a suite's mean, the suite's.
        model: `base`, or the delta's name.
        score: named `<task>/<metric>`, a suite's mean by the suite's name alone.
        change: the paired change from the base as `evals.paired` gives it, None for the base itself.
        prompt_hash: SHA-256 over all prompts of the task.
        template_hash: SHA-256 of the task's templates.
        chance: the score of a guesser, None where guessing has none.
        higher_is_better: False for perplexities, losses and error rates.
    """

    task: str
    metric: str
    model: str
    score: Score
    change: Mapping[str, Any] | None = None
    version: str | None = None
    fewshot: int = 0
    prompt_hash: str = ""
    template_hash: str | None = None
    chance: float | None = None
    higher_is_better: bool = True

    @property
    def name(self) -> str:
        return self.score.name

    @property
    def is_suite(self) -> bool:
        return self.score.name == self.task

    def as_line(self) -> dict[str, Any]:
        """Give the line of `scores.jsonl`."""
        rest = {key: getattr(self, key) for key in ("task", "metric", "version", "fewshot", "prompt_hash")}
        rest |= {key: getattr(self, key) for key in ("template_hash", "chance", "higher_is_better", "change")}
        line: dict[str, Any] = plain({"model": self.model, **asdict(self.score), **rest})
        return line

    def change_score(self) -> Score | None:
        """Give the paired change, tuned minus base, as a score; None where there is none."""
        value = None if self.change is None else finite(self.change.get("value"))
        if self.change is None or value is None:
            return None
        error = finite(self.change.get("standard_error"))
        return Score(f"{self.name}_change", value, self.score.unit, self.score.n, error)

    def change_interval(self) -> tuple[float, float] | None:
        """Give the 95 % interval of the change: the recorded one, else by Student's t over the items."""
        if self.change is None:
            return None
        ends = self.change.get("interval")
        if isinstance(ends, list | tuple) and len(ends) == 2:
            low, high = finite(ends[0]), finite(ends[1])
            if low is not None and high is not None:
                return low, high
        found = self.change_score()
        return found.interval() if found is not None and found.n > 1 else None

    @classmethod
    def of_line(cls, line: Mapping[str, Any], where: str) -> "Measured":
        """Read a line of `scores.jsonl`. Raises FolderError if something that it must hold is missing or odd."""
        for key, kind in LINE.items():
            value = line.get(key)
            whole = isinstance(value, kind) and not isinstance(value, bool)
            if not (finite(value) is not None if kind is float else whole):
                raise FolderError(f"the line has no {key}, or an odd one: {value!r}", where=where, fix=AGAIN)
        change = line.get("change")
        if not isinstance(change, dict | None):
            raise FolderError("the line's change is no object", where=where, fix=AGAIN)
        error = finite(line.get("standard_error")) if line["n"] > 1 else None
        version, template_hash = (
            None if line.get(key) is None else str(line[key]) for key in ("version", "template_hash")
        )
        return cls(
            task=line["task"],
            metric=line["metric"],
            model=line["model"],
            score=Score(line["name"], float(line["value"]), line["unit"], line["n"], error),
            change=change,
            version=version,
            fewshot=line["fewshot"],
            prompt_hash=str(line.get("prompt_hash") or ""),
            template_hash=template_hash,
            chance=finite(line.get("chance")),
            higher_is_better=line.get("higher_is_better") is not False,
        )


# What the changes say


@dataclass(frozen=True)
class Verdict:
    """What a change comes to: `learned`, `forgotten`, `tie`, or "" where nothing tells; and its corrected p-value."""

    word: str
    p_adjusted: float | None


def _word(one: Measured, adjusted: float | None) -> str:
    """Call a change by its corrected p-value; where there is none, by whether its 95 % interval holds zero."""
    change, interval = one.change_score(), one.change_interval()
    if change is None or (adjusted is None and interval is None):
        return ""
    clear = adjusted < LEVEL if adjusted is not None else interval is not None and not interval[0] <= 0 <= interval[1]
    if not clear or not change.value:
        return "tie"
    return "learned" if (change.value > 0) is one.higher_is_better else "forgotten"


def judged(measured: Sequence[Measured]) -> dict[tuple[str, str], Verdict]:
    """Judge every change, by model and name; p-values of tasks are corrected together, those of suites apart (Holm 1979)."""
    found = {}
    for suites in (False, True):
        family = [one for one in measured if one.change is not None and one.is_suite is suites]
        p_values = [finite((one.change or {}).get("p_value")) for one in family]
        corrected = iter(holm([p for p in p_values if p is not None]))
        for one, p in zip(family, p_values, strict=True):
            adjusted = None if p is None else next(corrected)
            found[one.model, one.name] = Verdict(_word(one, adjusted), adjusted)
    return found


def changes_of(
    items: Sequence[Mapping[str, Any]], model: str, name: str
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Give the items newly lost and newly won.

    Args:
        items: rows of an evaluation.
        model: the delta's name.
        name: of the score, `<task>/<metric>`.

    Returns:
        Rows right before and wrong after, and the reverse, in order of items; long prompts keep their end, which asks.
    """
    lost, won = list[dict[str, Any]](), list[dict[str, Any]]()
    for row in items:
        before, after = finite(row.get("base_right")), finite(row.get("tuned_right"))
        if row.get("model") != model or row.get("probe") != name or before is None or after is None or before == after:
            continue
        (lost if after < before else won).append({**row, "prompt": cut(row.get("prompt"))})
    return lost, won


def cut(text: Any, most: int = PROMPT_LENGTH) -> str:
    """Keep the end of a long text: examples come before the question that is asked."""
    text = "" if text is None else str(text)
    return text if len(text) <= most else "… " + text[-most:].lstrip()


# Plain values


def finite(value: Any) -> float | None:
    """Give a finite number as a float, None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def plain(value: Any) -> Any:
    """Make a value fit for JSON: NumPy's numbers become Python's, tuples lists, what is not finite None, other things text."""
    if isinstance(value, Mapping):
        return {str(key): plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(part) for part in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)
