"""Best-fit packing: whole documents into bins of tokens, with little waste.

**Paper:** Ding et al. 2024, Fewer Truncations Improve Language Modeling (2404.10830): best-fit decreasing keeps
documents whole at almost no padding. **Here:** documents above the capacity are an error: split or drop them before.
"""

from collections.abc import Sequence

import numpy as np


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack documents into bins: longest first, each into the fullest bin that still holds it.

    The free spaces of the bins are one integer with a bit for each size in use, so the best fit is its lowest set bit
    from `length` on: O(n · capacity / 64) with a constant far below that of a tree. Equal lengths keep their order, and
    the bins' lengths depend on the multiset of lengths only.

    Args:
        lengths: tokens of each document, all from 1 to `capacity`.
        capacity: most tokens of a bin.

    Returns:
        Indices into `lengths`, bin by bin; every document occurs once.

    Raises:
        ValueError: a length is below 1 or above the capacity.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and not (sizes.min() >= 1 and sizes.max() <= capacity):
        raise ValueError(f"lengths from {sizes.min()} to {sizes.max()} do not fit bins of 1 to {capacity}")
    all_lengths: list[int] = sizes.tolist()
    bins: list[list[int]] = []
    with_space: list[list[int]] = [[] for _ in range(capacity + 1)]  # free tokens -> bins
    spaces = 0
    for document in np.argsort(-sizes, kind="stable").tolist():
        length = all_lengths[document]
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            place = with_space[space].pop()
            if not with_space[space]:
                spaces ^= 1 << space
            bins[place].append(document)
        else:
            space, place = capacity, len(bins)
            bins.append([document])
        left = space - length
        with_space[left].append(place)
        spaces |= 1 << left
    return bins
