"""Where the reward of an answer comes from: functions, graders, the pocket's true reward, and models (`reward_models.py`)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

from loralab.delta.opened import folder_of
from loralab.errors import DataError, DeltaError
from loralab.evals.code import CodeProblem, cut, program
from loralab.evals.sandbox import run_programs
from loralab.lab.deltas import names_of
from loralab.lab.prompts import Asked
from loralab.lab.reward_function import RewardFunction, is_function
from loralab.pocket.grading import grade
from loralab.pocket.preferences import true_reward
from loralab.spec.objective import RewardSourceSpec

TRUE, GRADE = "pocket:true", "grade"
FINAL = "####"
"""Stands before the final answer in the rows of GSM8K."""


@dataclass(frozen=True)
class Answered:
    """An answer to be rewarded: its prompt, all its tokens (the stop token included), and its text without special ones."""

    asked: Asked
    tokens: list[int]
    text: str


class Reward(Protocol):
    """Gives a number for each answer."""

    def __call__(self, answers: Sequence[Answered]) -> list[float]: ...


@dataclass(frozen=True)
class Rewarded:
    """Rewards of answers: the weighted sum, and the parts by name, unweighted."""

    total: list[float]
    parts: dict[str, list[float]]


class Rewards:
    """Several rewards, added with their weights. Sources: by name, with weight."""

    def __init__(self, sources: dict[str, tuple[float, Reward]]) -> None:
        self.sources = sources

    def __call__(self, answers: Sequence[Answered]) -> Rewarded:
        """Reward answers. Raises EvaluationError where a source fails."""
        parts = {name: reward(answers) for name, (_, reward) in self.sources.items()}
        total = [sum(self.sources[n][0] * parts[n][i] for n in parts) for i in range(len(answers))]
        return Rewarded(total, parts)


def true(answers: Sequence[Answered]) -> list[float]:
    """Give the pocket world's true reward of stories."""
    return [true_reward(answer.asked.text, answer.text) for answer in answers]


def graded(answers: Sequence[Answered]) -> list[float]:
    """Give 1 for right answers and 0 for others; programs with tests are executed, confined, each different one once.

    Raises:
        EvaluationError: programs cannot be confined on this machine.
    """
    programs = [_program(answer) for answer in answers]
    different = list(dict.fromkeys(text for text in programs if text is not None))
    passed = {text: outcome.passed for text, outcome in zip(different, run_programs(different), strict=True)}
    pairs = zip(answers, programs, strict=True)
    return [float(_is_right(answer) if text is None else passed[text]) for answer, text in pairs]


def _is_right(answer: Answered) -> bool:
    if answer.asked.item is not None:
        return grade(answer.asked.item, answer.text)
    known = answer.asked.known or ""
    if FINAL in known:
        return FINAL in answer.text and _final(answer.text) == _final(known)
    return answer.text.strip() == known.strip()


def _final(text: str) -> str:
    return text.rpartition(FINAL)[2].strip().replace(",", "")


def _program(answer: Answered) -> str | None:
    """Write the program that passes if the answer is right; None where nothing is to be executed."""
    row = answer.asked.row
    if answer.asked.item is not None:
        return None
    if isinstance(row.get("test"), str) and isinstance(row.get("entry_point"), str):
        problem = CodeProblem("", answer.asked.text, row["test"], row["entry_point"])
        return program(problem, cut(answer.text))
    tests = row.get("tests") or row.get("test_list")
    if isinstance(tests, list):
        tests = "\n".join(map(str, tests))
    return f"{answer.text}\n{tests}\n" if isinstance(tests, str) else None


def refuse_ungradable(prompts: Sequence[Asked], path: str) -> None:
    """Refuse prompts that a reward says nothing about.

    Raises:
        DataError: `pocket:true` of prompts that ask for no story, `grade` of rows without a right answer.
    """
    for asked in prompts:
        if path == TRUE and not asked.text.startswith("story of "):
            fix = "take data.train=pocket:story, or another reward"
            raise DataError("pocket:true rewards stories, but this prompt asks for none", where=asked.where, fix=fix)
        if path != GRADE:
            continue
        answered = Answered(asked, [], "")
        is_story = asked.item is not None and asked.item.skill == "story"
        if is_story or (asked.item is None and not asked.known and _program(answered) is None):
            fix = "add a column `completion`, `answer`, or `test` and `entry_point`; or take another reward"
            raise DataError("`grade` needs a right answer, and this row has none", where=asked.where, fix=fix)


@dataclass(frozen=True)
class ByFunction:
    """Rewards by a function of the user's own."""

    function: RewardFunction

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        rows = [answer.asked.row for answer in answers]
        return self.function([answer.asked.text for answer in answers], [answer.text for answer in answers], rows)


def rewards_of(
    sources: Sequence[RewardSourceSpec], functions: Mapping[str, RewardFunction], model: Callable[[str], Reward]
) -> Rewards:
    """Make the rewards of a list of sources; a name that comes again gets a number.

    Args:
        sources: as the spec names them.
        functions: by path, started already.
        model: gives the reward of a path that names a delta.
    """
    made: dict[str, tuple[float, Reward]] = {}
    for source in sources:
        reward: Reward
        if source.path in (TRUE, GRADE):
            name, reward = source.path.rpartition(":")[2], true if source.path == TRUE else graded
        elif source.path in functions:
            name, reward = source.path.rpartition(":")[2], ByFunction(functions[source.path])
        else:
            name, reward = names_of([source.path])[0], model(source.path)
        free = (f"{name}-{copy}" if copy > 1 else name for copy in count(1))
        made[next(one for one in free if one not in made)] = (source.weight, reward)
    return Rewards(made)


def is_delta(path: str) -> bool:
    """Tell whether a reward's path names a delta."""
    return path not in (TRUE, GRADE) and not (is_function(path) and not Path(path).exists())


def look_for_rewards(sources: Sequence[RewardSourceSpec]) -> dict[str, RewardFunction]:
    """Look whether all rewards are there, before anything is loaded, and start the functions.

    Raises:
        LoralabError: a folder, file, module or function does not exist.
    """
    for source in sources:
        if is_delta(source.path) and not folder_of(source.path).is_dir():
            fix = "name a run folder of objective.name=reward, its delta, FILE.py:FUNCTION, pocket:true or grade"
            raise DeltaError("there is no reward of this name", where=source.path, fix=fix)
    found = [source for source in sources if is_function(source.path) and not is_delta(source.path)]
    return {source.path: RewardFunction(source.path, source.timeout) for source in found if source.path != TRUE}
