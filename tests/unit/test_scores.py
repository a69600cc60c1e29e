"""Scores of texts: the same as the model's own, however texts are laid out, for every way in which families take them."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from loralab.base.attention import NAME, document_mask
from loralab.base.labelled import Labelled, collate_labelled
from loralab.base.model import fingerprint, heads, load, longest_text, scores_texts
from loralab.errors import ModelError
from loralab.training.scores import ScoreHead
from tiny import tiny

WAYS = {"llama": "last", "gpt2": "last", "qwen3": "last", "gemma2": "last", "bert": "pooled", "roberta": "first"}
TEXTS = [[5, 9, 33, 71, 2], [8, 44, 2], [17, 61, 12, 90, 31, 55, 2]]


def scored(family: str, outputs: int = 3, **changes):
    """Make a tiny model of scores whose attention keeps texts apart."""
    model = tiny(family, task="ForSequenceClassification", num_labels=outputs, **changes)
    model.set_attn_implementation(NAME)
    return model


def texts(*tokens: list[int], second: int | None = None) -> list[Labelled]:
    return [
        Labelled(np.array(t, dtype=np.uint32), (len(t),), 0.0, (len(t),), second or len(t), "classify") for t in tokens
    ]


def pair(prompt: list[int], chosen: list[int], rejected: list[int], margin: float = 0.0) -> Labelled:
    tokens = np.array(prompt + chosen + rejected, dtype=np.uint32)
    parts = (len(prompt), len(chosen), len(rejected))
    return Labelled(tokens, parts, margin, (len(chosen), len(rejected)), len(tokens), "pairs")


@torch.no_grad()
def stock(model, tokens: list[list[int]], types: list[list[int]] | None = None) -> torch.Tensor:
    """Let Transformers score texts, padded on the right, with attention of its own."""
    own = type(model)(model.config)
    own.load_state_dict(model.state_dict())
    own.set_attn_implementation("eager")
    longest = max(map(len, tokens))
    rows = {"input_ids": tokens, "attention_mask": [[1] * len(t) for t in tokens]}
    rows |= {"token_type_ids": types} if types else {}
    padded = {name: torch.tensor([r + [0] * (longest - len(r)) for r in given]) for name, given in rows.items()}
    return own.eval()(**padded).logits


@pytest.mark.parametrize("family", WAYS)
def test_scores_are_those_of_the_stock_model(family):
    model = scored(family)
    head = ScoreHead(model)
    assert (head.way, head.packs) == (WAYS[family], family != "roberta")  # its positions begin behind padding's
    assert head.shares is (WAYS[family] == "last")
    ours = head.scores(collate_labelled(texts(*TEXTS)))
    assert ours.shape == (3, 3) and ours.dtype == torch.float32
    torch.testing.assert_close(ours, stock(model, TEXTS), rtol=1e-4, atol=1e-5)


def test_texts_share_what_they_begin_with_only_where_the_model_looks_back_alone():
    shared = collate_labelled([pair([5, 6, 7], [8, 2], [9, 10, 2]), pair([5, 11], [12, 2], [2])])
    apart = collate_labelled([pair([5, 6, 7], [8, 2], [9, 10, 2]), pair([5, 11], [12, 2], [2])], share=False)
    assert (shared.tokens.numel(), apart.tokens.numel()) == (3 + 2 + 3 + 2 + 2 + 1, 5 + 6 + 4 + 3)
    whole = [[5, 6, 7, 8, 2], [5, 6, 7, 9, 10, 2], [5, 11, 12, 2], [5, 11, 2]]
    for family in ("llama", "gpt2", "mistral"):
        model = scored(family, 1)
        for batch in (shared, apart):
            torch.testing.assert_close(ScoreHead(model).scores(batch), stock(model, whole), rtol=1e-4, atol=1e-5)
    for family in ("bert", "roberta"):
        with pytest.raises(ValueError, match="share prompts"):
            ScoreHead(scored(family, 1)).scores(shared)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_second_sentences_have_a_type_of_their_own_where_there_are_types(family):
    model = scored(family, type_vocab_size=2)
    batch = collate_labelled([*texts([5, 9, 33, 71, 2], second=2), *texts([8, 44, 2], second=1)])
    types = [[0, 0, 1, 1, 1], [0, 1, 1]]
    expected = stock(model, [[5, 9, 33, 71, 2], [8, 44, 2]], types)
    torch.testing.assert_close(ScoreHead(model).scores(batch), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, stock(model, [[5, 9, 33, 71, 2], [8, 44, 2]]), atol=1e-3)
    # A family without types is not told of them.
    plain = scored(family, type_vocab_size=1)
    torch.testing.assert_close(
        ScoreHead(plain).scores(batch), stock(plain, [[5, 9, 33, 71, 2], [8, 44, 2]]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("family", ["opt", "bert"])
def test_a_model_that_scores_otherwise_is_asked_itself(family, monkeypatch):
    model = scored(family)
    monkeypatch.setattr(ScoreHead, "_tried", lambda *_: None)
    head = ScoreHead(model)
    assert head.way == "own" and not head.shares
    torch.testing.assert_close(head.scores(collate_labelled(texts(*TEXTS))), stock(model, TEXTS), rtol=1e-4, atol=1e-5)


def test_the_head_computes_in_float32_whatever_the_model_is():
    model = scored("llama").to(torch.bfloat16)
    head = ScoreHead(model)
    batch = collate_labelled(texts(*TEXTS))
    assert head.way == "last"
    ours = head.scores(batch)
    assert ours.dtype == torch.float32
    mask = document_mask(batch.row.lengths)
    hidden = model.model(batch.tokens, attention_mask=mask, position_ids=batch.row.positions, use_cache=False)[0][0]
    ends = hidden[torch.tensor([4, 7, 14])]  # the last tokens of texts of 5, 3 and 7
    torch.testing.assert_close(ours, ends.float() @ model.score.weight.float().T, rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours, ours.bfloat16().float())
    ours.sum().backward()
    assert model.score.weight.grad is not None and model.score.weight.grad.dtype == torch.bfloat16


# Loading


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_only_the_head_is_drawn_and_the_fingerprint_is_that_of_the_files(tmp_path, family):
    language = tiny(family)
    language.save_pretrained(tmp_path)
    torch.manual_seed(7)
    base = load(str(tmp_path), outputs=2, need_tokenizer=False, device="cpu")
    torch.manual_seed(7)
    again = load(str(tmp_path), outputs=2, need_tokenizer=False, device="cpu")
    assert scores_texts(base.model) and base.model.config.num_labels == 2
    assert base.fingerprint == load(str(tmp_path), need_tokenizer=False).fingerprint
    stored = language.state_dict()
    held = base.model.state_dict()
    assert {name for name in held if name not in stored} == set(base.drawn)
    assert all(torch.equal(held[name], stored[name]) for name in held if name in stored)
    assert {name.split(".")[0] for name in base.drawn} <= {"score", "classifier", "bert"}
    assert all("pooler" in name for name in base.drawn if name.startswith("bert"))
    assert all(torch.equal(held[name], again.model.state_dict()[name]) for name in base.drawn)
    other = load(str(tmp_path), outputs=2, need_tokenizer=False, device="cpu").model.state_dict()
    drawn = [name for name in base.drawn if held[name].any()]  # biases begin at zero
    assert drawn and not any(torch.equal(held[name], other[name]) for name in drawn)
    assert not any(parameter.requires_grad for parameter in base.model.parameters())


def test_what_is_missing_inside_the_model_is_refused(tmp_path):
    model = tiny("bert")
    kept = {name: value for name, value in model.state_dict().items() if "layer.1.output" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ModelError, match="are missing from the files"):
        load(str(tmp_path), outputs=2, need_tokenizer=False)


def test_a_family_without_sequence_classification_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba", "num_hidden_layers": 1}))
    with pytest.raises(ModelError, match="cannot make this model") as caught:
        load(str(tmp_path), outputs=2, random_init=True, need_tokenizer=False)
    assert "sequence classification" in str(caught.value.fix)


def test_stored_heads_are_read(tmp_path):
    model = scored("roberta", 2)
    model.save_pretrained(tmp_path)
    base = load(str(tmp_path), outputs=2, need_tokenizer=False, device="cpu")
    assert base.drawn == () and base.fingerprint == fingerprint(sorted(model.state_dict().items()))
    batch = collate_labelled(texts(*TEXTS))
    torch.testing.assert_close(ScoreHead(base.model).scores(batch), stock(model, TEXTS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [None, 2])
def test_padding_never_hides_the_end_of_a_text(tmp_path, padding):
    tiny("llama", pad_token_id=padding).save_pretrained(tmp_path)
    base = load(str(tmp_path), outputs=1, need_tokenizer=False, device="cpu")
    pad = base.model.config.pad_token_id
    assert pad is not None and pad != 2, "texts end with 2"
    base.model.save_pretrained(tmp_path / "saved")
    own = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    rows = torch.tensor([[*t, *[pad] * (7 - len(t))] for t in TEXTS])
    with torch.no_grad():
        theirs = own(rows, attention_mask=(rows != pad).long()).logits
    ours = ScoreHead(base.model).scores(collate_labelled(texts(*TEXTS)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_heads_and_positions_are_found_by_family():
    named = {family: heads(scored(family)) for family in ("llama", "gpt2", "bert", "roberta")}
    assert named == {
        "llama": ["score"],
        "gpt2": ["score"],
        "bert": ["bert.pooler", "classifier"],
        "roberta": ["classifier"],
    }
    limits = {family: longest_text(scored(family)) for family in ("llama", "gpt2", "bert", "roberta")}
    assert limits == {"llama": 64, "gpt2": 64, "bert": 66, "roberta": 65}
    roberta = scored("roberta")
    roberta(torch.full((1, 65), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 66), 5))
