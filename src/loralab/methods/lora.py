"""LoRA: every target gains a low-rank pair; only the pairs move.

Paper: Hu et al. 2021 (2106.09685), W = W₀ + (alpha/rank) B A, B zero at the start. Rank-stabilised scaling alpha/√rank:
Kalajdzievski 2023 (2312.03732). Here: pairs are float32 whatever the base is; the seed of each pair depends on its
layer's name, so that adding a target leaves the start of the others as it was. A pair whose rank differs by `rank_pattern`
keeps the scale of the rest unless `alpha_pattern` gives it an alpha of its own.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from loralab.base.model import Base
from loralab.base.targets import match, match_parameters, pattern_matches
from loralab.delta.layers import active, shape_of, wrap_
from loralab.delta.linear import LowRankEmbedding, LowRankModule, Pair
from loralab.delta.lowrank import Delta, LayerDelta, rank_sum
from loralab.delta.store import save_lowrank
from loralab.errors import TargetError
from loralab.methods.base import Attachment, OneStage, ParamGroup, Wanted, all_wanted, count, count_all, split_vectors

Init = Literal["kaiming", "gaussian", "orthogonal"]
FIRST = "link-1"


class Lora(OneStage):
    """One low-rank pair on every target."""

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 32.0,
        scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r",
        dropout: float = 0.0,
        targets: Sequence[str] = ("all-linear",),
        exclude: Sequence[str] = (),
        init: Init = "kaiming",
        train: Literal["both", "B"] = "both",
        rank_pattern: dict[str, int] | None = None,
        alpha_pattern: dict[str, float] | None = None,
        also_train: Sequence[str] = (),
    ) -> None:
        self.rank, self.alpha, self.scaling, self.dropout = rank, alpha, scaling, dropout
        self.alpha_rank = rank  # the rank that alpha speaks of; pairs of another rank keep its scale
        self.targets, self.exclude, self.also_train = list(targets), list(exclude), list(also_train)
        self.init: Init = init
        self.train = train
        self.rank_pattern, self.alpha_pattern = rank_pattern or {}, alpha_pattern or {}
        self.layers: dict[str, LowRankModule] = {}
        self.whole: dict[str, Parameter] = {}
        self._whole_base: dict[str, Tensor] = {}
        self.pair_names: list[str] = []

    def attach(self, base: Base, seed: int) -> Attachment:
        """Put one pair on every target and unfreeze what is trained whole.

        Raises:
            TargetError: a pattern matches nothing, or a rank exceeds the layer's smaller side.
        """
        self._base, self._seed = base, seed
        model: nn.Module = base.model
        names = match(model, self.targets, self.exclude)
        for patterns, key in ((self.rank_pattern, "rank_pattern"), (self.alpha_pattern, "alpha_pattern")):
            _refuse_unmatched(patterns, names, key)
        all_parameters = count_all(model)
        if self.also_train:
            found = match_parameters(model, self.also_train, [])
            self.whole = {name: model.get_parameter(name) for name in found}
            _refuse_tied(base, self.whole)
            self._whole_base = {name: p.detach().clone() for name, p in self.whole.items()}
        self.layers = wrap_(model, names, self.dropout)
        self.add_link(FIRST, self.rank)
        for parameter in self.whole.values():
            parameter.requires_grad_(True)
        ranks = {name: layer.pair(FIRST).A.shape[0] for name, layer in self.layers.items()}
        return Attachment(tuple(names), count(self._trainable()), all_parameters, ranks)

    def add_link(self, name: str, rank: int) -> None:
        """Put a fresh pair (A random, B zero) beside every target and freeze the pairs before it."""
        for path, layer in self.layers.items():
            for old in self.pair_names:
                layer.pair(old).requires_grad_(False)
            layer.add_pair(name, self._fresh_pair(path, layer, name, rank))
        self.pair_names.append(name)

    def _fresh_pair(self, path: str, layer: LowRankModule, link: str, rank: int) -> Pair:
        out, into = shape_of(layer)
        rank = next((r for pattern, r in self.rank_pattern.items() if pattern_matches(pattern, path)), rank)
        if rank > min(out, into):
            raise TargetError(
                f"rank {rank} exceeds the layer's smaller side {min(out, into)}",
                where=f"method.rank at {path} ({out}×{into})",
                fix=f"lower method.rank, or give this layer its own in method.rank_pattern (at most {min(out, into)})",
            )
        generator = torch.Generator().manual_seed(_seed_of(self._seed, path, link))
        A = initial_factor(rank, into, self.init, generator)
        device = next(layer.base.parameters()).device
        pair = Pair(A.to(device), torch.zeros(out, rank, device=device), self.scale_of(path, rank))
        pair.A.requires_grad_(self.train == "both")
        return pair

    def scale_of(self, path: str, rank: int) -> float:
        """Give the number that B A is multiplied by in a layer of this rank."""
        alpha = next((a for pattern, a in self.alpha_pattern.items() if pattern_matches(pattern, path)), None)
        alpha, rank = (self.alpha, self.alpha_rank) if alpha is None else (alpha, rank)
        return alpha / rank if self.scaling == "alpha/r" else alpha / math.sqrt(rank)

    def _trainable(self) -> dict[str, Parameter]:
        """Name every tensor that moves now: `<layer>.<link>.A`, `<layer>.<link>.B`, and parameters trained whole."""
        tensors = {}
        for path, layer in self.layers.items():
            pair = layer.pair(self.pair_names[-1])
            for factor in ("A", "B"):
                if (parameter := getattr(pair, factor)).requires_grad:
                    tensors[f"{path}.{self.pair_names[-1]}.{factor}"] = parameter
        return tensors | self.whole

    def param_groups(self, learning_rate: float, weight_decay: float) -> list[ParamGroup]:
        return split_vectors(self._trainable(), learning_rate, weight_decay)

    def delta(self, wanted: Wanted = all_wanted) -> Delta:
        """Give the sum of all links as one pair per layer."""
        layers: dict[str, LayerDelta] = {
            path: rank_sum([layer.pair(name).layer_delta() for name in self.pair_names])
            for path, layer in self.layers.items()
        }
        return self._as_delta(layers)

    def link(self, name: str) -> Delta:
        """Give one link alone."""
        return self._as_delta({path: layer.pair(name).layer_delta() for path, layer in self.layers.items()})

    def _as_delta(self, layers: dict[str, LayerDelta]) -> Delta:
        embeddings = frozenset(p for p, layer in self.layers.items() if isinstance(layer, LowRankEmbedding))
        whole = {name: parameter.detach() for name, parameter in self.whole.items()}
        return Delta(layers, whole, self._base.fingerprint, embeddings)

    @contextmanager
    def without(self) -> Iterator[None]:
        """Restore the base exactly inside the block."""
        tuned = {name: parameter.detach().clone() for name, parameter in self.whole.items()}
        _set(self.whole, self._whole_base)
        try:
            with active(self._base.model, ()):
                yield
        finally:
            _set(self.whole, tuned)

    def save(self, folder: Path) -> None:
        """Write all links, summed, as one stock PEFT folder."""
        save_lowrank(folder, self.delta(), self._base.path, model=self._base.model)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give the factors of every link and the parameters trained whole."""
        return {name: p.detach() for name, p in self._all_tensors().items()}, {"links": list(self.pair_names)}

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        for name in facts["links"]:
            if name not in self.pair_names:
                self.add_link(name, self.rank_of(name))
        _set(self._all_tensors(), tensors)

    def _all_tensors(self) -> dict[str, Parameter]:
        tensors = dict(self.whole)
        for path, layer in self.layers.items():
            for name in self.pair_names:
                pair = layer.pair(name)
                tensors[f"{path}.{name}.A"], tensors[f"{path}.{name}.B"] = pair.A, pair.B
        return tensors

    def rank_of(self, link: str) -> int:
        """Give the rank with which a link starts; chains may vary it."""
        return self.rank


