"""The value model: what an answer is expected to bring, read off the same base by pairs and a head of its own.

Paper: P5 PERL (2403.10704), section 3: the value model is of the policy's size and has a LoRA adapter of its rank. Here: its pairs
are named `value` and lie beside the layers of the policy's own base, inactive but inside `acting()`, so the policy is the same bits
with and without them; A is random, B zero and the head zero, so every value is 0 at first.
"""

import hashlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import functional as F

from loralab.base.model import Base, head
from loralab.base.targets import match
from loralab.delta.layers import active, shape_of, wrap_
from loralab.delta.linear import LowRankModule, Pair
from loralab.errors import TargetError
from loralab.methods.base import (
    Around,
    Attachment,
    Method,
    ParamGroup,
    count,
    count_all,
    split_vectors,
)
from loralab.methods.lora import initial_factor
from loralab.methods.peft import Peft

NAME = "value"
PREFIX = f"{NAME}/"
"""Begins the names of its tensors in groups and checkpoints."""


class Value:
    """Low-rank pairs named `value` on a base, and a head (hidden → 1) in float32.

    The pairs stand on whatever the weights are when they act: where the policy moves the weights themselves, act inside the view of
    the base, and take the gradients before leaving it (`training.objectives.policy` does).

    Args:
        rank: of every pair; lowered to a layer's smaller side where that is less.
        alpha: the pairs' product is multiplied by alpha / rank.
        targets: patterns of layers, as a method's.
        exclude: patterns taken out again.
    """

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        targets: Sequence[str] = ("all-linear",),
        exclude: Sequence[str] = (),
    ) -> None:
        self.rank, self.alpha = rank, alpha
        self.targets, self.exclude = list(targets), list(exclude)
        self.layers: dict[str, LowRankModule] = {}
        self._names: list[str] | None = None

    def choose(self, base: Base) -> None:
        """Find the layers by name; before a method renames them by wrapping. The output head is left out: values do not pass it.

        Raises:
            TargetError: a pattern matches nothing, or the output head alone.
        """
        found = match(base.model, self.targets, self.exclude)
        self._names = [name for name in found if base.model.get_submodule(name) is not head(base.model)]
        if not self._names:
            fix = "name a layer before it, for example all-linear"
            raise TargetError("a value model cannot lie on the output head alone", where="method.targets", fix=fix)

    def attach(self, base: Base, seed: int) -> Attachment:
        """Put the pairs beside their layers, inactive, and make the head.

        A method that wraps layers on the same model must be attached after `choose` and before this; `WithValue` sees to it.

        Raises:
            TargetError: a pattern matches nothing.
        """
        if self._names is None:
            self.choose(base)
        assert self._names is not None
        model: nn.Module = base.model
        self._model = model
        all_parameters = count_all(model)
        self.layers = wrap_(model, self._names)
        for path, layer in self.layers.items():
            before = layer.active
            layer.add_pair(NAME, self._fresh_pair(path, layer, seed))
            layer.active = before
        width = base.model.config.get_text_config().hidden_size
        device = next(model.parameters()).device
        # Not drawn, so that torch's global generator is where it would be without a value model.
        self.head = nn.utils.skip_init(nn.Linear, width, 1, device=device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        ranks = {name: layer.pair(NAME).A.shape[0] for name, layer in self.layers.items()}
        return Attachment(tuple(self._names), count(self.tensors()), all_parameters, ranks)

    def _fresh_pair(self, path: str, layer: LowRankModule, seed: int) -> Pair:
        out, into = shape_of(layer)
        rank = min(self.rank, out, into)
        digest = hashlib.sha256(f"{seed}/{path}/{NAME}".encode()).digest()
        A = initial_factor(rank, into, "kaiming", torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))
        device = next(layer.base.parameters()).device
        return Pair(A.to(device), torch.zeros(out, rank, device=device), self.alpha / rank)

    def acting(self) -> AbstractContextManager[None]:
        """Let the value's pairs act inside the block, and no others."""
        return active(self._model, (NAME,))

    def values(self, hidden: Float[Tensor, "tokens hidden"]) -> Float[Tensor, " tokens"]:
        """Read V(s), the expected return, off the hidden states of the tokens that end s, computed inside `acting()`."""
        return F.linear(hidden.to(self.head.weight.dtype), self.head.weight, self.head.bias).squeeze(-1)

    def tensors(self) -> dict[str, Parameter]:
        """Name all that trains: `value/<layer>.A`, `value/<layer>.B`, `value/head.weight`, `value/head.bias`."""
        found: dict[str, Parameter] = {}
        for path, layer in self.layers.items():
            pair = layer.pair(NAME)
            found |= {f"{PREFIX}{path}.A": pair.A, f"{PREFIX}{path}.B": pair.B}
        return found | {f"{PREFIX}head.weight": self.head.weight, f"{PREFIX}head.bias": self.head.bias}

    def param_groups(self, learning_rate: float, weight_decay: float) -> list[ParamGroup]:
        """Name `value/matrices` and `value/vectors` (not decayed)."""
        groups = split_vectors(self.tensors(), learning_rate, weight_decay)
        return [ParamGroup(PREFIX + g.name, g.tensors, g.learning_rate, g.weight_decay) for g in groups]

    def state(self) -> dict[str, Tensor]:
        """Give all that trains, by name."""
        return {name: parameter.detach() for name, parameter in self.tensors().items()}

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Continue from a saved state; raises KeyError where a tensor is missing."""
        for name, parameter in self.tensors().items():
            parameter.copy_(tensors[name])


class WithValue(Around):
    """A method and a value model trained together: groups and state are of both, everything else is the method's own.

    The value's pairs act nowhere but inside `acting()`; it is no part of the delta, and is kept in checkpoints only.

    Args:
        method: moves the policy.
        value: learns beside it.
        value_learning_rate: of the value; None is the policy's.
    """

    def __init__(self, method: Method, value: Value, value_learning_rate: float | None = None) -> None:
        self.method, self.value, self.value_learning_rate = method, value, value_learning_rate

    def attach(self, base: Base, seed: int) -> Attachment:
        """Attach the method, and the value's pairs beside it; what is counted is the method's.

        Raises:
            TargetError: a pattern matches nothing, or the peft library's layers are in the value's place.
        """
        if isinstance(self.method, Peft):
            raise TargetError(
                "a value model cannot lie beside layers of the peft library",
                where="objective.algorithm",
                fix="set objective.algorithm=rloo, which needs no value model, or take method lora, cola or full",
            )
        self.value.choose(base)
        attachment = self.method.attach(base, seed)
        self.value.attach(base, seed)
        return attachment

    def param_groups(self, learning_rate: float, weight_decay: float) -> list[ParamGroup]:
        """Name the method's groups, then the value's."""
        rate = learning_rate if self.value_learning_rate is None else self.value_learning_rate
        own = self.method.param_groups(learning_rate, weight_decay)
        return own + self.value.param_groups(rate, weight_decay)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the method's state, and the value's tensors under `value/`."""
        tensors, facts = self.method.state()
        return tensors | self.value.state(), facts

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        own = {name: tensor for name, tensor in tensors.items() if not name.startswith(PREFIX)}
        self.value.load_state(tensors)
        self.method.load_state(own, facts)
