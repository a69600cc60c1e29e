"""Chain of LoRA: train a pair, tie a knot, extend the chain.

Paper: Xia, Qin & Hazan 2024 (2401.04151): after each link W ← W + (alpha/rank) B A, then a fresh pair (A random, B zero)
and a fresh optimizer. Here: a tied link stays a frozen pair beside the weight instead of being rounded into it, so the
function does not change at the knot in any dtype, and the sum exports exactly as one adapter of rank Σ rᵢ.
"""

from itertools import accumulate
from typing import Any

from loralab.delta.lowrank import Delta
from loralab.errors import DataError, TargetError
from loralab.methods.base import Knot, Progress
from loralab.methods.lora import Lora


class Cola(Lora):
    """LoRA in links, each trained on top of the frozen ones before it."""

    def __init__(
        self,
        *,
        links: int = 3,
        budgets: list[float] | None = None,
        ranks: list[int] | None = None,
        schedule: str = "restart",
        stop_gain: float | None = None,
        **lora: Any,
    ) -> None:
        super().__init__(**lora)
        self.num_links, self.schedule, self.stop_gain = links, schedule, stop_gain
        self.budgets = budgets or [1.0] * links
        self.ranks = ranks or [self.rank] * links
        self.rank = self.alpha_rank = self.ranks[0]
        self._loss_before: float | None = None

    def rank_of(self, link: str) -> int:
        return self.ranks[int(link.removeprefix("link-")) - 1]

    def knots(self, total_steps: int) -> list[int]:
        """Give the steps after which a link ends; the last is the end of the run. Every link has at least one step."""
        if total_steps < self.num_links:
            raise TargetError(
                f"{total_steps} steps cannot train {self.num_links} links",
                where="method.links",
                fix="train longer, or take fewer links",
            )
        whole = sum(self.budgets)
        ends = [round(total_steps * part / whole) for part in accumulate(self.budgets)]
        for i in range(len(ends)):
            ends[i] = max(ends[i], (ends[i - 1] if i else 0) + 1)
        return [min(end, total_steps) for end in ends[:-1]] + [total_steps]

    def phase(self, step: int, total_steps: int) -> tuple[int, int]:
        """Stretch the schedule over the link of this step, or over the whole chain if it is global."""
        if self.schedule == "global":
            return 0, total_steps
        start = 0
        for end in self.knots(total_steps):
            if step < end:
                return start, end - start
            start = end
        return 0, total_steps

    def at_step(self, progress: Progress) -> Knot | None:
        """Freeze the link that ended and begin the next; end the chain when a link gained less than `stop_gain`."""
        if progress.step == 0:
            self.knots(progress.total_steps)
            self._loss_before = progress.validation_loss() if self.stop_gain is not None else None
            if self.stop_gain is not None and self._loss_before is None:
                raise DataError(
                    "a chain that stops by gain needs validation rows",
                    where="method.stop_gain",
                    fix="give data.validation or a data.validation_share above 0",
                )
            return None
        if progress.step not in self.knots(progress.total_steps)[:-1]:
            return None
        link, gain = len(self.pair_names), None
        if self.stop_gain is not None:
            loss = progress.validation_loss()
            if loss is not None and self._loss_before is not None:
                gain = self._loss_before - loss
            self._loss_before = loss
            if gain is not None and gain < self.stop_gain:
                return Knot(link, gain, ends=True)
        name = f"link-{link + 1}"
        self.add_link(name, self.rank_of(name))
        return Knot(link, gain)

    def links(self) -> list[Delta]:
        return [self.link(name) for name in self.pair_names]

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        tensors, facts = super().state()
        return tensors, {**facts, "loss_before": self._loss_before}

    def load_state(self, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        super().load_state(tensors, facts)
        self._loss_before = facts["loss_before"]
