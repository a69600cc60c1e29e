"""Preference pairs over stories, with a true reward that is known exactly: reward models and policies can be held to it."""

import random
from collections.abc import Iterator

from loralab.pocket.items import Split, stream
from loralab.pocket.stories import ANIMALS, GLAD, KIND, SAD, THINGS, UNKIND, asked, story, tell

LONGEST = 140
"""Characters; each one beyond costs a hundredth, so that saying everything is no way to win."""


def true_reward(prompt: str, text: str) -> float:
    """Reward a story: a point each for the asked animal and thing, for kindness and for a glad end, one off for the reverse.

    A story that does not end with a full stop loses a point, and each character beyond `LONGEST` a hundredth.
    """
    asked_for = len({*asked(prompt)} & {*_words(text)})
    points, beyond = _manner(text)
    return float(asked_for + points) - beyond / 100


def _manner(text: str) -> tuple[int, int]:
    """Give the points that need no prompt (kindness, mood, full stop), and the characters beyond the longest."""
    words = _words(text)
    points = sum(
        any(word in good for word in words) - any(word in bad for word in words)
        for good, bad in ((KIND, UNKIND), (GLAD, SAD))
    )
    return points - (not text.endswith(".")), max(0, len(text) - LONGEST)


def _words(text: str) -> list[str]:
    return text.replace(".", " ").split()


def pairs(split: Split, *, seed: int = 0, close: bool = False) -> Iterator[dict[str, str]]:
    """Draw rows `prompt`, `chosen`, `rejected` without end; the chosen answer has the higher true reward.

    Args:
        split: of the prompts.
        seed: of the draws.
        close: only pairs of the same manner, so that nothing but the asked animal and thing decides. Of all pairs, where they are
            one in four, a judge that never looks at the prompt gets 88 % right.
    """
    rng = random.Random(f"{seed}/{split}/pairs{'/close' if close else ''}")
    for item in stream(story, split, seed=seed):
        first, second = _answer(rng, item.prompt), _answer(rng, item.prompt)
        gain = true_reward(item.prompt, first) - true_reward(item.prompt, second)
        if gain and not (close and _manner(first) != _manner(second)):
            chosen, rejected = (first, second) if gain > 0 else (second, first)
            yield {"prompt": item.prompt, "chosen": chosen, "rejected": rejected}


def _answer(rng: random.Random, prompt: str) -> str:
    """Tell the asked story, or one that strays from it, or one that breaks off."""
    animal, thing = asked(prompt)
    chance = rng.random()
    if chance < 0.15:
        animal = rng.choice(ANIMALS)
    elif chance < 0.3:
        thing = rng.choice(THINGS)
    text = tell(rng, animal, thing).text
    return text[: rng.randrange(20, len(text))] if chance > 0.9 else text
