"""Items of the pocket world, and the split that keeps test items out of every training stream.

The SHA-256 of an item's prompt (or of the key that it carries) decides its split, so train, validation and test are disjoint by
construction, whatever the seed, the difficulty or the number drawn.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")

VALIDATION_BELOW, TEST_BELOW = 13, 39
"""Of 256 values of the hash's first byte: 5 % validation, 10 % test, the rest train."""


@dataclass(frozen=True)
class Item:
    """One item of a skill.

    Attributes:
        skill: name of the skill.
        prompt: what the model is given; empty for unlabelled text.
        completion: one right answer, as training shows it; after it the model stops.
        choices: completions to choose from by likelihood; empty where the skill has no multiple choice.
        right: index of the right choice.
        tests: hidden tests of a program, as (inputs, result).
        key: what decides the split; empty takes the prompt.
    """

    skill: str
    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    right: int = 0
    tests: tuple[tuple[tuple[int, ...], int], ...] = ()
    key: str = ""

    @property
    def split(self) -> Split:
        """The split to which this item belongs."""
        return split_of(self.key or self.prompt)


class Draw(Protocol):
    """A skill: draws an item at a difficulty from 1 (easy) to 5 (hard)."""

    __name__: str

    def __call__(self, rng: random.Random, difficulty: int, /) -> Item: ...


def split_of(key: str) -> Split:
    """Decide a split by the first byte of the SHA-256 of a key."""
    byte = hashlib.sha256(key.encode()).digest()[0]
    return "validation" if byte < VALIDATION_BELOW else "test" if byte < TEST_BELOW else "train"


def stream(draw: Draw, split: Split, *, seed: int = 0, difficulty: int = 3) -> Iterator[Item]:
    """Draw items of one split without end; the same item may come again."""
    rng = random.Random(f"{seed}/{split}/{draw.__name__}/{difficulty}")
    while True:
        item = draw(rng, difficulty)
        if item.split == split:
            yield item


def with_choices(rng: random.Random, item: Item, wrong: list[str]) -> Item:
    """Add a multiple choice: the right completion among up to three different wrong ones, in random order."""
    others = [text for text in dict.fromkeys(wrong) if text != item.completion][:3]
    choices = [item.completion, *others]
    rng.shuffle(choices)
    return replace(item, choices=tuple(choices), right=choices.index(item.completion))
