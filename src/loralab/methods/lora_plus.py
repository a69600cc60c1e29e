"""LoRA+: the learning rate of B is `ratio` times that of A.

Paper: Hayou et al. 2024 (2402.12354). Groups as in the authors' code: A (and other matrices), B, vectors without weight
decay at B's rate, and pairs on embeddings at a rate of their own. Here: groups are named, weight decay is honoured in all
groups but vectors, and ratio 1 is LoRA bit for bit (pairs on embeddings keep their own rate).
"""

from typing import Any

from torch.nn import Parameter

from loralab.delta.linear import LowRankEmbedding
from loralab.methods.base import ParamGroup
from loralab.methods.lora import Lora


class LoraPlus(Lora):
    """LoRA whose B learns faster than its A."""

    def __init__(self, *, ratio: float = 16.0, embedding_learning_rate: float = 1e-6, **lora: Any) -> None:
        super().__init__(**lora)
        self.ratio, self.embedding_learning_rate = ratio, embedding_learning_rate

    def param_groups(self, learning_rate: float, weight_decay: float) -> list[ParamGroup]:
        """Name the four groups of the reference: A, B, vectors, embeddings."""
        groups: dict[str, dict[str, Parameter]] = {"A": {}, "B": {}, "vectors": {}, "embeddings": {}}
        on_embeddings = {path for path, layer in self.layers.items() if isinstance(layer, LowRankEmbedding)}
        for name, parameter in self._trainable().items():
            path, _, factor = name.rpartition(".")
            layer = path.rpartition(".")[0]
            if layer in on_embeddings and factor in ("A", "B"):
                groups["embeddings"][name] = parameter
            elif parameter.ndim < 2:
                groups["vectors"][name] = parameter
            elif layer in self.layers and factor == "B":
                groups["B"][name] = parameter
            else:
                groups["A"][name] = parameter
        rates = {
            "A": (learning_rate, weight_decay),
            "B": (learning_rate * self.ratio, weight_decay),
            "vectors": (learning_rate * self.ratio, 0.0),
            "embeddings": (self.embedding_learning_rate, weight_decay),
        }
        return [ParamGroup(name, tensors, *rates[name]) for name, tensors in groups.items() if tensors]
