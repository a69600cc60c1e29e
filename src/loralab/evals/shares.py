"""Probes of shares: items that are right or wrong, by skill, each paired with how the base did on it."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import nn

from loralab.evals.probe import Reading, measuring
from loralab.evals.stats import SHARE, skill_scores


class ShareProbe(ABC):
    """Share of items that are right, and of each skill.

    Args:
        name: `<role>/<measure>`.
        asked: skill and prompt of each item.
        model: that is measured.
    """

    def __init__(self, name: str, asked: Sequence[tuple[str, str]], model: nn.Module) -> None:
        self.name, self.asked, self.model = name, list(asked), model
        self._base: ndarray | None = None

    @abstractmethod
    def right(self) -> Float[ndarray, " items"]:
        """Tell of each item whether the model has it right: 1 or 0, or between where an item can be half right."""

    def read_base(self, without: AbstractContextManager[None] | None = None) -> Reading:
        """Read the base (inside `without`, which switches the delta off) and keep what later readings pair with."""
        with without or nullcontext(), measuring(self.model):
            self._base = self.right()
        return self._reading(self._base)

    def read(self, step: int | None = None) -> Reading:
        """Read the model as it is now; the change from the base is that of each item, averaged."""
        with measuring(self.model):
            right = self.right()
        reading = self._reading(right)
        if self._base is not None:
            skills = [skill for skill, _ in self.asked]
            reading.scores.extend(skill_scores(f"{self.name}_change", SHARE, right - self._base, skills))
        return reading

    def _reading(self, right: Float[ndarray, " items"]) -> Reading:
        rows = [
            {"skill": skill, "prompt": prompt, "right": value}
            for (skill, prompt), value in zip(self.asked, right.tolist(), strict=True)
        ]
        return Reading(skill_scores(self.name, SHARE, right, [skill for skill, _ in self.asked]), rows)


class Together(ShareProbe):
    """Several probes as one: their items side by side, each skill of each of them with the same weight.

    Args:
        name: of the whole.
        parts: at least one, of one model.
    """

    def __init__(self, name: str, parts: Sequence[ShareProbe]) -> None:
        super().__init__(name, [one for part in parts for one in part.asked], parts[0].model)
        self.parts = list(parts)

    def right(self) -> Float[ndarray, " items"]:
        return np.concatenate([part.right() for part in self.parts])
