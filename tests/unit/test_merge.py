"""Merging where embedding and head share one table."""

import pytest
import torch

from loralab.base.model import Base
from loralab.delta.layers import load_delta_
from loralab.delta.lowrank import Delta, LowRank
from loralab.delta.merge import merge_
from loralab.errors import TargetError
from loralab.methods.lora import Lora
from tiny import tiny

TOKENS = torch.tensor([[5, 9, 17, 33, 2]])


def tied() -> torch.nn.Module:
    model = tiny("llama", tie_word_embeddings=True).eval().requires_grad_(False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("target", ["lm_head", "model.embed_tokens"])
def test_a_pair_on_one_of_two_tied_layers_leaves_the_other(target: str) -> None:
    model = tied()
    vocab, hidden = model.lm_head.weight.shape
    out, into = (vocab, hidden) if target == "lm_head" else (hidden, vocab)
    pair = LowRank(torch.randn(2, into) / 4, torch.randn(out, 2) / 4, 0.5)
    delta = Delta({target: pair}, embeddings=frozenset({target} - {"lm_head"}))
    unmerged, merged = tied(), model
    load_delta_(unmerged, delta)
    merge_(merged, delta)
    base = tied()
    with torch.no_grad():
        expected = unmerged(TOKENS).logits
        torch.testing.assert_close(merged(TOKENS).logits, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(base(TOKENS).logits, expected, atol=1e-3)
    untouched = merged.model.embed_tokens if target == "lm_head" else merged.lm_head
    assert torch.equal(untouched.weight, base.lm_head.weight)
    assert merged.config.tie_word_embeddings is False


def test_a_tied_table_cannot_be_trained_whole_beside_pairs() -> None:
    base = Base(model=tied(), tokenizer=None, path="tiny", revision=None, fingerprint="")
    with pytest.raises(TargetError, match="shared by embedding and head"):
        Lora(rank=2, also_train=["embed_tokens"]).attach(base, 0)


@pytest.mark.parametrize(
    ("tuner", "keys"), [("ADALORA", {"total_step": 10}), ("PROMPT_TUNING", {"num_virtual_tokens": 2})]
)
def test_tuners_that_a_delta_cannot_hold_are_refused(tuner: str, keys: dict) -> None:
    from loralab.methods.peft import Peft

    model = tiny("llama").requires_grad_(False)
    base = Base(model=model, tokenizer=None, path="tiny", revision=None, fingerprint="")
    with pytest.raises(TargetError, match=f"peft's {tuner}"):
        Peft(tuner=tuner, keys=keys).attach(base, 0)


def test_a_fully_tuned_run_is_a_whole_model_already(tmp_path):
    from loralab.errors import DeltaError
    from loralab.lab.merging import merge

    (tmp_path / "run" / "delta").mkdir(parents=True)
    facts = '{"architectures": ["LlamaForSequenceClassification"], "model_type": "llama"}'
    (tmp_path / "run" / "delta" / "config.json").write_text(facts)
    for named in ("run", "run/delta"):
        with pytest.raises(DeltaError, match="a whole model already, a LlamaForSequenceClassification") as caught:
            merge(str(tmp_path / "no base"), str(tmp_path / named), str(tmp_path / "out"))
        assert caught.value.where == str(tmp_path / "run" / "delta") and caught.value.exit_code == 2
        assert f"use {tmp_path / 'run' / 'delta'} as it is" in str(caught.value.fix)
    assert not (tmp_path / "out").exists()
