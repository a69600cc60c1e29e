"""Log-likelihoods of continuations behind their contexts, as cheap as they can be had.

What makes it cheap: a context is computed once for all its continuations (and a beginning that many contexts share once for
all of them, `prefixes.py`); rows are full, without padding; only positions that predict a continuation go through the head;
requests that are the same are computed once; and several deltas are scored in one pass over the data, so that it is tokenised
and laid out once.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from loralab.base.data import Batch, collate
from loralab.base.text import Example
from loralab.delta.several import View
from loralab.errors import EvaluationError
from loralab.evals.generate import room
from loralab.evals.prefixes import trees
from loralab.evals.probe import measuring
from loralab.training.loss import LanguageHead

ROW_TOKENS = 2048
"""Most tokens of a row; a single request may be longer."""


ROWS_AT_ONCE = 16
"""Rows that are read by one model before the next one reads them."""


class Request(NamedTuple):
    """Tokens to be scored behind tokens that are only read; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Likelihood(NamedTuple):
    """How likely a continuation is: log p in nats, summed over its tokens; and whether each token is the likeliest."""

    log_likelihood: float
    is_greedy: bool


@dataclass
class Tally:
    """What scoring cost, over all views.

    Attributes:
        forwards: passes through the model.
        tokens: tokens that passed through it.
        plain_tokens: tokens that would have, with each request read whole and alone.
        truncated: requests that were too long and lost the beginning of their context, counted once for all views.
    """

    forwards: int = 0
    tokens: int = 0
    plain_tokens: int = 0
    truncated: int = 0


class Engine:
    """Scores requests on a model and the deltas that it wears.

    Args:
        head: of the model.
        row_tokens: most tokens in one pass.
    """

    def __init__(self, head: LanguageHead, row_tokens: int = ROW_TOKENS) -> None:
        self.head, self.row_tokens = head, row_tokens
        self.tally = Tally()

    def prepared(self, requests: Sequence[Request]) -> "Prepared":
        """Cut and lay requests out once, to be scored again and again.

        Raises:
            EvaluationError: a context or continuation is empty, or a continuation longer than the model can read.
        """
        return Prepared(self, requests)

    def score(self, requests: Sequence[Request], views: Sequence[View]) -> list[list[Likelihood]]:
        """Score each request in each view: views × requests. Raises EvaluationError as `prepared` does."""
        return self.prepared(requests).score(views)


class _Row(NamedTuple):
    """A pass: the batch, its positions that predict something, and for each prediction wanted, which of them and what."""

    batch: Batch
    places: Int[Tensor, " places"]
    which: Int[Tensor, " wanted"]
    targets: Int[Tensor, " wanted"]
    owners: Int[np.ndarray, " wanted"]


