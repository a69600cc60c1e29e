"""A tiny policy of three tokens, whose answers can all be listed, in float64: loss, gradients and J by hand."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from loralab.base.attention import NAME
from loralab.base.model import Base
from loralab.methods.full import Full
from loralab.methods.lora import Lora
from loralab.methods.value import Value, WithValue
from loralab.training.loss import LanguageHead
from loralab.training.objectives.policy import PolicyObjective, Rollout
from tiny import tiny

END, PROMPT, LONGEST = 2, [0, 1, 1], 2
ANSWERS = [[END], *([first, second] for first, second in itertools.product((0, 1), (0, 1, END)))]
"""Every answer of at most two tokens; one of two tokens may lack its end."""
REWARDS = [0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 1.0]
LAYERS = ["q_proj", "down_proj"]


class World:
    """A tiny policy that has moved away from its base, in float64."""

    def __init__(self, how: str = "lora", vocab: int = 3, wide: bool = True) -> None:
        model = tiny("llama", vocab_size=vocab, pad_token_id=None, bos_token_id=None)
        model.set_attn_implementation(NAME)
        model.requires_grad_(False)
        self.model = model.double() if wide else model
        self.base = Base(self.model, None, "tiny", None, "mark")
        self.method = Lora(rank=2, alpha=2.0, targets=LAYERS) if how == "lora" else Full(targets=[*LAYERS, "lm_head"])
        self.value = Value(rank=2, alpha=2.0, targets=LAYERS)
        self.both = WithValue(self.method, self.value)
        self.both.attach(self.base, 0)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in [*self.tensors, *self.value.tensors().values()]:
                parameter.data = parameter.data.to(self.model.dtype)
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        self.head = LanguageHead(self.model, chunk=3)

    @property
    def tensors(self) -> list[Tensor]:
        return [p for group in self.method.param_groups(1.0, 0.0) for p in group.tensors.values()]

    def objective(self, rollouts: list[Rollout], **keys: Any) -> PolicyObjective:
        given = {"algorithm": "rloo", "beta": 0.0, "kl": "low_variance", "reference": self.both.without, **keys}
        return PolicyObjective(lambda step: rollouts, self.head, **given)

    def log_probs(self, answer: list[int], temperature: float = 1.0, prompt: list[int] = PROMPT) -> Tensor:
        """Log-probabilities (tokens, vocab) from which an answer is written, by the model's own forward pass."""
        logits = self.model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits / temperature, -1)

    def of(self, answer: list[int], temperature: float = 1.0, prompt: list[int] = PROMPT) -> Tensor:
        """Log-probability of each token of an answer."""
        return self.log_probs(answer, temperature, prompt)[torch.arange(len(answer)), torch.tensor(answer)]

    def exact(self, beta: float, temperature: float) -> list[Tensor]:
        """The gradient of J = Σ p(y) ((1 − β) r(y) − β log p(y)/q(y)), over the listed answers."""
        with self.method.without(), torch.no_grad():
            reference = torch.stack([self.of(a, temperature).sum() for a in ANSWERS])
        log_p = torch.stack([self.of(a, temperature).sum() for a in ANSWERS])
        assert float(log_p.exp().sum().detach()) == pytest.approx(1), "the answers are all there are"
        if beta:
            assert float((log_p.exp() * (log_p - reference)).sum().detach()) > 0.01, "the policy has moved"
        J = (log_p.exp() * ((1 - beta) * torch.tensor(REWARDS) - beta * (log_p - reference))).sum()
        return list(torch.autograd.grad(J, self.tensors))

    def gradient(self, objective: PolicyObjective) -> list[Tensor]:
        """The gradient of one step's loss, divided once as the loop does."""
        weight = 0.0
        everything = [*self.tensors, *self.value.tensors().values()]
        for tensor in everything:
            tensor.grad = None
        for batch in next(objective.batches(self.model)):
            loss = objective.loss(self.model, batch)
            if loss.weight:
                loss.total.backward()
            weight += loss.weight
        return [torch.zeros_like(t) if t.grad is None else t.grad / weight for t in everything]

    def mean_gradient(self, samples: int, drawn_at: float | None = None, **keys: Any) -> list[Tensor]:
        """The mean over all ways to draw so many answers, each with its probability; at `drawn_at` a stand-in draws."""
        temperature = keys.get("temperature", 1.0)
        with torch.no_grad():
            log_p = [self.of(answer, drawn_at or temperature) for answer in ANSWERS]
        p = [float(found.sum().exp()) for found in log_p]
        total = [torch.zeros_like(t) for t in self.tensors]
        for drawn in itertools.combinations_with_replacement(range(len(ANSWERS)), samples):
            ways = 1 if len(set(drawn)) == 1 else samples
            assert samples <= 2
            told = [log_p[i].tolist() for i in drawn] if drawn_at else []
            rollout = Rollout(PROMPT, [ANSWERS[i] for i in drawn], [REWARDS[i] for i in drawn], log_probs=told)
            chance = ways * float(torch.tensor([p[i] for i in drawn]).prod())
            for mine, part in zip(total, self.gradient(self.objective([rollout], **keys)), strict=False):
                mine += chance * part
        return total


def same(mine: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    assert max(float(t.abs().max()) for t in theirs) > 1e-3, "there is something to compare"
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def opposite(tensors: list[Tensor]) -> list[Tensor]:
    return [-t for t in tensors]


def two_prompts() -> list[Rollout]:
    return [
        Rollout(PROMPT, [ANSWERS[1], ANSWERS[0], ANSWERS[6]], [1.0, 4.0, 1.5]),
        Rollout([1, 0], [ANSWERS[3], ANSWERS[5], ANSWERS[2]], [0.0, -1.0, 3.0]),
        Rollout([0, 0, 1, 0], [ANSWERS[0], ANSWERS[4], ANSWERS[4]], [2.0, 2.0, 2.0]),
        Rollout([1], [ANSWERS[2], ANSWERS[0], ANSWERS[1]], [0.5, 0.0, -3.0]),
    ]
