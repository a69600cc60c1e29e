"""Text skills as seeded generators: what the small base learns first, and what it is taught later.

Each skill writes prompt and completion on one line; train and test items are disjoint because an item's split is decided
by its own hash.
"""

import hashlib
import random
from collections.abc import Callable, Iterator

Item = tuple[str, str]
LETTERS = "abcdefghij"


def _word(rng: random.Random, longest: int = 6) -> str:
    return "".join(rng.choice(LETTERS) for _ in range(rng.randint(2, longest)))


def copy(rng: random.Random) -> Item:
    """Write a word again."""
    word = _word(rng)
    return f"copy {word} = ", word


def reverse(rng: random.Random) -> Item:
    """Write a word backwards."""
    word = _word(rng)
    return f"reverse {word} = ", word[::-1]


def order(rng: random.Random) -> Item:
    """Write the letters of a word in order."""
    word = _word(rng)
    return f"order {word} = ", "".join(sorted(word))


def last(rng: random.Random) -> Item:
    """Name the last letter."""
    word = _word(rng)
    return f"last {word} = ", word[-1]


def pairs(rng: random.Random) -> Item:
    """Write each letter beside itself, then the word: letter by letter work, as the later skill needs it."""
    word = _word(rng, 4)
    return f"pairs {word} = ", f"{' '.join(f'{letter}>{letter}' for letter in word)} : {word}"


def shift(rng: random.Random) -> Item:
    """Write each letter's successor, showing each step: the skill that is taught later."""
    word = _word(rng, 4)
    successor = dict(zip(LETTERS, LETTERS[1:] + LETTERS[0], strict=True))
    steps = " ".join(f"{letter}>{successor[letter]}" for letter in word)
    return f"shift {word} = ", f"{steps} : {''.join(successor[letter] for letter in word)}"


SOURCE: tuple[Callable[[random.Random], Item], ...] = (copy, reverse, order, last, pairs)


def items(skills: tuple[Callable[[random.Random], Item], ...], split: str, count: int, seed: int = 0) -> Iterator[Item]:
    """Generate different items of a split, `train` or `test`: an item's SHA-256 says to which it belongs."""
    rng = random.Random(f"{seed}/{split}")
    seen: set[Item] = set()
    while len(seen) < count:
        item = rng.choice(skills)(rng)
        held_out = hashlib.sha256("".join(item).encode()).digest()[0] < 32
        if held_out == (split == "test") and item not in seen:
            seen.add(item)
            yield item
