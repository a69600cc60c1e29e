"""A small invented world for recall: sixty people, where they live, what they do, what they own.

Each fact can be asked in six ways. The split goes by the question, so a test item asks for a fact in words in which
training never asked for it, while other questions taught the fact itself (a test counts that every fact has some).
"""

import random

from loralab.pocket.items import Item, with_choices

PEOPLE = 60
TOWNS = ("tolo", "brenn", "askev", "mirfal", "dunta", "orlix", "petta", "gavrin", "suvel", "kadmo")
TRADES = ("baker", "smith", "weaver", "tailor", "miller", "potter", "fisher", "hunter", "mason", "glazier")
PETS = ("cat", "dog", "goat", "hen", "horse", "crow", "mouse", "sheep", "duck", "pig")

ANSWERS = {"home": TOWNS, "trade": TRADES, "pet": PETS}
WAYS = {
    "home": (
        *("where does {} live? ", "the home of {} is ", "{} lives in "),
        *("tell the town of {}: ", "in which town is {}? ", "to visit {} go to "),
    ),
    "trade": (
        *("what does {} do? ", "the trade of {} is ", "{} works as a "),
        *("tell the work of {}: ", "which trade has {}? ", "by day {} is a "),
    ),
    "pet": (
        *("which animal has {}? ", "the pet of {} is ", "{} owns a "),
        *("tell the animal of {}: ", "what pet keeps {}? ", "at home {} has a "),
    ),
}


def _names() -> tuple[str, ...]:
    rng = random.Random("the people of the pocket world")
    names: dict[str, None] = {}
    while len(names) < PEOPLE:
        parts = (rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2))
        names["".join(parts) + rng.choice("nrslm")] = None
    return tuple(names)


def _world() -> dict[tuple[str, str], str]:
    rng = random.Random("the facts of the pocket world")
    return {(name, kind): rng.choice(answers) for name in NAMES for kind, answers in ANSWERS.items()}


NAMES = _names()
WORLD = _world()


def recall(rng: random.Random, difficulty: int) -> Item:
    """Ask for a fact; the higher the difficulty, the more people are asked about, twelve for each step."""
    name, kind = rng.choice(NAMES[: 12 * difficulty]), rng.choice(tuple(ANSWERS))
    item = Item("recall", rng.choice(WAYS[kind]).format(name), WORLD[name, kind])
    return with_choices(rng, item, rng.sample(ANSWERS[kind], 4))
