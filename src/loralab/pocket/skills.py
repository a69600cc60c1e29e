"""Ten source skills of the pocket world, each with an exact answer and plausible wrong ones; stories are the eleventh.

`difficulty` runs from 1 to 5: longer words, more pairs, larger numbers. The shipped base learned them at 3.
"""

import random
from string import ascii_lowercase, ascii_uppercase

from loralab.pocket.items import Draw, Item, with_choices

CAPITALS = 0.2
"""Share of copy and reverse items in capitals, so that the letters of the foreign text are not unknown to the base."""


def word(rng: random.Random, shortest: int, longest: int, letters: str = ascii_lowercase) -> str:
    """Draw a word of random letters."""
    return "".join(rng.choice(letters) for _ in range(rng.randint(shortest, longest)))


def copy(rng: random.Random, difficulty: int) -> Item:
    """Write a word again."""
    text = word(rng, 3, 3 + difficulty, ascii_uppercase if rng.random() < CAPITALS else ascii_lowercase)
    return with_choices(rng, Item("copy", f"copy {text} = ", text), _slips(rng, text))


def reverse(rng: random.Random, difficulty: int) -> Item:
    """Write a word backwards."""
    text = word(rng, 3, 3 + difficulty, ascii_uppercase if rng.random() < CAPITALS else ascii_lowercase)
    return with_choices(rng, Item("reverse", f"reverse {text} = ", text[::-1]), [text, *_slips(rng, text[::-1])])


def sort(rng: random.Random, difficulty: int) -> Item:
    """Write the letters of a word in alphabetical order."""
    text = word(rng, 3, 2 + difficulty)
    answer = "".join(sorted(text))
    return with_choices(rng, Item("sort", f"sort {text} = ", answer), [answer[::-1], text, *_slips(rng, answer)])


def count(rng: random.Random, difficulty: int) -> Item:
    """Count a letter in a word."""
    letters = rng.sample(ascii_lowercase, 3)
    text = word(rng, 4, 4 + difficulty, "".join(letters))
    answer = text.count(letters[0])
    near = [str(answer + step) for step in (1, -1, 2, 3) if answer + step >= 0]
    return with_choices(rng, Item("count", f"count {letters[0]} in {text} = ", str(answer)), near)


def find(rng: random.Random, difficulty: int) -> Item:
    """Look up the value of a key among pairs."""
    keys = rng.sample(ascii_lowercase, 1 + difficulty)
    values = rng.sample("0123456789", len(keys))
    key = rng.randrange(len(keys))
    pairs = " ".join(k + v for k, v in zip(keys, values, strict=True))
    others = [*(v for v in values if v != values[key]), *"0123456789"]
    return with_choices(rng, Item("find", f"find {pairs}: {keys[key]}", values[key]), others)


def compare(rng: random.Random, difficulty: int) -> Item:
    """Compare two numbers."""
    largest = 10 ** (1 + difficulty // 2)
    a, b = (rng.randrange(largest) for _ in range(2))
    answer = "less" if a < b else "more" if a > b else "same"
    return with_choices(rng, Item("compare", f"compare {a} {b} = ", answer), ["less", "more", "same"])


def add(rng: random.Random, difficulty: int) -> Item:
    """Add two small numbers; the sum stays below 100."""
    a, b = _small_pair(rng, difficulty)
    return with_choices(rng, Item("add", f"{a}+{b}=", str(a + b)), _near(rng, a + b))


def subtract(rng: random.Random, difficulty: int) -> Item:
    """Subtract a small number from a larger one."""
    a, b = _small_pair(rng, difficulty)
    return with_choices(rng, Item("subtract", f"{a + b}-{b}=", str(a)), _near(rng, a))


def shift(rng: random.Random, difficulty: int) -> Item:
    """Letter arithmetic: move every letter of a word forward in the alphabet, past z to a."""
    text, steps = word(rng, 1, difficulty), rng.randint(1, 5)
    answer = "".join(ascii_lowercase[(ascii_lowercase.index(letter) + steps) % 26] for letter in text)
    return with_choices(rng, Item("shift", f"shift {text} by {steps} = ", answer), _slips(rng, answer))


def _small_pair(rng: random.Random, difficulty: int) -> tuple[int, int]:
    """Draw two numbers with a sum below 100: the second of one digit at the lower difficulties."""
    b = rng.randint(1, 9 if difficulty <= 3 and rng.random() < 1 - 0.25 * (difficulty - 1) else 49)
    return rng.randint(0, 99 - b), b


def _near(rng: random.Random, answer: int) -> list[str]:
    """Give wrong results such as slips of carrying make."""
    wrong = [answer + step for step in (1, -1, 10, -10) if 0 <= answer + step < 100]
    rng.shuffle(wrong)
    return [str(number) for number in wrong]


def _slips(rng: random.Random, answer: str) -> list[str]:
    """Give wrong words: two neighbours swapped, or one letter replaced."""
    letters = ascii_uppercase if answer[0].isupper() else ascii_lowercase
    wrong = []
    for _ in range(6):
        place = rng.randrange(len(answer))
        if rng.random() < 0.5 and place:
            wrong.append(answer[: place - 1] + answer[place] + answer[place - 1] + answer[place + 1 :])
        else:
            wrong.append(answer[:place] + rng.choice(letters) + answer[place + 1 :])
    return wrong


EXACT: dict[str, Draw] = {
    draw.__name__: draw for draw in (copy, reverse, sort, count, find, compare, add, subtract, shift)
}
"""The rule skills; `facts.recall` completes the ten."""
