"""Items that changed sides: kept right, lost, won, kept wrong; and examples of those newly lost and newly won."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loralab.lab.measured import cut, finite
from loralab.report.wording import number, share, whole

SHOWN, LISTED = 2, 10
"""Examples on a card, and further ones in a list, of each task and direction."""
LISTED_LENGTH = 300


@dataclass(frozen=True)
class Bar:
    """Items of one task under one delta, by what became of them; shares `above chance` are None where none can guess.

    Attributes:
        won, kept, lost, missed: items wrong → right, right → right, right → wrong, wrong → wrong.
        lost_above, won_above: shares lost and won beyond what guessing is expected to do.
    """

    won: int
    kept: int
    lost: int
    missed: int
    lost_above: float | None = None
    won_above: float | None = None

    @property
    def n(self) -> int:
        return self.won + self.kept + self.lost + self.missed

    @property
    def parts(self) -> list[tuple[str, str, str, int]]:
        """Name, words, width in percent and count of each part, so that right before and right after lie side by side."""
        parts = [
            ("won", "newly won", self.won),
            ("kept", "kept right", self.kept),
            ("lost", "newly lost", self.lost),
            ("missed", "kept wrong", self.missed),
        ]
        return [(name, words, f"{100 * count / max(1, self.n):.3f}", count) for name, words, count in parts if count]

    @property
    def said(self) -> str:
        """Say the bar in words, for a tooltip and for those who cannot see it."""
        return ", ".join(f"{whole(count)} {words}" for _, words, _, count in self.parts) + f" of {whole(self.n)}"

    def of(self, which: str) -> tuple[str, str]:
        """Write a count with its share, and the share above chance."""
        count, above = (self.lost, self.lost_above) if which == "lost" else (self.won, self.won_above)
        return f"{whole(count)} ({share(count / max(1, self.n))})", share(above)


def bar_of_change(change: Mapping[str, Any] | None) -> Bar | None:
    """Read a bar off a recorded paired change; None where it does not count items lost and won."""
    if change is None:
        return None
    lost, won, before, n = (finite(change.get(key)) for key in ("lost", "won", "before", "n"))
    if lost is None or won is None or before is None or not n:
        return None
    kept = max(0, round(before * n) - round(lost))
    missed = max(0, round(n) - kept - round(lost) - round(won))
    above = (finite(change.get(f"{which}_above_chance")) for which in ("lost", "won"))
    return Bar(round(won), kept, round(lost), missed, *above)


def bar_of_items(base_right: Sequence[float], tuned_right: Sequence[float]) -> Bar:
    """Count items by what became of them; one that is worth more than half counts as right."""
    pairs = [(before > 0.5, after > 0.5) for before, after in zip(base_right, tuned_right, strict=True)]
    return Bar(*(pairs.count(pair) for pair in ((False, True), (True, True), (True, False), (False, False))))


@dataclass(frozen=True)
class Examples:
    """Items of one task that went one way: some as cards, more as a list, and how many are not shown.

    Each is a mapping of `item`, `prompt`, `reference`, `base` and `tuned` (what they wrote, None where nothing was written).
    """

    title: str
    way: str
    count: int
    cards: list[dict[str, Any]]
    listed: list[dict[str, Any]]

    @property
    def unseen(self) -> int:
        return self.count - len(self.cards) - len(self.listed)


def examples(title: str, way: str, rows: Iterable[Mapping[str, Any]]) -> Examples:
    """Take the first items of a task that were `lost` or `won`."""
    task = title.partition("/")[0]
    found = [{**row, "skill": None} if row.get("skill") == task else row for row in rows]  # the title says it
    cards = [_example(row) for row in found[:SHOWN]]
    listed = [_example(row, LISTED_LENGTH) for row in found[SHOWN : SHOWN + LISTED]]
    return Examples(title, way, len(found), cards, listed)


def _example(row: Mapping[str, Any], length: int | None = None) -> dict[str, Any]:
    texts = {"reference": row.get("reference"), "base": row.get("base_output"), "tuned": row.get("tuned_output")}
    told = {name: cut(text) if isinstance(text, str) else None for name, text in texts.items()}
    prompt = cut(row.get("prompt")) if length is None else cut(row.get("prompt"), length)
    skill = row.get("skill")
    return {"item": row.get("item"), "skill": skill if isinstance(skill, str) else "", "prompt": prompt, **told}


def written(value: float | None) -> str:
    """Write a p-value: never as zero."""
    return "–" if value is None else "< 0.0001" if value < 1e-4 else number(value, 4 if value < 0.01 else 3)
