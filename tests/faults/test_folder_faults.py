"""The run folder under kill -9, full disks and forbidden writes."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from loralab.errors import FolderError, Interrupted
from loralab.run.folder import RunFolder, append_line, read_json, read_lines, write_atomic, write_json

WRITER = """
import sys
from loralab.run.folder import RunFolder, append_line, write_json
run = RunFolder(sys.argv[1])
with run.lock():
    step = 0
    print("writing", flush=True)
    while True:
        run.write_status(state="running", step=step)
        append_line(run.metrics, {"step": step, "text": "x" * 5000})
        step += 1
"""


def _fill(folder: Path) -> None:
    """Write to a folder until its disk is full, then check what is left; runs in a small file system of its own."""
    run = RunFolder.create_or_open(folder, "a", "name: a\n")
    run.write_status(state="running", step=1)
    appended = 0
    try:
        while True:
            append_line(run.metrics, {"step": appended, "text": "x" * 3000})
            appended += 1
    except Interrupted as error:
        assert error.exit_code == 5
        assert "resumes" in str(error)
    assert [row["step"] for row in read_lines(run.metrics)] == list(range(appended))
    before = run.status.read_bytes()
    try:
        run.write_status(message="x" * 100_000)
    except Interrupted as error:
        assert str(run.status) in str(error)
    else:
        raise AssertionError("the disk is not full")
    assert run.status.read_bytes() == before
    assert not list(run.path.glob(".*.tmp"))
    run.metrics.unlink()
    run.write_status(state="done")
    assert run.read_status()["state"] == "done"


def _kill_while_writing(run: RunFolder) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(run.path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    try:
        assert writer.stdout.readline() == "writing\n"
        while len(read_lines(run.metrics)) < 5:
            pass
        with pytest.raises(FolderError, match=f"process {writer.pid}"), run.lock():
            pass
        writer.send_signal(signal.SIGKILL)
        _resume_at_once(run)
    finally:
        writer.kill()
        writer.communicate()


def _resume_at_once(run: RunFolder) -> None:
    """The killed process may still be dying, or a zombie: neither may block."""
    for _ in range(1000):
        try:
            with run.lock():
                return
        except FolderError:
            pass
    raise AssertionError("a killed run blocks its folder")


def test_a_killed_run_leaves_whole_files_and_no_living_owner(tmp_path):
    run = RunFolder.create_or_open(tmp_path, "a", "name: a\n")
    for _ in range(3):
        run.metrics.unlink(missing_ok=True)
        _kill_while_writing(run)
        rows = read_lines(run.metrics)
        assert [row["step"] for row in rows] == list(range(len(rows)))
        assert read_json(run.status)["step"] - len(rows) in (-1, 0)
        assert not list(run.path.glob(".*.tmp"))
        append_line(run.metrics, {"step": len(rows)})
        assert len(read_lines(run.metrics)) == len(rows) + 1


def test_a_really_full_disk_interrupts_and_keeps_the_old_content(tmp_path):
    small_disk = f'mount -t tmpfs -o size=256k tmpfs "{tmp_path}" && exec "$@"'
    unshare = [shutil.which("unshare") or "unshare", "-Urm", "sh", "-c", small_disk, "sh"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user name space may mount a small disk here: the next two tests stand in for it")
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_folder_faults as me"
    program += f"; me._fill(me.Path({str(tmp_path)!r}))"
    done = subprocess.run([*unshare, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_at_the_sync_keeps_the_old_content(tmp_path, monkeypatch, code):
    path = tmp_path / "status.json"
    write_json(path, {"step": 1})

    def fail(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(Interrupted) as caught:
        write_json(path, {"step": 2})
    assert caught.value.exit_code == 5
    assert caught.value.where == str(path)
    assert read_json(path) == {"step": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["status.json"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_at_an_append_interrupts(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(Interrupted):
        append_line(tmp_path / "metrics.jsonl", {"step": 1})


def test_a_line_that_fits_only_in_part_leaves_no_trace(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 1})
    before = path.read_bytes()
    program = f"""
import resource, signal
from loralab.errors import FolderError
from loralab.run.folder import append_line
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) + 10},) * 2)
try:
    append_line({str(path)!r}, {{"step": 2, "text": "too long for the rest"}})
except FolderError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert str(path) in done.stdout
    assert path.read_bytes() == before


def test_an_interrupt_while_writing_leaves_the_old_content(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_atomic(path, "old")

    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["a"]


def test_a_missing_folder_is_an_error_with_its_place(tmp_path):
    for write in (lambda path: write_atomic(path, "x"), lambda path: append_line(path, {"step": 1})):
        with pytest.raises(FolderError) as caught:
            write(tmp_path / "none/a")
        assert str(tmp_path / "none/a") in str(caught.value)
        assert caught.value.exit_code == 2
