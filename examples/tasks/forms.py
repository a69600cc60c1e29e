"""Rows of instruction data into questions with choices."""

import re
from typing import Any

CHOICE = re.compile(r"(Answer\d+): ")


def _parts(doc: dict[str, Any]) -> tuple[str, list[str], list[str]]:
    """Split an instruction into its question, the names of its choices and their texts."""
    before, *found = CHOICE.split(doc["instruction"])
    question = before.partition("question:")[2].strip()
    texts = [text.partition("\n\nAnswer format")[0].strip() for text in found[1::2]]
    return question, [name.lower() for name in found[::2]], texts


def arc_question(doc: dict[str, Any]) -> str:
    return f"Question: {_parts(doc)[0]}\nAnswer:"


def arc_choices(doc: dict[str, Any]) -> list[str]:
    return _parts(doc)[2]


def arc_right(doc: dict[str, Any]) -> int:
    return _parts(doc)[1].index(doc["answer"])


def boolq_question(doc: dict[str, Any]) -> str:
    question = doc["instruction"].partition("question:")[2].partition("\n\nAnswer format")[0].strip()
    return f"Question: {question.removesuffix('?')}?\nAnswer:"
