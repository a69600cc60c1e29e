import json
import random

import numpy as np
import pytest
from tiny_tokenizers import byte_tokenizer, labelled_text

from loralab.base.corpus import Corpus, tokenise
from loralab.base.reader import row_key, split
from loralab.base.sources import Source, Template
from loralab.base.text import Example, prove_stop
from loralab.errors import DataError

TOKENIZER = byte_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(path, *contents):
    return write(path, [{"text": content} for content in contents])


def corpus_of(path, **options):
    source = {key: options.pop(key) for key in ("form", "template", "weight") if key in options}
    return tokenise([Source(path, **source)], TOKENIZER, **options)


def decoded(corpus):
    return [TOKENIZER.decode(corpus[i].tokens.tolist()) for i in range(len(corpus))]


def test_the_arrays_hold_the_examples(tmp_path):
    corpus = corpus_of(texts(tmp_path / "a.jsonl", "one", "three", "two two"))
    assert decoded(corpus) == ["one</s>", "three</s>", "two two</s>"]
    assert corpus.lengths.tolist() == [4, 6, 8]
    assert (corpus.tokens.dtype, corpus.labelled.dtype, corpus.offsets.dtype) == (np.uint32, np.bool_, np.int64)
    assert len(corpus.tokens) == len(corpus.labelled) == corpus.offsets[-1] == 18
    with pytest.raises(IndexError):
        corpus[3]


def test_all_rows_are_accounted_for(tmp_path):
    prompts = [{"prompt": "p", "completion": c} for c in ("short", "", "x" * 30, "y" * 30, " ", "fits")]
    corpus = tokenise(
        [Source(write(tmp_path / "a.jsonl", prompts)), Source(texts(tmp_path / "b.jsonl", "z" * 25, "w"), weight=2.0)],
        TOKENIZER,
        max_length=10,
    )
    first, second = corpus.report.sources
    assert (first.form, first.rows, first.empty, first.dropped, first.examples) == ("prompt_completion", 6, 2, 2, 2)
    assert (second.form, second.rows, second.split, second.examples, second.weight) == ("text", 2, 1, 4, 2.0)
    total = corpus.report.total
    assert (total.rows, total.examples, total.tokens) == (8, len(corpus), len(corpus.tokens))
    assert total.labelled == corpus.labelled.sum() == (5 + 1 + 4 + 1) + (25 + 1)
    assert corpus.source.tolist() == [0, 0, 1, 1, 1, 1]
    assert json.loads(json.dumps(corpus.report.as_dict()))["total"]["dropped"] == 2


@pytest.mark.parametrize("max_length", [2, 3, 7, 10, 26])
def test_pieces_predict_every_token_exactly_once(tmp_path, max_length):
    alphabet = "abcdefghijklmnopqrstuvwxyz"
    corpus = corpus_of(texts(tmp_path / "a.jsonl", alphabet), max_length=max_length)
    assert corpus.lengths.max() <= max_length
    learned = "".join(labelled_text(corpus[i], TOKENIZER) for i in range(len(corpus)))
    assert learned == alphabet[1:] + "</s>"


def test_pieces_without_a_label_are_left_out():
    example = Example(range(9), [i == 8 for i in range(9)])
    assert [piece.tokens.tolist() for piece in split(example, 3)] == [[6, 7, 8]]


@pytest.mark.parametrize(
    ("overlong", "kept"), [("auto", ["ab</s>"]), ("drop", ["ab</s>"]), ("truncate", ["pppab", "ab</s>"])]
)
def test_examples_above_the_length_follow_the_rule(tmp_path, overlong, kept):
    rows = [("ppp", "abcdefg"), ("pppppp", "abc"), ("", "ab")]
    rows = [{"prompt": prompt, "completion": completion} for prompt, completion in rows]
    corpus = corpus_of(write(tmp_path / "a.jsonl", rows), max_length=5, overlong=overlong)
    assert decoded(corpus) == kept
    report = corpus.report.total
    assert report.dropped + report.truncated == 2
    assert report.truncated == len(kept) - 1


def test_prompted_examples_are_split_on_demand(tmp_path):
    rows = [{"prompt": "pppppp", "completion": "abc"}]
    corpus = corpus_of(write(tmp_path / "a.jsonl", rows), max_length=5, overlong="split")
    assert "".join(labelled_text(corpus[i], TOKENIZER) for i in range(len(corpus))) == "abc</s>"


def test_nothing_left_is_an_error_with_the_reasons(tmp_path):
    rows = [{"prompt": "p", "completion": "x" * 30}, {"prompt": "p", "completion": ""}]
    with pytest.raises(DataError, match="of 2 rows: 1 have nothing to learn, 1 exceed 10 tokens"):
        corpus_of(write(tmp_path / "a.jsonl", rows), max_length=10)


def test_the_row_of_an_error_is_named(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "a"}], "tools": "[]"}] * 2
    rows.append({"conversations": [{"from": "gpt", "value": "a"}], "tools": "{"})
    with pytest.raises(DataError) as caught:
        corpus_of(write(tmp_path / "a.jsonl", rows), chat_template="plain")
    assert caught.value.where.endswith("a.jsonl, row 3")


