"""Batches without padding, in a seeded order that can be resumed at any step.

A batch is one row: documents side by side, positions beginning anew with each, attention within each (`lengths`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import ceil, floor
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from loralab.base.packing import pack
from loralab.base.reader import Report
from loralab.base.text import Example
from loralab.errors import DataError

IGNORED = -100
"""Target of a position without a loss, as in `torch.nn.functional.cross_entropy`."""

ORDER, ROUND = 0, 1  # streams of random numbers


@dataclass(frozen=True)
class Batch:
    """Documents side by side in one row.

    Attributes:
        tokens: int64 (1, length).
        positions: int64 (1, length), from 0 in each document.
        targets: int64 (1, length), already shifted: the next token of the same document if it is labelled, else -100.
        lengths: tokens of each document; their sum is the length.
        parents: where documents are segments of trees, the number of the one that each continues, or -1; see
            `loralab.base.attention.document_mask`.
    """

    tokens: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]
    parents: tuple[int, ...] = ()

    @property
    def weight(self) -> int:
        """Number of positions with a loss."""
        return int((self.targets != IGNORED).sum())

    @property
    def num_tokens(self) -> int:
        """Number of tokens read, prompts included."""
        return self.tokens.shape[1]

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the tensors to a device."""
        moved = {name: getattr(self, name).to(device) for name in ("tokens", "positions", "targets")}
        return replace(self, **moved)


def collate(examples: Sequence[Example]) -> Batch:
    """Lay examples side by side.

    Raises:
        ValueError: there is no example, or an empty one.
    """
    lengths = tuple(len(example) for example in examples)
    if not lengths or min(lengths) < 1:
        raise ValueError(f"a batch needs examples with tokens, lengths are {lengths}")
    tokens = np.concatenate([example.tokens for example in examples]).astype(np.int64)
    labelled = np.concatenate([example.labelled for example in examples])
    # The first token of an example is never labelled, so nothing is predicted from the document before.
    targets = np.append(np.where(labelled, tokens, IGNORED)[1:], IGNORED)
    positions = np.concatenate([np.arange(length) for length in lengths])
    tokens_row, positions_row, targets_row = (torch.from_numpy(a).unsqueeze(0) for a in (tokens, positions, targets))
    return Batch(tokens_row, positions_row, targets_row, lengths)


def micro_batches(
    sequences: Sequence[Sequence[Any]], micro_batch: int | None, collate: Callable[[Sequence[Any]], Any] = collate
) -> list[Any]:
    """Lay the sequences of one step side by side, `micro_batch` at a time, as `collate` does."""
    size = micro_batch or len(sequences)
    groups = (sequences[start : start + size] for start in range(0, len(sequences), size))
    return [collate([example for sequence in group for example in sequence]) for group in groups]


def pack_and_shuffle(lengths: NDArray[np.int64], capacity: int, rng: np.random.Generator) -> list[list[int]]:
    """Pack documents best-fit and put the bins in random order; documents of equal length keep their order."""
    bins = pack(lengths.tolist(), capacity)
    return [bins[i] for i in rng.permutation(len(bins))]


