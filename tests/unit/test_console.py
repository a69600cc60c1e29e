"""The board of many runs: how far each is as its folder says, a line as each one ends, and nothing that stops it."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from loralab.console.found import data_warnings
from loralab.console.progress import Board, PlainDisplay
from loralab.run.folder import RunFolder, append_line


def run(root: Path, name: str, state: str, *, step: int = 0, total: int = 40) -> RunFolder:
    """Write what a run leaves after some steps: a loss at each, and the scores of base and last step."""
    folder = RunFolder(root / name)
    folder.path.mkdir(parents=True)
    folder.write_status(state=state, total_steps=total)
    append_line(folder.scores, {"step": 0, "model": "base", "name": "target/accuracy", "value": 0.05})
    for number in range(1, step + 1):
        append_line(folder.metrics, {"step": number, "loss": 2.0 - number / 100})
    if step:
        append_line(folder.metrics, {"step": step, "knot": 1, "gain": 0.1, "ends": False})
        for name, value in (("target/accuracy", 0.625), ("target/copy/accuracy", 0.5), ("drift/kl", 0.125)):
            append_line(folder.scores, {"step": step, "model": "tuned", "name": name, "value": value})
    return folder


class Screen:
    """A console that keeps what it shows."""

    def __init__(self, *, terminal: bool) -> None:
        self.text = StringIO()
        self.console = Console(file=self.text, force_terminal=terminal, width=120, height=40, color_system=None)

    def take(self) -> list[str]:
        """Give the lines shown since the last time."""
        lines = [" ".join(line.split()) for line in self.text.getvalue().splitlines() if line.strip()]
        self.text.seek(0)
        self.text.truncate()
        return lines


@pytest.fixture
def plain() -> Screen:
    return Screen(terminal=False)


def test_a_terminal_shows_how_far_each_run_is(tmp_path):
    folders = [RunFolder(tmp_path / "none"), run(tmp_path, "going", "running", step=30)]
    folders += [run(tmp_path, "begun", "running"), run(tmp_path, "done", "done", step=40)]
    screen = Screen(terminal=True)
    with Board(["lora [r=4]", "lora r16", "cola", "full"], screen.console) as board:
        board.look(folders)
    assert screen.take()[-5:-1] == [  # the last line gives the cursor back
        "lora [r=4] waiting",
        "lora r16 running 30/40 1.700 target/accuracy 0.6250",
        "cola running target/accuracy 0.0500",
        "full done 40/40 1.600 target/accuracy 0.6250",
    ]


def test_without_a_terminal_each_run_is_said_once_as_it_ends(tmp_path, plain):
    folders = [RunFolder(tmp_path / "a"), run(tmp_path, "b", "running", step=2)]
    with Board(["[a]", "b"], plain.console) as board:
        board.look(folders)
        assert plain.take() == []
        run(tmp_path, "a", "done", step=40)
        board.look(folders)
        assert plain.take() == ["[a]: done, step 40/40, loss 1.600 target/accuracy 0.6250"]
        folders[1].write_status(state="diverged")
        for _ in range(2):
            board.look(folders)
    assert plain.take() == ["b: diverged, step 2/40, loss 1.980 target/accuracy 0.6250"]


@pytest.mark.parametrize("before", ["interrupted", "diverged"])
def test_a_run_that_goes_on_is_said_when_it_ends_not_before(tmp_path, plain, before):
    folder = run(tmp_path, "a", before, step=2)
    with Board(["a"], plain.console) as board:
        board.look([folder])
        board.look([folder])
        assert plain.take() == [], "it ended like this in an earlier call"
        folder.write_status(state="running")
        board.look([folder])
        folder.write_status(state="done")
        board.look([folder])
        assert plain.take() == ["a: done, step 2/40, loss 1.980 target/accuracy 0.6250"]


def test_a_run_that_was_done_before_is_said(tmp_path, plain):
    with Board(["a"], plain.console) as board:
        board.look([run(tmp_path, "a", "done", step=40)])
    assert plain.take() == ["a: done, step 40/40, loss 1.600 target/accuracy 0.6250"]


DAMAGE = {
    "torn status": ("status.json", b'{"state": "run'),
    "status of another kind": ("status.json", b"[1, 2]"),
    "status in no encoding": ("status.json", b"\xff\xfe"),
    "damaged metrics": ("metrics.jsonl", b'{"step": 1, "lo\n{"step": 2, "loss": 1.0}\n'),
    "damaged scores": ("scores.jsonl", b'[]\n{"step": 2}\n'),
}


@pytest.mark.parametrize(("file", "content"), DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("terminal", [False, True])
def test_a_damaged_folder_stops_neither_the_board_nor_the_others(tmp_path, terminal, file, content):
    folders = [run(tmp_path, "a", "running", step=2), run(tmp_path, "b", "done", step=40)]
    (folders[0].path / file).write_bytes(content)
    screen = Screen(terminal=terminal)
    with Board(["a", "b"], screen.console) as board:
        board.look(folders)
    shown = "\n".join(screen.take())
    assert "a" in shown and "damaged" in shown
    assert "done" in shown and "target/accuracy 0.6250" in shown


def test_torn_or_odd_lines_are_passed_over(tmp_path, plain):
    folder = run(tmp_path, "a", "done", step=3)
    append_line(folder.metrics, {"step": 4, "loss": None})
    append_line(folder.scores, {"step": "4", "name": "target/loss", "value": 1.0})
    with folder.metrics.open("ab") as file:
        file.write(b'{"step": 5, "lo')
    with Board(["a"], plain.console) as board:
        board.look([folder])
    assert plain.take() == ["a: done, step 3/40, loss 1.970 target/accuracy 0.6250"]


def test_names_and_folders_belong_together(tmp_path, plain):
    with Board(["a", "b"], plain.console) as board, pytest.raises(ValueError):
        board.look([RunFolder(tmp_path / "a")])


def test_held_out_examples_that_are_trained_on_are_said_as_a_run_begins(plain):
    report = {"train": {"total": {"examples": 90}}, "validation": {"total": {"examples": 40, "in_training": 12}}}
    (line,) = data_warnings(report)
    assert line.startswith("12 of the 40 validation examples are trained on too")
    facts = {"folder": "runs/a", "method": "lora", "model": "m", "device": "cpu", "dtype": "float32", "share": 0.1}
    facts |= {"trained_parameters": 1, "all_parameters": 10, "total_steps": 4, "step": 0}
    PlainDisplay(plain.console).begin({**facts, "data_report": report})
    assert plain.take()[-1] == f"warning: {line}"
    PlainDisplay(plain.console).begin(facts)
    assert not any("warning" in line for line in plain.take())
    assert data_warnings({"train": {"total": {}}}) == data_warnings({"validation": {"total": {"examples": 4}}}) == []
