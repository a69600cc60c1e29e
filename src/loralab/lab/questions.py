"""What an evaluation is asked: names of tasks and suites, and how they are put."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loralab.errors import EvaluationError
from loralab.evals.generate import Sampling
from loralab.evals.sandbox import protection
from loralab.evals.suites import PROGRAMS, SUITES
from loralab.evals.taskfiles import refuse_file, refuse_unknown
from loralab.lab.tasks import is_file_of_items
from loralab.pocket import world


def names(text: str) -> list[str]:
    """Split names at commas."""
    return [name.strip() for name in text.split(",") if name.strip()]


def assignments(texts: Sequence[str]) -> dict[str, str]:
    """Read TASK[:SPLIT]=FILE. Raises EvaluationError where no file stands behind a name."""
    found: dict[str, str] = {}
    for text in texts:
        key, _, file = text.partition("=")
        if not key or not file:
            fix = "write --data hellaswag=validation.jsonl"
            raise EvaluationError(f"{text!r} does not say which file belongs to which task", where="--data", fix=fix)
        found[key] = file
    return found


@dataclass(frozen=True)
class Questions:
    """What is to be asked.

    Attributes:
        tasks: names of tasks, groups, tags or suites; addresses of the pocket world; files of items.
        limit: most items of each task.
        fewshot: examples before each item; None is each task's own number.
        data: `task` or `task:split` → file.
        include: folders with more tasks in lm-eval's format.
        chat: put prompts through the chat template.
        samples: answers to each prompt of tasks that are sampled.
        temperature: of these samples; 0 is greedy.
        top_p: of these samples.
        seed: of these samples.
        unsafe: run programs without protection where this machine offers none.
    """

    tasks: Sequence[str]
    limit: int | None = None
    fewshot: int | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    include: Sequence[str] = ()
    chat: bool = False
    samples: int = 1
    temperature: float | None = None
    top_p: float = 0.95
    seed: int = 0
    unsafe: bool = False

    @property
    def sampling(self) -> Sampling:
        """How samples are drawn: P1's temperature 0.2 for one pass@1 over several, greedy for a single one."""
        warm = (0.2 if self.samples > 1 else 0.0) if self.temperature is None else self.temperature
        return Sampling(temperature=warm, top_p=self.top_p if warm else 1.0, seed=self.seed)

    def data_of(self, task: str) -> dict[str, str]:
        """Give the files of a task by split."""
        found = {}
        for key, file in self.data.items():
            name, _, split = key.partition(":")
            if name == task:
                found[split or "test"] = file
        return found


def unheeded(questions: Questions) -> dict[str, list[str]]:
    """Give the tasks that an option says nothing to, by option; programs and items are asked as they stand.

    Options are `fewshot` (where examples are asked for) and `chat`; one that all tasks heed, or that is not given, is left out.
    """
    given = [name for name, value in (("fewshot", questions.fewshot), ("chat", questions.chat)) if value]
    deaf = sorted(name for name in _parts(questions) if _stands(name))
    return {option: deaf for option in given if deaf}


def _parts(questions: Questions) -> set[str]:
    """Name the tasks asked for, those of suites one by one."""
    return {part for name in questions.tasks for part in (SUITES[name].parts if name in SUITES else [name])}


def _stands(name: str) -> bool:
    """Tell whether a task's prompts are taken as they stand, without examples and without a chat template."""
    return name in PROGRAMS or world.is_address(name) or is_file_of_items(name)


def _refuse_unheeded(questions: Questions) -> None:
    """Refuse an option that none of the tasks heeds."""
    for option, deaf in unheeded(questions).items():
        if set(deaf) == _parts(questions):
            what = f"{option} says nothing to {', '.join(deaf)}: programs and items are asked as they stand"
            fix = f"leave {option} out, or name tasks of lm-eval's catalogue"
            raise EvaluationError(what, where=f"--{option}", fix=fix)


def refuse_before_loading(questions: Questions) -> None:
    """Look whether every name can be meant before a model is loaded."""
    if not questions.tasks:
        raise EvaluationError("no task is named", where="--tasks", fix="write --tasks hellaswag,arc_challenge")
    if questions.samples < 1:
        raise EvaluationError(f"{questions.samples} samples", where="--samples", fix="ask for 1 or more")
    sampling = questions.sampling
    known = _parts(questions)
    _refuse_unheeded(questions)
    for key, file in questions.data.items():
        if key.partition(":")[0] not in known:
            fix = f"tasks asked for: {', '.join(sorted(known))}"
            raise EvaluationError(f"data is given for {key.partition(':')[0]!r}, which is not asked", fix=fix)
        refuse_file(key.partition(":")[0], file)
    if not sampling.greedy and not any(name in PROGRAMS or world.is_address(name) for name in known):
        fix = "leave --samples and --temperature out, or ask for `code` or pocket:stack"
        raise EvaluationError("none of these tasks is sampled", where=", ".join(sorted(known)), fix=fix)
    if known & PROGRAMS.keys() and not questions.unsafe and (missing := protection().missing):
        fix = "leave the programs out, or say --unsafe"
        raise EvaluationError(f"programs cannot be run safely here: {missing}", where="--tasks", fix=fix)
    for name in known & PROGRAMS.keys():
        if strange := sorted(questions.data_of(name).keys() - {"test"}):
            raise EvaluationError(f"{name!r} has no split {strange[0]!r}", where="--data", fix=f"write {name}=FILE")
    for name in sorted(known):
        if world.is_address(name):
            world.suite(name, 1)
        elif not _stands(name):
            suite = next((SUITES[n] for n in questions.tasks if n in SUITES and name in SUITES[n].parts), None)
            refuse_unknown(name, (*questions.include, *(suite.include if suite else ())))
