"""The chunked loss against torch's cross-entropy, and what a model's own head forces."""

import pytest
import torch
from torch.nn import functional as F

from loralab.base import attention
from loralab.base.data import Batch, collate
from loralab.base.text import Example
from loralab.training.loss import NO_TARGET, LanguageHead, chunked_cross_entropy
from tiny import tiny


@pytest.mark.parametrize("chunk", [1, 3, 64])
@pytest.mark.parametrize("bias", [False, True])
def test_value_and_gradients_equal_cross_entropy_in_float64(chunk: int, bias: bool) -> None:
    torch.manual_seed(0)
    H = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    W = torch.randn(17, 6, dtype=torch.float64, requires_grad=True)
    b = torch.randn(17, dtype=torch.float64, requires_grad=True) if bias else None
    t = torch.randint(17, (10,))
    inputs = [x for x in (H, W, b) if x is not None]
    ours = chunked_cross_entropy(H, W, b, t, chunk)
    theirs = F.cross_entropy(F.linear(H, W, b), t, reduction="sum")
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), rel=1e-6)
    scaled = torch.autograd.grad(ours * 0.5, inputs)
    for got, expected in zip(scaled, torch.autograd.grad(theirs * 0.5, inputs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_no_logits_are_kept_for_backward() -> None:
    rows, vocab, hidden = 64, 500, 8
    H = torch.randn(rows, hidden, requires_grad=True)
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        chunked_cross_entropy(H, torch.randn(vocab, hidden), None, torch.randint(vocab, (rows,)), 16)
    assert kept == rows * hidden


def batch_of(*lengths: int, vocab: int = 97) -> Batch:
    torch.manual_seed(1)
    examples = []
    for length in lengths:
        tokens = torch.randint(4, vocab, (length,)).tolist()
        examples.append(Example(tokens, [i >= length // 2 for i in range(length)]))
    return collate(examples)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox", "opt"])
def test_packed_loss_equals_the_models_own_loss_document_by_document(family: str) -> None:
    model = tiny(family).eval()
    model.set_attn_implementation(attention.NAME)
    batch = batch_of(9, 14, 5)
    expected, start = 0.0, 0
    for length in batch.lengths:
        tokens = batch.tokens[:, start : start + length]
        targets = batch.targets[:, start : start + length]
        logits = model(input_ids=tokens).logits
        expected += float(F.cross_entropy(logits[0].detach(), targets[0], ignore_index=NO_TARGET, reduction="sum"))
        start += length
    head = LanguageHead(model)
    assert float(head.loss(batch).detach()) == pytest.approx(expected, rel=1e-5)
    pairs = list(head.logits(batch))
    rebuilt = sum(float(F.cross_entropy(logits, t, reduction="sum")) for logits, t in pairs)
    assert rebuilt == pytest.approx(expected, rel=1e-5)
    assert head.is_plain == (family != "gemma2"), "gemma2 caps its logits; the others are plain"


def test_a_head_that_scales_its_logits_is_found_out() -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = CohereForCausalLM(CohereConfig(vocab_size=97, logit_scale=0.25, pad_token_id=0, **shape)).eval()
    assert not LanguageHead(model).is_plain
