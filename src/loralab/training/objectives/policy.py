"""Reinforcement learning: answers are written by the policy, graded, and made more or less likely.

J = E[(1 − β) r − β KL(π‖base)] over answers y ~ π (P5 PERL, 2403.10704, section 2.2). Per token t, with k₁ = log π − log base of
the written token, and everything but log π and the KL of the loss without gradient:

- reinforce (P5; Lee et al. 2023, 2309.00267): −log π(yₜ) (Zₜ − V(sₜ)) + (V(sₜ) − Zₜ)², where Zₜ sums −β k₁ from t on and (1 − β) r.
- rloo (Ahmadian et al. 2024, 2402.14740): −log π(yₜ) (R − mean R of the other answers), R = (1 − β) r − β Σ k₁.
- grpo (Shao et al. 2024, 2402.03300): −ρₜ (r − mean r) / (sd r + 10⁻⁴) + β k₃. It has no scale of a reward, so 1 − β is dropped.

With kl = unbiased, grpo's term is β ρₜ k₃, whose mean gradient is that of the KL itself (DeepSeek-V3.2, 2512.02556).
With kl = exact the KL over the vocabulary takes the place of k₁ and k₃; it has a gradient of its own, so it enters the loss of
reinforce and rloo too. reinforce and rloo then climb J without bias, either way (`training.estimators` says why); grpo does not.
Where a stand-in wrote the answers (a server with kernels of its own), each answer's loss is weighed by π/μ of the whole answer.
Sums are divided by the number of answers (reinforce, rloo), or of answer tokens (grpo: every token of the step counts the same,
however long its answer), of the whole optimizer step.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from loralab.delta.several import View
from loralab.errors import DataError
from loralab.methods.value import Value
from loralab.training import estimators
from loralab.training.loss import LanguageHead, LogitsOf, Written
from loralab.training.objectives import Loss
from loralab.training.objectives.answers import (
    Known,
    PolicyBatch,
    Rollout,
    drawn,
    equal,
    facts,
    lay_out,
    refuse_strangers,
)


class PolicyObjective:
    """Makes answers of high reward likelier, near the base.

    The policy's dropout should be 0: answers are written, and graded by the reference, without.

    Args:
        sample: writes and grades the answers of a batch, given how many batches there were before.
        head: of the model.
        algorithm: what an answer is compared with.
        beta: weight of the KL in [0, 1]; at 0 the reference is never asked.
        kl: `low_variance` reads the written token alone, `exact` the whole vocabulary; `unbiased` (of grpo) is k₃ with the token's
            ratio as its weight.
        reference: a view in which the model is the reference (`Method.without`).
        value: learns the baseline of `reinforce`; None is no baseline.
        epochs: passes over each batch of answers.
        minibatches: optimizer steps of a pass, each on its share of the prompts, drawn anew in each pass.
        clip: where a token's ratio stops to count, with more than one epoch or minibatch.
        micro_batch: prompts computed at a time; None is all.
        temperature: that answers are sampled at. Policy and reference are both taken at it, so that J is of what is sampled.
        share: compute a prompt once for all its answers. Changes cost, not the result.
        seed: of the order of prompts in minibatches.
    """

    def __init__(
        self,
        sample: Callable[[int], list[Rollout]],
        head: LanguageHead,
        *,
        algorithm: Literal["reinforce", "rloo", "grpo"],
        beta: float,
        kl: Literal["low_variance", "unbiased", "exact"],
        reference: View,
        value: Value | None = None,
        epochs: int = 1,
        minibatches: int = 1,
        clip: float = 0.2,
        micro_batch: int | None = None,
        temperature: float = 1.0,
        share: bool = True,
        seed: int = 0,
    ) -> None:
        if value is not None and algorithm != "reinforce":
            raise ValueError(f"{algorithm} has no use for a value model")
        if kl == "unbiased" and algorithm != "grpo":
            raise ValueError(f"{algorithm} has its KL in the reward, unbiased already")
        self.sample, self.head, self.algorithm, self.beta, self.kl = sample, head, algorithm, beta, kl
        self.reference, self.value, self.epochs, self.minibatches = reference, value, epochs, minibatches
        self.clip, self.micro_batch, self.temperature, self.share = clip, micro_batch, temperature, share
        self.seed = seed
        self.rollouts: list[Rollout] = []
        """The batch in hand, or the last one."""
        self.sampled = 0
        """Batches drawn so far."""
        self._known: list[Known] = []
        self._updates = 0
        self._writes: bool | None = None

    # Batches

    def batches(self, model: nn.Module) -> Iterator[list[PolicyBatch]]:
        """Give the micro-batches of one optimizer step after another; new answers are written when the old ones are used up.

        Raises:
            DataError: there are fewer prompts than minibatches.
        """
        while True:
            if not self.rollouts or self._updates == self.epochs * self.minibatches:
                self._draw()
            step = self._step(self._updates)
            self._updates += 1
            yield step

    def _draw(self) -> None:
        rollouts = self.sample(self.sampled)
        if len(rollouts) < self.minibatches:
            raise DataError(
                f"{len(rollouts)} prompts do not fill {self.minibatches} minibatches",
                where="objective.minibatches",
                fix="raise train.batch_size, which counts prompts, or take fewer minibatches",
            )
        self.rollouts, self.sampled, self._updates = rollouts, self.sampled + 1, 0
        self._known = [drawn(rollout) for rollout in rollouts]
        if self.epochs * self.minibatches > 1:
            self._known = [a | b for a, b in zip(self._known, self._measure(rollouts), strict=True)]

    def _step(self, update: int) -> list[PolicyBatch]:
        """Lay out the micro-batches of one optimizer step on the batch in hand."""
        epoch, part = divmod(update, self.minibatches)
        chosen = np.arange(len(self.rollouts))
        if self.minibatches > 1:
            order = np.random.default_rng([self.seed, self.sampled, epoch]).permutation(chosen)
            chosen = np.array_split(order, self.minibatches)[part]
        rollouts, known = [self.rollouts[i] for i in chosen], [self._known[i] for i in chosen]
        signal, of_all = self._has_signal(rollouts, known), facts(self.rollouts)
        if self.algorithm != "reinforce":
            of_all["equal_rewards"] = float(sum(map(equal, self.rollouts)))
        step: dict[int, Known] = {}
        return [
            self._lay_out(rollouts[part], known[part], signal, number, step, of_all)
            for number, part in enumerate(self._parts(len(rollouts)))
        ]

    def _parts(self, count: int) -> list[slice]:
        size = self.micro_batch or count
        return [slice(start, start + size) for start in range(0, count, size)]

    def _lay_out(self, rollouts: list[Rollout], known: Sequence[Known], *rest: Any) -> PolicyBatch:
        device = next(self.head.model.parameters()).device
        rows = tuple(row.to(device) for row in lay_out(rollouts, packs=self.head.packs, share=self.share))
        joint = {name: torch.cat([found[name] for found in known]) for name in known[0]}
        return PolicyBatch(rollouts, rows, joint, *rest)

    def _has_signal(self, rollouts: list[Rollout], known: list[Known]) -> bool:
        """Tell whether a step could learn: not where each prompt's answers are worth the same and the policy is the reference."""
        if self.algorithm == "reinforce" or not all(equal(rollout) for rollout in rollouts):
            return True
        if not self.beta:
            return False
        for found in known if "old" in known[0] else self._measure(rollouts):
            apart = found["kl"] if self.kl == "exact" else found["old"] - found["reference"]
            if apart.any():
                return True
        return False

    @torch.no_grad()
    def _measure(self, rollouts: list[Rollout]) -> list[Known]:
        """Read answers as the policy that wrote them, its reference and its value do."""
        measured: list[Known] = []
        for part in self._parts(len(rollouts)):
            batch = self._lay_out(rollouts[part], [{}], True, 0, {}, {})
            known: Known = {}
            with self._without_dropout():
                logits = self._ask_reference(batch, known)
                known |= _kept(self._read(batch, logits))
                if self.value is not None:
                    with self.reference(), self.value.acting():
                        known["values"] = _here(self.value.values(self._states(batch)))
            sizes = [rollout.num_tokens for rollout in batch.rollouts]
            pieces = {name: found.split(sizes) for name, found in known.items()}
            measured += [{name: piece[i] for name, piece in pieces.items()} for i in range(len(sizes))]
        return measured

    # Forward passes

    @contextmanager
    def _without_dropout(self) -> Iterator[None]:
        was_training = self.head.model.training
        self.head.model.eval()
        try:
            yield
        finally:
            self.head.model.train(was_training)

    def _states(self, batch: PolicyBatch) -> Float[Tensor, "tokens hidden"]:
        """Give the hidden states from which each answer token is written."""
        return torch.cat([self.head.hidden(row.row)[row.before] for row in batch.rows])

    def _read(self, batch: PolicyBatch, reference: Sequence[LogitsOf] | None) -> Written:
        """Read the answers as the policy is now."""
        others: Sequence[LogitsOf | None] = reference or [None] * len(batch.rows)
        found = [
            self.head.written(row.row, row.before, row.next_tokens(), temperature=self.temperature, reference=logits)
            for row, logits in zip(batch.rows, others, strict=True)
        ]
        log_probs, entropy = torch.cat([w.log_probs for w in found]), torch.cat([w.entropy for w in found])
        kl = None if reference is None else torch.cat([w.kl for w in found if w.kl is not None])
        return Written(log_probs, entropy, kl)

    @torch.no_grad()
    def _ask_reference(self, batch: PolicyBatch, known: Known) -> list[LogitsOf] | None:
        """Note the reference's log-probabilities among what is known, or give its logits where the KL is exact."""
        if not self.beta or "reference" in known:
            return None
        with self._without_dropout(), self.reference():
            if self.kl == "exact":
                return [self.head.logits_of(row.row, row.before) for row in batch.rows]
            known["reference"] = _here(self._read(batch, None).log_probs)
        return None

    def _view_writes(self) -> bool:
        """Tell whether the view of the reference writes into weights: a graph from before it could not go backward then."""
        if self._writes is None:
            parameters = list(self.head.model.parameters())
            before = [parameter._version for parameter in parameters]
            with self.reference():
                pass
            self._writes = before != [parameter._version for parameter in parameters]
        return self._writes

    # Loss

    def loss(self, model: nn.Module, batch: PolicyBatch) -> Loss:
        """Give the summed loss of a micro-batch; weight 0 where the whole step has nothing to learn from."""
        if not batch.signal:
            return Loss(torch.zeros(()), 0.0, dict(batch.facts))
        known, written = dict(batch.known), None
        logits = self._ask_reference(batch, known)
        if (self.beta or "drawn" in known) and "old" not in known:  # the KL is a part of what tokens are worth
            if self.value is not None and self._view_writes():
                with torch.no_grad():
                    known |= _kept(self._read(batch, logits))
            else:
                written = self._read(batch, logits)
                known |= _kept(written)
        worth = self._worth(batch, known)
        refuse_strangers(known)
        of_value: Tensor | None = None
        if self.value is not None:
            of_value, values = self._value_loss(self.value, batch, worth)
            known |= {"values": known.get("values", values), "seen": values, "returns": worth}
            worth = worth - known["values"]
        if written is None:
            written = self._read(batch, logits)
        total = self._policy_loss(batch, written, known, worth)
        total = total if of_value is None else total + of_value
        batch.step[batch.number] = known | {"entropy": _here(written.entropy), "tails": torch.tensor(batch.tails)}
        weight = len(worth) if self.algorithm == "grpo" else len(batch.tails)
        return Loss(total, float(weight), batch.facts | self._metrics(batch.step))

    def _worth(self, batch: PolicyBatch, known: Known) -> Tensor:
        """Give each answer token what its log-probability is multiplied by: its return, or its answer's advantage."""
        tails, counts = batch.tails, [len(rollout.answers) for rollout in batch.rollouts]
        rewards = torch.tensor([r for rollout in batch.rollouts for r in rollout.rewards], dtype=torch.float64)
        if self.algorithm == "grpo":
            advantages = torch.cat([estimators.grpo_advantages(r) for r in rewards.split(counts)])
            return advantages.repeat_interleave(torch.tensor(tails))
        penalty = torch.zeros(sum(tails), dtype=torch.float64)
        if self.beta:
            exact = self.kl == "exact"
            penalty = known["kl"] if exact else estimators.log_ratio(known["old"], known["reference"])
        steps = pad_sequence((-self.beta * penalty).split(tails), batch_first=True)
        ends = torch.tensor(tails)
        steps[torch.arange(len(tails)), ends - 1] += (1 - self.beta) * rewards
        if self.algorithm == "reinforce":
            return estimators.returns(steps)[torch.arange(steps.shape[1]) < ends[:, None]]
        advantages = torch.cat([estimators.rloo_advantages(r) for r in steps.sum(-1).split(counts)])
        return advantages.repeat_interleave(ends)

    def _value_loss(self, value: Value, batch: PolicyBatch, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Give Σ (V − Z)² and V. Its gradients are taken at once, while the value's pairs act and the base is in place.

        That also frees what it keeps for backward before the policy's pass, or the policy's backward, needs the memory.
        """
        with self.reference(), value.acting():
            values = value.values(self._states(batch))
            loss = (values - targets.to(values)).square().sum()
            tensors = list(value.tensors().values())
            gradients = torch.autograd.grad(loss, tensors, materialize_grads=True)
        return _Formed.apply(loss.detach(), gradients, *tensors), _here(values)

    def _policy_loss(self, batch: PolicyBatch, written: Written, known: Known, worth: Tensor) -> Tensor:
        """Sum the loss of the tokens, and the KL where it is in the loss."""
        log_probs = written.log_probs
        advantages = worth.to(log_probs)
        if "old" in batch.known:
            old = known["old"].to(log_probs)
            loss, ratio, held = estimators.clipped(log_probs, old, advantages, self.clip)
            known |= {"ratio": _here(ratio), "held": _here(held)}
        elif self.algorithm == "grpo":
            loss = -torch.exp(log_probs - log_probs.detach()) * advantages
        else:
            loss = -log_probs * advantages
        if written.kl is not None:
            loss = loss + self.beta * written.kl
        elif self.beta and self.algorithm == "grpo":
            reference = known["reference"].to(log_probs)
            if self.kl == "unbiased":
                old = known["old"].to(log_probs) if "old" in batch.known else log_probs.detach()
                loss = loss + self.beta * estimators.weighted_kl(log_probs, old, reference)
            else:
                loss = loss + self.beta * estimators.kl_per_token(log_probs, reference)
        if "drawn" in known:
            weights = estimators.answer_weights(known["old"], known["drawn"], batch.tails)
            loss = loss * weights.repeat_interleave(torch.tensor(batch.tails)).to(loss)
        return loss.sum()

    def _metrics(self, step: dict[int, Known]) -> dict[str, float]:
        """Average over the micro-batches of the step so far, so that those of the last one are the step's."""
        joint = {name: torch.cat([step[n][name] for n in sorted(step)]) for name in step[min(step)]}
        found = {"entropy": float(joint["entropy"].mean())}
        if self.beta:
            exact = self.kl == "exact"
            kl = joint["kl"] if exact else estimators.kl_per_token(joint["old"], joint["reference"])
            found |= {"kl": float(kl.sum()) / len(joint["tails"]), "kl_per_token": float(kl.mean())}
        if "returns" in joint:
            found["value_loss"] = float((joint["seen"] - joint["returns"]).square().mean())
            explained = estimators.explained_variance(joint["seen"], joint["returns"])
            found |= {} if explained is None else {"explained_variance": explained}
        if "drawn" in joint:
            apart = estimators.kl_per_token(joint["drawn"], joint["old"])
            weights = estimators.answer_weights(joint["old"], joint["drawn"], joint["tails"].tolist())
            cut = (weights == estimators.HEAVIEST).double()
            found |= {"stand_in_kl_per_token": float(apart.mean()), "stand_in_weight": float(weights.mean())}
            found["stand_in_cut"] = float(cut.mean())
        if "ratio" in joint:
            found |= {"clipped": float(joint["held"].mean()), "ratio_max": float(joint["ratio"].max())}
        return found

    # State

    @property
    def _read_for(self) -> list[Any]:
        of_steps = [self.epochs, self.minibatches, self.seed]
        return [self.algorithm, self.beta, self.kl, self.value is not None, self.temperature, *of_steps]

    def state(self) -> dict[str, Any]:
        """Give how many batches were drawn, and the one in hand with its place in it, as plain values."""
        if self._updates == self.epochs * self.minibatches or not self.rollouts:
            return {"sampled": self.sampled, "updates": 0, "rollouts": [], "known": []}
        known = [{name: values.tolist() for name, values in found.items()} for found in self._known]
        in_hand = {"rollouts": [asdict(rollout) for rollout in self.rollouts], "known": known}
        return {"sampled": self.sampled, "updates": self._updates, "read_for": self._read_for, **in_hand}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a state: the next steps are those that an uninterrupted objective would give.

        A batch in hand that was read for other settings, as where a run branches off, is given up for a new one.
        """
        self.sampled, self._updates = state["sampled"], state["updates"]
        if state["rollouts"] and state["read_for"] != self._read_for:
            self.rollouts, self._known = [], []
            return
        self.rollouts = [Rollout(**rollout) for rollout in state["rollouts"]]
        self._known = [
            {name: torch.tensor(values, dtype=torch.float64) for name, values in found.items()}
            for found in state["known"]
        ]


class _Formed(torch.autograd.Function):
    """A loss whose gradients are there already: backward scales them and hands them on."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *_tensors: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        return None, None, *(gradient * scale.to(gradient) for gradient in ctx.gradients)


def _here(values: Tensor) -> Tensor:
    """Bring numbers to main memory as float64, which holds every narrower float exactly."""
    return values.detach().double().cpu()


def _kept(written: Written) -> Known:
    """Keep what the policy says of tokens that it wrote."""
    kl = {} if written.kl is None else {"kl": _here(written.kl)}
    return {"old": _here(written.log_probs), **kl}
