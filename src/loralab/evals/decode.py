"""The loop that writes many answers at once, in a batch that rows leave as soon as they end and that others join.

The device is waited for once a step, for the tokens that were chosen; all else of ours is queued (Transformers waits once
more where it is given a padding mask).
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loralab.errors import EvaluationError
from loralab.evals.cache import Rows
from loralab.evals.passes import Passes
from loralab.evals.sampling import NOTHING, Sampling, choose, log_probabilities
from loralab.evals.written import Row, Stops

PREFILL_TOKENS = 4096
"""Most tokens of prompts, padding included, in one pass."""
SHARED_TOKENS = 16
"""A beginning of fewer tokens is read with every prompt."""


@dataclass
class Tally:
    """What was computed.

    Attributes:
        prefills: passes over prompts.
        prompt_tokens: tokens of prompts in them; a prompt that is answered several times at once counts once.
        padding: further tokens in them, which fill up shorter prompts.
        steps: passes that continue answers by a token.
        rows: rows in these passes, summed.
        needed: those of them whose token became part of an answer.
        refills: times that rows joined others which were being written.
        put_back: rows that had to leave for lack of room before they had ended, and were read again.
        largest: most rows × columns held at once.
    """

    prefills: int = 0
    prompt_tokens: int = 0
    padding: int = 0
    steps: int = 0
    rows: int = 0
    needed: int = 0
    refills: int = 0
    put_back: int = 0
    largest: int = 0


@dataclass(frozen=True)
class Choice:
    """How the next tokens are chosen, and where answers end."""

    sampling: Sampling
    stops: Stops
    log_probs: bool

    def take(
        self, logits: Float[Tensor, "rows vocab"], rows: Sequence[Row], streams: Tensor, drawn: Tensor
    ) -> Int[Tensor, " rows"]:
        """Choose the next token of each row and write it, except in rows that have ended; waits for the device once.

        Raises:
            EvaluationError: the logits of a row are not numbers.
        """
        logits = logits.float()
        tokens = choose(logits, self.sampling, streams, drawn)
        found: list[float] | list[None] = [None] * len(rows)
        if self.log_probs:
            # Both in one transfer: the bits of a float32 travel as an integer.
            bits = log_probabilities(logits, tokens).view(torch.int32)
            both = torch.stack([tokens.to(torch.int32), bits]).cpu()
            chosen, found = both[0].tolist(), both[1].view(torch.float32).tolist()
        else:
            chosen = tokens.tolist()
        for row, token, log_prob in zip(rows, chosen, found, strict=True):
            if row.ended is None:
                if token == NOTHING:
                    raise _no_numbers(row)
                row.take(token, log_prob, self.stops)
        return tokens


def _no_numbers(row: Row) -> EvaluationError:
    begin = repr(row.prompt.text[:60]) if row.prompt.text else str(row.prompt.tokens[:12])
    return EvaluationError(
        f"the model's logits are not numbers behind {len(row.tokens)} tokens of an answer to {begin} …",
        where="generation",
        fix="load the model in float32 or bfloat16, and check the delta: a training that diverged leaves such weights",
    )


class _Batch:
    """Rows that are being written, and what the device knows of them."""

    def __init__(self, passes: Passes) -> None:
        self.passes = passes
        self.rows: list[Row] = []
        self.cache = Rows(passes.types)
        # For each row: its newest token, its stream, the length of its prompt, how many tokens it has drawn.
        self.state = torch.empty(4, 0, dtype=torch.long, device=passes.device)

    @property
    def size(self) -> int:
        """Rows × columns of the next step."""
        return len(self.rows) * (self.cache.columns + 1) if self.rows else 0

    def join(self, rows: Sequence[Row], tokens: Tensor, streams: Tensor, cache: Rows, order: Tensor) -> None:
        """Let rows join whose next token is chosen; `order` names their rows in the cache of what they have read."""
        numbers = [[len(row.prompt.tokens) for row in rows], [len(row.tokens) for row in rows]]
        joining = torch.cat([torch.stack([tokens, streams]), torch.tensor(numbers, device=tokens.device)])
        self.state = torch.cat([self.state, joining], 1)
        self.rows.extend(rows)
        self.cache.expect(max(row.longest - row.cached for row in self.rows))
        self.cache.join(cache, order)

    def step(self, choice: Choice) -> None:
        """Write one more token of each row."""
        newest, streams, lengths, drawn = self.state
        shortest, longest = min(row.cached for row in self.rows), self.cache.columns
        logits = self.passes.step(self.cache, newest, lengths + drawn - 1, padded=shortest < longest)
        newest.copy_(choice.take(logits, self.rows, streams, drawn))
        drawn += 1

    def keep(self, stay: Sequence[bool]) -> None:
        """Let the other rows leave: the last ones take their places."""
        staying = sum(stay)
        if staying == len(stay):
            return
        free = [i for i in range(staying) if not stay[i]]
        moved = [i for i in range(staying, len(stay)) if stay[i]]
        if free:
            self.state[:, free] = self.state[:, moved]
            for into, source in zip(free, moved, strict=True):
                self.rows[into] = self.rows[source]
        self.rows, self.state = self.rows[:staying], self.state[:, :staying]
        self.cache.keep(staying, moved, free, max((row.cached for row in self.rows), default=0))


def write_refilling(passes: Passes, rows: Sequence[Row], choice: Choice, budget: int, tally: Tally) -> None:
    """Write answers in a batch that rows leave as soon as they end, and that others join.

    Those of the largest limit begin first, so that few are left over at the end, and among them those of the shortest prompts:
    what joins later is then about as long as what has grown meanwhile. Rows are let in when a quarter of the batch is free, as a
    pass over few prompts costs about as much as one over many. Room is kept for each row up to its limit at first, then for
    twice what answers have taken so far; where that was too little, the rows that have written least wait again.

    Args:
        passes: of a model that can `refill`.
        rows: answers to write; each has a limit of 1 or more.
        choice: how tokens are chosen.
        budget: most tokens, rows × columns, held at once; a single row may be larger.
        tally: counts what is computed.
    """
    waiting = deque(sorted(rows, key=lambda row: (-row.prompt.limit, row.size, row.group)))
    batch, begin, usual = _Batch(passes), _Beginning(passes, rows, tally), _Usual()
    while waiting or batch.rows:
        fitting = _fitting(waiting, batch.rows, budget, usual) if waiting else 0
        if fitting and (not batch.rows or fitting == len(waiting) or 4 * fitting >= fitting + len(batch.rows)):
            tally.refills += bool(batch.rows)
            joining = [waiting.popleft() for _ in range(fitting)]
            _let_in(batch, joining, choice, begin, tally)
            usual.learn(joining)
        elif batch.size > budget:
            waiting.extendleft(_put_back(batch, budget, tally))
        if batch.rows:
            tally.steps += 1
            tally.rows += len(batch.rows)
            tally.needed += len(batch.rows)
            tally.largest = max(tally.largest, batch.size)
            batch.step(choice)
            usual.learn(batch.rows)
            batch.keep([row.ended is None for row in batch.rows])


class _Usual:
    """How long answers usually get: what the ended ones have shown."""

    def __init__(self) -> None:
        self._ended = self._tokens = 0

    def learn(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row.ended is not None:
                self._ended += 1
                self._tokens += len(row.tokens)

    def foreseen(self, row: Row) -> int:
        """Foresee how many tokens a row comes to, the prompt included."""
        if not self._ended:
            return row.longest
        usual = 2 * max(self._tokens // self._ended, len(row.tokens))
        return len(row.prompt.tokens) + min(row.prompt.limit, usual)


def _fitting(waiting: Sequence[Row], writing: Sequence[Row], budget: int, usual: _Usual) -> int:
    """Count the rows, from the first waiting one on, for which there is room."""
    longest, count = max(map(usual.foreseen, writing), default=0), 0
    for row in waiting:
        longest = max(longest, usual.foreseen(row))
        if longest * (len(writing) + count + 1) > budget and (writing or count):
            break
        count += 1
    return count


def _put_back(batch: _Batch, budget: int, tally: Tally) -> list[Row]:
    """Take rows out of a batch that has outgrown the budget: those that have written least."""
    order = sorted(range(len(batch.rows)), key=lambda i: len(batch.rows[i].tokens))
    out = set(order[: len(order) - max(1, budget // (batch.cache.columns + 1))])
    back = [batch.rows[i] for i in sorted(out)]
    batch.keep([i not in out for i in range(len(batch.rows))])
    tally.put_back += len(back)
    return back


class _Beginning:
    """Tokens with which all prompts begin (instructions, examples), read once."""

    def __init__(self, passes: Passes, rows: Sequence[Row], tally: Tally) -> None:
        prompts = [row.prompt.tokens for row in {row.group: row for row in rows}.values()]
        shared = _shared(prompts) if passes.share and len(prompts) > 1 else 0
        self.tokens = prompts[0][:shared] if shared >= SHARED_TOKENS else []
        self.cache: Rows | None = None
        if self.tokens:
            self.cache, _ = passes.read([self.tokens])
            tally.prefills += 1
            tally.prompt_tokens += shared


def _shared(prompts: Sequence[list[int]]) -> int:
    """Count the tokens with which all prompts begin; at least one of each is left."""
    low, high = min(prompts), max(prompts)  # what these two share, all between them share
    most = min(map(len, prompts)) - 1
    return next((i for i in range(most) if low[i] != high[i]), most)


def _let_in(batch: _Batch, rows: Sequence[Row], choice: Choice, begin: _Beginning, tally: Tally) -> None:
    """Read what rows have so far, each distinct prompt once, choose their next tokens and let them join."""
    device = batch.state.device
    for group in _alike(rows):
        texts = [same[0].read[len(begin.tokens) :] for same in group]
        cache, logits = batch.passes.read(texts, begin.cache)
        tally.prefills += 1
        tally.prompt_tokens += sum(map(len, texts))
        tally.padding += len(texts) * max(map(len, texts)) - sum(map(len, texts))
        joining = [row for same in group for row in same]
        order = torch.tensor([i for i, same in enumerate(group) for _ in same], device=device)
        streams = torch.tensor([row.stream for row in joining], device=device)
        drawn = torch.tensor([len(row.tokens) for row in joining], device=device)
        tokens = choice.take(logits[order], joining, streams, drawn)
        staying = [i for i, row in enumerate(joining) if row.ended is None]
        if staying:
            stay = torch.tensor(staying, device=device)
            batch.join([joining[i] for i in staying], tokens[stay], streams[stay], cache, order[stay])


def _alike(rows: Sequence[Row]) -> Iterator[list[list[Row]]]:
    """Gather the rows that have read the same, and those of similar length up to `PREFILL_TOKENS`, so that little is padding."""
    same: dict[object, list[Row]] = {}
    for row in rows:
        same.setdefault(row if row.tokens else row.group, []).append(row)
    group: list[list[Row]] = []
    for found in sorted(same.values(), key=lambda found: -found[0].size):
        longest = (group or [found])[0][0].size
        if group and ((len(group) + 1) * longest > PREFILL_TOKENS or 2 * found[0].size < longest):
            yield group
            group = []
        group.append(found)
    if group:
        yield group
