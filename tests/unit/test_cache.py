"""Rows of a cache that leave and join, against lists of tensors."""

import random

import pytest
import torch
from transformers.cache_utils import (
    DummyLayer,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    StaticLayer,
)

from loralab.evals.cache import Rows, can_hold, has_windows

HEADS, KEY, VALUE = 2, 3, 5
"""Keys and values may have different widths."""


def columns_of(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.rand(rows, HEADS, columns, KEY), torch.rand(rows, HEADS, columns, VALUE)


def written(cache: Rows, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give all that is in use, as a pass over no new column would get it."""
    return cache.update(*columns_of(cache.rows, 0), layer)


@pytest.mark.parametrize("seed", range(8))
def test_rows_keep_what_they_read_through_any_order_of_leaving_and_joining(seed):
    choose = random.Random(seed)
    cache = Rows([DynamicLayer, DummyLayer, DynamicSlidingWindowLayer])
    rows: list[dict[int, tuple[torch.Tensor, torch.Tensor]]] = []  # of each row, what each layer holds
    for _ in range(60):
        if not rows or choose.random() < 0.3:
            lengths = [choose.randint(1, choose.choice([3, 90])) for _ in range(choose.randint(1, 4))]
            joining, longest = Rows([DynamicLayer, DummyLayer, DynamicSlidingWindowLayer]), max(lengths)
            read = {layer: columns_of(len(lengths), longest) for layer in (0, 2)}
            for layer, (keys, values) in read.items():
                joining.update(keys, values, layer)
            order = [choose.randrange(len(lengths)) for _ in range(choose.randint(1, 5))]
            cache.join(joining, torch.tensor(order))
            rows += [
                {layer: tuple(x[i, :, longest - lengths[i] :] for x in read[layer]) for layer in read} for i in order
            ]
        elif choose.random() < 0.4:
            stay = [choose.random() < 0.6 for _ in rows]
            count = sum(stay)
            free = [i for i in range(count) if not stay[i]]
            moved = [i for i in range(count, len(rows)) if stay[i]]
            for into, source in zip(free, moved, strict=True):
                rows[into] = rows[source]
            rows = rows[:count]
            cache.keep(count, moved, free, max((row[0][0].shape[1] for row in rows), default=0))
        else:
            cache.expect(choose.randint(0, 99))
            for layer in (0, 2):
                keys, values = columns_of(len(rows), 1)
                cache.update(keys, values, layer)
                for row, k, v in zip(rows, keys, values, strict=True):
                    row[layer] = torch.cat([row[layer][0], k], 1), torch.cat([row[layer][1], v], 1)
        assert cache.rows == len(rows) and cache.columns >= max((row[0][0].shape[1] for row in rows), default=0)
        for layer in (0, 2):
            keys, values = written(cache, layer)
            for i, row in enumerate(rows):
                length = row[layer][0].shape[1]
                assert torch.equal(keys[i, :, keys.shape[2] - length :], row[layer][0])
                assert torch.equal(values[i, :, values.shape[2] - length :], row[layer][1])


def test_columns_are_dropped_that_are_padding_for_all():
    cache, long = Rows([DynamicLayer]), Rows([DynamicLayer])
    long.update(*columns_of(2, 50), 0)
    cache.join(long, torch.tensor([0, 1]))
    assert cache.columns == cache.get_seq_length() == 50
    cache.keep(1, [1], [0], 7)
    assert cache.columns == 7 and written(cache, 0)[0].shape == (1, HEADS, 7, KEY)
    cache.keep(0, [], [], 0)
    cache.join(long, torch.tensor([1]))
    assert (cache.rows, cache.columns) == (1, 50)


def test_buffers_double_so_that_steps_copy_nothing():
    cache, places = Rows([DynamicLayer]), []
    cache.expect(1000)
    for _ in range(1000):
        keys, _ = cache.update(*columns_of(2, 1), 0)
        places.append(keys.untyped_storage().nbytes())
    assert len(set(places)) <= 6
    cache.expect(30)
    cache.update(*columns_of(2, 1), 0)
    cache.update(*columns_of(2, 24), 0)
    assert cache.layers[0].keys.shape[2] == 1001 + 30, "and no larger than can be needed"


def test_padding_between_a_beginning_and_its_rows_is_closed():
    cache = Rows([DynamicLayer])
    keys, values = columns_of(3, 4 + 5)  # a beginning of 4, and up to 5 behind it
    cache.update(keys, values, 0)
    cache.close(4, torch.tensor([0, 2, 5 - 1]))
    for i, missing in enumerate((0, 2, 4)):
        for found, before in zip(written(cache, 0), (keys, values), strict=True):
            expected = torch.cat([before[i, :, :4], before[i, :, 4 + missing :]], 1)
            assert torch.equal(found[i, :, missing:], expected)


def test_only_keys_and_values_in_columns_can_be_held():
    assert can_hold([DynamicLayer, DynamicSlidingWindowLayer, DummyLayer])
    assert has_windows([DynamicLayer, DynamicSlidingWindowLayer]) and not has_windows([DynamicLayer])
    for kind in (LinearAttentionLayer, LinearAttentionAndFullAttentionLayer, DynamicIndexedLayer, StaticLayer):
        assert not can_hold([DynamicLayer, kind])
    assert not can_hold([]) and not can_hold(None)
