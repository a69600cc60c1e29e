"""Groups of tails behind a prefix: each tail stands, is predicted and is read as in a document of its own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loralab.base.attention import document_mask
from loralab.base.trees import forest
from tiny import tiny

pieces = st.lists(st.integers(0, 100), min_size=1, max_size=5)
groups_of = st.lists(st.tuples(pieces, st.lists(pieces, min_size=1, max_size=4)), min_size=1, max_size=4)


def alone(groups):
    """(whole document, tokens of its tail) of every tail, in order."""
    return [(prefix + tail, len(tail)) for prefix, tails in groups for tail in tails]


@given(groups_of, st.booleans())
def test_every_tail_token_stands_where_it_says_behind_its_predecessor(groups, share):
    laid = forest(groups, share=share)
    texts = alone(groups)
    assert laid.tails == tuple(length for _, length in texts)
    assert laid.weight == len(texts)
    row, positions = laid.tokens[0], laid.row.positions[0]
    assert laid.next_tokens().tolist() == [token for text, length in texts for token in text[-length:]]
    assert row[laid.before].tolist() == [token for text, length in texts for token in text[-length - 1 : -1]]
    assert positions[laid.places].tolist() == [p for text, n in texts for p in range(len(text) - n, len(text))]
    assert positions[laid.before].tolist() == [p - 1 for text, n in texts for p in range(len(text) - n, len(text))]
    assert positions[laid.ends].tolist() == [len(text) - 1 for text, _ in texts]
    assert row[laid.ends].tolist() == [text[-1] for text, _ in texts]
    assert laid.row.weight == 0  # nothing is predicted by itself


@given(groups_of)
def test_a_shared_prefix_costs_its_tokens_once(groups):
    once = sum(len(prefix) + sum(map(len, tails)) for prefix, tails in groups)
    each = sum(len(prefix) + len(tail) for prefix, tails in groups for tail in tails)
    assert forest(groups).num_tokens == sum(forest(groups).row.lengths) == once
    apart = forest(groups, share=False)
    assert apart.num_tokens == sum(apart.row.lengths) == each
    assert apart.row.parents == ()


GROUPS = [([5, 6, 7, 8], [[9, 10], [9, 11, 12], [13]]), ([20, 21], [[22, 23, 24]]), ([30], [[31], [32, 33]])]


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("share", [True, False])
def test_a_model_reads_each_tail_as_if_its_text_stood_alone(family, share):
    model = tiny(family)
    model.set_attn_implementation("loralab")
    laid = forest(GROUPS, share=share)
    mask = document_mask(laid.row.lengths, parents=laid.row.parents)
    logits = model(laid.tokens, position_ids=laid.row.positions, attention_mask=mask, use_cache=False).logits[0]
    singly = [model(torch.tensor([text]), use_cache=False).logits[0] for text, _ in alone(GROUPS)]
    for found, back in ((laid.places, 0), (laid.before, 1)):
        ends = [len(text) - back for text in singly]
        expected = [text[end - n : end] for text, end, n in zip(singly, ends, laid.tails, strict=True)]
        torch.testing.assert_close(logits[found], torch.cat(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits[laid.ends], torch.stack([s[-1] for s in singly]), rtol=1e-4, atol=1e-5)


def test_moving_keeps_everything():
    laid = forest(GROUPS)
    moved = laid.to("meta")
    assert moved.tails == laid.tails
    assert {t.device.type for t in (moved.tokens, moved.row.positions, moved.places, moved.before)} == {"meta"}


@pytest.mark.parametrize("groups", [[], [([], [[1]])], [([1], [])], [([1], [[2], []])]])
def test_what_cannot_be_laid_is_refused(groups):
    with pytest.raises(ValueError, match="a forest needs"):
        forest(groups)
