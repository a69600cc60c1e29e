"""Classes and numbers: the losses against NumPy; words that stand for classes against the model's own logits."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from loralab.base.attention import NAME
from loralab.base.labelled import Labelled
from loralab.base.model import load
from loralab.errors import SpecError
from loralab.training.loss import LanguageHead
from loralab.training.objectives.classify import ClassifyObjective
from loralab.training.words import WordHead, collate_words, tokens_of_words
from tiny import tiny


@dataclass
class Batch:
    """Labels, and the scores that a head is to give for them."""

    labels: torch.Tensor
    scores: torch.Tensor


class Given:
    """A head that gives what stands in the batch."""

    def scores(self, batch):
        return batch.scores


class NoFeed:
    """A feed that is not asked."""

    def next_step(self):
        raise AssertionError

    def state(self):
        return {"epoch": 3}

    def load_state(self, state):
        self.loaded = state


def test_classes_are_learned_by_cross_entropy():
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(7, 3)) * 2, rng.integers(0, 3, 7)
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    batch = Batch(torch.tensor(labels).float(), torch.tensor(scores).float())
    loss = ClassifyObjective(NoFeed(), Given()).loss(nn.Linear(1, 1), batch)
    assert float(loss.total) == pytest.approx(-np.log(shares[np.arange(7), labels]).sum(), rel=1e-5)
    assert loss.weight == 7
    assert loss.metrics["accuracy"] == pytest.approx(np.mean(scores.argmax(1) == labels))


def test_numbers_are_learned_by_squared_error():
    batch = Batch(torch.tensor([1.0, -2.0, 0.5]), torch.tensor([[0.0], [1.0], [0.5]]))
    loss = ClassifyObjective(NoFeed(), Given(), regression=True).loss(nn.Linear(1, 1), batch)
    assert (float(loss.total), loss.weight, loss.metrics) == (10.0, 3.0, {})


def test_the_cursor_is_the_feeds():
    feed = NoFeed()
    objective = ClassifyObjective(feed, Given())
    objective.load_state(objective.state())
    assert feed.loaded == {"epoch": 3}


# Words


def text(tokens: list[int], label: int) -> Labelled:
    return Labelled(np.array(tokens, dtype=np.uint32), (len(tokens),), label, (len(tokens),), len(tokens), "classify")


def test_words_are_scored_behind_the_text_as_the_model_itself_would():
    model = tiny("llama")
    words = [[7, 8], [9], [7, 11, 12]]
    examples = [text([5, 33, 71, 2], 0), text([8, 44, 2], 2)]
    expected = []
    for example in examples:
        for word in words:
            tokens = torch.tensor([[*example.tokens[:-1].tolist(), *word]])  # the end makes way
            with torch.no_grad():
                log_p = model(tokens).logits[0].log_softmax(-1)
            first = len(example) - 1
            expected.append(sum(float(log_p[first + i - 1, token]) for i, token in enumerate(word)))
    model.set_attn_implementation(NAME)
    batch = collate_words(examples, words=words, stop=2)
    assert batch.tokens.shape[1] == 3 + 6 + 2 + 6, "each text once"
    head = WordHead(LanguageHead(model))
    scores = head.scores(batch.to("cpu"))
    np.testing.assert_allclose(scores.detach().numpy().ravel(), expected, rtol=1e-4, atol=1e-4)
    loss = ClassifyObjective(NoFeed(), head).loss(model, batch)
    table = np.array(expected).reshape(2, 3)
    by_hand = -(table[[0, 1], [0, 2]] - np.log(np.exp(table).sum(1)))
    assert float(loss.total.detach()) == pytest.approx(by_hand.sum(), rel=1e-3)
    loss.total.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0


def test_words_are_tokenised_as_behind_a_space():
    tokenizer = load("pocket", device="cpu").tokenizer
    found = tokens_of_words(["great", "bad"], tokenizer)
    assert [tokenizer.decode(tokens) for tokens in found] == [" great", " bad"]
    with pytest.raises(SpecError, match="the same"):
        tokens_of_words(["great", "great"], tokenizer)
