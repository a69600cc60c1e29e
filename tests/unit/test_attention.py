import copy
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import Lfm2Config, Lfm2ForCausalLM

from loralab.base.attention import NAME, attention, document_mask, packs
from loralab.base.packed import document_attention, varlen_arguments
from loralab.errors import ModelError
from tiny import DECODERS, ENCODERS, tiny

LENGTHS = (3, 9, 1, 6)
ROW = sum(LENGTHS)


def ours(family, **changes):
    model = tiny(family, **changes)
    model.set_attn_implementation(NAME)
    return model


def first_position(family):
    return 1 if family == "roberta" else 0  # RoBERTa counts on from its padding index, 0 here


def positions(family):
    return torch.cat([torch.arange(length) for length in LENGTHS])[None] + first_position(family)


def tokens(rows=1, length=ROW):
    return torch.randint(3, 101, (rows, length))


def pulled(logits, pull):
    """A scalar whose gradient reaches every logit with its own weight."""
    return (logits * pull).sum()


@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_packed_documents_give_the_logits_and_gradients_of_each_alone(family):
    model, ids, pull = ours(family), tokens(), torch.randn(ROW, 101)
    alone = torch.cat([model(part).logits[0] for part in ids.split(LENGTHS, 1)])
    pulled(alone, pull).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    packed = model(ids, position_ids=positions(family), attention_mask=document_mask(LENGTHS), use_cache=False).logits[
        0
    ]
    pulled(packed, pull).backward()
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    assert expected
    for name, parameter in model.named_parameters():
        if name in expected:
            size = float(expected[name].abs().max())
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-5 * max(size, 1), msg=name)


@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_without_the_document_mask_documents_disturb_each_other(family):
    model, ids = ours(family), tokens()
    alone = torch.cat([model(part).logits[0] for part in ids.split(LENGTHS, 1)])
    together = model(ids, position_ids=positions(family), attention_mask=torch.ones_like(ids), use_cache=False).logits
    assert (together[0] - alone).abs().max() > 0.05


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", DECODERS + ENCODERS)
def test_a_padded_batch_gives_what_the_stock_attention_gives(family, side):
    model, ids = tiny(family), tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask = mask if side == "left" else mask.flip(1)
    ids[mask == 0] = 0
    stock = model(ids, attention_mask=mask).logits[mask.bool()]
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(ids, attention_mask=mask).logits[mask.bool()], stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_a_cache_continues_as_the_stock_attention_does(family):
    model, ids = tiny(family), tokens(2, 5)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    wanted = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(ids, **wanted)
    model.set_attn_implementation(NAME)
    assert model.generate(ids, **wanted).tolist() == stock.tolist()


def test_a_mask_that_was_copied_on_its_way_still_tells_the_documents():
    model, ids = ours("llama"), tokens()
    named = {"position_ids": positions("llama"), "use_cache": False}
    expected = model(ids, attention_mask=document_mask(LENGTHS), **named).logits
    assert torch.equal(model(ids, attention_mask=document_mask(LENGTHS).clone(), **named).logits, expected)


@pytest.mark.parametrize("lengths", [(3, 9), (30,)])
def test_lengths_that_do_not_cover_the_row_are_refused(lengths):
    with pytest.raises(ModelError, match="documents have"):
        ours("llama")(tokens(), attention_mask=document_mask(lengths), use_cache=False)


def test_several_packed_rows_are_refused():
    with pytest.raises(ModelError, match="2 rows"):
        ours("llama")(tokens(2), attention_mask=document_mask(LENGTHS), use_cache=False)


def test_attention_that_needs_what_packing_cannot_give_is_refused():
    q = torch.randn(1, 4, ROW, 8)
    with pytest.raises(ModelError, match="s_aux"):
        attention(torch.nn.Module(), q, q, q, document_mask(LENGTHS), s_aux=torch.zeros(4))


@pytest.mark.parametrize("family", (*DECODERS, "bert"))
def test_families_prove_that_they_pack(family):
    model = ours(family).train()
    assert packs(model)
    assert model.training


def test_models_that_cannot_pack_are_found_out():
    assert not packs(tiny("llama"))  # stock attention
    assert not packs(ours("roberta"))  # positions from 0 are not its own
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    kinds = ["conv", "full_attention"]
    hybrid = Lfm2ForCausalLM(Lfm2Config(vocab_size=101, num_hidden_layers=2, layer_types=kinds, **sizes))
    hybrid.set_attn_implementation(NAME)
    assert not packs(hybrid)  # its convolutions reach over the documents' ends


# The kernel


