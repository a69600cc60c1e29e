"""A repaired pair stays a stock adapter: peft and our own loader give the logits of the weights that the formula says."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from loralab.base.targets import weight_of
from loralab.delta.layers import load_delta_
from loralab.delta.lowrank import Delta, LowRank
from loralab.delta.store import ADAPTER, WEIGHTS, load_lowrank, save_lowrank
from loralab.spectral.intruders import Intruders, intruders
from loralab.spectral.repair import Edit, compressed, edited, sharpened
from tiny import tiny

TOKENS = torch.tensor([[5, 9, 17, 33, 2, 40, 100, 1]])
RANK, K = 3, 6

# Layers with a loud pair (an intruder) and with a faint one, and what was trained whole beside them.
CASES = {
    "llama": (
        ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.up_proj"],
        ["model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj"],
        ["model.norm.weight"],
    ),
    "gpt2": (["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"], ["transformer.h.1.attn.c_attn"], []),
    "embedding": (["model.embed_tokens", "model.layers.0.self_attn.o_proj"], ["model.layers.1.self_attn.o_proj"], []),
    "head": (["lm_head"], ["model.layers.1.mlp.up_proj"], []),
}


def base_of(case: str) -> nn.Module:
    return tiny(case if case in ("llama", "gpt2") else "llama").requires_grad_(False)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def weights_of(model: nn.Module, names) -> dict[str, Tensor]:
    return {name: weight_of(model.get_submodule(name)).detach() for name in names}


def trained(case: str, model: nn.Module, dtype: torch.dtype = torch.float32) -> Delta:
    """Make a delta of random pairs: a loud direction and two faint ones in some layers, only faint ones in others."""
    loud, faint, whole = CASES[case]
    layers = {}
    for number, (name, weight) in enumerate(weights_of(model, loud + faint).items()):
        out, into = weight.shape
        generator = torch.Generator().manual_seed(number)
        A, B = torch.randn(RANK, into, generator=generator), torch.randn(out, RANK, generator=generator)
        sizes = torch.tensor([1.5 if name in loud else 0.02, 0.02, 0.02]) * float(
            torch.linalg.matrix_norm(weight.float(), 2)
        )
        A, B = A / A.norm(dim=1, keepdim=True), B / B.norm(dim=0) * sizes / 2
        layers[name] = LowRank(A.to(dtype), B.to(dtype), 2.0)
    parameters = {name: model.get_parameter(name).detach() * 1.5 for name in whole}
    embeddings = frozenset({"model.embed_tokens"}) & set(layers)
    return Delta(layers, parameters, "f" * 64, embeddings)


def found_in(model: nn.Module, delta: Delta) -> dict[str, Intruders]:
    known = {}
    for name, weight in weights_of(model, delta).items():
        known[name] = sharpened(weight, delta[name], intruders(weight, delta[name], k=K))
    return known


def formula(model: nn.Module, delta: Delta, moved: dict[str, list[int]], strength: float) -> Tensor:
    """Give the logits of the model with each tuned weight's singular values scaled as asked, formed densely."""
    parted = {"model.embed_tokens", "lm_head"} & set(delta)
    assert not parted or model.lm_head.weight is not model.model.embed_tokens.weight
    with torch.no_grad():
        for name, weight in weights_of(model, delta).items():
            change = delta[name]
            assert isinstance(change, LowRank)
            tuned = weight.double() + change.scale * (change.B.double() @ change.A.double())
            U, s, Vt = torch.linalg.svd(tuned, full_matrices=False)
            s[moved[name]] *= strength
            weight.copy_((U * s) @ Vt)
        for name, value in delta.whole.items():
            model.get_parameter(name).copy_(value)
    return logits(model)


