"""LoRA and full fine-tuning on the layouts of eleven families, and adapters exchanged with stock PEFT in both directions.

PEFT always runs on the family as Transformers ships it, with its own attention, so it is an independent witness. An
adapter that makes PEFT warn fails, because warnings are errors here.
"""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import FixedFeed, NoWatch, World, fresh_base, loop_on
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from loralab.base.attention import packs
from loralab.delta.layers import load_delta_
from loralab.delta.lowrank import LowRank
from loralab.delta.merge import merge_
from loralab.delta.store import load_lowrank
from loralab.errors import DeltaError
from loralab.methods import METHODS
from loralab.methods.base import ParamGroup
from loralab.training.loss import LanguageHead
from tiny import DECODERS, ENCODERS, tiny

every_family = pytest.mark.parametrize("family", DECODERS + ENCODERS)
STEPS = 4
MASK_TOKEN = 3


def logits(model: nn.Module) -> Tensor:
    """Logits of two rows, the second padded on the right; of the real tokens only."""
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(4, 97, (2, 9), generator=generator)
    seen = torch.ones_like(tokens)
    seen[1, 6:] = 0
    tokens[1, 6:] = 0
    model.eval()
    with torch.no_grad():
        found: Tensor = model(input_ids=tokens, attention_mask=seen).logits[seen.bool()]
    return found


def same_logits(model: nn.Module, other: nn.Module, *, atol: float = 1e-5) -> None:
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=atol)


class SameStep(FixedFeed):
    """The same packed step again and again, so that its loss must fall."""

    def next_step(self) -> list[Any]:
        self.step = 0
        return super().next_step()


def trained_world(family: str, kind: str, lr: float, **keys: Any) -> tuple[World, list[float]]:
    """Train a method for four steps on one batch and give the losses."""
    base = fresh_base(family)
    method = METHODS[kind](**keys)
    method.attach(base, 0)
    w = World(base, method, LanguageHead(base.model))
    if family in ENCODERS:
        return w, masked_token_losses(base.model, method.param_groups(lr, 0.01))
    assert packs(base.model)
    watch = NoWatch()
    loop_on(w, steps=STEPS, feed=SameStep(), lr=lr).run(watch)
    return w, watch.losses


def masked_token_losses(model: nn.Module, groups: list[ParamGroup]) -> list[float]:
    """Train an encoder to restore every third token of four rows."""
    tokens = torch.randint(4, 97, (4, 12), generator=torch.Generator().manual_seed(5))
    hidden = torch.zeros_like(tokens, dtype=torch.bool)
    hidden[:, 1::3] = True
    optimizer = torch.optim.AdamW(
        [{"params": list(g.tensors.values()), "lr": g.learning_rate, "weight_decay": g.weight_decay} for g in groups]
    )
    losses = []
    for _ in range(STEPS):
        found = model.train()(input_ids=tokens.masked_fill(hidden, MASK_TOKEN)).logits
        loss = nn.functional.cross_entropy(found[hidden], tokens[hidden])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@cache
def lora_world(family: str) -> tuple[World, list[float]]:
    """A LoRA that every test of the family only reads."""
    return trained_world(family, "lora", 1e-2, rank=4, alpha=8.0)


@every_family
def test_lora_on_all_linears_trains(family: str) -> None:
    w, losses = lora_world(family)
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.05
    delta = w.method.delta()
    blocks = {name for name, m in tiny(family).named_modules() if type(m).__name__ in ("Linear", "Conv1D")}
    heads = {name for name in blocks if name.startswith(("lm_head", "cls"))}
    assert set(delta) == blocks - heads
    for name, pair in delta.items():
        assert isinstance(pair, LowRank)
        assert bool(pair.B.any()), f"{name} did not move"


@every_family
def test_full_trains(family: str) -> None:
    w, losses = trained_world(family, "full", 2e-3)
    assert losses[-1] < losses[0] - 0.05
    moved = w.method.delta()
    assert all(bool(layer.dense().any()) for layer in moved.values())


@every_family
def test_stock_peft_gives_the_logits_of_our_adapter(family: str, tmp_path: Path) -> None:
    w, _ = lora_world(family)
    w.method.save(tmp_path)
    theirs = PeftModel.from_pretrained(tiny(family), str(tmp_path))
    same_logits(theirs, w.base.model)
    with theirs.disable_adapter():
        assert float((logits(theirs) - logits(w.base.model)).abs().max()) > 1e-3


@every_family
def test_merging_gives_the_unmerged_logits(family: str) -> None:
    w, _ = lora_world(family)
    merged = tiny(family).requires_grad_(False)
    errors = merge_(merged, w.method.delta())
    same_logits(merged, w.base.model, atol=2e-5)
    assert len(errors) == len(w.method.delta())


