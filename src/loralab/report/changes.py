"""Figures of an evaluation: every model's scores, what changed, pass@k. Evaluation in, SVG text out."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from loralab.evals.stats import Z95, Score
from loralab.lab.evaluation import BASE, Evaluation
from loralab.lab.measured import Measured, finite
from loralab.report.drawing import BASE_COLOUR, DELTA_COLOURS, FAINT, PAPER, RANK_SHAPES, Canvas, canvas
from loralab.report.figures import Drawn
from loralab.report.labels import name_ends, right_margin, text_width
from loralab.report.read import printable
from loralab.report.wording import number

MOST_ROWS = 20
"""Scores in one figure; of more, those that changed most."""
LONGEST_NAME = 30


@dataclass(frozen=True)
class Model:
    """A model of an evaluation as pages show it: name, colour and marker; `folder` and `method` are what marks carry."""

    name: str
    colour: str
    marker: str

    @property
    def folder(self) -> str:
        return self.name

    @property
    def method(self) -> str:
        return self.name

    @property
    def label(self) -> str:
        return printable(self.name)


def models_of(evaluation: Evaluation) -> list[Model]:
    """Give the base in grey, then each delta its colour and marker, in the order of the evaluation."""
    deltas = [
        Model(name, DELTA_COLOURS[i % len(DELTA_COLOURS)], RANK_SHAPES[i % len(RANK_SHAPES)])
        for i, name in enumerate(evaluation.deltas)
    ]
    return [Model(BASE, BASE_COLOUR, "o"), *deltas]


def figures(evaluation: Evaluation) -> list[Drawn]:
    """Draw scores and changes, a pair of figures per unit, then pass@k per task."""
    drawn = []
    units = list(dict.fromkeys(one.score.unit for one in evaluation.measured))
    for i, unit in enumerate(units):
        names = [n for n in evaluation.names() if any(one.score.unit == unit for one in _all(evaluation, n))]
        kept = _most_changed(evaluation, names)
        said = f"The {len(kept)} of {len(names)} scores that changed most; the table has all." if kept != names else ""
        drawn += [
            _levels(evaluation, kept, unit, f"levels-{i}", said),
            _changes(evaluation, kept, unit, f"changes-{i}", said),
        ]
    return [figure for figure in drawn if figure is not None]


def _all(evaluation: Evaluation, name: str) -> list[Measured]:
    return [one for one in evaluation.measured if one.name == name]


def _most_changed(evaluation: Evaluation, names: Sequence[str]) -> list[str]:
    if len(names) <= MOST_ROWS:
        return list(names)

    def moved(name: str) -> float:
        found = [change.value for one in _all(evaluation, name) if (change := one.change_score()) is not None]
        return max(map(abs, found), default=0.0)

    kept = sorted(names, key=lambda name: (not any(one.is_suite for one in _all(evaluation, name)), -moved(name)))[
        :MOST_ROWS
    ]
    return [name for name in names if name in kept]


def _rows(made: Canvas, names: Sequence[str], titles: Sequence[str], suites: Sequence[bool]) -> Axes:
    """Make axes with a row per score, named at the left, suites below a line."""
    short = [printable(t) if len(t) <= LONGEST_NAME else printable(t[: LONGEST_NAME - 1]) + "…" for t in titles]
    axes = made.axes(left=14 + max(text_width(t, 11.3) for t in short), bottom=50)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_yticks(range(len(names)), short)
    axes.yaxis.grid(False)
    for row in range(1, len(names)):
        first = suites[row] and not suites[row - 1]
        axes.axhline(row - 0.5, color=BASE_COLOUR if first else FAINT, lw=1.0 if first else 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    return axes


def _titles(evaluation: Evaluation, names: Sequence[str]) -> tuple[list[str], list[bool]]:
    firsts = [_all(evaluation, name)[0] for name in names]
    return [evaluation.title(one) for one in firsts], [one.is_suite for one in firsts]


def _height(names: Sequence[str], models: int) -> float:
    return 74 + len(names) * (16 + 11 * models)


def _places(count: int) -> list[float]:
    """Spread marks of one row from top to bottom."""
    return [0.66 * ((i + 0.5) / count - 0.5) for i in range(count)]


def _levels(evaluation: Evaluation, names: Sequence[str], unit: str, key: str, said: str) -> Drawn | None:
    models = models_of(evaluation)
    title = f"Before and after: {unit}"
    titles, suites = _titles(evaluation, names)
    with canvas(key, title, 520, _height(names, len(models))) as made:
        axes = _rows(made, names, titles, suites)
        for model, shift in zip(models, _places(len(models)), strict=True):
            for row, name in enumerate(names):
                one = evaluation.find(model.name, name)
                if one is None:
                    continue
                ends = one.score.interval() or (one.score.value, one.score.value)
                tip = f"{model.label}, {titles[row]}: {_value(one.score, ends)}"
                _mark(made, axes, model, one.score.value, ends, row + shift, tip, hollow=model.name == BASE)
        guessed = {
            row: one.chance
            for row, name in enumerate(names)
            for one in _all(evaluation, name)
            if one.chance is not None
        }
        for row, chance in guessed.items():
            axes.plot([chance] * 2, [row - 0.42, row + 0.42], color=BASE_COLOUR, lw=1.0, ls=(0, (2, 2)), zorder=1)
        axes.set_xlabel(unit, labelpad=6)
    caption = "Open grey circles are the base. Lines are 95\N{NO-BREAK SPACE}% intervals."
    caption += " Dashes mark what guessing gives." if guessed else ""
    return Drawn(made.svg, title, f"{caption} {said}".strip())


def _changes(evaluation: Evaluation, names: Sequence[str], unit: str, key: str, said: str) -> Drawn | None:
    """Draw changes in the good direction: learned to the right, forgotten to the left; ties are hollow."""
    models = [model for model in models_of(evaluation) if model.name != BASE]
    verdicts = evaluation.verdicts()
    names = [name for name in names if any(one.change_score() for one in _all(evaluation, name))]
    if not names or not models:
        return None
    title = "What changed: learned to the right, forgotten to the left"
    titles, suites = _titles(evaluation, names)
    with canvas(key, title, 520, _height(names, len(models))) as made:
        axes = _rows(made, names, titles, suites)
        axes.axvline(0, color=BASE_COLOUR, lw=1.2)
        for model, shift in zip(models, _places(len(models)), strict=True):
            for row, name in enumerate(names):
                one = evaluation.find(model.name, name)
                change = one.change_score() if one is not None else None
                if one is None or change is None:
                    continue
                sign = 1 if one.higher_is_better else -1
                ends = sorted(sign * end for end in one.change_interval() or (change.value, change.value))
                word = verdicts[model.name, name].word
                tip = f"{model.label}, {titles[row]}: {word or 'changed by'} {_value(change, one.change_interval(), signed=True)}"
                _mark(
                    made, axes, model, sign * change.value, (ends[0], ends[1]), row + shift, tip, hollow=word == "tie"
                )
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, -0.02 * (high - low)), max(high, 0.02 * (high - low)))
        axes.set_xlabel(f"change in the good direction, {unit}", labelpad=6)
    caption = "Paired, item by item, with 95\N{NO-BREAK SPACE}% intervals. Hollow marks are ties."
    return Drawn(made.svg, title, f"{caption} {said}".strip())


def _value(score: Score, ends: tuple[float, float] | None, *, signed: bool = False) -> str:
    text = number(score.value, signed=signed)
    if ends is None or ends[0] == ends[1]:
        return text
    return f"{text} (95\N{NO-BREAK SPACE}%: {number(ends[0], signed=signed)} to {number(ends[1], signed=signed)})"


def _mark(
    made: Canvas, axes: Axes, model: Model, x: float, ends: tuple[float, float], y: float, tip: str, *, hollow: bool
) -> None:
    if ends[0] < ends[1]:
        made.mark(axes.plot(ends, [y, y], color=model.colour, lw=1.6, alpha=0.6, solid_capstyle="butt")[0], model)
    face, edge, width = (PAPER, model.colour, 1.8) if hollow else (model.colour, PAPER, 0.8)
    dot = axes.plot([x], [y], model.marker, ms=6.5 if hollow else 7.5, mfc=face, mec=edge, mew=width)
    made.mark(dot[0], model, tip, stop=True)


# pass@k


def pass_at_k(evaluation: Evaluation) -> list[Drawn]:
    """Draw pass@k over k, on a logarithmic scale, a line per model."""
    tasks = list(dict.fromkeys(str(row.get("task")) for row in evaluation.curves))
    drawn = [_pass_at_k(evaluation, task, f"pass-{i}") for i, task in enumerate(tasks)]
    return [figure for figure in drawn if figure is not None]


def _pass_at_k(evaluation: Evaluation, task: str, key: str) -> Drawn | None:
    lines = []
    for model in models_of(evaluation):
        rows = [row for row in evaluation.curves if row.get("task") == task and row.get("model") == model.name]
        numbers = [tuple(finite(row.get(key)) for key in ("k", "pass_at_k", "standard_error")) for row in rows]
        points = sorted(
            (k, share, error or 0.0) for k, share, error in numbers if k is not None and share is not None and k >= 1
        )
        if points:
            lines.append((model, points))
    longest = max((points[-1][0] for _, points in lines), default=0)
    if longest < 2:
        return None  # a single point is in the table
    title = f"{printable(task)}: share of problems solved by one of k samples"
    with canvas(key, title, 520, 320) as made:
        axes = made.axes(left=58, right=right_margin([model.label for model, _ in lines]), bottom=48)
        axes.set_xscale("log")
        for model, points in lines:
            ks, shares = [k for k, _, _ in points], [share for _, share, _ in points]
            low = [max(0.0, share - _half(error)) for _, share, error in points]
            high = [min(1.0, share + _half(error)) for _, share, error in points]
            made.mark(axes.fill_between(ks, low, high, color=model.colour, alpha=0.13, lw=0), model)
            made.mark(axes.plot(ks, shares, color=model.colour, lw=1.7)[0], model)
            for i in _telling([int(k) for k in ks]):
                tip = f"{model.label}: pass@{ks[i]:.0f} {number(shares[i])}"
                dot = axes.plot([ks[i]], [shares[i]], model.marker, ms=5.5, color=model.colour, mec=PAPER, mew=0.6)
                made.mark(dot[0], model, tip)
        axes.set_xlim(1, longest)
        axes.xaxis.set_major_locator(
            FixedLocator([k for k in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if k <= longest])
        )
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.yaxis.set_major_locator(MaxNLocator(5))
        name_ends(made, axes, [(model, model.label, points[-1][0], points[-1][1]) for model, points in lines])
        axes.set_xlabel("k, samples per problem", labelpad=6)
        axes.set_ylabel("pass@k", labelpad=8, rotation_mode="anchor")
    return Drawn(made.svg, title, "Bands are 95\N{NO-BREAK SPACE}% intervals over the problems.")


def _half(error: float) -> float:
    return Z95 * error


def _telling(ks: Sequence[int]) -> list[int]:
    """Choose the places of 1, 2, 5, 10, 20, 50 … and of the last."""
    wanted = {step * 10**power for power in range(5) for step in (1, 2, 5)}
    return [i for i, k in enumerate(ks) if k in wanted or i == len(ks) - 1]
