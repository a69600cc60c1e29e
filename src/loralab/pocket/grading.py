"""Exact graders: what counts as right for an answer that a model wrote."""

from loralab.pocket.calc import final_answer
from loralab.pocket.items import Item
from loralab.pocket.stack import passes


def grade(item: Item, text: str) -> bool:
    """Tell whether an answer is right: the final answer of `calc`, the hidden tests of `stack`, else the exact text."""
    if item.skill == "stack":
        return passes(text, item.tests)
    if item.skill == "calc":
        answer = final_answer(text)
        return answer is not None and answer == final_answer(item.completion)
    return text == item.completion
