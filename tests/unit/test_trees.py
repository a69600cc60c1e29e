"""Segments that share a beginning: attention as if each path from a root stood alone."""

import pytest
import torch

from loralab.base.attention import document_mask
from loralab.base.packed import document_attention
from loralab.base.tiles import tree_tiles
from tiny import tiny

LENGTHS = (70, 30, 5, 41, 12, 9, 100, 3)
PARENTS = (-1, 0, 0, 0, 3, 3, -1, 6)
"""Two trees; in the first, two leaves continue a segment that itself continues the root."""


def path(segment: int) -> list[int]:
    """Row numbers of the tokens from the root to the end of a segment."""
    begins = [sum(LENGTHS[:i]) for i in range(len(LENGTHS))]
    before = path(PARENTS[segment]) if PARENTS[segment] >= 0 else []
    return [*before, *range(begins[segment], begins[segment] + LENGTHS[segment])]


def positions() -> torch.Tensor:
    places = [0] * sum(LENGTHS)
    for segment in range(len(LENGTHS)):
        for position, row in enumerate(path(segment)):
            places[row] = position
    return torch.tensor(places)


def qkv(heads=4, groups=2, size=8):
    generator = torch.Generator().manual_seed(0)
    shapes = (heads, groups, groups)
    return [torch.randn(sum(LENGTHS), n, size, generator=generator, requires_grad=True) for n in shapes]


@pytest.mark.parametrize("window, softcap", [(None, None), (20, None), (None, 2.0), (60, 1.5)])
def test_every_path_is_attended_as_if_it_stood_alone(window, softcap):
    q, k, v = qkv()
    ours = document_attention(q, k, v, LENGTHS, PARENTS, window=window, softcap=softcap)
    for segment, length in enumerate(LENGTHS):
        rows = path(segment)
        alone = document_attention(q[rows], k[rows], v[rows], (len(rows),), window=window, softcap=softcap)
        torch.testing.assert_close(ours[rows[-length:]], alone[-length:], rtol=1e-5, atol=1e-6)


def test_gradients_of_a_shared_beginning_are_the_sum_over_its_paths():
    q, k, v = qkv()
    gain = torch.randn(sum(LENGTHS), 4, 8, generator=torch.Generator().manual_seed(1))
    ours = torch.autograd.grad((document_attention(q, k, v, LENGTHS, PARENTS) * gain).sum(), (q, k, v))
    total = torch.zeros(())
    for segment, length in enumerate(LENGTHS):
        rows = path(segment)
        alone = document_attention(q[rows], k[rows], v[rows], (len(rows),))
        total = total + (alone[-length:] * gain[rows[-length:]]).sum()
    for mine, theirs in zip(ours, torch.autograd.grad(total, (q, k, v)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_model_reads_a_tree_as_it_reads_each_path():
    model = tiny("llama")
    model.set_attn_implementation("loralab")
    model.eval()
    tokens = torch.randint(0, model.config.vocab_size, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    mask = document_mask(LENGTHS, parents=PARENTS)
    together = model(tokens, position_ids=positions()[None], attention_mask=mask, use_cache=False).logits[0]
    for segment, length in enumerate(LENGTHS):
        rows = path(segment)
        alone = model(tokens[:, rows], use_cache=False).logits[0]
        torch.testing.assert_close(together[rows[-length:]], alone[-length:], rtol=1e-4, atol=1e-5)


def test_small_trees_share_a_tile_and_a_large_one_is_cut_where_keys_before_it_are_seen():
    small = tree_tiles((4, 3, 2, 5, 1), (-1, 0, 0, -1, 3), 16)
    assert [(tile.start, tile.stop, tile.spans) for tile in small] == [(0, 15, ((0, 15),))]
    large = tree_tiles((4, 3, 9, 2), (-1, 0, 0, -1), 6)
    assert [(tile.start, tile.stop) for tile in large] == [(0, 6), (6, 12), (12, 18)]
    assert large[2].spans == ((0, 4), (7, 18))
