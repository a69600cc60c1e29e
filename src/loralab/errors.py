"""Errors of the product: each says what was wrong, where, and what to do next.

Every error that a person can cause is a `LoralabError`; the command line prints it and leaves with its exit code.
Nothing else is caught there, so a traceback always means a defect of ours.
"""


class LoralabError(Exception):
    """Base of all errors with a message meant for the person at the keyboard.

    Args:
        what: what was wrong, in one sentence.
        where: dotted key, file and line, or name of the thing that was wrong.
        fix: what to do next.
    """

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        if self.where:
            lines.append(f"  where: {self.where}")
        if self.fix:
            lines.append(f"  next:  {self.fix}")
        return "\n".join(lines)


class SpecError(LoralabError):
    """A recipe does not describe a run. `problems` holds every mistake found, not only the first."""

    def __init__(self, problems: list[LoralabError]) -> None:
        self.problems = problems
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        super().__init__(f"{count} in the recipe")

    def __str__(self) -> str:
        return "\n".join([self.what, *(str(problem) for problem in self.problems)])


class DataError(LoralabError):
    """A data file, row, form or template cannot be used."""


class ModelError(LoralabError):
    """A base model cannot be loaded or does not offer what was asked of it."""


class TargetError(LoralabError):
    """A pattern matches no layer, or a rank does not fit the layer."""


class DeltaError(LoralabError):
    """A delta cannot be read, or belongs to another base."""


class FolderError(LoralabError):
    """A run folder is locked, damaged, or holds something else."""


class CheckpointError(LoralabError):
    """A checkpoint is incomplete or its checksum differs."""


class MergeError(LoralabError):
    """A merge would lose more than its limit allows."""


class EvaluationError(LoralabError):
    """A task, suite or way of sampling does not exist, or cannot run here."""


class Diverged(LoralabError):
    """Training produced NaN or a loss spike; the last good checkpoint is kept."""

    exit_code = 4


class Interrupted(LoralabError):
    """A run stopped before its end and can be resumed by the same command."""

    exit_code = 5


def did_you_mean(word: str, known: list[str]) -> str | None:
    """Name the closest known word, or None if none is near."""
    from difflib import get_close_matches

    near = get_close_matches(word, known, n=1, cutoff=0.6)
    return near[0] if near else None
