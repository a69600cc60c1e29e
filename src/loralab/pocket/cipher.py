"""`cipher`: the stories in a foreign alphabet and word order, as unlabelled text: continued pretraining in miniature.

Each letter has its own foreign one, verbs stand last and colours behind their nouns. Graded by loss, and by cloze items
whose choices all stand in the text already: only who reads the foreign grammar knows which of them is meant.
"""

import random
from string import ascii_lowercase, ascii_uppercase

from loralab.pocket.items import Item, with_choices
from loralab.pocket.stories import Story, tell

_LETTERS = list(ascii_uppercase)
_ORDER = list(ascii_lowercase)
for _list in (_LETTERS, _ORDER):
    random.Random("the foreign alphabet").shuffle(_list)


def foreign(text: str, difficulty: int) -> str:
    """Write a text in foreign letters: at difficulty 1 in none of them, at 3 in half, at 5 in all 26."""
    number = round(26 * (difficulty - 1) / 4)
    return text.translate(str.maketrans("".join(_ORDER[:number]), "".join(_LETTERS[:number])))


def sentences(story: Story) -> tuple[str, ...]:
    """Tell a story in the foreign word order, a sentence at a time (still in our letters)."""
    return (
        f"{story.hero} the {story.animal} near the {story.place} a {story.thing} {story.colour} {story.verb}",
        f"{story.hero} the {story.thing} to the {story.goal} took",
        f"there the {story.animal} a {story.other} {story.meeting}",
        f"{story.hero} {story.mood} was",
    )


def cipher(rng: random.Random, difficulty: int) -> Item:
    """Write a foreign story, in more foreign letters the higher the difficulty; its first sentence decides its split."""
    told = sentences(tell(rng))
    return Item("cipher", "", foreign(". ".join(told) + ".", difficulty), key=told[0])


def cloze(rng: random.Random, difficulty: int) -> Item:
    """Ask for the next word of a foreign story, in its second or third sentence."""
    story = tell(rng)
    told = sentences(story)
    if rng.random() < 0.5:
        opened, right = f"{told[0]}. {story.hero} the ", story.thing
    else:
        opened, right = f"{told[0]}. {told[1]}. there the ", story.animal
    wrong = [story.thing, story.place, story.animal, story.goal if "took" in opened else story.colour]
    item = Item("cipher", foreign(opened, difficulty), foreign(right, difficulty), key=told[0])
    return with_choices(rng, item, [foreign(word, difficulty) for word in wrong if word != right])
