"""What a Llama block keeps for backward, against the lean formula (numbers per token and block):

2h (two residuals) + h + 2kv (q, k, v) + h (attention out) + 2i (gate, up) + Σ ranks.
"""

import gc

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.base import attention
from loralab.base.data import Batch, collate
from loralab.base.model import Base
from loralab.base.text import Example
from loralab.methods.lora import Lora
from loralab.training.loss import LanguageHead
from loralab.training.recompute import recompute_

HIDDEN, KV, MLP, RANK, TOKENS = 128, 64, 352, 8, 256


def kept_bytes(layers: int, how: str, dtype: torch.dtype) -> int:
    """Bytes alive between forward and backward that were not there before, each storage once."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation=attention.NAME,
    )
    model = LlamaForCausalLM(shape).to(dtype).requires_grad_(False).train()
    method = Lora(rank=RANK, alpha=16.0)
    method.attach(Base(model=model, tokenizer=None, path="", revision=None, fingerprint=""), 0)
    recompute_(model, how)
    head = LanguageHead(model)
    model.train()
    batch = batch_of(TOKENS)
    head.loss(batch).backward()  # whatever is made once is made now
    gc.collect()
    before = live_storages()
    hooked: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        hooked[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = head.loss(batch)
    # What autograd saved goes through the hooks; what selective recomputation keeps are ordinary tensors.
    alive = live_storages() | hooked
    del loss
    return sum(size for pointer, size in alive.items() if pointer not in before)


def live_storages() -> dict[int, int]:
    # By type, not isinstance: that would wake lazy modules among all objects.
    tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def batch_of(tokens: int) -> Batch:
    half = tokens // 2
    return collate([Example([i % 60 + 2 for i in range(half)], [True] * half) for _ in range(2)])


def over_lean(how: str, dtype: torch.dtype) -> float:
    """What one block keeps over the lean formula; as a difference of two depths, embeddings, head and loss cancel."""
    per_block = (kept_bytes(5, how, dtype) - kept_bytes(3, how, dtype)) / 2
    numbers = 2 * HIDDEN + (HIDDEN + 2 * KV) + HIDDEN + 2 * MLP + 7 * RANK
    return per_block / (TOKENS * numbers * torch.empty((), dtype=dtype).element_size())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_block_keeps_at_most_1_15_of_the_lean_formula(dtype: torch.dtype) -> None:
    ratio = over_lean("selective", dtype)
    assert 0.9 <= ratio <= 1.15, f"{ratio:.3f} of the lean formula"


def test_recomputation_keeps_less_in_order() -> None:
    none, selective, full = (kept_bytes(4, how, torch.float32) for how in ("none", "selective", "full"))
    assert full < selective < none


@pytest.mark.parametrize("how", ["selective", "full"])
def test_recomputation_changes_no_gradient(how: str) -> None:
    def gradients(chosen: str) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            attn_implementation=attention.NAME,
        )
        model = LlamaForCausalLM(shape).requires_grad_(False).train()
        method = Lora(rank=4, alpha=8.0, dropout=0.2)
        method.attach(Base(model=model, tokenizer=None, path="", revision=None, fingerprint=""), 0)
        recompute_(model, chosen)
        head = LanguageHead(model)
        model.train()
        torch.manual_seed(7)
        for layer in method.layers.values():
            torch.nn.init.normal_(layer.pair("link-1").B)
        head.loss(batch_of(24)).backward()
        return [p.grad for g in method.param_groups(1.0, 0.0) for p in g.tensors.values()]

    for ours, plain in zip(gradients(how), gradients("none"), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    for how in ("none", "selective", "full"):
        print(f"{how}: {over_lean(how, torch.float32):.3f} of the lean formula")
