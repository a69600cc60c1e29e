"""Names written beside what they name, so that no figure needs a legend."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.text import Text
from numpy import ndarray

from loralab.report.drawing import FAINT, SIZE, Canvas, Named

SIDES = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in pixels."""


def text_width(text: str, size: float = SIZE) -> float:
    """Estimate the width of a text in pixels; system fonts are about this wide."""
    return 0.6 * size * len(text)


def place_labels(
    axes: Axes, points: Sequence[tuple[float, float]], labels: Sequence[str], taken: Sequence[Box]
) -> list[Text]:
    """Write each label beside its point, where it covers least of what is drawn already.

    A greedy choice of eight sides, near or, with a line to the point, farther away.
    """
    frame = axes.get_window_extent()
    boxes = [*taken, *(_around(*_pixels(axes, point), 9, 9) for point in points)]
    made = []
    for point, label in zip(points, labels, strict=True):
        x, y = _pixels(axes, point)
        half_wide, half_high = text_width(label) / 2, SIZE / 2
        spots = [
            (
                ring,
                x + dx * (half_wide + (gap if not dy else gap - 4)),
                y + dy * (half_high + (gap if not dx else gap - 2)),
            )
            for ring, gap in enumerate((11, 24, 40, 58))
            for dx, dy in SIDES
        ]
        near = [_around(across, up, half_wide, half_high) for _, across, up in spots]
        covered = _overlaps(np.array(near), np.array(boxes)).sum(axis=1)
        costs = [
            float(area) + 10 * _outside(box, tuple(frame.extents)) + 60 * ring
            for area, box, (ring, _, _) in zip(covered, near, spots, strict=True)
        ]
        best = min(range(len(near)), key=lambda i: (round(costs[i]), i))
        boxes.append(near[best])
        ring, across, up = spots[best]
        if ring:
            edge = (min(max(x, near[best][0]), near[best][2]), min(max(y, near[best][1]), near[best][3]))
            ends = axes.transData.inverted().transform([(x, y), edge])
            axes.plot(ends[:, 0], ends[:, 1], color=FAINT, lw=0.9, zorder=1)
        place = axes.transData.inverted().transform((across, up))
        made.append(axes.text(place[0], place[1], label, ha="center", va="center", size=SIZE, clip_on=False))
    return made


def _pixels(axes: Axes, point: tuple[float, float]) -> tuple[float, float]:
    x, y = axes.transData.transform(point)
    return float(x), float(y)


def _around(x: float, y: float, half_wide: float, half_high: float) -> Box:
    return (x - half_wide, y - half_high, x + half_wide, y + half_high)


def _overlaps(a: Float[ndarray, "boxes 4"], b: Float[ndarray, "others 4"]) -> Float[ndarray, "boxes others"]:
    """Give the area that each box shares with each other one."""
    low, high = np.maximum(a[:, None, :2], b[:, :2]), np.minimum(a[:, None, 2:], b[:, 2:])
    area: Float[ndarray, "boxes others"] = np.maximum(0.0, high - low).prod(axis=2)
    return area


def _outside(box: Box, frame: Sequence[float]) -> float:
    area = (box[2] - box[0]) * (box[3] - box[1])
    left, bottom, right, top = (float(edge) for edge in frame)
    return area - float(_overlaps(np.array([box]), np.array([(left, bottom, right, top)]))[0, 0])


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move places apart until neighbours are `gap` away, in the same order and within [low, high] if they fit."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = [places[i] for i in order]
    gap = min(gap, (high - low) / max(1, len(moved) - 1))
    for i in range(len(moved)):
        moved[i] = max(moved[i], low if i == 0 else moved[i - 1] + gap)
    for i in reversed(range(len(moved))):
        moved[i] = min(moved[i], high if i == len(moved) - 1 else moved[i + 1] - gap)
    result = [0.0] * len(moved)
    for i, place in zip(order, moved, strict=True):
        result[i] = place
    return result


def right_margin(labels: Sequence[str]) -> float:
    """Give the pixels that names at the right end of lines need."""
    return min(190.0, 16 + text_width(max(labels, key=len), SIZE - 1))


def name_ends(made: Canvas, axes: Axes, ends: Sequence[tuple[Named, str, float, float]]) -> None:
    """Write the name of each run at the right, level with the end (x, y) of its line as far as there is room."""
    frame, to_axes = axes.get_window_extent(), axes.transAxes.inverted()
    pixels = [axes.transData.transform((x, y)) for _, _, x, y in ends]
    heights = spread([float(pixel[1]) for pixel in pixels], SIZE + 2, frame.y0, frame.y1)
    for (run, label, _, _), (x, y), height in zip(ends, pixels, heights, strict=True):
        start, end = to_axes.transform((x + 3, y)), to_axes.transform((frame.x1 + 9, height))
        made.mark(axes.text(end[0], end[1], label, transform=axes.transAxes, va="center", size=SIZE - 1), run)
        ways = ([start[0], end[0] - 0.005], [start[1], end[1]])
        made.mark(axes.plot(*ways, transform=axes.transAxes, color=FAINT, lw=0.8, clip_on=False)[0], run)
