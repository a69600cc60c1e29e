"""Who sees whom in a packed row: the row cut into tiles, blocks of query rows with the keys that they may see.

Documents that begin alike may be one tree: the shared beginning is a segment, and each segment behind it names it as its
`parent`, whose tokens (and those of the parent's parents) it sees whole.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Tile(NamedTuple):
    """Query rows from `start` to `stop`, and the spans of keys that some of them see, each from its first to its last."""

    start: int
    stop: int
    spans: tuple[tuple[int, int], ...]


@lru_cache(maxsize=16)
def document_tiles(lengths: tuple[int, ...], causal: bool, window: int | None, block: int) -> tuple[Tile, ...]:
    """Cut each document of a row into tiles of up to `block` rows."""
    tiles, begin = [], 0
    for length in lengths:
        end = begin + length
        for start in range(begin, end, block):
            stop = min(start + block, end)
            first = begin if window is None else max(begin, start - window + 1)
            last = stop if causal else end if window is None else min(end, stop + window - 1)
            tiles.append(Tile(start, stop, ((first, last),)))
        begin = end
    return tuple(tiles)


@lru_cache(maxsize=4)
def tree_tiles(lengths: tuple[int, ...], parents: tuple[int, ...], block: int) -> tuple[Tile, ...]:
    """Cut a row of segments into tiles of about `block` rows: whole trees where they are small, else parts of one."""
    ends = tuple(accumulate(lengths))
    begins = [end - length for end, length in zip(ends, lengths, strict=True)]
    tiles = []
    for start, stop in _blocks(
        [begin for begin, parent in zip(begins, parents, strict=True) if parent < 0], ends, block
    ):
        first = bisect_right(ends, start)
        seen = {begins[first]: stop}  # from the first row's segment on, the rows themselves
        for segment in range(first, bisect_left(ends, stop) + 1):
            while (segment := parents[segment]) >= 0 and begins[segment] < begins[first]:
                seen[begins[segment]] = ends[segment]
        tiles.append(Tile(start, stop, _joined(sorted(seen.items()))))
    return tuple(tiles)


def _blocks(roots: list[int], ends: tuple[int, ...], block: int) -> Iterator[tuple[int, int]]:
    """Give from where to where each tile goes: over as many trees as fit, or through one that does not, step by step."""
    start = 0
    for begin, end in zip(roots, [*roots[1:], ends[-1]], strict=True):
        if end - start > block and begin > start:
            yield start, begin
            start = begin
        while end - start > block:
            yield start, start + block
            start += block
    if start < ends[-1]:
        yield start, ends[-1]


def _joined(spans: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Join spans that touch."""
    joined = spans[:1]
    for first, last in spans[1:]:
        if first == joined[-1][1]:
            joined[-1] = (joined[-1][0], last)
        else:
            joined.append((first, last))
    return tuple(joined)


@lru_cache(maxsize=2)
def tree_biases(
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    block: int,
    repeats: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Float[Tensor, "rows columns"], ...]:
    """Give, for each tile of a tree, 0 where a query sees a key and -inf elsewhere."""
    depths: list[int] = []  # position of each segment's first token
    for parent in parents:
        depths.append(0 if parent < 0 else depths[parent] + lengths[parent])
    sizes = torch.tensor(lengths)
    segment = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
    first = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes)
    position = torch.arange(len(segment)) - first + torch.repeat_interleave(torch.tensor(depths), sizes)
    heirs = torch.eye(len(lengths), dtype=torch.bool)  # row: segment, column: those that it sees
    for number, parent in enumerate(parents):
        if parent >= 0:
            heirs[number] |= heirs[parent]
    biases = []
    for tile in tree_tiles(lengths, parents, block):
        keys = torch.cat([torch.arange(*span) for span in tile.spans])
        rows = torch.arange(tile.start, tile.stop)[:, None]
        distance = position[rows] - position[keys]
        hidden = ~heirs[segment[rows], segment[keys]] | (distance < 0)
        if window is not None:
            hidden |= distance >= window
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        biases.append(bias.repeat_interleave(repeats, 0).to(device))
    return tuple(biases)


@lru_cache(maxsize=8)
def bias_template(
    block: int,
    repeats: int,
    left: int,
    right: int,
    causal: bool,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Float[Tensor, "rows columns"]:
    """Give 0 where a query sees a key and -inf elsewhere, for keys from `left` before the block to `right` behind it."""
    distance = torch.arange(-left, block + right, device=device) - torch.arange(block, device=device)[:, None]
    hidden = distance > 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden |= distance.abs() >= window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return bias.repeat_interleave(repeats, 0)
