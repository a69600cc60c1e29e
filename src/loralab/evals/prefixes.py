"""Token sequences that begin alike, laid out as trees so that a shared beginning is computed once.

Legend: a path is one sequence as the model reads it; a segment is a run of tokens of the packed row; a path is the chain of
segments from a root. Paths are taken in sorted order, so that a beginning is shared by neighbours, and a row holds as many as
fit: a beginning shared by all (the examples of a few-shot prompt) is computed once in each row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray

from loralab.base.data import IGNORED, Batch

SHORTEST = 4
"""A beginning of fewer tokens is not worth a segment of its own."""


@dataclass
class Tree:
    """A row of segments and where each path lies in it.

    Attributes:
        segments: tokens of each.
        parents: the segment that each continues, or -1.
        paths: for each path that was added, its segments from the root.
    """

    segments: list[tuple[int, ...]] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    paths: list[list[int]] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return sum(map(len, self.segments))

    def add(self, path: tuple[int, ...], shared: int) -> None:
        """Add a path whose first `shared` tokens are those of the path before it."""
        chain = self._split_at(shared) if shared else []
        if shared < len(path):
            self.segments.append(path[shared:])
            self.parents.append(chain[-1] if chain else -1)
            chain = [*chain, len(self.segments) - 1]
        self.paths.append(chain)

    def _split_at(self, depth: int) -> list[int]:
        """Give the segments of the last path's first `depth` tokens, cutting one in two where it reaches beyond."""
        chain: list[int] = []
        for segment in self.paths[-1]:
            chain.append(segment)
            length = len(self.segments[segment])
            if depth > length:
                depth -= length
                continue
            if depth < length:
                self._cut(segment, depth)
            return chain
        raise ValueError(f"the path before is {depth} tokens too short")

    def _cut(self, segment: int, length: int) -> None:
        """Cut a segment in two; the second part takes its place among the parents of others."""
        whole = self.segments[segment]
        self.segments[segment : segment + 1] = [whole[:length], whole[length:]]
        self.parents = [
            *(p + 1 if p >= segment else p for p in self.parents[: segment + 1]),
            segment,
            *(p + 1 if p >= segment else p for p in self.parents[segment + 1 :]),
        ]
        self.paths = [
            [part for s in path for part in ((s, s + 1) if s == segment else (s + (s > segment),))]
            for path in self.paths
        ]

    def batch(self) -> Batch:
        """Give the row as a batch without targets."""
        lengths = tuple(map(len, self.segments))
        depths: list[int] = []
        for parent in self.parents:
            depths.append(0 if parent < 0 else depths[parent] + lengths[parent])
        tokens = np.concatenate([np.asarray(segment, dtype=np.int64) for segment in self.segments])
        positions = np.concatenate([np.arange(d, d + n) for d, n in zip(depths, lengths, strict=True)])
        row, places = torch.from_numpy(tokens)[None], torch.from_numpy(positions)[None]
        return Batch(row, places, torch.full_like(row, IGNORED), lengths, tuple(self.parents))

    def rows(self) -> list[Int[ndarray, " _"]]:
        """Give for each path where its tokens stand in the row."""
        ends = np.cumsum([len(segment) for segment in self.segments])
        return [
            np.concatenate([np.arange(ends[s] - len(self.segments[s]), ends[s]) for s in path]) for path in self.paths
        ]


def trees(
    paths: Sequence[tuple[int, ...]], joints: Sequence[int], most_tokens: int
) -> Iterator[tuple[list[int], Tree]]:
    """Lay paths out in rows of up to `most_tokens` tokens (one path at least).

    Args:
        paths: without the empty one.
        joints: of each path, where a split is most likely to serve others too: the end of its context.
        most_tokens: of a row; where all paths begin alike, a row may be eight times as long as that beginning.

    Yields:
        Numbers of the paths in a row, in the order in which they were added, and the row.
    """
    numbers: list[int] = []
    tree, size = Tree(), 0
    order = sorted(range(len(paths)), key=paths.__getitem__)
    if len(order) > 1:
        # Each row computes what all begin with once more: longer rows keep that to an eighth of them.
        most_tokens = max(most_tokens, 8 * _shared(paths[order[0]], paths[order[-1]], len(paths[order[0]])))
    for number in order:
        path = paths[number]
        shared = _shared(paths[numbers[-1]], path, joints[number]) if numbers else 0
        if numbers and size + len(path) - shared > most_tokens:
            yield numbers, tree
            numbers, tree, size, shared = [], Tree(), 0, 0
        tree.add(path, shared)
        numbers.append(number)
        size += len(path) - shared
    if numbers:
        yield numbers, tree


def _shared(before: tuple[int, ...], path: tuple[int, ...], joint: int) -> int:
    """Count the tokens to share: up to the joint if both reach it and little more is alike; of few only a whole path."""
    alike = 0
    for a, b in zip(before, path, strict=False):
        if a != b:
            break
        alike += 1
    if joint <= alike < min(joint + SHORTEST, len(path)):
        alike = joint
    return alike if alike >= SHORTEST or alike == len(before) == len(path) else 0
