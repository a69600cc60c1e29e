"""How the next token is chosen: the likeliest one, or one drawn with temperature, top-k and top-p.

Each answer draws from a random stream of its own, which hangs on the seed, the prompt's place in the list and the number of
the sample only: what an answer says does not change with the other rows of its batch, their order or how many fit. All
views of a model draw from the same streams, so that the answers of a base and of its deltas are paired.
"""

from dataclasses import dataclass
from math import isfinite

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from loralab.errors import EvaluationError

NOTHING = -1
"""Stands for the token of a row whose logits are not numbers."""

_WORD = (1 << 64) - 1
_STRIDE, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; by default the likeliest is taken.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_p: only the likeliest tokens are left that together have at least this probability; 1 leaves all.
        top_k: only so many likeliest tokens are left (more where they tie); 0 leaves all.
        seed: of all random streams.

    The order is that of Transformers: temperature, top-k, top-p.

    Raises:
        EvaluationError: a value that no distribution has.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isfinite(self.temperature) and self.temperature >= 0):
            fix = "0 takes the likeliest token, 1 draws from the model's own distribution"
            raise EvaluationError(f"a temperature of {self.temperature}", where="temperature", fix=fix)
        if not 0 < self.top_p <= 1:
            fix = "give a number above 0 and up to 1, which leaves all tokens"
            raise EvaluationError(f"a top-p of {self.top_p}", where="top_p", fix=fix)
        if self.top_k < 0:
            raise EvaluationError(f"a top-k of {self.top_k}", where="top_k", fix="0 leaves all tokens")

    @property
    def greedy(self) -> bool:
        """The likeliest token is always taken."""
        return self.temperature == 0

    def stream(self, prompt: int, sample: int) -> int:
        """Give the key of the random stream of a prompt's sample, as a signed 64-bit number."""
        key = _mixed(self.seed & _WORD)
        for number in (prompt, sample):
            key = _mixed((key + (number + 1) * _STRIDE) & _WORD)
        return key - (1 << 64) if key >> 63 else key


def choose(
    logits: Float[Tensor, "rows vocab"], sampling: Sampling, streams: Int[Tensor, " rows"], drawn: Int[Tensor, " rows"]
) -> Int[Tensor, " rows"]:
    """Choose the next token of each row; `NOTHING` where its logits are not numbers.

    Args:
        logits: float32, of the next token.
        sampling: how to choose.
        streams: the key of each row's random stream.
        drawn: how many tokens each row has drawn before.
    """
    top, likeliest = logits.max(-1)  # not a number if any is none
    found = likeliest if sampling.greedy else _draw(_left(logits, top, sampling), uniform(streams, drawn))
    return torch.where(torch.isfinite(top), found, NOTHING)


def _left(logits: Tensor, top: Tensor, sampling: Sampling) -> Float[Tensor, "rows vocab"]:
    """Give the logits after temperature, top-k and top-p: the largest is 0, those that are out are -inf."""
    scores = (logits - top[:, None]) / sampling.temperature  # from 0 down, so that no small temperature overflows
    nothing = torch.empty(0, dtype=torch.long)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(nothing, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(nothing, scores)
    return scores


def _draw(scores: Float[Tensor, "rows vocab"], u: Float[Tensor, " rows"]) -> Int[Tensor, " rows"]:
    """Take the first token at which the sum of probabilities passes u: one of probability 0 never does."""
    cumulative = torch.softmax(scores, -1).cumsum(-1, dtype=u.dtype)
    passed = torch.searchsorted(cumulative, u[:, None] * cumulative[:, -1:], right=True).squeeze(-1)
    return passed.clamp(max=scores.shape[-1] - 1)  # only where nothing is a number


def uniform(streams: Int[Tensor, " rows"], drawn: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Give the next number of each stream, in [0, 1): SplitMix64 (Steele, Lea & Flood 2014) counting the draws.

    Computed on the streams' device. One bit less than the dtype holds, so that a share u of a sum is always less than the sum.
    """
    word = streams + (drawn + 1) * (_STRIDE - (1 << 64))
    word = (word ^ _shifted(word, 30)) * (_FIRST - (1 << 64))
    word = (word ^ _shifted(word, 27)) * (_SECOND - (1 << 64))
    word = word ^ _shifted(word, 31)
    dtype, bits = (torch.float32, 23) if streams.device.type == "mps" else (torch.float64, 52)
    return _shifted(word, 64 - bits).to(dtype) * 2.0**-bits


def _shifted(word: Int[Tensor, " rows"], by: int) -> Int[Tensor, " rows"]:
    """Shift right as if the numbers had no sign."""
    return (word >> by) & ((1 << (64 - by)) - 1)


def _mixed(word: int) -> int:
    """Give SplitMix64's output function, on a number of 64 bits without sign."""
    word = ((word ^ (word >> 30)) * _FIRST) & _WORD
    word = ((word ^ (word >> 27)) * _SECOND) & _WORD
    return word ^ (word >> 31)


def log_probabilities(logits: Float[Tensor, "rows vocab"], tokens: Int[Tensor, " rows"]) -> Float[Tensor, " rows"]:
    """Give the log-probability (nats) of each row's token under the model itself: temperature 1, no token left out."""
    return logits.gather(-1, tokens.clamp(min=0)[:, None]).squeeze(-1) - logits.logsumexp(-1)
