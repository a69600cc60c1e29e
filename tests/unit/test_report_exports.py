"""Figures as files: whole by themselves, in real colours, the same bytes each time."""

import re
import struct
from pathlib import Path
from xml.etree import ElementTree

import pytest

from inside_world import make_inside
from loralab.errors import FolderError
from loralab.report.drawing import PNG_DPI, canvas, kept_as_files
from loralab.report.exports import write_figures
from loralab.report.page import write
from mended_world import write_sweep
from report_world import make_run

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    edits = [("scale", 0.0, ""), ("scale", 0.5, ""), ("scale", 1.0, ""), ("all", 0.5, "")]
    return write_sweep(tmp_path_factory.mktemp("exports") / "sweep", edits=edits)


@pytest.fixture(scope="module")
def files(sweep):
    return write_figures(sweep, sweep.parent / "figures")


def test_every_figure_of_the_page_is_a_file_of_each_format(sweep, files):
    page = write(sweep).read_text(encoding="utf-8")
    figures = page.count('class="figure"')
    assert figures > 3
    for ending in (".svg", ".png"):
        assert len([file for file in files if file.suffix == ending]) == figures
    assert sorted(sweep.parent.joinpath("figures").iterdir()) == sorted(files)
    assert (sweep.parent / "figures" / "repair-plane.svg") in files


def test_an_svg_stands_by_itself_in_real_colours_and_its_text_is_text(files):
    for file in (file for file in files if file.suffix == ".svg"):
        text = file.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        assert "var(--" not in text and "currentColor" not in text
        assert root.get("width") and root.get("viewBox")
        assert "#1b1e24" in text, "ink of the light page"
        words = " ".join("".join(element.itertext()) for element in root.iter(f"{SVG}text"))
        assert re.search(r"[a-z]{4}", words)
        assert root.find(f"{SVG}metadata") is not None and "date" not in text


def test_a_png_is_as_large_as_the_page_draws_it_threefold(files):
    (file,) = (file for file in files if file.name == "repair-plane.png")
    content = file.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", content[16:24])
    assert (width, height) == (520 * PNG_DPI // 72, 440 * PNG_DPI // 72)
    assert b"Learning against forgetting" in content and b"Software" not in content


def test_files_are_the_same_bytes_each_time(sweep, files, tmp_path):
    again = write_figures(sweep, tmp_path, formats=("svg",))
    assert again and all(file.read_bytes() == (files[0].parent / file.name).read_bytes() for file in again)


def test_pages_are_the_same_with_and_without_files(sweep, tmp_path):
    before = write(sweep, tmp_path / "a.html").read_bytes()
    with kept_as_files(("svg",)) as kept:
        inside = write(sweep, tmp_path / "b.html").read_bytes()
    assert kept and inside == before
    count = len(kept)
    write(sweep, tmp_path / "c.html")
    assert len(kept) == count, "outside of the block nothing is kept"


def test_figures_in_a_file_have_the_inks_that_the_page_exchanges():
    with kept_as_files(("svg",)) as kept, canvas("x", "a title", 200, 100) as made:
        axes = made.axes()
        axes.plot([0, 1], [0, 1], color="#D55E00")
    assert "var(--line)" in made.svg and "currentColor" in made.svg
    text = kept["x.svg"].decode()
    assert "#dfe2e7" in text and "#d55e00" in text and "a title" in text


@pytest.mark.parametrize("kind", ["spectra", "run"])
def test_other_folders_have_files_too(kind, tmp_path):
    where = tmp_path / "what"
    folder = make_run(where, "lora-r4") if kind == "run" else make_inside(where, depth=1, deltas={"a": 2.0})
    found = write_figures(folder, tmp_path / "figures", formats=["svg"])
    assert len(found) > 4 and all(re.fullmatch(r"[a-z0-9-]+\.svg", file.name) for file in found)


def test_an_unknown_format_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(FolderError, match="jpeg") as refused:
        write_figures(tmp_path / "nothing", tmp_path / "figures", formats=("jpeg",))
    assert refused.value.fix == "use svg or png" and not (tmp_path / "figures").exists()


def test_a_file_where_the_folder_should_be_is_refused(sweep, tmp_path):
    Path(tmp_path / "taken").write_text("")
    with pytest.raises(FolderError) as refused:
        write_figures(sweep, tmp_path / "taken", formats=("svg",))
    assert refused.value.where == str(tmp_path / "taken")
