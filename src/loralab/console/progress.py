"""Runs while they go on: a live block on a terminal, plain lines elsewhere, a board of many."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from loralab.console.found import data_warnings
from loralab.console.screen import console, size, table
from loralab.errors import FolderError
from loralab.run.folder import RunFolder, read_lines

PLAIN_LINES = 20
"""About how many progress lines a run prints where there is no terminal."""

LITTLE = ("majority", "majority_change", "brier", "reward_sd", "margin_sd", "label_sd", "longer_wins", "longer_chosen")
"""Measures that the screen leaves to the files: they say little of how a run goes on."""
LEVELS = ("/accuracy", "/auc", "/pearson", "/loss", "policy/reward", "policy/held_out")
"""Endings of the scores that stand on the board."""

UNDER_WAY = ("waiting", "new", "running")
BROKEN_OFF = ("interrupted", "diverged")
"""A run found like this at the first look ended in an earlier call, and goes on in this one."""


class LiveDisplay:
    """One block that stays in place: progress, loss, last scores, learning rate, memory, time left."""

    def __init__(self, out: Console | None = None) -> None:
        self.out = out or console()
        self._line: dict[str, Any] = {}
        self._scores: dict[str, float] = {}
        self._live: Live | None = None

    def begin(self, facts: dict[str, Any]) -> None:
        self.out.print(_facts_line(facts))
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.out,
        )
        self._task = self._progress.add_task("train", total=facts["total_steps"], completed=facts["step"])
        self._live = Live(self._block(), console=self.out, refresh_per_second=4)
        self._live.start()

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        self._line = line
        self._progress.update(self._task, completed=line["step"], total=total_steps)
        if self._live:
            self._live.update(self._block())

    def scores(self, step: int, scores: Sequence[Any]) -> None:
        self._scores = {score.name: score.value for score in scores}
        if self._live:
            self._live.update(self._block())

    def note(self, message: str) -> None:
        self.out.print(message)

    def end(self) -> None:
        if self._live:
            self._live.stop()

    def _block(self) -> Group:
        return Group(self._progress, Text(_step_text(self._line)), Text(scores_text(self._scores)))


class PlainDisplay:
    """One line every so often: for logs and pipes."""

    def __init__(self, out: Console | None = None) -> None:
        self.out = out or console()

    def begin(self, facts: dict[str, Any]) -> None:
        self.out.print(_facts_line(facts))
        self._every = max(1, facts["total_steps"] // PLAIN_LINES)

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        if line["step"] % self._every == 0 or line["step"] == total_steps:
            self.out.print(f"step {line['step']}/{total_steps}  {_step_text(line)}")

    def scores(self, step: int, scores: Sequence[Any]) -> None:
        self.out.print(f"step {step}  {scores_text({score.name: score.value for score in scores})}")

    def note(self, message: str) -> None:
        self.out.print(message)

    def end(self) -> None:
        pass


class Board:
    """Many runs at a glance, a line each, read from their folders; where there is no terminal, a line as each one ends."""

    def __init__(self, names: Sequence[str], out: Console | None = None) -> None:
        self.out, self.names = out or console(), list(names)
        self._said: dict[str, str] = {}
        self._live = Live(Text(""), console=self.out, refresh_per_second=2) if self.out.is_terminal else None

    def __enter__(self) -> "Board":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def look(self, folders: Sequence[RunFolder]) -> None:
        """Read the folders (in the order of the names) and show how far each run is."""
        found = [(name, *_progress(folder)) for name, folder in zip(self.names, folders, strict=True)]
        if self._live:
            lines = [[escape(cell.removeprefix("loss ")) for cell in (name, *cells)] for name, _, *cells in found]
            self._live.update(table(("run", "state", "step", "loss", "last probe"), lines))
            return
        for name, mark, state, step, aim, scores in found:
            if name not in self._said:
                self._said[name] = mark if state in BROKEN_OFF else ""
            if state not in UNDER_WAY and self._said[name] != mark:
                self._said[name] = mark
                how_far = f", step {step}, {aim}  {scores}" if step else ""
                self.out.print(f"{name}: {state}{how_far}", markup=False)


def _progress(folder: RunFolder) -> tuple[str, str, str, str, str]:
    """Give a mark of the status as written, state, step, loss or reward, and last scores of a run as they stand on disk."""
    try:
        if not folder.status.exists():
            return "", "waiting", "", "", ""
        status = folder.read_status()
        steps, scores = _numbers(folder.metrics, "loss"), _numbers(folder.scores, "value")
    except FolderError as error:  # its own run says more; those of the other runs go on
        return error.what, "damaged", "", "", ""
    state = str(status["state"])
    mark = f"{state} {status.get('updated')}"
    last = {str(line.get("name")): line["value"] for line in scores if line["step"] == scores[-1]["step"]}
    said = scores_text({name: value for name, value in last.items() if name.endswith(LEVELS)})
    if not steps:
        return mark, state, "", "", said
    return mark, state, f"{steps[-1]['step']}/{status.get('total_steps', '?')}", _aim(steps[-1], ".3f"), said


def _numbers(path: Path, key: str) -> list[dict[str, Any]]:
    """Read the lines of a file that hold a number under a key, each of a step."""
    lines = read_lines(path)
    return [line for line in lines if isinstance(line.get(key), int | float) and isinstance(line.get("step"), int)]


def display() -> LiveDisplay | PlainDisplay:
    """Choose the live block on a terminal, plain lines elsewhere."""
    out = console()
    return LiveDisplay(out) if out.is_terminal else PlainDisplay()


def cost_line(facts: Mapping[str, Any]) -> str:
    """Write what a finished run took, by its status."""
    line = f"{facts['step']} steps, {facts['tokens']:,} tokens in {facts['wall_s']:.1f} s"
    if facts.get("probe_s") and facts["wall_s"]:
        share = min(1.0, facts["probe_s"] / facts["wall_s"])
        line += f"; probes took {share:.1%} of the time ({facts['probe_tokens']:,} tokens)"
    return f"{line}; peak memory {size(facts['peak_bytes'])}"


def _facts_line(facts: dict[str, Any]) -> str:
    where = f"{facts['folder']}  {facts['method']} on {facts['model']} ({facts['device']}, {facts['dtype']})"
    share = f"{facts['trained_parameters']:,} of {facts['all_parameters']:,} numbers train ({facts['share']:.2%})"
    start = f", going on from step {facts['step']}" if facts["step"] else ""
    warnings = [f"warning: {line}" for line in data_warnings(facts.get("data_report", {}))]
    return "\n".join([where, f"{share}, {facts['total_steps']} steps{start}", *warnings])


def _step_text(line: dict[str, Any]) -> str:
    if not line:
        return ""
    rate = max(line["learning_rate"].values())
    return (
        f"{_aim(line, '.4f')}  |g| {line['gradient_norm']:.3g}  lr {rate:.2e}  "
        f"{line['tokens_per_s']:,.0f} tokens/s  {size(line['peak_bytes'])}"
    )


def _aim(line: Mapping[str, Any], form: str) -> str:
    """Write what training aims at: the loss, of judges with the share judged right; of a policy the reward and its price.

    The loss of a policy says nothing of how it goes: its answers change with it.
    """
    keys = {"reward": "reward", "kl": "KL", "entropy": "entropy", "length": "tokens"}
    if isinstance(line.get("reward"), int | float):
        found = [f"{word} {line[key]:{form}}" for key, word in keys.items() if isinstance(line.get(key), int | float)]
        return "  ".join(found)
    right = line.get("accuracy")
    said = f"  accuracy {right:{form}}" if isinstance(right, int | float) else ""
    return f"loss {line['loss']:{form}}{said}"


def scores_text(scores: dict[str, float]) -> str:
    """Write the scores of whole texts and tasks; those of single skills, with two slashes, stand in the files."""
    told = {name: value for name, value in scores.items() if name.count("/") < 2}
    return "  ".join(f"{name} {value:.4f}" for name, value in told.items() if name.rpartition("/")[2] not in LITTLE)
