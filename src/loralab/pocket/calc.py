"""`calc`: arithmetic in several worked steps, graded on the final answer: the GSM8K of the pocket world."""

import random

from loralab.pocket.items import Item, split_of

ANSWER = "answer "
WORDS_FROM = 4
"""From this difficulty on, the gains and losses are told in words."""
NAMES = ("ana", "bo", "cleo", "dan", "eva", "finn", "gus", "hedy")
THINGS = ("nuts", "pens", "eggs", "keys", "beads", "cards", "figs", "stones")
GAINS = ("gets", "finds", "buys", "picks")
LOSSES = ("gives", "loses", "sells", "drops")


def calc(rng: random.Random, difficulty: int) -> Item:
    """Work out a row of gains and losses, `difficulty` of them or one less; no result leaves 0 to 99.

    Every step is a sum that training may show as an item of `add` or `subtract`: the worked steps of others would be test
    items of these skills, told with their answers.
    """
    total = rng.randint(5, 60)
    in_words = difficulty >= WORDS_FROM
    told = f"{rng.choice(NAMES)} has {total} {rng.choice(THINGS)}" if in_words else str(total)
    worked = []
    for _ in range(rng.randint(max(1, difficulty - 1), difficulty)):
        gain, change = _change(rng, total)
        step = f"{'+' if gain else '-'}{change}"
        told += f", {rng.choice(GAINS if gain else LOSSES)} {change}" if in_words else step
        after = total + change if gain else total - change
        worked.append(f"{total}{step}={after}")
        total = after
    return Item("calc", f"calc {told}: ", f"{', '.join(worked)}. {ANSWER}{total}")


def _change(rng: random.Random, total: int) -> tuple[bool, int]:
    """Draw whether something is gained or lost, and how much."""
    while True:
        change = rng.randint(2, 9 if rng.random() < 0.7 else 30)
        gain = total - change < 0 or (total + change < 100 and rng.random() < 0.5)
        if split_of(f"{total}{'+' if gain else '-'}{change}=") == "train":
            return gain, change


def final_answer(text: str) -> str | None:
    """Give what stands after the last `answer`, or None."""
    _, found, after = text.rpartition(ANSWER)
    return after.strip() if found else None