def held_texts(corpus, share):
    train, held = corpus.hold_out(share)
    return set(decoded(train)), set(decoded(held))


def test_half_a_character_is_named_with_its_row(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": "ab", "completion": "c"}, {"prompt": "a\ud800", "completion": "b"}])
    with pytest.raises(DataError, match="half a character") as caught:
        corpus_of(path)
    assert caught.value.where == f"{path}, row 2"


def test_rows_are_held_out_by_content_not_by_place(tmp_path):
    contents = [f"row {i}" for i in range(400)]
    whole = corpus_of(texts(tmp_path / "a.jsonl", *contents))
    train, held = held_texts(whole, 0.1)
    assert train | held == {f"{c}</s>" for c in contents}
    assert not train & held
    assert 20 <= len(held) <= 60
    random.Random(0).shuffle(contents)
    doubled = tokenise(
        [Source(texts(tmp_path / "b.jsonl", *contents[:150])), Source(texts(tmp_path / "c.jsonl", *contents))],
        TOKENIZER,
    )
    assert held_texts(doubled, 0.1) == (train, held)
    grown_train, grown_held = held_texts(corpus_of(texts(tmp_path / "d.jsonl", *contents, "new", "newer")), 0.1)
    assert train <= grown_train and held <= grown_held


def test_the_report_follows_the_division(tmp_path):
    whole = corpus_of(texts(tmp_path / "a.jsonl", *(f"row {i}" for i in range(50))))
    train, held = whole.hold_out(0.3)
    for part in (train, held):
        total = part.report.total
        assert (total.examples, total.tokens) == (len(part), len(part.tokens))
        assert total.labelled == part.labelled.sum()
        assert total.rows == 50
    assert train.report.total.held_out == len(held) > 0
    assert held.report.total.held_out == 0


@pytest.mark.parametrize("share", [1e-9, 0.5, 1.0])
def test_both_sides_get_a_row(tmp_path, share):
    train, held = corpus_of(texts(tmp_path / "a.jsonl", "one", "two", "one")).hold_out(share)
    assert len(train) and len(held)
    assert set(train.keys.tolist()).isdisjoint(held.keys.tolist())


def test_one_long_text_is_divided_by_its_pieces(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"line {i}\n" for i in range(300)))
    train, held = corpus_of(str(tmp_path / "book.txt"), max_length=16).hold_out(0.1)
    assert 0 < len(held) < len(train)
    assert train.lengths.max() <= 16


def test_no_share_holds_nothing_out_and_one_example_cannot_be_divided(tmp_path):
    corpus = corpus_of(texts(tmp_path / "a.jsonl", "only"))
    train, held = corpus.hold_out(0)
    assert (len(train), len(held)) == (1, 0)
    with pytest.raises(DataError, match="one example"):
        corpus.hold_out(0.02)


def test_only_columns_that_are_read_decide_the_key():
    row = {"text": "a", "id": 1, "meta": None}
    assert row_key(row, ["text"]) == row_key({"text": "a", "id": 2}, ["text"]) == row_key(row, ["text", "meta"])
    assert row_key(row, ["text"]) != row_key(row, ["text", "id"])
    assert 0 <= row_key(row, ["text"]) < 2**64


def test_the_fingerprint_is_of_what_is_trained(tmp_path):
    first = corpus_of(texts(tmp_path / "a.jsonl", "ab", "c"))
    same = corpus_of(texts(tmp_path / "b.jsonl", "ab", "c"))
    other = corpus_of(texts(tmp_path / "c.jsonl", "a", "bc"))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_an_empty_corpus_has_its_dtypes(tmp_path):
    empty = Corpus.of([], max_length=8, report=corpus_of(texts(tmp_path / "a.jsonl", "a")).report)
    assert (len(empty), empty.tokens.dtype, empty.labelled.dtype) == (0, np.uint32, np.bool_)


@pytest.fixture(scope="module")
def stories_tokenizer(assets):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(assets / "models" / "stories3M")


@pytest.mark.parametrize(
    ("name", "source", "answer"),
    [
        ("gsm8k/test.jsonl", {"template": Template("{question}\n", "{answer}")}, "#### 18"),
        ("llamafactory_demo/alpaca_en_demo.json", {}, None),
        ("llamafactory_demo/v1_sft_demo.jsonl", {}, "I am {{name}}"),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", {}, '"name": "search_recipes"'),
        ("llamafactory_demo/c4_demo.jsonl", {}, None),
    ],
)
def test_real_files_become_examples_that_stop(assets, stories_tokenizer, name, source, answer):
    sources = [Source(str(assets / "data" / name), **source)]
    corpus = tokenise(sources, stories_tokenizer, chat_template="plain", max_length=4096, overlong="drop")
    report = corpus.report.total
    assert report.rows == report.examples + report.dropped + report.empty
    assert report.examples > 0.9 * report.rows
    assert prove_stop([corpus[i] for i in range(len(corpus))], stories_tokenizer).holds
    if answer:
        assert answer in labelled_text(corpus[0], stories_tokenizer)
        assert answer not in name