class Prepared:
    """Requests laid out in rows; see `Engine.prepared`."""

    def __init__(self, engine: Engine, requests: Sequence[Request]) -> None:
        self.engine = engine
        longest = room(engine.head.model)
        engine.tally.truncated += sum(len(c) + len(t) > longest + 1 for c, t in requests)
        cut = [_cut(request, longest) for request in requests]
        self.unique = list(dict.fromkeys(cut))
        number = {request: i for i, request in enumerate(self.unique)}
        self._number = [number[request] for request in cut]
        self._plain_tokens = sum(len(c) + len(t) - 1 for c, t in cut)
        device = engine.head.model.device
        rows = self._tree_rows() if engine.head.packs else self._single_rows()
        self._rows = [
            _Row(r.batch.to(device), r.places.to(device), r.which.to(device), r.targets.to(device), r.owners)
            for r in rows
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens that one view's scoring computes."""
        return sum(row.batch.num_tokens for row in self._rows)

    def _tree_rows(self) -> list[_Row]:
        paths = [context + continuation[:-1] for context, continuation in self.unique]
        joints = [len(context) for context, _ in self.unique]
        rows = []
        for numbers, tree in trees(paths, joints, self.engine.row_tokens):
            rows.append(self._row(numbers, tree.batch(), tree.rows()))
        return rows

    def _single_rows(self) -> list[_Row]:
        """Lay out each request alone, for models that cannot keep documents of a row apart."""
        rows = []
        for number, (context, continuation) in enumerate(self.unique):
            path = [*context, *continuation[:-1]]
            rows.append(self._row([number], collate([Example(path, [False] * len(path))]), [np.arange(len(path))]))
        return rows

    def _row(self, numbers: list[int], batch: Batch, where: list[Int[np.ndarray, " _"]]) -> _Row:
        """Say which positions of a batch predict the continuations of these requests."""
        wanted: list[Int[np.ndarray, " _"]] = []
        targets: list[int] = []
        owners: list[int] = []
        for number, row in zip(numbers, where, strict=True):
            continuation = self.unique[number].continuation
            wanted.append(row[len(row) - len(continuation) :])
            targets.extend(continuation)
            owners.extend([number] * len(continuation))
        places, which = np.unique(np.concatenate(wanted), return_inverse=True)
        return _Row(
            batch, torch.from_numpy(places), torch.from_numpy(which), torch.tensor(targets), np.array(owners, dtype=int)
        )

    def score(self, views: Sequence[View]) -> list[list[Likelihood]]:
        """Score each request in each view: views × requests. Raises EvaluationError for logits that are not numbers."""
        totals = np.zeros((len(views), len(self.unique)))
        misses = np.zeros((len(views), len(self.unique)))
        with measuring(self.engine.head.model), side_by_side_on(self.engine.head.model.device) as each:
            for start in range(0, len(self._rows), ROWS_AT_ONCE):
                rows = self._rows[start : start + ROWS_AT_ONCE]
                for number, view in enumerate(views):
                    with view():
                        found = list(each(self._read, rows))
                    for row, (log_p, missed) in zip(rows, found, strict=True):
                        totals[number] += np.bincount(row.owners, log_p, minlength=len(self.unique))
                        misses[number] += np.bincount(row.owners, missed, minlength=len(self.unique))
        self.engine.tally.forwards += len(self._rows) * len(views)
        self.engine.tally.tokens += self.num_tokens * len(views)
        if (lost := np.isnan(totals).any(1)).any():
            fix = "load the model in float32 or bfloat16, and check the delta: a training that diverged leaves such weights"
            who = f"model {int(np.argmax(lost)) + 1} of {len(views)}"
            raise EvaluationError("the model's logits are not numbers", where=who, fix=fix)
        self.engine.tally.plain_tokens += self._plain_tokens * len(views)
        return [
            [Likelihood(float(total[i]), bool(missed[i] == 0)) for i in self._number]
            for total, missed in zip(totals, misses, strict=True)
        ]

    def _read(self, row: _Row) -> tuple[Float[np.ndarray, " wanted"], Float[np.ndarray, " wanted"]]:
        """Give log p of every wanted token, and 1 where another is likelier."""
        log_p = torch.empty(len(row.which), dtype=torch.float64, device=row.which.device)
        missed = torch.empty_like(log_p)
        order = torch.argsort(row.which, stable=True)
        begin = taken = 0
        for logits in self.engine.head.logits_at(row.batch, row.places):
            end = begin + len(logits)
            mine = order[taken : taken + int(((row.which >= begin) & (row.which < end)).sum())]
            line, target = row.which[mine] - begin, row.targets[mine]
            best = logits[line, target] >= logits.amax(-1)[line]
            # Of equal ones the first is taken, as in decoding; few are the likeliest, and only they are looked at.
            best[best.clone()] = logits[line[best]].argmax(-1) == target[best]
            missed[mine] = (~best).double()
            log_p[mine] = torch.log_softmax(logits, -1)[line, target].double()
            begin, taken = end, taken + len(mine)
        return log_p.cpu().numpy(), missed.cpu().numpy()


@contextmanager
def side_by_side_on(device: torch.device) -> Iterator[Callable[..., Iterable[Any]]]:
    """Give a `map` that works on several rows at once where a CPU has several threads, each on a row of its own.

    Rows are independent and full, so that a thread for each leaves none waiting, as threads that share small products do.
    """
    threads = torch.get_num_threads() if device.type == "cpu" else 1
    if threads == 1:
        yield map
        return

    def begin() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    try:
        with ThreadPoolExecutor(threads, initializer=begin) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)


def _cut(request: Request, longest: float) -> Request:
    """Cut a request to what the model can read by leaving out the beginning of its context, as lm-eval does.

    The last token of the continuation is predicted, not read, so one more than the model reads may stay.
    """
    context, continuation = request
    if not context or not continuation:
        what = "a context" if not context else "a continuation"
        raise EvaluationError(f"{what} is empty", fix="begin it with the tokenizer's first token, or leave it out")
    if len(continuation) > longest:
        raise EvaluationError(
            f"a continuation has {len(continuation)} tokens, but the model reads {int(longest)}",
            fix="leave out long items, or take a model that reads more",
        )
    if len(context) + len(continuation) <= longest + 1:
        return request
    return Request(context[ceil(len(context) + len(continuation) - longest - 1) :], continuation)
