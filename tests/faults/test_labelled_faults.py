"""Judged rows that cannot be used are refused with what is wrong, where, and what to do."""

import json

import pytest

from loralab.base.labelled import read_labelled
from loralab.base.model import load
from loralab.base.sources import Source, Template
from loralab.errors import DataError


@pytest.fixture(scope="module")
def tokenizer():
    return load("pocket").tokenizer


def refused(tmp_path, tokenizer, rows, *, template=None, **options) -> str:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as error:
        read_labelled([Source(str(path), template=template)], tokenizer, **options)
    assert error.value.where and error.value.fix
    return str(error.value)


def pair(**changes):
    return {"prompt": "p ", "chosen": "good", "rejected": "bad", **changes}


def thumb(**changes):
    return {"prompt": "p ", "completion": "c", "label": True, **changes}


def text(label, **changes):
    return {"text": "some words", "label": label, **changes}


def good(count=3):
    return [text(("neg", "pos")[i % 2]) for i in range(count)]


@pytest.mark.parametrize(
    "rows, options, said",
    [
        # Nothing is left.
        ([pair(rejected="good")] * 2, {}, ["no example is left of 2 rows", "2 have equal sides"]),
        ([pair(chosen="")] * 3, {}, ["no example is left of 3 rows", "3 have nothing that was judged"]),
        ([pair(prompt="p" * 90)] * 2, {"max_length": 16}, ["2 exceed 16 tokens", "data.max_length"]),
        ([thumb(completion=" "), thumb(completion=None)], {}, ["2 have nothing that was judged"]),
        # Labels.
        ([thumb()] * 4, {}, ["all 4 thumbs are up"]),
        ([thumb(label=0)] * 3, {}, ["all 3 thumbs are down"]),
        ([thumb(), thumb(label="maybe")], {}, ["'maybe' is no thumb", "rows.jsonl, row 2"]),
        ([thumb(), thumb(label=2)], {}, ["2 is no thumb", "row 2"]),
        ([thumb(label=0.5)], {}, ["0.5 is no thumb", "row 1"]),
        ([thumb(), thumb(label=None)], {}, ["an empty label is no thumb", "row 2"]),
        ([text("a")] * 5, {}, ["all 5 texts are of class `a`"]),
        ([text("pos"), text(None)], {}, ["an empty label is no class", "row 2"]),
        ([text("pos"), text(" ")], {}, ["is no class", "row 2"]),
        ([text(["a", "b"])], {}, ["is no class", "row 1"]),
        (
            [*good(), text("positive")],
            {"classes": ["neg", "pos", "positif"]},
            ["`positive` is not among the classes", "row 4", "did you mean `positif`?"],
        ),
        ([text(1), text(2)], {"classes": ["no", "yes"]}, ["`2` is not among the classes", "row 2", "no, yes"]),
        ([text(1), text(0)], {"classes": ["1", "2"]}, ["`0` is not among the classes", "row 2"]),
        ([text(1.0), text("high")], {"kind": "regression"}, ["'high' is no number", "row 2"]),
        ([text(1.0), text("nan")], {"kind": "regression"}, ["'nan' is no number", "row 2"]),
        ([text(True)], {"kind": "regression"}, ["True is no number", "row 1"]),
        ([pair(), pair(margin="wide")], {}, ["'wide' is no number", "row 2"]),
        # Columns.
        ([{"a": "b"}], {}, ["nothing judged is found in the columns a", "chosen, rejected"]),
        ([{"prompt": "p", "chosen": "c", "rejcted": "r"}], {"kind": "pairs"}, ["no column `rejected`", "`rejcted`"]),
        ([{"question": "q", "chosen": "c", "rejected": "r"}], {}, ["no `prompt`; is `question` one?", "{question}"]),
        ([{"prompt": "p", "completion": "c", "lable": 1}], {"kind": "thumbs"}, ["did you mean `lable`?"]),
        ([{"words": "w", "label": 1}], {"kind": "classify"}, ["no text is found in the columns words, label"]),
        ([{"words": "w", "label": 1}], {"kind": "thumbs"}, ["no form fits the columns words, label"]),
        ([pair(chosen={"a": 1})], {}, ["an object found", "row 1"]),
        ([pair(chosen="half \ud800")], {}, ["half a character", "row 1"]),
        ([{"text": "half \ud800", "label": 1}], {}, ["half a character", "row 1"]),
        ([{"chosen": [{"role": "user", "content": "x"}], "rejected": [{"content": "y"}]}], {}, ["row 1"]),
        ([pair(prompt=[{"role": "user", "content": "x"}])], {}, ["no chat template", "data.chat_template"]),
        ([pair()], {"overlong": "split"}, ["cannot be split", "drop or truncate"]),
        # Templates.
        ([text(1)], {"template": Template("{text} {label}", "")}, ["shows the model `label`"]),
        ([text(1)], {"template": Template("{text}", "x"), "kind": "classify"}, ["has no completion"]),
        ([pair()], {"template": Template("{prompt}", "{chosen}")}, ["two answers, the template one completion"]),
        ([thumb()], {"template": Template("{promt}", "{completion}")}, ["did you mean `{prompt}`?"]),
    ],
)
def test_bad_rows_are_named(tmp_path, tokenizer, rows, options, said):
    message = refused(tmp_path, tokenizer, rows, **options)
    for words in said:
        assert words in message


def test_rows_of_one_class_can_be_read_where_that_is_meant(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(text("pos")) + "\n")
    found = read_labelled([Source(str(path))], tokenizer, classes=["neg", "pos"], need_both=False)
    assert (found.classes, found.labels.tolist()) == (("neg", "pos"), [1.0])


def test_sources_are_judged_alike(tmp_path, tokenizer):
    paths = [tmp_path / "pairs.jsonl", tmp_path / "thumbs.jsonl"]
    for path, row in zip(paths, (pair(), thumb()), strict=True):
        path.write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="no column `chosen`") as error:
        read_labelled([Source(str(path)) for path in paths], tokenizer)
    assert error.value.where == str(paths[1])


def test_one_prompt_cannot_be_divided(tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(pair()) + "\n")
    with pytest.raises(DataError, match="cannot be divided"):
        read_labelled([Source(str(path))], tokenizer).hold_out(0.5)
