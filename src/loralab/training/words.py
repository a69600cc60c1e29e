"""Words that stand for classes: a causal language model classifies by the likelihood of each behind the text, without a head.

Source: MeZO (2305.17333, appendix E.2) and P2 Chain of LoRA (2401.04151): prompt, then label word; training is the
cross-entropy over the words' summed log-likelihoods.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.base.labelled import Labelled
from loralab.base.trees import Forest, forest
from loralab.errors import LoralabError, SpecError
from loralab.training.loss import LanguageHead


@dataclass(frozen=True, eq=False)
class WordBatch:
    """Texts in one row, every word behind each.

    Attributes:
        forest: a group for each text, a tail for each word.
        labels: number of the class of each text.
        answers: tokens of each text.
    """

    forest: Forest
    labels: Float[Tensor, " texts"]
    answers: Int[Tensor, " texts"]

    @property
    def tokens(self) -> Int[Tensor, "1 length"]:
        """All tokens of the row."""
        return self.forest.tokens

    def to(self, device: torch.device | str) -> "WordBatch":
        """Copy the tensors to a device."""
        moved = {name: getattr(self, name).to(device) for name in ("forest", "labels", "answers")}
        return replace(self, **moved)


def tokens_of_words(words: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokenise words as they stand behind a text and a space.

    Raises:
        SpecError: two words are the same to the tokenizer, so they cannot stand for two classes.
    """
    before = tokenizer("a", add_special_tokens=False)["input_ids"]
    found = [tokenizer(f"a {word}", add_special_tokens=False)["input_ids"][len(before) :] for word in words]
    if not all(found) or len({tuple(tokens) for tokens in found}) < len(found):
        what = "to this model's tokenizer two of the words are the same, or one is nothing"
        raise SpecError([LoralabError(what, where="objective.words", fix="choose other words")])
    return found


def collate_words(examples: Sequence[Labelled], *, words: Sequence[Sequence[int]], stop: int | None) -> WordBatch:
    """Lay texts side by side with every word behind each; the token that ends a text makes way for the word."""
    texts = [
        example.tokens[:-1] if len(example) > 1 and int(example.tokens[-1]) == stop else example.tokens
        for example in examples
    ]
    labels = torch.tensor([example.label for example in examples], dtype=torch.float32)
    return WordBatch(forest([(text, words) for text in texts]), labels, torch.tensor([len(text) for text in texts]))


class WordHead:
    """Scores texts by the log-likelihood of each word behind them."""

    def __init__(self, head: LanguageHead) -> None:
        self.head = head

    @property
    def model(self) -> PreTrainedModel:
        return self.head.model

    def scores(self, batch: WordBatch) -> Float[Tensor, "texts outputs"]:
        """Give the summed log-likelihood of every word behind every text (nats)."""
        laid = batch.forest
        log_probs = self.head.log_probs(laid.row, laid.before, laid.next_tokens())
        sizes = torch.tensor(laid.tails, device=log_probs.device)
        word = torch.arange(len(sizes), device=log_probs.device).repeat_interleave(sizes)
        sums = log_probs.new_zeros(len(sizes)).index_add(0, word, log_probs)
        return sums.view(len(batch.labels), -1)
