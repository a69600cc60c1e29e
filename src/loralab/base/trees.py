"""Groups of documents that begin alike, side by side in one row: what they share is computed once.

Two answers to one prompt, or many, are tails of a prefix. In the row the prefix is a segment and each tail one that continues
it (see `attention.document_mask`), so a group costs P + Σ Rᵢ tokens where documents of their own cost Σ (P + Rᵢ).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from loralab.base.data import IGNORED, Batch

Tokens = Sequence[int] | NDArray[Any]


@dataclass(frozen=True, eq=False)
class Forest:
    """Tails that share their prefix, in one row.

    Attributes:
        row: the segments, each prefix followed by its tails; no targets.
        tails: tokens of each tail, in order of groups and tails.
        places: where in the row each tail token stands, tail after tail.
        before: where its predecessor stands, whose output predicts it; for the first of a tail that is the prefix's last
            token, which the tails of a group have in common.
    """

    row: Batch
    tails: tuple[int, ...]
    places: Int[Tensor, " tokens"]
    before: Int[Tensor, " tokens"]

    @property
    def tokens(self) -> Int[Tensor, "1 length"]:
        """All tokens of the row."""
        return self.row.tokens

    @property
    def num_tokens(self) -> int:
        """Number of tokens read, prefixes included."""
        return self.row.num_tokens

    @property
    def weight(self) -> int:
        """Number of tails."""
        return len(self.tails)

    @property
    def ends(self) -> Int[Tensor, " tails"]:
        """Where the last token of each tail stands."""
        return self.places[torch.tensor(self.tails, device=self.places.device).cumsum(0) - 1]

    def next_tokens(self) -> Int[Tensor, " tokens"]:
        """Give the tail tokens, tail after tail."""
        return self.row.tokens[0, self.places]

    def to(self, device: torch.device | str) -> "Forest":
        """Copy the tensors to a device."""
        return replace(self, row=self.row.to(device), places=self.places.to(device), before=self.before.to(device))


def forest(groups: Sequence[tuple[Tokens, Sequence[Tokens]]], *, share: bool = True) -> Forest:
    """Lay groups of a prefix and its tails side by side; a tail without company is one document with its prefix.

    Args:
        groups: (prefix, tails), each of one token at least.
        share: compute a prefix once for all its tails; else every tail is a document with a prefix of its own. Only the
            cost differs: same tails, same order.

    Raises:
        ValueError: no group, a group without tails, or an empty prefix or tail.
    """
    if not groups or not all(len(prefix) and len(tails) and all(map(len, tails)) for prefix, tails in groups):
        raise ValueError("a forest needs groups with tails, and tokens in every prefix and tail")
    segments: list[tuple[NDArray[np.int64], int, int]] = []  # tokens, position of the first, parent
    sizes: list[int] = []
    places, before = [], []
    end = 0  # of the row so far
    for prefix, tails in groups:
        root, trunk = len(segments), np.asarray(prefix, dtype=np.int64)
        shared = share and len(tails) > 1
        if shared:
            segments.append((trunk, 0, -1))
            end += len(trunk)
        last = end - 1
        for tail in tails:
            branch = np.asarray(tail, dtype=np.int64)
            segments.append((branch, len(trunk), root) if shared else (np.concatenate([trunk, branch]), 0, -1))
            end += len(segments[-1][0])
            place = np.arange(end - len(branch), end)
            places.append(place)
            before.append(np.append(last if shared else place[0] - 1, place[:-1]))
            sizes.append(len(branch))
    lengths = tuple(len(tokens) for tokens, _, _ in segments)
    parents = tuple(parent for _, _, parent in segments)
    row, positions = (
        torch.from_numpy(np.concatenate(parts))[None]
        for parts in (
            [tokens for tokens, _, _ in segments],
            [np.arange(begin, begin + len(tokens)) for tokens, begin, _ in segments],
        )
    )
    batch = Batch(row, positions, torch.full_like(row, IGNORED), lengths, parents if max(parents) >= 0 else ())
    return Forest(batch, tuple(sizes), *(torch.from_numpy(np.concatenate(parts)) for parts in (places, before)))
