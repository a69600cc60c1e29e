"""Figures as files of their own: SVG, where text stays text, and PNG."""

from collections.abc import Sequence
from pathlib import Path

from loralab.errors import FolderError
from loralab.report.drawing import kept_as_files
from loralab.report.page import of_folder
from loralab.run.files import explain_failed_writes, write_atomic

FORMATS = ("svg", "png")


def write_figures(folder: str | Path, out: str | Path, formats: Sequence[str] = FORMATS) -> list[Path]:
    """Write every figure of a folder's page into a folder, in light colours on white paper.

    Args:
        folder: what `loralab report` takes: a run, runs, an evaluation, spectra, a repair.
        out: the folder for the files; it is made. Files of the same names are replaced.
        formats: `svg`, `png`, or both.

    Returns:
        The files, in the page's order; none where the page has no figure.

    Raises:
        FolderError: an unknown format, nothing to report, or the files cannot be written.
        Interrupted: the disk is full.
    """
    for ending in formats:
        if ending not in FORMATS:
            fix = f"use {' or '.join(FORMATS)}"
            raise FolderError(f"figures are not written as {ending!r}", where="--format", fix=fix)
    with kept_as_files(tuple(dict.fromkeys(formats))) as files:
        of_folder(folder)
    target = Path(out)
    with explain_failed_writes(target):
        target.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_atomic(target / name, content)
    return [target / name for name in files]
