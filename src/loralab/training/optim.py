"""Optimizers over named groups, learning-rate schedules, float32 masters.

A schedule is a factor of the step that multiplies every group's own learning rate, so the ratio of LoRA+ holds
throughout. Tensors narrower than float32 are stepped on float32 masters kept here and rounded once per step.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from loralab.methods.base import ParamGroup

Schedule = Callable[[int, int], float]
"""(step within the phase, steps of the phase) → factor of the learning rate."""

MakeTorchOptimizer = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


def steps_of(amount: float, total: int) -> int:
    """Read an amount below 1 as a share of `total`, from 1 on as steps."""
    return round(amount * total) if amount < 1 else round(amount)


def schedule(
    name: str, *, warmup: float = 0.0, final: float = 0.0, scale: float = 1000.0, cooldown: float = 0.2
) -> Schedule:
    """Make a schedule by name: constant, linear, cosine or inverse_sqrt.

    All rise linearly over the warm-up. Linear and cosine then fall to `final`; inverse_sqrt falls as
    1/sqrt(1 + t/scale) and in the cooldown straight to zero (P1 section 3: t_scale 1000, the last 20 %).
    """

    def factor(step: int, total: int) -> float:
        warm = steps_of(warmup, total)
        if step < warm:
            return (step + 1) / (warm + 1)
        progress = min(1.0, (step - warm) / max(1, total - warm))
        if name == "linear":
            return 1 - (1 - final) * progress
        if name == "cosine":
            return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))
        if name == "inverse_sqrt":
            left = min(1.0, (total - step) / max(1, steps_of(cooldown, total)))
            flat_end = min(step, total - steps_of(cooldown, total))
            return left / math.sqrt(1 + max(0, flat_end - warm) / scale)
        return 1.0

    return factor


class LionW(torch.optim.Optimizer):
    """Lion with decoupled weight decay.

    Paper: Chen et al. 2023 (2302.06675), algorithm 2; P1 uses it with betas (0.9, 0.95). Here: the decay is not times the
    learning rate, only times the schedule's factor, as in the optimizer that P1 used.
    """

    def __init__(self, groups: list[dict[str, Any]], lr: float = 1e-4, betas: Sequence[float] = (0.9, 0.95)) -> None:
        super().__init__(groups, {"lr": lr, "betas": tuple(betas), "weight_decay": 0.0})
        for group in self.param_groups:
            group["peak"] = group["lr"]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Move every tensor by the sign of its interpolated momentum."""
        for group in self.param_groups:
            slow, fast = group["betas"]
            keep = 1 - group["weight_decay"] * group["lr"] / group["peak"]
            tensors = [p for p in group["params"] if p.grad is not None]
            if not tensors:
                continue
            grads = [p.grad for p in tensors]
            for p in tensors:
                if "momentum" not in self.state[p]:
                    self.state[p]["momentum"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum"] for p in tensors]
            update = torch._foreach_lerp(grads, momenta, slow)
            torch._foreach_sign_(update)
            if keep != 1:
                torch._foreach_mul_(tensors, keep)
            torch._foreach_add_(tensors, update, alpha=-group["lr"])
            torch._foreach_lerp_(momenta, grads, 1 - fast)


def torch_optimizer(
    name: str,
    *,
    betas: Sequence[float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    decay_exponent: float = -0.8,
    clip_threshold: float = 1.0,
) -> MakeTorchOptimizer:
    """Give the maker of an optimizer by name: adamw, lionw or adafactor."""

    def make(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        if name == "lionw":
            return LionW(groups, betas=betas)
        if name == "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(
                groups,
                lr=groups[0]["lr"],
                decay_rate=decay_exponent,
                clip_threshold=clip_threshold,
                scale_parameter=False,
                relative_step=False,
            )
        return torch.optim.AdamW(groups, betas=(betas[0], betas[1]), eps=epsilon)

    return make


class Optimizer:
    """Steps named groups; keeps float32 masters; saves and loads its state by tensor name, without pickle."""

    def __init__(self, groups: list[ParamGroup], make: MakeTorchOptimizer) -> None:
        self.groups = groups
        self.tensors: dict[str, Parameter] = {name: p for group in groups for name, p in group.tensors.items()}
        self._masters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else p.detach().float().requires_grad_(True)
            for name, p in self.tensors.items()
        }
        self._narrow = [name for name, p in self.tensors.items() if self._masters[name] is not p]
        self._inner = make(
            [
                {
                    "params": [self._masters[name] for name in group.tensors],
                    "lr": group.learning_rate,
                    "weight_decay": group.weight_decay,
                }
                for group in groups
            ]
        )

    def collect(self) -> None:
        """Add the gradients of narrow tensors to their float32 masters, so that accumulation rounds nothing."""
        for name in self._narrow:
            if (grad := self.tensors[name].grad) is not None:
                master = self._masters[name]
                master.grad = grad.float() if master.grad is None else master.grad.add_(grad)
                self.tensors[name].grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Give the collected gradients by name, those that there are."""
        return {name: m.grad for name, m in self._masters.items() if m.grad is not None}

    def scale_gradients(self, factor: float) -> None:
        """Multiply every gradient: the one normaliser of an optimizer step."""
        if grads := list(self.gradients().values()):
            torch._foreach_mul_(grads, factor)

    def clip(self, largest: float | None) -> float:
        """Give the gradient's norm over all tensors; shorten the gradient if it exceeds `largest`.

        Tensors enter in the order of their names, so that regrouping them changes no bit. Groups of a model of their own
        (`value/matrices`) are clipped by a norm of their own, which is not given: their error does not shorten the policy's step.
        """
        norms: dict[str, float] = {}
        alive = self.gradients()
        for model in dict.fromkeys(group.model for group in self.groups):
            names = {name for group in self.groups if group.model == model for name in group.tensors}
            ordered = [self._masters[name] for name in sorted(names & alive.keys())]
            if largest is None:
                norm = torch.nn.utils.get_total_norm([m.grad for m in ordered if m.grad is not None])
            else:
                norm = torch.nn.utils.clip_grad_norm_(ordered, largest)
            norms[model] = float(norm)
        broken = [norm for norm in norms.values() if not math.isfinite(norm)]
        return broken[0] if broken else norms.get("") or max(norms.values())

    def step(self, factor: float) -> None:
        """Move the tensors with every group's learning rate times `factor`, and forget the gradients."""
        for group, inner in zip(self.groups, self._inner.param_groups, strict=True):
            inner["lr"] = group.learning_rate * factor
        self.collect()
        self._inner.step()
        with torch.no_grad():
            for name in self._narrow:
                self.tensors[name].copy_(self._masters[name])
        self.zero()

    def zero(self) -> None:
        """Forget the gradients."""
        for name, parameter in self.tensors.items():
            parameter.grad = self._masters[name].grad = None

    def learning_rates(self) -> dict[str, float]:
        """Give each group's learning rate of the last step."""
        return {g.name: float(inner["lr"]) for g, inner in zip(self.groups, self._inner.param_groups, strict=True)}

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give tensors `<name>/<moment>` and `<name>/master`, and numbers that are not tensors."""
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for name, master in self._masters.items():
            if master is not self.tensors[name]:
                tensors[f"{name}/master"] = master.detach()
            for key, value in self._inner.state.get(master, {}).items():
                if isinstance(value, Tensor):
                    tensors[f"{name}/{key}"] = value
                elif value is not None:
                    facts[f"{name}/{key}"] = value
        return tensors, facts

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continue from a saved state of the same groups."""
        for key, value in [*tensors.items(), *facts.items()]:
            name, _, entry = key.rpartition("/")
            master = self._masters[name]
            if entry == "master":
                with torch.no_grad():
                    master.copy_(value)
            else:
                # AdamW keeps its step count as a tensor in main memory, everything else on the tensor's device.
                place = master.device if isinstance(value, Tensor) and value.ndim else "cpu"
                self._inner.state[master][entry] = value.to(place) if isinstance(value, Tensor) else value