def _set(parameters: dict[str, Parameter], values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(values[name])


def _refuse_tied(base: Base, whole: dict[str, Parameter]) -> None:
    """Refuse a table that embedding and head share: an adapter's file can hold it for one of the two only."""
    table, head = base.model.get_input_embeddings(), base.model.get_output_embeddings()
    if head is not None and head.weight is table.weight:
        for name, parameter in whole.items():
            if parameter is head.weight:
                raise TargetError(
                    f"{name} is shared by embedding and head, which an adapter cannot say",
                    where="method.also_train",
                    fix="leave it out, put a pair on it by naming it in method.targets, or use method full",
                )


def _refuse_unmatched(patterns: dict[str, Any], names: list[str], key: str) -> None:
    for pattern in patterns:
        if not any(pattern_matches(pattern, name) for name in names):
            raise TargetError(
                f"the pattern {pattern!r} matches none of the targets",
                where=f"method.{key}",
                fix=f"name a target, e.g. {names[0]!r}, or drop the pattern",
            )


def _seed_of(seed: int, path: str, link: str) -> int:
    digest = hashlib.sha256(f"{seed}/{path}/{link}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def initial_factor(rank: int, into: int, init: Init, generator: torch.Generator) -> Tensor:
    """Draw A (rank, in) in float32.

    kaiming: uniform(±1/√in), the reference code's kaiming_uniform with a = √5; gaussian: normal(0, 1/rank) as PEFT
    names it; orthogonal: orthonormal rows.
    """
    A = torch.empty(rank, into)
    if init == "kaiming":
        return nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=generator)
    if init == "gaussian":
        return A.normal_(std=1 / rank, generator=generator)
    return nn.init.orthogonal_(A, generator=generator)
