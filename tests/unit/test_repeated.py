"""Held-out rows that are trained on too."""

import json
from pathlib import Path

import pytest
from labelled_rows import BYTES, corpus

from loralab.base.corpus import tokenise
from loralab.base.repeated import KEY, count_repeated, repeated, with_repeated
from loralab.base.sources import Source


def pair(number: int, *, turned: bool = False, prompt: str = "p") -> dict[str, str]:
    sides = [f"yes {number}", f"no {number}"]
    chosen, rejected = sides[::-1] if turned else sides
    return {"prompt": f"{prompt} {number}: ", "chosen": chosen, "rejected": rejected}


def both(folder: Path, train: list, held: list) -> int:
    (folder / "train").mkdir(parents=True)
    (folder / "held").mkdir()
    return repeated(corpus(folder / "train", train), corpus(folder / "held", held, need_both=False))


def test_pairs_are_the_same_by_prompt_and_sides_in_either_order(tmp_path):
    train = [pair(i) for i in range(20)]
    assert both(tmp_path / "none", train, [pair(i) for i in range(20, 30)]) == 0
    assert both(tmp_path / "some", train, [pair(3), pair(25), pair(7), pair(3)]) == 3, (
        "a row that comes again counts again"
    )
    assert both(tmp_path / "turned", train, [pair(4, turned=True), pair(21)]) == 1
    assert both(tmp_path / "asked", train, [pair(4, prompt="q")]) == 0, "the same answers to another prompt"
    shifted = {"prompt": "p 5: y", "chosen": "es 5", "rejected": "no 5"}
    assert both(tmp_path / "side", train, [{**pair(5), "rejected": "no 6"}, shifted]) == 0


def test_the_judgement_does_not_count(tmp_path):
    train = [{"text": f"text {i}", "label": i % 2} for i in range(20)]
    held = [{"text": "text 3", "label": 0}, {"text": "text 4", "label": 0}, {"text": "text 20", "label": 1}]
    assert both(tmp_path / "classes", train, held) == 2
    train = [{"prompt": "Q ", "completion": f"answer {i}", "label": i % 2} for i in range(9)]
    assert both(tmp_path / "thumbs", train, [train[1], {**train[2], "label": 1}, {**train[3], "prompt": "R "}]) == 2


def test_texts_are_compared_by_what_is_read(tmp_path):
    def texts(name: str, rows: list[dict[str, str]]):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tokenise([Source(str(tmp_path / name))], BYTES, max_length=64)

    train = texts("train.jsonl", [{"prompt": f"say {i}: ", "completion": f"{i}!"} for i in range(12)])
    held = texts("held.jsonl", [{"prompt": "say 3: ", "completion": "3!"}, {"prompt": "say 3: ", "completion": "4!"}])
    assert repeated(train, held) == 1


def test_the_count_stands_beside_the_others_and_only_where_there_is_one():
    report = {"train": {"total": {"rows": 3}}, "validation": {"sources": [], "total": {"rows": 2}}}
    assert with_repeated(report, 0) is report
    found = with_repeated(report, 2)
    assert found["validation"] == {"sources": [], "total": {"rows": 2, KEY: 2}} and found["train"] == report["train"]
    assert KEY not in report["validation"]["total"]


@pytest.mark.parametrize(("train", "held", "count"), [("abc", "aax", 2), ("aaa", "ab", 1), ("", "a", 0), ("a", "", 0)])
def test_elements_are_counted_as_often_as_they_are_held_out(train, held, count):
    assert count_repeated(train, held) == count
