"""Pseudo-log-likelihood under encoders, against masking one token at a time in one row without padding."""

import numpy as np
import pytest
import torch
from battery import fresh_base
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedTokenizerFast

from loralab.base.model import Base
from loralab.errors import DataError, ModelError
from loralab.evals.masked import MaskedProbe, MaskedText, masked_texts
from loralab.methods import METHODS
from tiny import ENCODERS, tiny

MASK, PAD, CLS, SEP = 100, 0, 1, 2


def tokenizer_of(*, mask: bool = True, longest: int = 40) -> PreTrainedTokenizerFast:
    """Words w3 to w99 as tokens 3 to 99, between special tokens as BERT has them."""
    words = {"[PAD]": PAD, "[CLS]": CLS, "[SEP]": SEP, "[MASK]": MASK} | {f"w{i}": i for i in range(3, 100)}
    backend = Tokenizer(models.WordLevel(words, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]" if mask else None,
        model_max_length=longest,
    )


def texts_of(lengths: tuple[int, ...] = (5, 11, 1, 8, 11, 3, 0)) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(f"w{i}" for i in rng.integers(3, 100, length)) for length in lengths]


@torch.no_grad()
def one_at_a_time(model: nn.Module, text: MaskedText) -> float:
    """Sum −log P of each token with that token masked, a row and a forward pass for each."""
    total = 0.0
    for place in np.flatnonzero(text.scored).tolist():
        row = torch.from_numpy(text.tokens)[None].clone()
        right = int(row[0, place])
        row[0, place] = MASK
        total -= float(model(input_ids=row).logits[0, place].double().log_softmax(-1)[right])
    return total


def encoder(family: str, *, own_attention: bool) -> torch.nn.Module:
    return fresh_base(family).model if own_attention else tiny(family)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("own_attention", [True, False])
@pytest.mark.parametrize("at_once", [1, 40, 4096])
def test_the_pseudo_loss_is_that_of_masking_one_token_at_a_time(family, own_attention, at_once):
    model, tokenizer = encoder(family, own_attention=own_attention), tokenizer_of()
    texts = masked_texts(texts_of(), tokenizer)
    probe = MaskedProbe("general", texts, model, tokenizer, at_once=at_once)
    reading = probe.read_base()
    expected = [one_at_a_time(model, text) for text in texts if text.scored.any()]
    assert [row["num_tokens"] for row in reading.items] == [5, 11, 1, 8, 11, 3], "the text without a word is left out"
    np.testing.assert_allclose([row["loss_sum"] for row in reading.items], expected, rtol=2e-5)
    (score,) = reading.scores
    assert (score.name, score.unit, score.n) == ("general/pseudo_loss", "nats/token", 6)
    assert score.value == pytest.approx(sum(expected) / 39, rel=1e-5)


def test_special_tokens_are_read_but_not_predicted():
    (text,) = masked_texts(["w5 w6 w7"], tokenizer_of())
    assert text.tokens.tolist() == [CLS, 5, 6, 7, SEP] and text.scored.tolist() == [False, True, True, True, False]


def test_long_texts_come_in_pieces_that_hold_every_word():
    words = texts_of((25,))[0]
    pieces = masked_texts([words, "w9"], tokenizer_of(), max_length=10)
    assert [len(piece.tokens) for piece in pieces] == [10, 10, 10, 3, 3]
    assert " ".join(f"w{i}" for piece in pieces[:4] for i in piece.tokens[piece.scored]) == words
    assert len(masked_texts([words], tokenizer_of(longest=12))) == 3
    (whole,) = masked_texts([words], tokenizer_of(longest=int(1e30)))
    assert len(whole.tokens) == 27


def test_the_rise_is_paired_with_the_base_text_by_text():
    model, tokenizer = tiny("bert"), tokenizer_of()
    probe = MaskedProbe("general", masked_texts(texts_of(), tokenizer), model, tokenizer)
    before = probe.read_base()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.bert.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    after = probe.read(3)
    moved = np.array([b["loss_sum"] - a["loss_sum"] for a, b in zip(before.items, after.items, strict=True)])
    assert [s.name for s in after.scores] == ["general/pseudo_loss", "general/pseudo_loss_rise"]
    assert after.scores[1].value == pytest.approx(moved.sum() / 39) and after.scores[1].value != 0
    assert after.scores[1].value == pytest.approx(after.scores[0].value - before.scores[0].value)
    assert 0 < after.scores[1].standard_error < after.scores[0].standard_error + before.scores[0].standard_error