def reference(q, k, v, lengths, causal=True, window=None, scale=None, softcap=None):
    """The definition: one dense T×T softmax for each head."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = torch.arange(len(owner))
    distance = place[:, None] - place[None, :]
    seen = owner[:, None] == owner[None, :]
    if causal:
        seen &= distance >= 0
    if window is not None:
        seen &= distance.abs() < window
    return torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


def row(lengths, heads, groups, size=8, dtype=torch.float64):
    shapes = ((sum(lengths), n, size) for n in (heads, groups, groups))
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("heads, groups", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "rule",
    [
        {},
        {"window": 5},
        {"window": 50},
        {"softcap": 0.7},
        {"softcap": 0.7, "window": 40, "scale": 0.9},
        {"causal": False},
        {"causal": False, "window": 7},
        {"causal": False, "window": 45, "softcap": 1.1},
    ],
    ids=str,
)
def test_tiles_equal_the_dense_definition_forward_and_backward(heads, groups, rule):
    lengths = (1, 5, 33, 100, 32)  # below, at and above the 32 rows of a float64 tile
    ten = row(lengths, heads, groups)
    pull = torch.randn_like(ten[0])
    out, expected = document_attention(*ten, lengths, **rule), reference(*ten, lengths, **rule)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    for ours_, theirs in zip(
        torch.autograd.grad(out, ten, pull), torch.autograd.grad(expected, ten, pull), strict=True
    ):
        torch.testing.assert_close(ours_, theirs, rtol=1e-9, atol=1e-11)


def test_layout_in_memory_does_not_matter():
    lengths = (4, 40)
    q, k, v = row(lengths, 4, 2)
    turned = [x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert not turned[0].is_contiguous()
    torch.testing.assert_close(document_attention(*turned, lengths), document_attention(q, k, v, lengths))


@pytest.mark.parametrize("softcap", [None, 0.7])
def test_the_backward_pass_drops_the_same_probabilities_as_the_forward_pass(softcap):
    lengths = (2, 33)
    ten = row(lengths, 2, 1, size=1)

    def dropped(*ten):
        torch.manual_seed(5)
        return document_attention(*ten, lengths, softcap=softcap, dropout=0.4)

    assert torch.autograd.gradcheck(dropped, ten)


def test_dropout_keeps_the_mean_and_follows_the_seed():
    lengths = (200, 200)
    q, k, _ = row(lengths, 4, 4)
    ones = torch.ones_like(k)
    kept = document_attention(q, k, ones, lengths, dropout=0.25)
    assert not torch.allclose(kept, torch.ones_like(kept))
    assert kept.mean().item() == pytest.approx(1, abs=0.02)
    assert not torch.equal(document_attention(q, k, ones, lengths, dropout=0.25), kept)


def test_dropout_of_a_model_acts_in_training_only():
    model = ours("llama", attention_dropout=0.5)
    ids, named = tokens(), {"position_ids": positions("llama"), "attention_mask": document_mask(LENGTHS)}

    def logits():
        return model(ids, **named, use_cache=False).logits

    assert torch.equal(logits(), logits())
    model.train()
    assert not torch.allclose(logits(), logits())


def saved_sizes(function):
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        function()
    return sizes


def test_no_square_of_the_length_is_saved():
    lengths, (heads, size) = (150, 250), (4, 8)
    ten = row(lengths, heads, 2, size)
    largest = sum(lengths) * heads * size
    assert max(saved_sizes(lambda: document_attention(*ten, lengths, softcap=2.0))) == largest
    assert max(saved_sizes(lambda: reference(*ten, lengths))) == heads * sum(lengths) ** 2  # the ruler measures


def test_bfloat16_is_as_exact_as_the_fused_kernel():
    lengths = (300,)
    wide = row(lengths, 4, 4, size=16, dtype=torch.float32)
    narrow = [x.detach().bfloat16().requires_grad_() for x in wide]
    pull = torch.randn_like(wide[0])

    def fused(q, k, v):
        turned = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(*turned, is_causal=True)[0].transpose(0, 1)

    def errors(out):
        given = (out, *torch.autograd.grad(out, narrow, pull.bfloat16()))
        return [((x.float() - y).norm() / y.norm()).item() for x, y in zip(given, exact, strict=True)]

    rounded = [x.detach().float().requires_grad_() for x in narrow]
    expected = reference(*rounded, lengths)
    exact = (expected, *torch.autograd.grad(expected, rounded, pull.bfloat16().float()))
    ours_, theirs = errors(document_attention(*narrow, lengths)), errors(fused(*narrow))
    assert max(ours_) < 0.01
    assert all(a < 2 * b + 1e-3 for a, b in zip(ours_, theirs, strict=True))


def test_the_operator_keeps_its_schema_and_can_be_faked():
    q, k, v = (x.detach() for x in row((4, 9), 4, 2))
    operator = torch.ops.loralab.document_attention.default
    given = (q, k, v, [4, 9], [], True, None, 0.3, None, 0.0, 0)
    checked = torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
    assert set(checked.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    "causal, window, span",
    [(True, None, (-1, 0)), (True, 4, (3, 0)), (False, None, (-1, -1)), (False, 4, (3, 3))],
)
def test_the_variable_length_kernel_is_told_the_documents(causal, window, span):
    told = varlen_arguments((3, 9, 1), causal, window, torch.device("cpu"))
    assert told["cu_seq_q"].tolist() == [0, 3, 12, 13]
    assert told["cu_seq_q"].dtype is torch.int32
    assert told["cu_seq_k"] is told["cu_seq_q"]
    assert (told["max_q"], told["max_k"], told["window_size"]) == (9, 9, span)


def test_a_model_can_be_copied_after_a_packed_pass():
    model = ours("llama")
    model(tokens(), position_ids=positions("llama"), attention_mask=document_mask(LENGTHS), use_cache=False)
    assert packs(copy.deepcopy(model))
