"""Judged rows as tests write them, and what a model reads of them."""

import json

from tiny_tokenizers import byte_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from loralab.base.labelled import LabelledCorpus, collate_labelled, read_labelled
from loralab.base.sources import Source

BYTES = byte_tokenizer()
PAIRS = [
    {"prompt": "Who? ", "chosen": "The owl.", "rejected": "The fox and the owl."},
    {"prompt": "What is it? ", "chosen": "A coin", "rejected": "stolen", "margin": 2.5},
    {"prompt": "Why? ", "chosen": "So.", "rejected": "No."},
]


def corpus(tmp_path, rows, tokenizer=BYTES, *, template=None, name="rows.jsonl", **options) -> LabelledCorpus:
    path = tmp_path / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_labelled([Source(str(path), template=template)], tokenizer, **options)


def whole(labelled_corpus):
    return collate_labelled([labelled_corpus[i] for i in range(len(labelled_corpus))])


def texts(labelled_corpus, tokenizer=BYTES):
    """Every text that is read, special tokens written out."""
    return [tokenizer.decode(tokens.tolist()) for tokens in whole(labelled_corpus).documents()]


def sides(rows):
    return [row["prompt"] + row[side] for row in rows for side in ("chosen", "rejected")]


def alike(left, right):
    """Count the characters that two texts begin with alike."""
    return max(n for n in range(len(left) + 1) if right.startswith(left[:n]))


def encoder(*, typed=True):
    """A tokenizer of words that joins two texts as BERT's does."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"]
    special = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    inputs = names if typed else names[::2]
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **special)


SENTENCES = [("a b c", "d e"), ("f", "g h a b"), ("c", "c")]
