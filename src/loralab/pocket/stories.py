"""Short grammatical stories: the language of the pocket world, for loss and for rewards.

A story keeps to its people and things: who finds something takes it along, and the ending follows from how they met.
"""

import random
from dataclasses import dataclass

from loralab.pocket.items import Item

ANIMALS = ("fox", "bear", "hare", "wolf", "deer", "owl", "frog", "mole", "swan", "otter", "lynx", "crow")
NAMES = ("anna", "bela", "coro", "dima", "enzo", "fara", "gero", "hugo", "ilka", "juno")
THINGS = ("ball", "bell", "book", "boat", "coin", "drum", "kite", "lamp", "ring", "rope", "shell", "flute")
COLOURS = ("red", "blue", "green", "white", "black", "golden")
PLACES = ("river", "hill", "wood", "lake", "mill", "bridge", "barn", "garden")
FINDS = ("found", "saw", "lost", "made")
KIND, UNKIND = ("helped", "thanked", "hugged"), ("pushed", "teased", "scared")
GLAD, SAD = ("glad", "merry", "proud"), ("sad", "angry", "lonely")


@dataclass(frozen=True)
class Story:
    """What happens in a story; `text` tells it."""

    hero: str
    animal: str
    thing: str
    colour: str
    place: str
    goal: str
    verb: str
    meeting: str
    other: str
    mood: str

    @property
    def sentences(self) -> tuple[str, ...]:
        """The story, a sentence at a time."""
        return (
            f"{self.hero} the {self.animal} {self.verb} a {self.colour} {self.thing} near the {self.place}",
            f"{self.hero} took the {self.thing} to the {self.goal}",
            f"there the {self.animal} {self.meeting} {'an' if self.other[0] in 'aeiou' else 'a'} {self.other}",
            f"{self.hero} was {self.mood}",
        )

    @property
    def text(self) -> str:
        """The story as one line."""
        return ". ".join(self.sentences) + "."


def tell(rng: random.Random, animal: str | None = None, thing: str | None = None) -> Story:
    """Draw a story, about an animal and a thing if they are given."""
    animal = animal or rng.choice(ANIMALS)
    place, goal = rng.sample(PLACES, 2)
    kind = rng.random() < 0.5
    return Story(
        hero=rng.choice(NAMES),
        animal=animal,
        thing=thing or rng.choice(THINGS),
        colour=rng.choice(COLOURS),
        place=place,
        goal=goal,
        verb=rng.choice(FINDS),
        meeting=rng.choice(KIND if kind else UNKIND),
        other=rng.choice([other for other in ANIMALS if other != animal]),
        mood=rng.choice(GLAD if kind else SAD),
    )


def story(rng: random.Random, difficulty: int) -> Item:
    """Tell a story about an animal and a thing; `difficulty` is its number of sentences, up to four."""
    animal, thing = rng.choice(ANIMALS), rng.choice(THINGS)
    told = tell(rng, animal, thing)
    text = ". ".join(told.sentences[: max(1, min(4, difficulty + 1))]) + "."
    return Item("story", f"story of {animal} and {thing}: ", text)


def asked(prompt: str) -> tuple[str, str]:
    """Give the animal and the thing that a prompt asks for."""
    animal, _, thing = prompt.removeprefix("story of ").removesuffix(": ").partition(" and ")
    return animal, thing
