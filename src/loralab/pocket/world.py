"""Addresses of the pocket world: `pocket:NAME` in a recipe is a training text, or a suite of items to be graded.

`pocket:NAME/SPLIT?items=5000&difficulty=2&seed=1`: NAME is a skill, `source` (all that the base learned), or one of the targets
`calc`, `stack` and `cipher`; without SPLIT, texts are of `train` and suites of `test`. `preferences` are pairs of stories; from
difficulty 4 on, such as only the prompt tells apart. Seeded generators make everything.
"""

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import parse_qsl

from loralab.errors import DataError, did_you_mean
from loralab.pocket.calc import calc
from loralab.pocket.cipher import cipher, cloze
from loralab.pocket.facts import recall
from loralab.pocket.items import SPLITS, Draw, Item, Split, stream
from loralab.pocket.preferences import pairs
from loralab.pocket.skills import EXACT
from loralab.pocket.stack import stack
from loralab.pocket.stories import story

SCHEME = "pocket"
GRADED: dict[str, Draw] = {**EXACT, "recall": recall}
"""The ten source skills with an exact answer."""
SOURCE: dict[str, Draw] = {**GRADED, "story": story}
TARGETS: dict[str, Draw] = {"calc": calc, "stack": stack, "cipher": cipher}
PREFERENCES = "preferences"
NAMES = ("source", *SOURCE, *TARGETS, PREFERENCES)

TRAIN_ITEMS, SUITE_ITEMS = 20_000, 40
CLOSE_FROM = 4
"""From this difficulty on, preferences are pairs that only the prompt tells apart."""
PATIENCE = 300
MIXTURE = {"story": 0.2, "count": 2, "find": 2, "add": 2, "subtract": 2, "shift": 2, "recall": 2}
"""Weights of skills in the source text, 1 where none is named: stories are many times longer than answers, and what is
harder to learn comes more often."""


@dataclass(frozen=True)
class Address:
    """A parsed address."""

    name: str
    split: Split | None = None
    items: int | None = None
    difficulty: int = 3
    seed: int = 0


def is_address(path: str) -> bool:
    """Tell whether a path names data of the pocket world, or means to: `parse` refuses other spellings of the scheme."""
    return path.lower().startswith(f"{SCHEME}:")


def parse(path: str) -> Address:
    """Read an address.

    Raises:
        DataError: an unknown name or setting, one that stands twice, or a number out of range.
    """
    if not path.startswith(f"{SCHEME}:"):
        fix = f"write {SCHEME}:{path.partition(':')[2]}"
        raise DataError("addresses of the pocket world are written in small letters", where=path, fix=fix)
    place, _, query = path.removeprefix(f"{SCHEME}:").partition("?")
    name, _, split = place.partition("/")
    if split and split not in SPLITS:
        raise DataError(f"there is no split {split!r}", where=path, fix=f"splits: {', '.join(SPLITS)}")
    if name not in NAMES:
        near = did_you_mean(name, list(NAMES))
        fix = f"did you mean {SCHEME}:{near}?" if near else f"names: {', '.join(NAMES)}"
        raise DataError("the pocket world has no such data", where=path, fix=fix)
    numbers: dict[str, int] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        least, most = {"items": (1, 10**7), "difficulty": (1, 5), "seed": (0, 10**9)}.get(key, (1, 0))
        is_number = value.isascii() and value.isdecimal() and len(value) <= len(str(most))
        if not (is_number and least <= int(value) <= most):
            fix = "write pocket:NAME?items=5000&difficulty=3&seed=0, difficulty from 1 to 5"
            raise DataError(f"{key}={value} is no setting of the pocket world", where=path, fix=fix)
        if key in numbers:
            raise DataError(f"{key} stands twice", where=path, fix="keep one of them")
        numbers[key] = int(value)
    return Address(name, split or None, **numbers)


def rows(path: str) -> list[dict[str, str]]:
    """Give the rows of a text: `prompt` and `completion`, `text` where it is unlabelled, or `prompt`, `chosen`, `rejected`."""
    address = parse(path)
    if address.name == PREFERENCES:
        drawn_pairs = pairs(address.split or "train", seed=address.seed, close=address.difficulty >= CLOSE_FROM)
        return list(itertools.islice(drawn_pairs, address.items or TRAIN_ITEMS))
    drawn = itertools.islice(draws(address), address.items or TRAIN_ITEMS)
    return [{"prompt": i.prompt, "completion": i.completion} if i.prompt else {"text": i.completion} for i in drawn]


def draws(address: Address) -> Iterator[Item]:
    """Draw the items of a text without end."""
    split, skills = address.split or "train", {**SOURCE, **TARGETS}
    if address.name != "source":
        yield from stream(skills[address.name], split, seed=address.seed, difficulty=address.difficulty)
    rng = random.Random(f"{address.seed}/{split}/mixture")
    weights = [MIXTURE.get(name, 1.0) for name in SOURCE]
    levels = range(1, address.difficulty + 1)  # easy items first show what the hard ones are about
    streams = {
        (name, level): stream(draw, split, seed=address.seed, difficulty=level)
        for name, draw in SOURCE.items()
        for level in levels
    }
    while True:
        yield next(streams[rng.choices(tuple(SOURCE), weights)[0], rng.choice(levels)])


def suite(path: str, items: int | None = None) -> list[Item]:
    """Draw different items to be graded, in a fixed order: `items` of each skill, or all there are if they are fewer.

    Stories have no answer to grade, so `source` has ten skills; `cipher` is asked as cloze items.

    Raises:
        DataError: an address of nothing that can be graded.
    """
    address = parse(path)
    if address.name in ("story", PREFERENCES):
        fix = "stories may be data.general; skills, source, calc, stack and cipher can be graded"
        raise DataError(f"{address.name} has no right answer to grade", where=path, fix=fix)
    wanted = items or address.items or SUITE_ITEMS
    graded: dict[str, Draw] = {**GRADED, "calc": calc, "stack": stack, "cipher": cloze}
    asked = GRADED if address.name == "source" else {address.name: graded[address.name]}
    return [item for draw in asked.values() for item in _different(draw, address, wanted)]


def _different(draw: Draw, address: Address, wanted: int) -> list[Item]:
    """Draw until enough different prompts are found, or hundreds of draws in turn bring no new one."""
    found: dict[str, Item] = {}
    since = 0
    for item in stream(draw, address.split or "test", seed=address.seed, difficulty=address.difficulty):
        since = since + 1 if item.prompt in found else 0
        found.setdefault(item.prompt, item)
        if len(found) == wanted or since == PATIENCE:
            return list(found.values())
    raise AssertionError("a stream has no end")
