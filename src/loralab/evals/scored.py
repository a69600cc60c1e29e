"""The probe of reward models and classifiers: how well they judge held-out rows.

Legend: r reward (the one output of the head), Δ = r of the chosen answer − r of the rejected one. A claim is the probability
that the model gives to what it says: of thumbs σ(r) that the thumb is up; of a pair σ(|Δ|), of a text the probability of its
likeliest class, that it judges right.

A base whose head was never trained judges by chance. It is read all the same, so that curves begin somewhere; what a run
learned is told against the baseline: always naming the commonest label (`target/majority`), a coin for pairs.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from loralab.base.judged import Kind
from loralab.evals.judgement import (
    Estimate,
    Values,
    area_under_curve,
    brier,
    calibration_error,
    minus_log_sigmoid,
    pearson,
    reliability,
    sigmoid,
    softmax,
    spearman,
    wins,
)
from loralab.evals.probe import Reading, measuring
from loralab.evals.stats import SHARE, Score, mean_score, skill_scores

NAME = "target"
LOSS_UNITS = {"pairs": "nats/pair", "thumbs": "nats/text", "classify": "nats/text", "regression": "squared error"}
REWARD = "reward"
MOST_CLASSES = 12
"""Of more classes, only their mean is kept."""
THUMBS = ("down", "up")


class Rows(Protocol):
    """A batch of judged rows: `LabelledBatch`, or `WordBatch`."""

    @property
    def labels(self) -> Float[Tensor, " items"]: ...

    @property
    def answers(self) -> Int[Tensor, " reads"]: ...


class Scorer(Protocol):
    """What turns rows into numbers: `ScoreHead`, or `WordHead`."""

    @property
    def model(self) -> nn.Module: ...

    def scores(self, batch: Any) -> Float[Tensor, "reads outputs"]: ...


@dataclass(frozen=True, eq=False)
class _Read:
    """What a pass gave: outputs of each read, labels of each item, tokens of the answer of each read."""

    outputs: Float[ndarray, "reads outputs"]
    labels: Float[ndarray, " items"]
    lengths: Float[ndarray, " reads"]


@dataclass(frozen=True, eq=False)
class _Judged:
    """What was made of it: loss of each item, whether it is judged right (None of numbers), all other scores, columns."""

    losses: Values
    right: Values | None
    scores: list[Score]
    columns: dict[str, ndarray]


class ScoreProbe:
    """Loss, accuracy, ranking, calibration and length bias on held-out rows; `target/loss` comes first.

    Args:
        batches: the rows, laid out.
        head: gives (reads, outputs) for a batch: one output per class, else one.
        kind: of the rows.
        classes: names of the classes, in the order of the outputs; none for other kinds.
        centre: weight of (r₁ + r₂)² in the loss of a pair.
    """

    def __init__(
        self,
        batches: Sequence[Rows],
        head: Scorer,
        *,
        kind: Kind,
        classes: Sequence[str] = (),
        centre: float = 0.0,
    ) -> None:
        self.name = NAME
        self.batches, self.head, self.kind = list(batches), head, kind
        self.classes, self.centre = tuple(classes), centre
        self._base: _Judged | None = None

    def read_base(self, without: AbstractContextManager[None] | None = None) -> Reading:
        """Read the base (inside `without`, which switches the delta off) and keep what later readings pair with."""
        with without or nullcontext():
            self._base = self._judge()
        return self._reading(self._base)

    def read(self, step: int | None = None) -> Reading:
        """Read the model as it is now; losses and right judgements are paired with the base's item by item."""
        now = self._judge()
        reading, base = self._reading(now), self._base
        if base is not None:
            reading.scores.append(self._mean("loss_rise", now.losses - base.losses, LOSS_UNITS[self.kind]))
            if now.right is not None and base.right is not None:
                reading.scores.append(self._mean("accuracy_change", now.right - base.right, SHARE))
        return reading

    def _judge(self) -> _Judged:
        read = self._pass()
        if not np.isfinite(read.outputs).all():  # nothing more can be said of a model that diverged
            return _Judged(np.full(len(read.labels), np.nan), None, [], {})
        judge: Callable[[_Read], _Judged] = getattr(self, f"_{self.kind}")
        return judge(read)

    def _pass(self) -> _Read:
        outputs, labels, lengths = [], [], []
        with measuring(self.head.model):
            for batch in self.batches:
                outputs.append(self.head.scores(batch).double().cpu().numpy())
                labels.append(batch.labels.double().cpu().numpy())
                lengths.append(batch.answers.double().cpu().numpy())
        return _Read(np.concatenate(outputs), np.concatenate(labels), np.concatenate(lengths))

    def _reading(self, judged: _Judged) -> Reading:
        loss = self._mean("loss", judged.losses, LOSS_UNITS[self.kind])
        columns = {"loss_sum": judged.losses, **judged.columns}
        if judged.right is not None:
            columns["right"] = judged.right
        rows = zip(*(column.tolist() for column in columns.values()), strict=True)
        return Reading([loss, *judged.scores], [dict(zip(columns, row, strict=True)) for row in rows])

    # What is said of each kind

    def _pairs(self, read: _Read) -> _Judged:
        rewards, lengths = read.outputs.reshape(-1, 2), read.lengths.reshape(-1, 2)
        (chosen, rejected), (long, short) = rewards.T, lengths.T
        margins = chosen - rejected
        losses = minus_log_sigmoid(margins - read.labels) + self.centre * (chosen + rejected) ** 2
        right, claimed = wins(chosen, rejected), sigmoid(np.abs(margins))
        n = len(margins)
        scores = [
            self._mean("accuracy", right, SHARE),
            Score(f"{NAME}/majority", 0.5, SHARE, n, None),
            self._mean("majority_change", right - 0.5, SHARE),
            *self._calibration(claimed, right),
            self._mean("brier", sigmoid(-margins) ** 2, "squared probability"),
            *self._rewards(rewards),
            self._mean("margin_mean", margins, REWARD),
            Score(f"{NAME}/margin_sd", float(margins.std(ddof=min(1, n - 1))), REWARD, n, None),
            *self._correlated("length_correlation", spearman(rewards.ravel(), lengths.ravel(), n), 2 * n),
            *self._correlated("margin_correlation", spearman(margins, read.labels), n),
        ]
        apart = long != short
        if apart.any():
            longer = wins(long, short)[apart]
            scores.append(
                self._mean("longer_wins", wins((2 * longer - 1) * margins[apart], np.zeros(len(longer))), SHARE)
            )
            scores.append(self._mean("longer_chosen", longer, SHARE))
        columns = {"reward": chosen, "rejected_reward": rejected, "length": long, "rejected_length": short}
        return _Judged(losses, right, scores, {**columns, "label": read.labels, "claimed": claimed})

    def _thumbs(self, read: _Read) -> _Judged:
        rewards, is_up = read.outputs[:, 0], read.labels > 0.5
        signs = np.where(is_up, 1.0, -1.0)
        right, claimed = wins(signs * rewards, np.zeros(len(rewards))), sigmoid(rewards)
        scores = [
            *self._shares(right, read.labels, THUMBS),
            *self._area(rewards, is_up),
            *self._calibration(claimed, is_up.astype(float)),
            self._mean("brier", (claimed - is_up) ** 2, "squared probability"),
            *self._rewards(rewards[:, None]),
            *self._correlated("length_correlation", spearman(rewards, read.lengths), len(rewards)),
        ]
        if 0 < is_up.sum() < len(is_up):
            apart = float(rewards[is_up].mean() - rewards[~is_up].mean())
            scores.append(
                Score(f"{NAME}/margin_mean", apart, REWARD, len(rewards), _error_of_difference(rewards, is_up))
            )
        columns = {"reward": rewards, "length": read.lengths, "label": read.labels, "claimed": claimed}
        return _Judged(minus_log_sigmoid(signs * rewards), right, scores, columns)

    def _classify(self, read: _Read) -> _Judged:
        shares, labels = softmax(read.outputs), read.labels.astype(int)
        items = np.arange(len(labels))
        said = read.outputs.argmax(1)
        right, claimed = (said == labels).astype(float), shares[items, said]
        shifted = read.outputs - read.outputs.max(1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(1)) - shifted[items, labels]
        truth = np.eye(read.outputs.shape[1])[labels]
        names = self.classes or tuple(str(i) for i in range(read.outputs.shape[1]))
        two = len(names) == 2
        scores = [
            *self._shares(right, read.labels, names),
            *(self._area(read.outputs[:, 1] - read.outputs[:, 0], labels == 1) if two else ()),
            *self._calibration(claimed, right),
            self._mean("brier", brier(shares, truth), "squared probability"),
        ]
        columns = {"length": read.lengths, "label": read.labels, "claimed": claimed, "said": said.astype(float)}
        return _Judged(losses, right, scores, columns)

    def _regression(self, read: _Read) -> _Judged:
        said = read.outputs[:, 0]
        squares = (said - read.labels) ** 2
        mean = self._mean("rmse", squares, "of the label's own")
        root = float(np.sqrt(mean.value))
        error = None if mean.standard_error is None or root == 0 else mean.standard_error / (2 * root)
        spread = float(read.labels.std())
        scores = [
            Score(mean.name, root, "units of the label", mean.n, error),
            Score(f"{NAME}/label_sd", spread, "units of the label", mean.n, None),
            *self._correlated("pearson", pearson(said, read.labels), len(said)),
            *self._correlated("spearman", spearman(said, read.labels), len(said)),
        ]
        return _Judged(squares, None, scores, {"reward": said, "length": read.lengths, "label": read.labels})

    # Parts of it

    def _mean(self, measure: str, values: Values, unit: str) -> Score:
        return mean_score(f"{NAME}/{measure}", unit, values, np.ones(len(values)))

    def _shares(self, right: Values, labels: Values, names: Sequence[str]) -> Iterator[Score]:
        """Give accuracy, balanced accuracy, that of each class, and what always naming the commonest class gives."""
        yield self._mean("accuracy", right, SHARE)
        numbers = labels.astype(int)
        balanced, *each = skill_scores(f"{NAME}/balanced_accuracy", SHARE, right, [str(number) for number in numbers])
        yield balanced
        commonest = (numbers == np.bincount(numbers).argmax()).astype(float)
        yield self._mean("majority", commonest, SHARE)
        yield self._mean("majority_change", right - commonest, SHARE)
        for one in each if len(names) <= MOST_CLASSES else ():
            number = one.name.split("/")[1]
            name = names[int(number)]
            yield Score(
                f"{NAME}/{number if '/' in name else name}/accuracy", one.value, SHARE, one.n, one.standard_error
            )

    def _area(self, values: Values, is_up: ndarray) -> Iterator[Score]:
        return self._correlated("auc", area_under_curve(values, is_up), len(values), "share of up and down pairs")

    def _calibration(self, claimed: Values, true: Values) -> Iterator[Score]:
        error = calibration_error(reliability(claimed, true))
        yield Score(f"{NAME}/calibration_error", error, "probability", len(claimed), None)

    def _rewards(self, rewards: Float[ndarray, "items answers"]) -> Iterator[Score]:
        answers = np.full(len(rewards), float(rewards.shape[1]))
        yield mean_score(f"{NAME}/reward_mean", REWARD, rewards.sum(1), answers)
        sd = float(rewards.std(ddof=min(1, rewards.size - 1)))
        yield Score(f"{NAME}/reward_sd", sd, REWARD, rewards.size, None)

    def _correlated(self, measure: str, found: Estimate | None, n: int, unit: str = "correlation") -> Iterator[Score]:
        """Give a score of what may not exist: without variation there is no correlation."""
        if found is not None:
            yield Score(f"{NAME}/{measure}", found[0], unit, n, found[1])


def _error_of_difference(values: Values, is_up: ndarray) -> float | None:
    """Give the standard error of the difference of two means with variances of their own (Welch); None for a single item."""
    groups = [values[is_up], values[~is_up]]
    if min(map(len, groups)) < 2:
        return None
    return float(np.sqrt(sum(group.var(ddof=1) / len(group) for group in groups)))
