"""The only training loop: pretraining, instruction tuning, and whatever objective comes next, run through it.

One optimizer step: take its micro-batches, add up their gradients, divide once by their joint weight, clip, step. After
the step, in this order: knot, probes, checkpoint; so a checkpoint holds everything up to its step.
"""

import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from loralab.errors import CheckpointError, Diverged, Interrupted, TargetError
from loralab.methods.base import Knot, Method, Progress
from loralab.training.checkpoint import State, random_state, set_random_state
from loralab.training.objectives import Objective
from loralab.training.optim import MakeTorchOptimizer, Optimizer, Schedule

SPIKE_WINDOW, SPIKE_PATIENCE, SPIKE_FLOOR_NATS = 50, 10, 0.1
IDLE = 3
"""Steps in a row without anything to learn from, after which that is said."""


@dataclass(frozen=True)
class StepReport:
    """What happened in one optimizer step."""

    step: int
    loss: float
    """Nats per labelled token."""
    num_tokens: int
    num_labelled: float
    gradient_norm: float
    learning_rates: dict[str, float]
    metrics: dict[str, float]
    seconds: float


class Watch(Protocol):
    """Who looks on: measures, records, saves. The loop knows no evaluation and no folder."""

    def measure(self, step: int, *, last: bool = False) -> None:
        """Run the probes if they are due, or if this is the last step."""
        ...

    def validation_loss(self, step: int) -> float | None:
        """Give the validation loss after `step` steps, measuring it if need be."""
        ...

    def on_step(self, report: StepReport) -> None: ...

    def on_knot(self, knot: Knot, step: int) -> None: ...

    def on_warning(self, message: str, step: int) -> None: ...

    def save_if_due(self, step: int, state: Callable[[], State], *, now: bool = False) -> None:
        """Write a checkpoint if one is due, or at once."""
        ...

    def is_enough(self) -> bool:
        """Tell whether what was measured says that the run should end here."""
        ...

    def stop_requested(self) -> bool: ...


