"""Preference pairs over stories, with a true reward that is known exactly: reward models and policies can be held to it."""

import random
from collections.abc import Iterator
from dataclasses import replace

from loralab.pocket.items import Split, stream
from loralab.pocket.stories import ANIMALS, GLAD, KIND, SAD, THINGS, UNKIND, asked, story, tell

LONGEST = 140
"""Characters; each one beyond costs a hundredth, so that saying everything is no way to win."""


def true_reward(prompt: str, text: str) -> float:
    """Reward a story: a point each for the asked animal and thing, for kindness and for a glad end, one off for the reverse.

    A story that does not end with a full stop loses a point, and each character beyond `LONGEST` a hundredth.
    """
    words = text.replace(".", " ").split()
    reward = float(len({*asked(prompt)} & {*words}))
    for good, bad in ((KIND, UNKIND), (GLAD, SAD)):
        reward += any(word in good for word in words) - any(word in bad for word in words)
    return reward - (not text.endswith(".")) - max(0, len(text) - LONGEST) / 100


def pairs(split: Split, *, seed: int = 0, close: bool = False) -> Iterator[dict[str, str]]:
    """Draw rows `prompt`, `chosen`, `rejected` without end; the chosen answer has the higher true reward.

    Args:
        split: of the prompts.
        seed: of the draws.
        close: only pairs of one story with the asked animal and thing, and the same story with one of them exchanged. In other
            pairs a judge that never looks at the prompt gets 88 % right, and is hard to move from there.
    """
    rng = random.Random(f"{seed}/{split}/pairs{'/close' if close else ''}")
    for item in stream(story, split, seed=seed):
        if close:
            first, second = _told_twice(rng, item.prompt)
        else:
            first, second = _answer(rng, item.prompt), _answer(rng, item.prompt)
        gain = true_reward(item.prompt, first) - true_reward(item.prompt, second)
        if gain:
            chosen, rejected = (first, second) if gain > 0 else (second, first)
            yield {"prompt": item.prompt, "chosen": chosen, "rejected": rejected}


def _told_twice(rng: random.Random, prompt: str) -> tuple[str, str]:
    """Tell the asked story, and tell it again with another animal or another thing."""
    told = tell(rng, *asked(prompt))
    if rng.random() < 0.5:
        again = replace(told, animal=rng.choice([name for name in ANIMALS if name not in (told.animal, told.other)]))
    else:
        again = replace(told, thing=rng.choice([name for name in THINGS if name != told.thing]))
    return told.text, again.text


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
