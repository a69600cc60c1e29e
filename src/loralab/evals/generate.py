"""Answers that a model writes, most likely token after most likely token, in batches and with a cache of keys and values.

Transformers' own `generate` does the work, with nothing of the model's own taste in sampling: no penalties, no temperature,
no beams. Prompts of different lengths are padded on the left, which the attention mask hides.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loralab.evals.probe import measuring

CACHED_TOKENS = 16384
"""Most tokens, prompts and answers together, whose keys and values are held at once."""


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
        together: prompts of different lengths may share a batch; not with a model that a left padding would disturb.

    Returns:
        New tokens of each answer, in the order of the prompts.
    """
    answers: list[list[int]] = [[]] * len(prompts)
    with measuring(model), _no_taste_of_its_own(model):
        for group in _groups(prompts, limits, together, room(model)):
            found = _continue(model, [prompts[i] for i in group], max(limits[i] for i in group), stops)
            for i, answer in zip(group, found, strict=True):
                answers[i] = _cut(answer[: limits[i]], stops)
    return answers


def _groups(
    prompts: Sequence[Sequence[int]], limits: Sequence[int], together: bool, positions: float = inf
) -> Iterator[list[int]]:
    """Group prompts of about the same limit and length, up to `CACHED_TOKENS`; of the same length if they must.

    All of a group are continued as far as the one of the largest limit: that must not lead any beyond the model's positions.
    """
    group: list[int] = []
    longest = most = 0
    sizes = [
        (limit, len(prompt)) if together else (len(prompt), limit)
        for prompt, limit in zip(prompts, limits, strict=True)
    ]
    for i in sorted(range(len(prompts)), key=sizes.__getitem__):
        apart = not together and len(prompts[i]) != longest
        longest, most = max(longest, len(prompts[i])), max(most, limits[i])
        if group and (apart or longest + most > positions or (longest + most) * (len(group) + 1) > CACHED_TOKENS):
            yield group
            group, longest, most = [], len(prompts[i]), limits[i]
        group.append(i)
    if group:
        yield group


def _continue(model: PreTrainedModel, prompts: list[Sequence[int]], most: int, stops: Sequence[int]) -> list[list[int]]:
    longest = max(map(len, prompts))
    padding = stops[0] if stops else 0
    tokens = [[padding] * (longest - len(prompt)) + [*prompt] for prompt in prompts]
    seen = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    greedy = GenerationConfig(
        do_sample=False, max_new_tokens=most, eos_token_id=list(stops) or None, pad_token_id=padding, use_cache=True
    )
    write: Any = model.generate  # not declared: it comes from a mixin
    found: torch.Tensor = write(
        torch.tensor(tokens, device=model.device),
        attention_mask=torch.tensor(seen, device=model.device),
        generation_config=greedy,
    )
    return [[int(token) for token in row] for row in found[:, longest:].tolist()]


@contextmanager
def _no_taste_of_its_own(model: PreTrainedModel) -> Iterator[None]:
    """Put the model's own generation settings aside: Transformers would fill in from them what ours leave open."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


def _cut(answer: list[int], stops: Sequence[int]) -> list[int]:
    """End an answer with its first stop token: in a batch it is padded until the last one has stopped."""
    end = next((place for place, token in enumerate(answer, 1) if token in stops), len(answer))
    return answer[:end]


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered.

    Attributes:
        tokens: at least one. Where a token reaches over the end of the prompt, they end before it.
        text: the prompt as it was written; None where only its tokens are known.
        limit: most new tokens.
    """

    tokens: list[int]
    text: str | None
    limit: int


def answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], *, together: bool = True
) -> list[str]:
    """Write an answer to each prompt, as text without special tokens; see `generate`."""
    stops = stop_tokens(model, tokenizer)
    limits = [prompt.limit for prompt in prompts]
    found = generate(model, [prompt.tokens for prompt in prompts], limits=limits, stops=stops, together=together)
    return [text_behind(prompt, answer, tokenizer) for prompt, answer in zip(prompts, found, strict=True)]


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """List the tokens that end an answer: the tokenizer's end-of-sequence token and those of the model's own settings."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return [token for token in dict.fromkeys(found) if isinstance(token, int)]


def room(model: PreTrainedModel) -> float:
    """Give the most tokens that a model can read: its positions, without end where it has no such number."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or inf


def text_behind(prompt: Prompt, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode tokens that follow a prompt.

    They are decoded together and what the prompt wrote is taken off: alone, a tokenizer would write the beginning of a text.
    """
    before, whole = (
        str(tokenizer.decode(found, skip_special_tokens=True, clean_up_tokenization_spaces=False))
        for found in (prompt.tokens, [*prompt.tokens, *tokens])
    )
    known = prompt.text if prompt.text is not None and whole.startswith(prompt.text) else before
    return whole[len(known) :]
