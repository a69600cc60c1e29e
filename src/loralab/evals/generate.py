"""Answers that a model writes: many at once, with a cache of keys and values, greedy or sampled, of a base and its deltas.

Nothing of the model's own taste in sampling has a say: no penalties, no temperature, no beams. Most models write in a batch
that rows leave and join (`decode.write_refilling`); whether one can is read from its cache and proved on the model itself.
The others write behind prompts of the same length with Transformers' own `generate`.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from math import inf

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.delta.several import View
from loralab.errors import EvaluationError
from loralab.evals.alike import write_alike
from loralab.evals.decode import Choice, Tally, write_refilling
from loralab.evals.passes import Passes
from loralab.evals.probe import measuring
from loralab.evals.sampling import Sampling
from loralab.evals.written import Answer, Prompt, Row, Stops, cut, text_behind

__all__ = [
    "CACHED_TOKENS",
    "Answer",
    "Prompt",
    "Sampling",
    "Tally",
    "Writer",
    "answers",
    "fitted",
    "generate",
    "room",
    "stop_tokens",
    "text_behind",
]

CACHED_TOKENS = 16384
"""Most tokens, prompts and answers together, whose keys and values are held at once."""


class Writer:
    """Writes answers to prompts.

    Args:
        model: a causal language model.
        tokenizer: gives answers their text and finds stop texts; None leaves both out.
        stops: tokens that end an answer; by default those of `stop_tokens`.
        together: prompts of different lengths may share a batch; False for a model that a left padding would disturb.
        budget: most tokens, rows × columns, whose keys and values are held at once; by default `CACHED_TOKENS`.

    Attributes:
        tally: what has been computed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        stops: Sequence[int] | None = None,
        together: bool = True,
        budget: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.together = model, tokenizer, together
        if stops is None:
            stops = stop_tokens(model, tokenizer) if tokenizer is not None else []
        self._stops, self._budget = Stops(stops, tokenizer), budget
        self.tally = Tally()

    def write(
        self,
        prompts: Sequence[Prompt],
        *,
        sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
        samples: int = 1,
        log_probs: bool = False,
        views: Sequence[View] = (nullcontext,),
    ) -> list[list[list[Answer]]]:
        """Answer each prompt.

        Args:
            prompts: what to answer; a prompt that stands there twice, or is answered several times, is read once a batch.
            sampling: how tokens are chosen.
            samples: answers to each prompt; greedy ones are all the same, so one is written.
            log_probs: give the log-probability of each token.
            views: of the model, such as its base and its deltas; by default the model as it is. All draw the same numbers.

        Returns:
            For each view, for each prompt, its samples. Model, mode and random state are left as they were.

        Raises:
            EvaluationError: a prompt without tokens, or longer with its limit than the model can read; stop texts without a
                tokenizer; logits that are not numbers.
        """
        self._check(prompts)
        written = []
        with measuring(self.model):
            for view in views:
                with view():
                    written.append(self._write(prompts, sampling, samples, log_probs))
        return written

    def _write(
        self, prompts: Sequence[Prompt], sampling: Sampling, samples: int, log_probs: bool
    ) -> list[list[Answer]]:
        same: dict[tuple[int, ...], int] = {}
        groups = [same.setdefault(tuple(prompt.tokens), len(same)) for prompt in prompts]
        distinct = min(samples, 1) if sampling.greedy else samples
        rows = [
            [Row(prompt, sampling.stream(i, k), groups[i], self._stops.tokens_of(prompt)) for k in range(distinct)]
            for i, prompt in enumerate(prompts)
        ]
        todo = [row for group in rows for row in group if row.prompt.limit > 0]
        choice = Choice(sampling, self._stops, log_probs)
        budget = self._budget or CACHED_TOKENS
        passes = Passes(self.model) if todo and self.together else None
        if passes is not None and passes.refill:
            write_refilling(passes, todo, choice, budget, self.tally)
        else:
            write_alike(self.model, todo, choice, budget, self.tally)
        found = [[self._answer(row, log_probs) for row in group] for group in rows]
        return [group * samples for group in found] if distinct < samples else found

    def _answer(self, row: Row, log_probs: bool) -> Answer:
        text = None
        if self.tokenizer is not None:
            text = cut(text_behind(row.prompt, row.tokens, self.tokenizer), row.prompt.stop_texts)
        return Answer(row.tokens, text, row.ended or "limit", row.log_probs if log_probs else None)

    def _check(self, prompts: Sequence[Prompt]) -> None:
        for i, prompt in enumerate(prompts):
            size = len(prompt.tokens) + prompt.limit
            what = fix = None
            if not prompt.tokens:
                what, fix = "a prompt has no tokens", "begin it with the tokenizer's first token"
            elif size > room(self.model):
                what = f"a prompt of {len(prompt.tokens)} tokens with {prompt.limit} to follow is longer than the model reads"
                fix = f"lower the limit, or cut the prompt with `fitted`: the model reads {room(self.model)} tokens"
            elif prompt.stop_texts and self.tokenizer is None:
                what, fix = "a prompt has stop texts, but there is no tokenizer", "give the writer its tokenizer"
            if what is not None:
                raise EvaluationError(what, where=f"prompt {i + 1} of {len(prompts)}", fix=fix)


def generate(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    limits: Sequence[int],
    stops: Sequence[int],
    together: bool = True,
) -> list[list[int]]:
    """Continue each prompt greedily until a stop token, which ends the answer as its last token, or the prompt's limit.

    Args:
        model: a causal language model; its delta, if it carries one, is active.
        prompts: tokens of each prompt, at least one.
        limits: most new tokens of each answer.
        stops: tokens that end an answer.
        together: as for a `Writer`.

    Returns:
        New tokens of each answer, in the order of the prompts.
    """
    asked = [Prompt(list(tokens), None, limit) for tokens, limit in zip(prompts, limits, strict=True)]
    (found,) = Writer(model, stops=stops, together=together).write(asked)
    return [answer.tokens for (answer,) in found]


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, together: bool = True
) -> list[str]:
    """Write the greedy answer to each prompt, as text without special tokens; see `Writer`."""
    (found,) = Writer(model, tokenizer, together=together).write(prompts)
    return [answer.text or "" for (answer,) in found]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end an answer: the tokenizer's end-of-sequence token and those of the model's own settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return [token for token in dict.fromkeys(found) if isinstance(token, int)]


def room(model: PreTrainedModel) -> float:
    """Give the most tokens that a model can read: its positions, without end where it has no such number."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or inf


def fitted(prompt: Prompt, positions: float) -> tuple[Prompt, int]:
    """Cut a prompt on the left so that it fits with its answer, as lm-eval does, and tell how many tokens were cut.

    At least one token is kept; where the limit alone is too large, it is lowered.
    """
    limit = int(min(prompt.limit, positions - 1))
    size = len(prompt.tokens)
    kept = int(min(size, positions - limit))
    if kept == size:
        return replace(prompt, limit=limit), 0
    return replace(prompt, tokens=prompt.tokens[size - kept :], text=None, limit=limit), size - kept