class Loop:
    """Moves a method's tensors by an objective, step by step."""

    def __init__(
        self,
        *,
        model: nn.Module,
        method: Method,
        objective: Objective,
        make_optimizer: MakeTorchOptimizer,
        learning_rate: float,
        weight_decay: float,
        schedule: Schedule,
        total_steps: int,
        clip: float | None = 1.0,
        spike: float | None = 10.0,
        may_rest: bool = False,
    ) -> None:
        self.model, self.method, self.objective = model, method, objective
        self.schedule, self.total_steps, self.clip, self.spike = schedule, total_steps, clip, spike
        self.may_rest = may_rest  # a step without anything to learn from, as where all rewards are equal, is no failure
        self._new_optimizer = lambda: Optimizer(method.param_groups(learning_rate, weight_decay), make_optimizer)
        self.optimizer = self._new_optimizer()
        self.step = 0
        self.num_tokens = 0
        self._recent: deque[float] = deque(maxlen=SPIKE_WINDOW)
        self._without_gradient: set[str] | None = None
        self._looks = self._rested = 0

    def run(self, watch: Watch) -> None:
        """Train to the end.

        Raises:
            Diverged: the loss became NaN or spiked; nothing was stepped on it.
            Interrupted: a stop was requested; the state was saved.
        """
        self.model.train()
        if self.step == 0:
            watch.measure(0)
            self.method.at_step(self._progress(watch))
            watch.save_if_due(0, self.state)
        batches = self.objective.batches(self.model)
        while self.step < self.total_steps:
            watch.on_step(self._one_step(next(batches), watch))
            knot = self.method.at_step(self._progress(watch))
            if knot is not None:
                self._tie(knot, watch)
            ended = self.step == self.total_steps
            watch.measure(self.step, last=ended)
            if not ended and watch.is_enough():
                self.total_steps, ended = self.step, True
                watch.measure(self.step, last=True)
            watch.save_if_due(self.step, self.state, now=ended)
            if watch.stop_requested() and not ended:
                watch.save_if_due(self.step, self.state, now=True)
                raise Interrupted(
                    f"stopped after step {self.step}", fix="run the same command again: it goes on from here"
                )

    def _progress(self, watch: Watch) -> Progress:
        return Progress(self.step, self.total_steps, lambda: watch.validation_loss(self.step))

    def _one_step(self, micro_batches: list[Any], watch: Watch) -> StepReport:
        begin, total, weight, tokens = time.perf_counter(), 0.0, 0.0, 0
        metrics: dict[str, float] = {}
        for batch in micro_batches:
            loss = self.objective.loss(self.model, batch)
            if loss.weight:
                loss.total.backward()
                self.optimizer.collect()
            total += float(loss.total.detach())
            weight += loss.weight
            tokens += batch.tokens.numel()
            metrics |= loss.metrics
        mean = total / max(weight, 1.0)
        self._refuse_divergence(mean)
        self.optimizer.scale_gradients(1.0 / max(weight, 1.0))
        if self.may_rest and not any(bool(grad.any()) for grad in self.optimizer.gradients().values()):
            weight = 0.0
            self.optimizer.zero()  # a gradient of zeros would still let the moments move the tensors
        self._rested = 0 if weight else self._rested + 1
        if self.may_rest and self._rested == IDLE:
            watch.on_warning(f"nothing to learn from in {IDLE} steps: all answers are worth the same", self.step + 1)
        if weight:
            self._look_for_dead_tensors(watch)
        norm = self.optimizer.clip(self.clip)
        if not math.isfinite(norm):
            raise self._divergence(f"the gradient's norm is {norm}")
        if norm == 0.0 and self.step > 1 and weight:
            raise self._divergence("every gradient is exactly zero, so nothing can be learned any more")
        start, length = self.method.phase(self.step, self.total_steps)
        self.optimizer.step(self.schedule(self.step - start, length))
        self.step += 1
        self.num_tokens += tokens
        rates, seconds = self.optimizer.learning_rates(), time.perf_counter() - begin
        return StepReport(self.step, mean, tokens, weight, norm, rates, metrics, seconds)

    def _refuse_divergence(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise self._divergence(f"the loss is {loss}")
        usual = statistics.median(self._recent) if len(self._recent) >= SPIKE_PATIENCE else None
        usual = None if usual is None else max(usual, SPIKE_FLOOR_NATS)
        if self.spike and usual is not None and loss > self.spike * usual:
            raise self._divergence(f"the loss is {loss:.3g}, {loss / usual:.0f} times its running median {usual:.3g}")
        self._recent.append(loss)

    def _divergence(self, what: str) -> Diverged:
        return Diverged(
            f"training diverged: {what}",
            where=f"step {self.step + 1}",
            fix="lower optimizer.learning_rate or raise schedule.warmup; if this loss is expected, raise train.spike and"
            " go on from the last checkpoint with --from RUN@STEP",
        )

    def _look_for_dead_tensors(self, watch: Watch) -> None:
        """In the first three steps, find tensors that never receive a gradient.

        A pair's A needs the second step, as B starts at zero; under a head that starts at zero too, the third.
        """
        if self._looks > 2:
            return
        self._looks += 1
        alive = {name for name, grad in self.optimizer.gradients().items() if bool(grad.any())}
        dead = set(self.optimizer.tensors) - alive
        self._without_gradient = dead if self._without_gradient is None else self._without_gradient & dead
        names = sorted(self._without_gradient)
        if self._looks == 2 and len(names) == len(self.optimizer.tensors):
            raise TargetError("no trained tensor receives a gradient", where=names[0], fix="change method.targets")
        if self._looks == 3 and names:
            watch.on_warning(
                f"{len(names)} trained tensors receive no gradient: {', '.join(names[:3])} …", self.step + 1
            )

    def _tie(self, knot: Knot, watch: Watch) -> None:
        watch.on_knot(knot, self.step)
        if knot.ends:
            self.total_steps = self.step
        else:
            self.optimizer = self._new_optimizer()

    def state(self) -> State:
        """Give everything needed to go on as if never stopped."""
        method_tensors, method_facts = self.method.state()
        optimizer_tensors, optimizer_facts = self.optimizer.state()
        return State(
            self.step,
            {"method": method_tensors, "optimizer": optimizer_tensors, "random": random_state()},
            {
                "method": method_facts,
                "optimizer": optimizer_facts,
                "data": self.objective.state(),
                "num_tokens": self.num_tokens,
                "total_steps": self.total_steps,
                "recent": list(self._recent),
                "looks": self._looks,
                "without_gradient": None if self._without_gradient is None else sorted(self._without_gradient),
            },
        )

    def load_state(self, state: State, *, branch: bool = False) -> None:
        """Go on from a state; a branch keeps its own length.

        Raises:
            CheckpointError: the state is of another method or shape.
            DataError: its place in the data is of other data.
        """
        facts = state.facts
        try:
            self.method.load_state(state.tensors["method"], facts["method"])
            fits = self.method.state()[0].keys() == state.tensors["method"].keys()
        except (KeyError, RuntimeError):  # a tensor is missing, or has another shape
            fits = False
        if not fits:
            raise CheckpointError(
                "the checkpoint is of another method, rank or choice of targets",
                where=f"step {state.step}",
                fix="begin from it with the method that it was made with",
            )
        self.optimizer = self._new_optimizer()
        self.optimizer.load_state(state.tensors["optimizer"], facts["optimizer"])
        self.objective.load_state(facts["data"])
        self.step, self.num_tokens = state.step, facts["num_tokens"]
        if not branch:
            self.total_steps = facts["total_steps"]
        self._recent.extend(facts["recent"])
        self._looks, dead = facts.get("looks", 3), facts["without_gradient"]
        self._without_gradient = None if dead is None else set(dead)
        set_random_state(state.tensors["random"])
