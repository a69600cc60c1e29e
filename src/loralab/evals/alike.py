"""Answers of models whose cache is not made of columns, or that a padding would disturb: prompts of one length at a time."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel, StoppingCriteria

from loralab.evals.decode import Choice, Tally
from loralab.evals.written import Row


def write_alike(model: PreTrainedModel, rows: Sequence[Row], choice: Choice, budget: int, tally: Tally) -> None:
    """Write answers to prompts of the same length with Transformers' `generate`, which makes the cache its own way.

    Our choice is put in as a logits processor, so tokens are drawn as in `write_refilling`. Rows stay until all have ended.
    """
    for group in _of_one_length(rows, budget):
        tokens = torch.tensor([row.prompt.tokens for row in group], device=model.device)
        streams = torch.tensor([row.stream for row in group], device=model.device)
        processor, most = _Chooses(choice, group, streams), max(row.prompt.limit for row in group)
        bare = GenerationConfig(do_sample=False, max_new_tokens=most, pad_token_id=0, use_cache=True)
        write: Any = model.generate  # not declared: it comes from a mixin
        own = model.generation_config
        model.generation_config = GenerationConfig()  # what ours leaves open would be filled in from the model's own
        try:
            write(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=bare,
                logits_processor=[processor],
                stopping_criteria=[_Ended(group)],
            )
        finally:
            model.generation_config = own
        tally.prefills += 1
        tally.prompt_tokens += tokens.numel()
        tally.steps += processor.drawn - 1
        tally.rows += len(group) * (processor.drawn - 1)
        tally.needed += sum(len(row.tokens) - 1 for row in group)
        tally.largest = max(tally.largest, len(group) * (tokens.shape[1] + processor.drawn - 1))


def _of_one_length(rows: Sequence[Row], budget: int) -> Iterator[list[Row]]:
    """Group rows whose prompts have one length, of about the same limit, up to the budget."""
    group: list[Row] = []
    for row in sorted(rows, key=lambda row: (len(row.prompt.tokens), row.prompt.limit)):
        apart = group and len(group[0].prompt.tokens) != len(row.prompt.tokens)
        if group and (apart or row.longest * (len(group) + 1) > budget):
            yield group
            group = []
        group.append(row)
    if group:
        yield group


class _Chooses(LogitsProcessor):
    """Leaves only the token that was chosen."""

    def __init__(self, choice: Choice, rows: Sequence[Row], streams: Tensor) -> None:
        self.choice, self.rows, self.streams, self.drawn = choice, rows, streams, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        drawn = torch.full_like(self.streams, self.drawn)
        tokens = self.choice.take(scores, self.rows, self.streams, drawn)
        self.drawn += 1
        return torch.full_like(scores, -torch.inf).scatter_(-1, tokens.clamp(min=0)[:, None], 0.0)


class _Ended(StoppingCriteria):
    """Tells Transformers which rows have ended."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = rows

    def __call__(self, input_ids: Tensor, scores: Tensor | None, **_: Any) -> Tensor:
        return torch.tensor([row.ended is not None for row in self.rows], device=input_ids.device)
