"""The canvas of all figures: matplotlib in, SVG text out, that belongs to the page it stands in.

Text stays text, in the page's own font; ink, hairlines and paper take the page's colours, so that one figure serves light,
dark and print. Marks carry what the page's script reads: `data-run`, `data-method` and, for a tooltip, `data-tip`.
Within `kept_as_files` each figure is kept as a file of its own too. The same input gives the same bytes: no date, ids
salted with the figure's name.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from io import BytesIO, StringIO
from typing import Any, Protocol
from xml.etree import ElementTree

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.markers import MarkerStyle
from matplotlib.path import Path

from loralab.report.read import Run

COLOURS = {"full": "#D55E00", "lora": "#0072B2", "lora_plus": "#009E73", "cola": "#CC79A7", "peft": "#E69F00"}
"""One colour per method on all pages, told apart by the colour-blind too (Okabe & Ito)."""

DELTA_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F4FA3", "#8C6D31")
"""Colours of an evaluation's deltas, in their order, from the same palette."""

BASE_COLOUR = "#8A8F98"
RANK_SHAPES = ("o", "v", "s", "D", "^", "<", "P", "X", "*")
"""Marker of ranks 1, 2, 4, … 256; full fine-tuning, which has no rank, is a hexagon."""

INK, FAINT, PAPER = "#1b1e24", "#dfe2e7", "#ffffff"
"""Colours of a figure in a file of its own, those of the light page; on a page they become the page's, light or dark."""
_PAGE = {INK: "currentColor", FAINT: "var(--line)", PAPER: "var(--paper)"}
SIZE = 13.5
PNG_DPI = 216
"""Three pixels of a PNG for one of the page."""
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.size": SIZE,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 1.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": SIZE - 1.5,
    "ytick.labelsize": SIZE - 1.5,
    "axes.unicode_minus": True,
}
_SVG, _XLINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _XLINK)


class Named(Protocol):
    """What a mark can stand for: a run, or a model of an evaluation."""

    @property
    def folder(self) -> str: ...

    @property
    def method(self) -> str: ...


def colour(method: str) -> str:
    """Give the colour of a method."""
    return COLOURS.get(method, BASE_COLOUR)


def shape(run: Run) -> str:
    """Give the marker of a run's rank."""
    if run.rank is None:
        return "h" if run.method == "full" else "p"
    return RANK_SHAPES[min(round(run.rank.bit_length() - 1), len(RANK_SHAPES) - 1)]


def icon(run: Run) -> str:
    """Give the marker of a run as an SVG path around the origin, 1 wide: what names the run outside of figures."""
    return marker_path(shape(run))


def marker_path(name: str) -> str:
    """Give a marker as an SVG path around the origin, 1 wide."""
    marker = MarkerStyle(name)
    words = {Path.MOVETO: "M", Path.LINETO: "L", Path.CURVE3: "Q", Path.CURVE4: "C", Path.CLOSEPOLY: "Z"}
    parts = []
    for corners, code in marker.get_path().iter_segments(marker.get_transform()):
        down = [-value if i % 2 else value for i, value in enumerate(corners)]  # SVG counts downwards
        numbers = "" if code == Path.CLOSEPOLY else " ".join(f"{value:.3f}" for value in down)
        parts.append(words[code] + numbers)
    return "".join(parts)


def marker_size(run: Run) -> float:
    """Grow with the rank, in points: 6.5 at rank 1, 10 at 256 and for full fine-tuning."""
    steps = len(RANK_SHAPES) - 1
    place = steps if run.rank is None else min(run.rank.bit_length() - 1, steps)
    return 6.5 + 3.5 * place / steps