class Examples(Protocol):
    """What a feed asks of a corpus, whatever its examples are; see `corpus.Corpus`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...

    @property
    def lengths(self) -> NDArray[np.int64]: ...

    @property
    def source(self) -> NDArray[np.int16]: ...

    @property
    def max_length(self) -> int: ...

    @property
    def report(self) -> Report: ...

    @property
    def fingerprint(self) -> str: ...


class Feed:
    """Optimizer steps of `batch_size` sequences from a corpus.

    A sequence is one packed bin of up to `corpus.max_length` tokens, or one example without packing. In an epoch, the
    examples of a source with weight w are seen w times: its whole part always, its fraction by walking on through a
    seeded permutation, so that 0.25 sees everything once in four epochs. An epoch ends when its sequences do; a step
    that they do not fill takes the rest from the next epoch. All is a pure function of (corpus, seed, epoch).

    Args:
        corpus: what to feed; `report.sources` carry the weights.
        batch_size: sequences of one optimizer step.
        micro_batch: sequences computed at a time; None is all.
        packing: fill sequences with whole examples.
        seed: of the order.
        collate: lays the examples of a micro-batch side by side.

    Raises:
        DataError: the corpus has no examples.
    """

    def __init__(
        self,
        corpus: Examples,
        *,
        batch_size: int,
        micro_batch: int | None = None,
        packing: bool = True,
        seed: int = 0,
        collate: Callable[[Sequence[Any]], Any] = collate,
    ) -> None:
        if not len(corpus):
            raise DataError("the corpus has no examples", where="data.train", fix="lower data.validation_share")
        self.corpus, self.batch_size, self.micro_batch = corpus, batch_size, micro_batch
        self.packing, self.seed, self.collate = packing, seed, collate
        self.epoch, self.position = 0, 0
        self._fingerprint = corpus.fingerprint
        self._members = [np.flatnonzero(corpus.source == i) for i in range(len(corpus.report.sources))]
        self._planned: tuple[int, list[list[int]]] | None = None

    def next_step(self) -> list[Any]:
        """Take the micro-batches of the next optimizer step: of `Batch`, unless `collate` makes others."""
        step: list[list[int]] = []
        while len(step) < self.batch_size:
            sequences = self.sequences(self.epoch)
            taken = sequences[self.position : self.position + self.batch_size - len(step)]
            step += taken
            self.position += len(taken)
            if self.position >= len(sequences):
                self.epoch, self.position = self.epoch + 1, 0
        sequences_of_step = [[self.corpus[i] for i in sequence] for sequence in step]
        return micro_batches(sequences_of_step, self.micro_batch, self.collate)

    def sequences(self, epoch: int) -> list[list[int]]:
        """Give the sequences of an epoch, in order, as lists of example indices."""
        if self._planned is None or self._planned[0] != epoch:
            rng = np.random.default_rng([self.seed, ORDER, epoch])
            order = rng.permutation(self._drawn(epoch))
            if self.packing:
                bins = pack_and_shuffle(self.corpus.lengths[order], self.corpus.max_length, rng)
                plan = [order[members].tolist() for members in bins]
            else:
                plan = [[index] for index in order.tolist()]
            self._planned = epoch, plan
        return self._planned[1]

    def _drawn(self, epoch: int) -> NDArray[np.int64]:
        """List the examples of an epoch, each source by its weight."""
        drawn = [np.empty(0, dtype=np.int64)]
        for index, (members, report) in enumerate(zip(self._members, self.corpus.report.sources, strict=True)):
            whole, fraction = divmod(report.weight, 1)
            drawn += [members] * int(whole)
            first, last = (floor(round(e * fraction * len(members), 6)) for e in (epoch, epoch + 1))
            for number in range(first // max(len(members), 1), ceil(last / max(len(members), 1))):
                order = np.random.default_rng([self.seed, ROUND, index, number]).permutation(members)
                begin = number * len(members)
                drawn.append(order[max(first - begin, 0) : last - begin])
        return np.concatenate(drawn)

    @property
    def steps_per_epoch(self) -> float:
        """Steps of the first epoch; later ones differ only where a weight has a fraction."""
        return self.num_sequences(1) / self.batch_size

    @property
    def tokens_per_epoch(self) -> float:
        """Tokens of one epoch on average, prompts included."""
        lengths = self.corpus.lengths
        pairs = zip(self._members, self.corpus.report.sources, strict=True)
        return float(sum(report.weight * lengths[members].sum() for members, report in pairs))

    def num_sequences(self, epochs: int | float) -> int:
        """Count the sequences of so many epochs."""
        whole, fraction = divmod(epochs, 1)
        repeats = all(report.weight == int(report.weight) for report in self.corpus.report.sources)
        if repeats:  # packing depends on the multiset of lengths only, so all epochs are equally long
            return ceil(round(epochs * len(self.sequences(0)), 6))
        count = sum(len(self.sequences(epoch)) for epoch in range(int(whole)))
        return count + (ceil(fraction * len(self.sequences(int(whole)))) if fraction else 0)

    def num_steps(self, epochs: int | float) -> int:
        """Count the steps that see so many epochs; the last may reach into the next."""
        return max(1, ceil(self.num_sequences(epochs) / self.batch_size))

    def state(self) -> dict[str, Any]:
        """Give the cursor as plain values: where the next step begins, and in which data."""
        return {"epoch": self.epoch, "position": self.position, **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a cursor: the next steps are those that an uninterrupted feed would give.

        Raises:
            DataError: the cursor belongs to other data or another order.
        """
        check_identity(self._identity(), state)
        self.epoch, self.position = state["epoch"], state["position"]

    def _identity(self) -> dict[str, Any]:
        weights = [report.weight for report in self.corpus.report.sources]
        return {"seed": self.seed, "packing": self.packing, "weights": weights, "corpus": self._fingerprint}


def check_identity(mine: dict[str, Any], state: dict[str, Any]) -> None:
    """Refuse a cursor whose data or order differ from the feed's.

    Raises:
        DataError: names what differs.
    """
    differing = [name for name, value in mine.items() if state.get(name) != value]
    if differing:
        what = f"the checkpoint was made with another {', '.join(differing)}, so its place in the data means nothing"
        raise DataError(what, where="data", fix="restore the data and the settings, or begin a new run")