def test_the_base_is_read_with_the_delta_switched_off():
    model, tokenizer = fresh_base("bert").model, tokenizer_of()
    texts = masked_texts(texts_of(), tokenizer)
    pristine = MaskedProbe("general", texts, model, tokenizer).read_base()
    method = METHODS["lora"](rank=4, alpha=8.0, targets=["query", "value"])
    method.attach(Base(model=model, tokenizer=None, path="tiny", revision=None, fingerprint="0" * 64), 0)
    probe = MaskedProbe("general", texts, model, tokenizer)
    assert probe.read(0).scores[0] == pristine.scores[0], "a fresh adapter changes nothing"
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    assert probe.read_base(method.without()) == pristine
    assert probe.read(1).scores[1].value != 0


def test_only_the_masked_positions_go_through_the_head():
    model, tokenizer = tiny("roberta"), tokenizer_of()
    rows: list[torch.Size] = []
    model.lm_head.register_forward_pre_hook(lambda module, given: rows.append(given[0].shape))
    probe = MaskedProbe("general", masked_texts(texts_of((6, 6)), tokenizer), model, tokenizer, at_once=24)
    rows.clear()
    probe.read_base()
    assert rows == [(3, 1, 32)] * 4, "twelve rows of eight tokens, three in a pass"
    assert not model.roberta._forward_hooks, "and the model is as it was"


def test_a_head_that_needs_the_whole_row_gets_it():
    class Centred(nn.Module):
        """Take the mean over the row off before the head."""

        def __init__(self, head: nn.Module) -> None:
            super().__init__()
            self.head = head

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = self.head(hidden - hidden.mean(1, keepdim=True))
            return found

    model, tokenizer = tiny("bert"), tokenizer_of()
    model.cls = Centred(model.cls)
    texts = masked_texts(texts_of((5, 5, 5)), tokenizer)
    reading = MaskedProbe("general", texts, model, tokenizer).read_base()
    expected = [one_at_a_time(model, text) for text in texts]
    np.testing.assert_allclose([row["loss_sum"] for row in reading.items], expected, rtol=2e-5)


def test_long_texts_can_be_read_in_part():
    model, tokenizer = tiny("bert"), tokenizer_of()
    texts = masked_texts(texts_of((30, 4)), tokenizer)
    probes = [MaskedProbe("general", texts, model, tokenizer, positions=6) for _ in range(2)]
    first, again = (probe.read_base() for probe in probes)
    assert [row["num_tokens"] for row in first.items] == [6, 4] and first == again
    assert first.items[1]["loss_sum"] == pytest.approx(one_at_a_time(model, texts[1]), rel=2e-5)
    found = first.items[0]["loss_sum"]
    assert 0 < found < one_at_a_time(model, texts[0])
    begin = MaskedText(texts[0].tokens, texts[0].scored & (np.arange(32) <= 6))
    assert found != pytest.approx(one_at_a_time(model, begin), rel=1e-3), "the six are not just the first"


def test_a_probe_leaves_mode_and_random_state_as_they_were():
    model, tokenizer = tiny("bert", hidden_dropout_prob=0.5).train(), tokenizer_of()
    probe = MaskedProbe("general", masked_texts(texts_of(), tokenizer), model, tokenizer)
    before = torch.get_rng_state()
    assert probe.read_base() == probe.read_base(), "dropout is off"
    assert torch.equal(torch.get_rng_state(), before) and model.training


def test_what_cannot_be_read_is_refused():
    tokenizer = tokenizer_of()
    texts = masked_texts(texts_of(), tokenizer)
    with pytest.raises(ModelError, match="predicts the next token"):
        MaskedProbe("general", texts, tiny("llama"), tokenizer)
    with pytest.raises(ModelError, match="no mask token"):
        MaskedProbe("general", texts, tiny("bert"), tokenizer_of(mask=False))
    with pytest.raises(DataError, match="no text has a token"):
        MaskedProbe("general", masked_texts([""], tokenizer), tiny("bert"), tokenizer)
    with pytest.raises(DataError, match="no room"):
        masked_texts(["w5"], tokenizer, max_length=2)
    long = masked_texts(texts_of((68,)), tokenizer_of(longest=1000))
    with pytest.raises(DataError, match="70 tokens, but the model reads 66"):
        MaskedProbe("general", long, tiny("bert"), tokenizer)
    with pytest.raises(DataError, match="70 tokens, but the model reads 65"):  # the padding's own position is none
        MaskedProbe("general", long, tiny("roberta"), tokenizer)