@pytest.mark.parametrize("family", ["top1", "all"])
@pytest.mark.parametrize("case", CASES)
def test_peft_and_we_load_the_repaired_folder_with_the_logits_of_the_formula(
    case: str, family: str, tmp_path: Path
) -> None:
    model = base_of(case)
    loud, faint, whole = CASES[case]
    delta = trained(case, model)
    known = found_in(model, delta)
    moved = {name: known[name].indices[: 1 if family == "top1" else None] for name in delta}
    assert all(moved[name] for name in loud) and not any(moved[name] for name in faint)
    repaired = edited(delta, Edit(family, 0.25), found=known)
    save_lowrank(tmp_path, repaired, "base", model=model)

    right, before = formula(base_of(case), delta, moved, 0.25), formula(base_of(case), delta, moved, 1.0)
    assert float((right - before).abs().max()) > 0.1, "a repair that moves no logit would show nothing"
    theirs = PeftModel.from_pretrained(base_of(case), str(tmp_path))
    torch.testing.assert_close(logits(theirs), right, rtol=1e-4, atol=2e-4)

    again, ours = load_lowrank(tmp_path), base_of(case)
    load_delta_(ours, again)
    torch.testing.assert_close(logits(ours), right, rtol=1e-4, atol=2e-4)
    assert again.base_fingerprint == "f" * 64 and again.embeddings == delta.embeddings
    for name in delta:
        assert again[name].rank == RANK + len(moved[name])
        assert torch.equal(again[name].A, repaired[name].A) and torch.equal(again[name].B, repaired[name].B)
    assert all(torch.equal(again.whole[name], delta.whole[name]) for name in whole)
    facts = json.loads((tmp_path / ADAPTER).read_text())
    assert len({facts["r"], *facts["rank_pattern"].values()}) == 1 + len({len(m) for m in moved.values() if m})


def test_on_a_bfloat16_base_the_edit_is_kept_in_float32(tmp_path: Path) -> None:
    model = base_of("llama").bfloat16()
    delta = trained("llama", model, torch.bfloat16)
    known = found_in(model, delta)
    repaired = edited(delta, Edit("all", 0.0), found=known)
    loud, faint, _ = CASES["llama"]
    for name, weight in weights_of(model, loud).items():
        # What was the intruder's left vector, the repaired weight maps nothing onto.
        after = weight.double() + repaired[name].dense(torch.float64)
        u = known[name].triplets.left[:, known[name].indices].double()
        assert float((after.t() @ u).norm()) < 1e-6 * float(torch.linalg.matrix_norm(after, 2))
    assert all(repaired[name] is delta[name] for name in faint)
    save_lowrank(tmp_path, repaired, "base", model=model)
    stored = load_file(tmp_path / WEIGHTS)
    assert {stored[f"base_model.model.{name}.lora_B.weight"].dtype for name in loud} == {torch.float32}
    assert {stored[f"base_model.model.{name}.lora_B.weight"].dtype for name in faint} == {torch.bfloat16}
    ours = base_of("llama").bfloat16()
    load_delta_(ours, load_lowrank(tmp_path))
    theirs = logits(PeftModel.from_pretrained(base_of("llama").bfloat16(), str(tmp_path)))
    torch.testing.assert_close(logits(ours), theirs, rtol=0.05, atol=0.05 * float(theirs.float().std()))


def test_a_scaled_and_a_compressed_folder_load_in_peft_too(tmp_path: Path) -> None:
    model = base_of("llama")
    delta = trained("llama", model)
    known = found_in(model, delta)
    small, table = compressed(edited(delta, Edit("all", 0.25), found=known), RANK)
    assert table["discarded"].max() > 0.01
    tapered = edited(delta, Edit("taper", 0.5), whole=lambda name: model.get_parameter(name))
    nothing = edited(delta, Edit("scale", 0.0), whole=lambda name: model.get_parameter(name))
    for number, changed in enumerate((small, tapered, nothing)):
        right = base_of("llama")
        with torch.no_grad():
            for name, weight in weights_of(right, changed).items():
                weight += changed[name].dense()
            for name, value in changed.whole.items():
                right.get_parameter(name).copy_(value)
        save_lowrank(tmp_path / str(number), changed, "base", model=model)
        theirs = PeftModel.from_pretrained(base_of("llama"), str(tmp_path / str(number)))
        torch.testing.assert_close(logits(theirs), logits(right), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(theirs), logits(base_of("llama")))
