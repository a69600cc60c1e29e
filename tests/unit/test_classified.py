"""Classified texts and numbers: what the model reads, of which class."""

import json

import pytest
import torch
from labelled_rows import BYTES, SENTENCES, corpus, encoder, texts, whole

from loralab.base.labelled import collate_labelled, read_labelled
from loralab.base.sources import Source, Template


@pytest.mark.parametrize(
    "first, second", [("premise", "hypothesis"), ("sentence1", "sentence2"), ("text", "text_pair")]
)
def test_an_encoder_is_told_of_two_sentences_as_its_tokenizer_joins_them(tmp_path, first, second):
    tokenizer = encoder()
    rows = [{first: a, second: b, "label": i % 2} for i, (a, b) in enumerate(SENTENCES)]
    batch = whole(corpus(tmp_path, rows, tokenizer))
    theirs = [tokenizer(a, b) for a, b in SENTENCES]
    assert [tokens.tolist() for tokens in batch.documents()] == [found["input_ids"] for found in theirs]
    types = batch.document_types()
    assert [mine.tolist() for mine in types] == [found["token_type_ids"] for found in theirs]
    assert batch.types[0].tolist() == [t for found in theirs for t in found["token_type_ids"]]
    assert batch.row.parents == ()
    assert batch.tokens[0, batch.firsts].tolist() == [tokenizer.cls_token_id] * 3
    assert batch.tokens[0, batch.reads].tolist() == [tokenizer.sep_token_id] * 3
    untold = whole(corpus(tmp_path, rows, encoder(typed=False)))
    assert untold.types is None
    assert torch.equal(untold.tokens, batch.tokens)


def test_an_encoder_takes_an_answer_for_a_second_sentence(tmp_path):
    tokenizer = encoder()
    row = {"prompt": "a b", "chosen": "c d", "rejected": "c e f"}
    found = corpus(tmp_path, [row], tokenizer)
    batch = collate_labelled([found[0]], share=False)
    theirs = [tokenizer(row["prompt"], row[side]) for side in ("chosen", "rejected")]
    assert [tokens.tolist() for tokens in batch.documents()] == [found["input_ids"] for found in theirs]
    assert [types.tolist() for types in batch.document_types()] == [found["token_type_ids"] for found in theirs]
    assert batch.answers.tolist() == [2, 3]
    assert batch.firsts.tolist() == [0, 7]
    shared = whole(found)
    assert shared.num_tokens < batch.num_tokens
    for mine, theirs in zip(shared.document_types(), batch.document_types(), strict=True):
        assert torch.equal(mine, theirs)


def test_a_decoder_reads_two_sentences_as_two_lines(tmp_path):
    rows = [
        {"premise": "It rains.", "hypothesis": "Wet?", "label": "yes"},
        {"premise": "P", "hypothesis": "H", "label": "no"},
    ]
    found = corpus(tmp_path, rows)
    assert texts(found) == ["It rains.\nWet?</s>", "P\nH</s>"]
    assert (found.classes, found.labels.tolist()) == (("no", "yes"), [1.0, 0.0])
    assert whole(found).types is None


@pytest.mark.parametrize("column", ["text", "sentence", "content"])
def test_single_texts_end_with_a_special_token_and_hold_none(tmp_path, column):
    rows = [{column: "a </s> b", "label": 0}, {column: "c [SEP] d", "label": 1}]
    assert texts(corpus(tmp_path, rows)) == ["a </s> b</s>", "c [SEP] d</s>"]
    assert whole(corpus(tmp_path, rows)).answers.tolist() == [len(row[column]) + 1 for row in rows]
    assert (corpus(tmp_path, rows)[0].tokens == BYTES.eos_token_id).sum() == 1
    found = corpus(tmp_path, rows, encoder())
    assert (found[1].tokens == 3).nonzero()[0].tolist() == [len(found[1]) - 1]
    assert whole(found).types is None


def test_a_template_can_write_the_text_to_be_classified(tmp_path):
    rows = [{"title": "T", "body": f"B{i}", "label": i} for i in (0, 1)]
    found = corpus(tmp_path, rows, template=Template("{title}: {body}", ""))
    assert (found.kind, texts(found)) == ("classify", ["T: B0</s>", "T: B1</s>"])


@pytest.mark.parametrize(
    "labels, names, numbers",
    [
        ([10, 2, 0, 2], ("0", "2", "10"), [2, 1, 0, 1]),
        (["10", "2", "b"], ("10", "2", "b"), [0, 1, 2]),
        ([True, False], ("false", "true"), [1, 0]),
        ([1.0, 0.0], ("0", "1"), [1, 0]),
        (["pos", "neg", "pos"], ("neg", "pos"), [1, 0, 1]),
    ],
)
def test_classes_are_named_and_numbered_in_order(tmp_path, labels, names, numbers):
    found = corpus(tmp_path, [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)])
    assert (found.classes, found.labels.tolist()) == (names, numbers)


def test_given_classes_keep_their_order_and_take_numbers_for_words(tmp_path):
    rows = [{"text": "t", "label": label} for label in ("pos", "neg")]
    found = corpus(tmp_path, rows, classes=["pos", "neg"])
    assert (found.classes, found.labels.tolist()) == (("pos", "neg"), [0, 1])
    rows = [{"text": "t", "label": label} for label in (1, 0, 1)]
    assert corpus(tmp_path, rows, classes=["neg", "pos"]).labels.tolist() == [1, 0, 1]
    assert corpus(tmp_path, rows, classes=["1", "0"]).labels.tolist() == [0, 1, 0]


def test_classes_are_those_of_all_sources(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path, label in zip(paths, "ca", strict=True):
        path.write_text(json.dumps({"text": "t", "label": label}) + "\n")
    found = read_labelled([Source(str(path)) for path in paths], BYTES)
    assert (found.classes, found.labels.tolist(), found.source.tolist()) == (("a", "c"), [1, 0], [0, 1])


def test_numbers_are_kept_as_they_are(tmp_path):
    rows = [{"sentence1": "a", "sentence2": "b", "label": label} for label in (3.8, "0.25", 2)]
    found = corpus(tmp_path, rows, kind="regression")
    assert (found.kind, found.labels.tolist(), found.classes) == ("regression", [3.8, 0.25, 2.0], ())
    assert whole(found).labels.dtype == torch.float32


def test_long_texts_lose_their_end_but_not_what_ends_them(tmp_path):
    rows = [{"text": "abcdefghij", "label": 0}, {"text": "ab", "label": 1}]
    found = corpus(tmp_path, rows, max_length=8, overlong="truncate")
    assert texts(found) == ["abcdefg</s>", "ab</s>"]
    assert (found.report.total.truncated, found.report.total.dropped) == (1, 0)
    long = [{"premise": "a b c d e f", "hypothesis": "g h", "label": i} for i in (0, 1)]
    tokenizer = encoder()
    cut = whole(corpus(tmp_path, long, tokenizer, max_length=8, overlong="truncate"))
    assert tokenizer.decode(cut.documents()[0]) == "[CLS] a b c [SEP] g h [SEP]"
    assert cut.document_types()[0].tolist() == [0] * 5 + [1] * 3