OUR_VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("qwen2", {"also_train": ["q_proj.bias", "v_proj.bias"]}),
    "biases-of-conv1d-and-norms": ("gpt2", {"also_train": ["c_fc.bias", "ln_1", "ln_f.weight"]}),
    "tied-scaled-embedding": ("gemma2", {"targets": ["q_proj", "embed_tokens"]}),
    "tied-positions": ("gpt2", {"targets": ["c_attn", "wte", "wpe"]}),
    "head": ("llama", {"targets": ["up_proj", "lm_head"]}),
    "one-block-rslora": ("roberta", {"targets": ["*.layer.1.*"], "scaling": "alpha/sqrt(r)"}),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("variant", OUR_VARIANTS)
def test_stock_peft_gives_the_logits_of_our_variants(variant: str, tmp_path: Path) -> None:
    family, keys = OUR_VARIANTS[variant]
    base = fresh_base(family)
    method = METHODS["lora"](rank=4, alpha=8.0, **keys)
    method.attach(base, 0)
    randomise(base.model)
    method.save(tmp_path)
    same_logits(PeftModel.from_pretrained(tiny(family), str(tmp_path)), base.model)
    same_logits(attached(family, tmp_path), base.model)


def randomise(model: nn.Module) -> None:
    """Move every trained tensor."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def peft_adapter(family: str, folder: Path, **keys: Any) -> nn.Module:
    """Write an adapter with stock PEFT, every trained tensor random, and give PEFT's model."""
    chosen = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "fan_in_fan_out": family == "gpt2", **keys}
    model = get_peft_model(tiny(family), LoraConfig(**chosen))
    randomise(model)
    model.save_pretrained(folder)
    return model


def attached(family: str, folder: Path) -> nn.Module:
    model = fresh_base(family).model
    load_delta_(model, load_lowrank(folder))
    return model


@every_family
def test_we_give_the_logits_of_an_adapter_of_stock_peft(family: str, tmp_path: Path) -> None:
    theirs = peft_adapter(family, tmp_path)
    same_logits(attached(family, tmp_path), theirs)


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rslora": ("qwen2", {"use_rslora": True}),
    "patterns": (
        "llama",
        {
            "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 3, "^model.layers.0.self_attn.k_proj": 1},
            "alpha_pattern": {"self_attn.v_proj": 3, "down_proj": 5},
        },
    ),
    "patterns-rslora": ("phi3", {"use_rslora": True, "rank_pattern": {"qkv_proj": 2}, "alpha_pattern": {"o_proj": 3}}),
    "head-whole": ("llama", {"modules_to_save": ["lm_head"]}),
    "norms-whole": ("gpt2", {"modules_to_save": ["ln_1", "ln_f"]}),
    "embedding": ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embedding-scaled": ("gemma2", {"target_modules": ["q_proj", "embed_tokens"]}),
    "embeddings-gpt2": ("gpt2", {"target_modules": ["c_attn", "wte", "wpe"]}),
    "embedding-bert": ("bert", {"target_modules": ["query", "word_embeddings"]}),
    "head-pair": ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    "bias-all": ("qwen2", {"bias": "all"}),
    "bias-lora-only": ("gpt_neox", {"bias": "lora_only"}),
    "bias-of-conv1d": ("gpt2", {"bias": "lora_only"}),
    "bias-of-encoder": ("bert", {"bias": "all"}),
    "one-block": ("opt", {"target_modules": ["q_proj", "fc1"], "layers_to_transform": [1]}),
}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_stock_peft_load(variant: str, tmp_path: Path) -> None:
    family, keys = VARIANTS[variant]
    theirs = peft_adapter(family, tmp_path, **keys)
    same_logits(attached(family, tmp_path), theirs)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_of_stock_peft_merge(variant: str, tmp_path: Path) -> None:
    family, keys = VARIANTS[variant]
    theirs = peft_adapter(family, tmp_path, **keys)
    merged = tiny(family).requires_grad_(False)
    merge_(merged, load_lowrank(tmp_path))
    same_logits(merged, theirs, atol=2e-5)


REFUSED: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "bias-of-pairs": {"lora_bias": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "tokens": {"trainable_token_indices": [5, 7]},
}


@pytest.mark.filterwarnings("ignore:Adapter 'default'. 8 LoRA tensor")  # PEFT doubts the biases of its own pairs
@pytest.mark.parametrize("variant", REFUSED)
def test_what_is_no_plain_pair_is_refused_by_name(variant: str, tmp_path: Path) -> None:
    peft_adapter("gpt_neox", tmp_path, **REFUSED[variant])
    with pytest.raises(DeltaError) as caught:
        attached("gpt_neox", tmp_path)
    assert caught.value.where and caught.value.fix
