"""The report command: where it writes, what it says, and what it refuses."""

from pathlib import Path

import pytest

from little_world import loralab
from report_world import make_run, open_run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("report") / "sweep"
    for name in ("full", "lora-r4"):
        make_run(root, name)
    return root


def test_a_folder_of_runs_gets_its_page(sweep, capsys):
    assert loralab("report", sweep) == 0
    page = sweep / "report.html"
    assert capsys.readouterr().out == f"wrote {page}\n"
    html = page.read_text(encoding="utf-8")
    assert all(run.name in html for run in sweep.iterdir() if run.is_dir())


def test_one_run_gets_its_page(sweep, tmp_path, capsys):
    run = make_run(tmp_path, "cola")
    assert loralab("report", run) == 0
    assert (run / "report.html").exists() and str(run / "report.html") in capsys.readouterr().out


def test_the_page_goes_where_out_says(sweep, tmp_path, capsys):
    page = tmp_path / "a name with spaces, long enough that a line of eighty characters cannot hold all of it.html"
    assert loralab("report", sweep, "--out", page) == 0
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert loralab("report", sweep) == 0
    assert page.read_bytes() == (sweep / "report.html").read_bytes()


def test_runs_that_did_not_begin_are_no_reason_to_fail(tmp_path, capsys):
    open_run(tmp_path, "lora-r4")
    assert loralab("report", tmp_path) == 0
    assert "not begun" in (tmp_path / "report.html").read_text(encoding="utf-8")


def refused(capsys, *words: object) -> str:
    """Check that the command refuses with its three lines, and give them."""
    assert loralab("report", *words) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert [line.split()[0] for line in said.err.splitlines()] == ["loralab:", "where:", "next:"]
    return said.err


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "read.txt").write_text("nothing")
    assert "no run in this folder" in refused(capsys, tmp_path)
    assert [path.name for path in tmp_path.rglob("*.html")] == []


@pytest.mark.parametrize("name", ["none", "file.txt"])
def test_what_is_no_folder_is_refused(tmp_path, capsys, name):
    (tmp_path / "file.txt").write_text("nothing")
    assert str(tmp_path / name) in refused(capsys, tmp_path / name)


def test_a_page_that_is_a_folder_is_refused(sweep, tmp_path, capsys):
    assert "--out report.html" in refused(capsys, sweep, "--out", tmp_path)


def test_a_page_in_no_folder_is_refused(sweep, tmp_path, capsys):
    page = tmp_path / "none" / "page.html"
    assert str(page) in refused(capsys, sweep, "--out", page)
    assert not page.parent.exists()


def test_a_report_of_nothing_shows_its_usage(capsys):
    assert loralab("report") == 2
    assert "FOLDER" in capsys.readouterr().err
