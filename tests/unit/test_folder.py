import json
import os
import socket
import subprocess
import sys
import threading
import time

import pytest

from loralab.errors import FolderError, LoralabError
from loralab.run import folder as module
from loralab.run.folder import (
    RunFolder,
    append_line,
    environment,
    keep_lines,
    read_json,
    read_lines,
    repair,
    write_atomic,
    write_json,
)

SPEC = "name: a\nseed: 0\n"


@pytest.fixture
def run(tmp_path):
    return RunFolder.create_or_open(tmp_path, "a-12345678", SPEC)


def test_write_atomic_replaces_text_and_bytes_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_atomic(path, "größer")
    assert path.read_text(encoding="utf-8") == "größer"
    write_atomic(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [item.name for item in tmp_path.iterdir()] == ["a.txt"]


def test_written_files_have_the_usual_permissions(tmp_path):
    (tmp_path / "usual").write_text("")
    write_atomic(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_readers_never_see_half_a_file(tmp_path):
    path = tmp_path / "value.json"
    values = [{"text": letter * 200_000} for letter in "ab"]
    write_json(path, values[0])
    stop = threading.Event()

    def write():
        while not stop.is_set():
            for value in values:
                write_json(path, value)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(read_json(path) in values for _ in range(100))
    finally:
        stop.set()
        writer.join()


def test_json_files_must_hold_an_object(tmp_path):
    assert read_json(tmp_path / "none.json") == {}
    for text in ('{"a": ', "[1]"):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(FolderError) as caught:
            read_json(tmp_path / "bad.json")
        assert "bad.json" in str(caught.value)


def test_lines_come_back_in_order(tmp_path):
    path = tmp_path / "lines.jsonl"
    rows = [{"step": step, "text": "line\nbreak\r\u2028ü"} for step in range(5)]
    for row in rows:
        append_line(path, row)
    assert read_lines(path) == rows
    assert read_lines(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("torn", [b'{"step": 2', b'{"step": 2}', b'{"st\n', b"\x00\x00\x00\n"])
def test_a_torn_last_line_is_dropped_and_repaired(tmp_path, torn):
    path = tmp_path / "lines.jsonl"
    append_line(path, {"step": 1})
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert read_lines(path) == [{"step": 1}]
    repair(path)
    assert path.read_bytes() == whole
    append_line(path, {"step": 2})
    assert read_lines(path) == [{"step": 1}, {"step": 2}]


def test_repair_leaves_whole_and_missing_files_alone(tmp_path):
    path = tmp_path / "lines.jsonl"
    repair(path)
    assert not path.exists()
    append_line(path, {"step": 1})
    before = path.stat()
    repair(path)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_damage_before_the_last_line_is_named_with_its_line(tmp_path):
    path = tmp_path / "lines.jsonl"
    path.write_text('{"a": 1}\n{"a":\n{"a": 3}\n')
    with pytest.raises(FolderError) as caught:
        read_lines(path)
    assert caught.value.where == f"{path}:2"


def test_keep_lines_drops_what_came_after_a_checkpoint(tmp_path):
    path = tmp_path / "lines.jsonl"
    for step in range(6):
        append_line(path, {"step": step, "loss": step / 3})
    first = b"".join(path.read_bytes().splitlines(keepends=True)[:4])
    keep_lines(path, lambda row: row["step"] <= 3)
    assert path.read_bytes() == first
    keep_lines(tmp_path / "none.jsonl", lambda row: True)
    assert not (tmp_path / "none.jsonl").exists()


def test_create_writes_the_spec_and_a_new_status(run):
    assert run.spec.read_text() == SPEC
    assert run.read_status()["state"] == "new"
    assert "started" not in run.read_status()


def test_the_same_spec_opens_the_folder_and_keeps_its_status(tmp_path, run):
    run.write_status(state="running", step=3)
    again = RunFolder.create_or_open(tmp_path, "a-12345678", SPEC)
    assert again.read_status()["step"] == 3


@pytest.mark.parametrize(("spec", "line"), [("name: a\nseed: 1\n", 2), (SPEC + "x: 1\n", 3), ("name: a\n", 2)])
def test_another_spec_is_refused_at_its_first_difference(tmp_path, run, spec, line):
    with pytest.raises(FolderError) as caught:
        RunFolder.create_or_open(tmp_path, "a-12345678", spec)
    assert caught.value.where == f"{run.spec}:{line}"
    assert run.spec.read_text() == SPEC


def test_a_folder_that_is_no_run_is_refused_untouched(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.txt").write_text("years of work")
    with pytest.raises(FolderError):
        RunFolder.create_or_open(tmp_path, "thesis", SPEC)
    assert [item.name for item in (tmp_path / "thesis").iterdir()] == ["chapter.txt"]


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(FolderError) as caught:
        RunFolder.create_or_open(tmp_path, "a", SPEC)
    assert str(tmp_path / "a") in str(caught.value)


def test_status_merges_fields_and_keeps_its_start(run, monkeypatch):
    monkeypatch.setattr(module, "_now", lambda: "first")
    run.write_status(state="running", step=0, total_steps=10)
    monkeypatch.setattr(module, "_now", lambda: "second")
    run.write_status(step=4)
    expected = {"state": "running", "step": 4, "total_steps": 10, "started": "first", "updated": "second"}
    assert run.read_status() == expected == json.loads(run.status.read_text())


def test_unknown_states_are_refused(run):
    with pytest.raises(FolderError, match="finished"):
        run.write_status(state="finished")
    assert run.read_status()["state"] == "new"


def test_a_lock_has_a_living_owner_and_goes_away(run):
    assert run.owner() is None
    with run.lock():
        assert run.owner().pid == os.getpid()
        assert run.owner().host == socket.gethostname()
    assert run.owner() is None
    with run.lock():
        pass


def test_a_locked_folder_refuses_a_second_run_and_says_whose_it_is(run):
    with run.lock():
        with pytest.raises(LoralabError) as caught, RunFolder(run.path).lock():
            pass
        message = str(caught.value)
        assert caught.value.exit_code == 2
        assert f"process {os.getpid()}" in message
        assert socket.gethostname() in message
        assert "s ago" in message
        assert run.owner() is not None, "the refused run must not free the lock"


def test_an_error_frees_the_lock(run):
    with pytest.raises(KeyError), run.lock():
        raise KeyError
    assert run.owner() is None


def test_the_lock_repairs_torn_lines_and_removes_leftovers(run):
    for path in (run.metrics, run.scores, run.samples):
        path.write_bytes(b'{"step": 1}\n{"st')
    (run.path / ".status.json.0123.tmp").write_text("half")
    with run.lock():
        append_line(run.metrics, {"step": 2})
    assert read_lines(run.metrics) == [{"step": 1}, {"step": 2}]
    assert run.scores.read_bytes() == run.samples.read_bytes() == b'{"step": 1}\n'
    assert not list(run.path.glob("*.tmp")) + list(run.path.glob(".*.tmp"))


def _claim(run, age_s=0.0, **changes):
    """Leave the lock of another owner whose last heartbeat was `age_s` seconds ago."""
    with run.lock():
        owner = read_json(run.path / ".lock")
    write_json(run.path / ".lock", owner | changes)
    then = time.time() - age_s
    os.utime(run.path / ".lock", (then, then))


def test_a_reused_process_number_is_not_the_owner(run):
    _claim(run, process="another start")
    assert run.owner() is None
    with run.lock():
        assert run.owner() is not None


@pytest.mark.parametrize(("age_s", "alive"), [(module.STALE_S / 2, True), (module.STALE_S * 2, False)])
def test_an_owner_elsewhere_lives_by_its_heartbeat(run, age_s, alive):
    _claim(run, age_s, host="elsewhere")
    assert (run.owner() is not None) == alive
    if alive:
        with pytest.raises(FolderError, match="elsewhere"), run.lock():
            pass
    else:
        with run.lock():
            assert run.owner().host == socket.gethostname()


def test_a_silent_owner_on_this_machine_lives_as_long_as_its_process(run):
    _claim(run, age_s=module.STALE_S * 100)
    assert run.owner() is not None


def test_the_heart_beats_while_the_lock_is_held(run):
    with run.lock(heartbeat_s=0.01):
        os.utime(run.path / ".lock", (0, 0))
        deadline = time.monotonic() + 5
        while (run.path / ".lock").stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert time.time() - (run.path / ".lock").stat().st_mtime < 5


def test_a_run_that_lost_its_folder_stops_writing_and_leaves_the_new_lock(run):
    with pytest.raises(FolderError, match="took over"), run.lock():
        write_json(run.path / ".lock", read_json(run.path / ".lock") | {"host": "elsewhere"})
        run.write_status(state="running")
    assert run.owner().host == "elsewhere"


def test_one_of_many_takes_over_a_dead_owner(run):
    _claim(run, process="dead")
    program = """
import sys, time
from loralab.errors import FolderError
from loralab.run import folder

def slowly(pid, look=folder._process_start):  # long enough for all to find the dead owner
    time.sleep(0.1)
    return look(pid)

folder._process_start = slowly
sys.stdin.readline()
try:
    with folder.RunFolder(sys.argv[1]).lock():
        print("mine", flush=True)
        sys.stdin.readline()
except FolderError:
    print("refused", flush=True)
"""
    words = [sys.executable, "-c", program, str(run.path)]
    racers = [subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    answers = [racer.stdout.readline().strip() for racer in racers]
    for racer in racers:
        racer.communicate("done\n", timeout=20)
    assert sorted(answers) == ["mine", "refused", "refused", "refused"]


def test_environment_describes_packages_machine_and_code():
    found = environment()
    import numpy

    assert found["packages"]["numpy"] == numpy.__version__
    assert found["cores"] >= 1
    assert found["memory_bytes"] > 2**20
    assert found["command"] == sys.argv
    assert json.loads(json.dumps(found)) == found


def test_environment_names_the_commit_and_whether_it_is_dirty(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment()["git_commit"] is None
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "empty"], check=True)
    head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (environment()["git_commit"], environment()["git_dirty"]) == (head, False)
    (tmp_path / "new").write_text("")
    assert environment()["git_dirty"] is True