@dataclass
class Canvas:
    """A figure being drawn, `width` × `height` in the page's pixels, and what its marks say."""

    name: str
    title: str
    width: float
    height: float
    figure: Figure
    _marks: list[dict[str, str]] = field(default_factory=list)
    svg: str = ""

    def axes(self, *, left: float = 62, right: float = 12, top: float = 14, bottom: float = 50) -> Axes:
        """Add axes with margins in pixels."""
        made = self.figure.add_axes(
            (
                left / self.width,
                bottom / self.height,
                (self.width - left - right) / self.width,
                (self.height - top - bottom) / self.height,
            )
        )
        made.tick_params(length=0)
        return made

    def mark(self, artist: Artist, run: Named | None, tip: str = "", *, stop: bool = False) -> None:
        """Say what an artist stands for; with a tip it answers the pointer, with `stop` the keyboard reaches it too."""
        facts = {"class": "mark" if tip else "part"}
        if run is not None:
            facts |= {"data-run": run.folder, "data-method": run.method}
        if tip:
            facts |= {"data-tip": tip, "role": "img", "aria-label": tip}
        if stop:
            facts["tabindex"] = "0"
        artist.set_gid(f"mark-{len(self._marks)}")
        self._marks.append(facts)

    def finish(self) -> None:
        out = StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)  # the page's fonts have them
            self.figure.savefig(out, format="svg", transparent=True, metadata=nothing)
            files = _files.get()
            if files is not None:
                files.keep(self)
        self.svg = _of_the_page(out.getvalue(), self._marks, self.title)


@dataclass(frozen=True)
class Files:
    """Figures as files of their own: `found` holds their bytes by file name, in the order in which they were drawn."""

    formats: Sequence[str]
    found: dict[str, bytes] = field(default_factory=dict)

    def keep(self, made: Canvas) -> None:
        """Save a figure on white paper, with its title as metadata."""
        for ending in self.formats:
            out, metadata = BytesIO(), dict.fromkeys(("Date", "Creator") if ending == "svg" else ("Software",))
            facts = {**metadata, "Title": made.title}
            made.figure.savefig(out, format=ending, facecolor=PAPER, dpi=PNG_DPI, metadata=facts)
            self.found[f"{made.name}.{ending}"] = out.getvalue()


_files: ContextVar[Files | None] = ContextVar("files", default=None)


@contextmanager
def kept_as_files(formats: Sequence[str]) -> Iterator[dict[str, bytes]]:
    """Keep every figure that is drawn within the block as a file too: file name → bytes.

    Args:
        formats: `svg` (text stays text) or `png` (216 dots per inch).
    """
    files = Files(formats)
    token = _files.set(files)
    try:
        yield files.found
    finally:
        _files.reset(token)


@contextmanager
def canvas(name: str, title: str, width: float = 520, height: float = 380) -> Iterator[Canvas]:
    """Draw in the house style, whatever a person's own matplotlib settings are; `canvas.svg` is there after the block.

    Args:
        name: unique on the page: it salts the ids.
        title: what the figure shows, for those who cannot see it.
        width: in pixels of the page.
        height: in pixels of the page.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        made = Canvas(name, title, width, height, Figure(figsize=(width / 72, height / 72), dpi=72))
        yield made
        made.finish()


def _of_the_page(text: str, marks: Sequence[dict[str, str]], title: str) -> str:
    """Take what belongs to a file of its own out of the SVG, and put in what belongs to the page."""
    root = ElementTree.fromstring(text)
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag == f"{{{_SVG}}}metadata":
                parent.remove(child)
    for element in root.iter():
        name = element.get("id", "")
        if name and name not in used:
            del element.attrib["id"]
        if name.startswith("mark-"):
            element.attrib.update(marks[int(name.removeprefix("mark-"))])
        for key, value in element.attrib.items():
            if not key.startswith(("data-", "aria-")):
                element.set(key, _page_colours(value))
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"class": "figure", "role": "group", "aria-label": title}
    return ElementTree.tostring(root, encoding="unicode")


def _page_colours(value: str) -> str:
    for standin, page in _PAGE.items():
        value = value.replace(standin, page)
    value = re.sub(r"-?\d+\.\d{3,}", lambda found: f"{float(found[0]):.2f}", value)
    value = re.sub(r"font-family: [^;]*(?:; )?", "", value)
    return re.sub(r"font: ((?:(?:bold|italic|\d00) )*)([\d.]+)px [^;]*", _font, value)


def _font(found: re.Match[str]) -> str:
    weight = "; font-weight: 600" if "bold" in found[1] or "600" in found[1] else ""
    slant = "; font-style: italic" if "italic" in found[1] else ""
    return f"font-size: {found[2]}px{weight}{slant}"
