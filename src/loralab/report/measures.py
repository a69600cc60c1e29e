"""What is measured of a run: learning by its objective, forgetting, and what each is held against.

Legend: a change is the tuned model minus the base, paired by item. Learning is the change of the target in the good
direction, forgetting the change of the source in the bad one, so that both are usually above 0. A model that judges has no
base to be paired with, as its head was never trained: it is held against a baseline that needs no model.
"""

from dataclasses import dataclass

from loralab.evals.stats import Score, t95
from loralab.report.read import Run


@dataclass(frozen=True)
class Side:
    """One way to measure learning or forgetting.

    Attributes:
        level: name of the score that is measured on base and tuned model.
        change: name of its paired change.
        sign: +1 or −1; sign · change is the learning or the forgetting.
        unit: of the level.
        phrase: what the level says, in words.
        way: the kind of measurement, in words.
        measure: the level with its unit, in words; "" says it by unit and phrase.
        baseline: what the level is held against where that is not the base: a score's name, or a number.
        against: the baseline in words.
    """

    level: str
    change: str
    sign: int
    unit: str
    phrase: str
    way: str
    measure: str = ""
    baseline: str | float | None = None
    against: str = ""

    @property
    def words(self) -> str:
        """The level with its unit, in words."""
        return self.measure or (f"loss in {NATS}" if self.unit == NATS else f"share {self.phrase}")


SHARE, NATS = "share of items", "nats per token"
REWARD, AREA, CORRELATION = "reward", "share of up and down pairs", "correlation"
LEARNING = (
    Side("target/accuracy", "target/accuracy_change", 1, SHARE, "answered right", "right answers"),
    Side("target/choice", "target/choice_change", 1, SHARE, "right by multiple choice", "multiple choice"),
    Side("target/loss", "target/loss_rise", -1, NATS, "loss", "loss"),
)
FORGETTING = (
    Side("source/accuracy", "source/accuracy_change", -1, SHARE, "answered right", "right answers"),
    Side("source/choice", "source/choice_change", -1, SHARE, "right by multiple choice", "multiple choice"),
    Side("general/loss", "general/loss_rise", 1, NATS, "loss", "loss"),
    Side("general/pseudo_loss", "general/pseudo_loss_rise", 1, NATS, "pseudo-loss", "pseudo-loss"),
)
RANKED = Side(
    *("target/auc", "target/auc_over_chance", 1, AREA, "area under the ROC curve", "ranking"),
    measure="area under the ROC curve",
    baseline=0.5,
    against="chance",
)
RIGHT = Side(
    *("target/accuracy", "target/majority_change", 1, SHARE, "judged right", "right judgements"),
    baseline="target/majority",
    against="always naming the commonest label (of pairs, a coin)",
)
NUMBERS = Side(
    *("target/pearson", "target/pearson_over_chance", 1, CORRELATION, "correlation with the labels", "correlation"),
    measure="Pearson correlation",
    baseline=0.0,
    against="chance",
)
HELD_OUT = Side(
    *("policy/held_out", "policy/held_out_change", 1, REWARD, "held-out reward", "held-out reward"),
    measure="mean held-out reward",
)
TRAINED = Side(
    *("policy/reward", "policy/reward_change", 1, REWARD, "the reward it was trained on,", "reward trained on"),
    measure="mean reward that it was trained on",
)
LEARNING_BY = {
    "text": LEARNING,
    "reward": (RANKED, RIGHT),
    "classify": (RIGHT, RANKED, NUMBERS),
    "policy": (HELD_OUT, TRAINED, *LEARNING[:2]),
}
"""Measures of learning by objective, the most telling first. A loss of rewards is no loss of text."""
JUDGES = ("reward", "classify")
"""Objectives after which a model judges texts, and writes none."""


@dataclass(frozen=True)
class View:
    """One way to look at a comparison: a measure of learning and one of forgetting; either may be missing."""

    learning: Side | None
    forgetting: Side | None


def level(run: Run, side: Side, when: str = "after") -> Score | None:
    """Give the level of a run's `base` or `after`; of a side with a baseline, that stands for the base."""
    if when == "base" and isinstance(side.baseline, str):
        return run.after.get(side.baseline, run.base.get(side.baseline))
    if when == "base" and side.baseline is not None:
        return Score(side.level, float(side.baseline), side.unit, 0, None)
    found: dict[str, Score] = getattr(run, when)
    return found.get(side.level)


def against(run: Run, side: Side) -> str:
    """Name what a run is held against by a side, "" where it is the base: of pairs no label is commonest."""
    coin = (
        isinstance(side.baseline, str) and (found := level(run, side, "base")) is not None and not found.standard_error
    )
    return "a coin" if coin else side.against.partition(" (")[0]


def change(run: Run, side: Side | None) -> Score | None:
    """Give learning or forgetting: the paired change if it was recorded, else the difference, then without error.

    Over a baseline that is a number, the error is that of the level.
    """
    if side is None:
        return None
    found = run.after.get(side.change)
    if found is not None:
        return Score(side.change, side.sign * found.value, side.unit, found.n, found.standard_error)
    base, after = level(run, side, "base"), level(run, side)
    if base is None or after is None:
        return None
    error = after.standard_error if isinstance(side.baseline, float) else None
    return Score(side.change, side.sign * (after.value - base.value), side.unit, after.n, error)


def half_width(score: Score | None) -> float | None:
    """Give half the 95 % interval (Student's t over the items), None without a standard error.

    Where all items came out alike, the longer side of the interval that keeps a width (`Score.interval`).
    """
    if score is None or score.standard_error is None or score.n < 2:
        return None
    if score.standard_error == 0 and (ends := score.interval()) is not None:
        return max(score.value - ends[0], ends[1] - score.value)
    return t95(score.n - 1) * score.standard_error
