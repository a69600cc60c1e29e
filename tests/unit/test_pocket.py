"""The pocket world: answers against a second way to compute them, splits that never meet, graders, addresses."""

import itertools
import random
import re
from collections import Counter

import pytest

from loralab.errors import DataError
from loralab.pocket import world
from loralab.pocket.calc import final_answer
from loralab.pocket.cipher import foreign
from loralab.pocket.facts import WAYS, WORLD
from loralab.pocket.grading import grade
from loralab.pocket.items import Item, split_of, stream
from loralab.pocket.preferences import LONGEST, true_reward
from loralab.pocket.stack import STEPS as STACK_STEPS
from loralab.pocket.stack import MachineError, passes, run
from loralab.pocket.stories import asked

DRAWS = 100_000
SKILLS = {**world.SOURCE, **world.TARGETS}


def drawn(name, split="train", count=300, difficulty=3, seed=0):
    return list(itertools.islice(stream(SKILLS[name], split, seed=seed, difficulty=difficulty), count))


# Answers, each computed a second time from the words of the prompt


def _after(prompt, word):
    return prompt.removesuffix(" = ").removeprefix(word).strip()


def _shifted(prompt):
    text, _, by = _after(prompt, "shift").partition(" by ")
    return "".join(chr((ord(letter) - 97 + int(by)) % 26 + 97) for letter in text)


def _found(prompt):
    pairs, _, key = prompt.removeprefix("find ").partition(": ")
    return {pair[0]: pair[1] for pair in pairs.split()}[key]


def _counted(prompt):
    letter, _, text = _after(prompt, "count").partition(" in ")
    return str(sum(1 for other in text if other == letter))


def _compared(prompt):
    a, b = map(int, _after(prompt, "compare").split())
    return {True: "less", False: "more"}[a < b] if a != b else "same"


def _computed(prompt):
    return str(eval(prompt.removesuffix("=")))


SECOND_WAY = {
    "copy": lambda prompt: _after(prompt, "copy"),
    "reverse": lambda prompt: "".join(reversed(_after(prompt, "reverse"))),
    "sort": lambda prompt: "".join(sorted(_after(prompt, "sort"))),
    "count": _counted,
    "find": _found,
    "compare": _compared,
    "add": _computed,
    "subtract": _computed,
    "shift": _shifted,
}


@pytest.mark.parametrize("difficulty", [1, 3, 5])
@pytest.mark.parametrize("name", SECOND_WAY)
def test_every_answer_is_right(name, difficulty):
    for item in drawn(name, difficulty=difficulty):
        assert SECOND_WAY[name](item.prompt) == item.completion, item


@pytest.mark.parametrize("name", [*world.GRADED])
def test_a_choice_has_one_right_answer_in_any_place(name):
    items = drawn(name)
    assert all(item.choices[item.right] == item.completion for item in items)
    assert all(len(set(item.choices)) == len(item.choices) >= 2 for item in items)
    assert len({item.right for item in items}) >= 3
    for item in items:
        assert [grade(item, choice) for choice in item.choices].count(True) == 1


@pytest.mark.parametrize("name", [*world.SOURCE, "calc", "stack"])
def test_difficulty_makes_longer_items_or_more_of_them(name):
    easy, hard = drawn(name, difficulty=1, count=500), drawn(name, difficulty=5, count=500)
    longer = sum(len(i.prompt + i.completion) for i in hard) > sum(len(i.prompt + i.completion) for i in easy)
    assert longer or len({i.prompt for i in hard}) > len({i.prompt for i in easy})


def test_every_fact_is_taught_by_some_question_and_asked_in_tests_by_another():
    taught = {fact: [w for w in WAYS[fact[1]] if split_of(w.format(fact[0])) == "train"] for fact in WORLD}
    assert min(len(ways) for ways in taught.values()) >= 1
    asked = {item.prompt for item in world.suite("pocket:recall", items=200)}
    assert len(asked) >= 40
    assert not asked & {way.format(name) for (name, _), ways in taught.items() for way in ways}


# Splits


@pytest.fixture(scope="module")
def training_texts():
    """Prompts and texts of 10⁵ draws from each training stream, preference pairs included."""
    prompts, texts = set(), set()
    for name in ("source", "calc", "stack", "cipher"):
        for item in itertools.islice(world.draws(world.parse(f"pocket:{name}")), DRAWS):
            prompts.add(item.prompt)
            texts.add(item.prompt + item.completion)
    for row in world.rows(f"pocket:preferences?items={DRAWS}"):
        prompts.add(row["prompt"])
        texts |= {row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]}
    return prompts, texts


def test_no_test_item_is_in_a_training_stream(training_texts):
    prompts, texts = training_texts
    assert len(texts) > 200_000
    for name in (*SKILLS, "source"):
        for split in ("test", "validation"):
            free = name in ("story", "cipher")
            items = drawn(name, split, 3000) if free else world.suite(f"pocket:{name}/{split}", items=300)
            assert items
            for item in items:
                assert item.prompt == "" or item.prompt not in prompts
                assert item.prompt + item.completion not in texts


def test_no_worked_step_of_calc_is_an_item_of_another_test():
    """With its result each step reads as an item of `add` or `subtract`, answer included."""
    for difficulty in (1, 3, 5):
        worked = " ".join(item.completion for item in drawn("calc", count=5000, difficulty=difficulty))
        steps = set(re.findall(r"\d+[+-]\d+=", worked))
        tested = {item.prompt for name in ("add", "subtract") for item in world.suite(f"pocket:{name}", items=300)}
        assert len(steps) > 500 and len(tested) > 500
        assert not steps & tested


def test_no_cloze_text_begins_a_training_text(training_texts):
    """Prefixes of the foreign training texts, up to the longest cloze text."""
    _, texts = training_texts
    sentences = {text[: text.index(".")] for text in texts if " tHe " in text}
    clozes = world.suite("pocket:cipher", items=1000)
    assert len(clozes) == 1000 and len(sentences) > 10_000
    assert not sentences & {item.prompt[: item.prompt.index(".")] for item in clozes}


def test_splits_do_not_meet_at_other_difficulties_or_seeds():
    for name in SKILLS:
        trained = {i.key or i.prompt for d in (1, 5) for i in drawn(name, "train", 2000, d, seed=d)}
        tested = {i.key or i.prompt for d in (1, 5) for i in drawn(name, "test", 200, d, seed=d)}
        assert trained and tested and not trained & tested


def test_streams_are_repeatable_and_seeds_differ():
    assert drawn("calc") == drawn("calc")
    assert drawn("calc") != drawn("calc", seed=1)
    assert [i.prompt[-9:] for i in drawn("copy")] != [i.prompt[-9:] for i in drawn("reverse")]


# Targets


@pytest.mark.parametrize("difficulty", [1, 3, 5])
def test_calc_shows_right_steps_and_a_right_answer(difficulty):
    for item in drawn("calc", difficulty=difficulty):
        steps, _, answer = item.completion.partition(". answer ")
        for step in steps.split(", "):
            worked, _, result = step.partition("=")
            assert eval(worked) == int(result)
        assert int(answer) == int(result) == int(final_answer(item.completion))
        assert len(re.findall(r"\d+", item.prompt)) == 1 + len(steps.split(", "))


def test_calc_is_told_in_words_where_it_is_hard():
    assert not any(re.search("[a-z]", item.prompt.removeprefix("calc ")) for item in drawn("calc", difficulty=3))
    assert all(" has " in item.prompt for item in drawn("calc", difficulty=4))


def test_calc_grades_only_the_final_answer():
    item = Item("calc", "calc: …", "5+3=8. answer 8")
    assert grade(item, "5+3=9, no. answer 8")
    assert not grade(item, "5+3=8. answer 9")
    assert not grade(item, "8") and not grade(item, "") and not grade(item, "answer ")


def test_programs_of_the_stack_pass_their_own_tests():
    for difficulty in (1, 3, 5):
        items = drawn("stack", difficulty=difficulty)
        assert all(grade(item, item.completion) for item in items)
        assert not any(grade(item, f"{item.completion} 1 +") for item in items)


@pytest.mark.parametrize("step", STACK_STEPS, ids=lambda step: step.words)
def test_all_ways_to_write_a_step_do_the_same(step):
    for x, n in itertools.product((0, 1, 6, -4), (2, 9)):
        assert {run(way.format(n=n), [x]) for way in step.ways} == {step.compute(x, n)}


def test_a_task_has_many_right_programs():
    item = next(i for i in drawn("stack") if i.prompt == "program: double. " or "double" in i.prompt)
    programs = {i.completion for i in drawn("stack", count=5000) if i.prompt == item.prompt}
    assert len(programs) >= 2 and all(grade(item, program) for program in programs)


@pytest.mark.parametrize(
    "program",
    ["+", "dup", "drop", "1 2", "x", "-1 +", "9" * 30 + " +", "dup * " * 40, "1 + " * 60, "١ +", "swap"],
)
def test_a_wrong_program_fails_and_never_hangs(program):
    with pytest.raises(MachineError):
        run(program, [10])
    assert not passes(program, (((10,), 11),))


@pytest.mark.parametrize("nothing", ["", "  "])
def test_no_program_is_wrong_even_where_nothing_is_to_be_done(nothing):
    item = next(i for i in drawn("stack", count=20_000) if all(inputs == (result,) for inputs, result in i.tests))
    assert grade(item, item.completion) and not grade(item, nothing)


def test_the_foreign_text_is_foreign_in_letters_and_in_order():
    letters = "".join(chr(97 + i) for i in range(26))
    assert len(set(foreign(letters, 5))) == 26 and foreign(letters, 5).isupper()
    back = str.maketrans(foreign(letters, 5), letters)
    for item in drawn("cipher", difficulty=5):
        assert item.prompt == "" and item.completion.isupper()
        told = item.completion.translate(back).removesuffix(".").split(". ")
        assert told[0].split()[-1] in ("found", "saw", "lost", "made")
        assert told[1].endswith(" took") and told[3].endswith(" was")


def test_more_letters_are_foreign_the_higher_the_difficulty():
    letters = "".join(chr(97 + i) for i in range(26))
    counts = [sum(map(str.isupper, foreign(letters, d))) for d in range(1, 6)]
    assert counts == sorted(set(counts)) and counts[0] == 0 and counts[-1] == 26


def test_cloze_choices_all_stand_in_the_text():
    items = world.suite("pocket:cipher", items=300)
    for item in items:
        assert all(choice in item.prompt for choice in item.choices) and len(item.choices) == 4
        assert item.choices[item.right] == item.completion


# Preferences


def test_the_true_reward_counts_what_it_says():
    prompt = "story of fox and ball: "
    best = "anna the fox saw a red ball near the hill. there the fox helped a deer. anna was glad."
    assert true_reward(prompt, best) == 4
    assert true_reward(prompt, best.replace("helped", "pushed")) == 2
    assert true_reward(prompt, best.replace("glad", "sad")) == 2
    assert true_reward(prompt, best.replace("fox", "owl")) == 3
    assert true_reward(prompt, best.removesuffix(".")) == 3
    assert true_reward(prompt, best[:-1] + "x" * (LONGEST + 10 - len(best)) + ".") == pytest.approx(2.9)
    assert true_reward(prompt, "") == -1


def test_chosen_is_better_than_rejected():
    rows = world.rows("pocket:preferences?items=500")
    assert all(true_reward(r["prompt"], r["chosen"]) > true_reward(r["prompt"], r["rejected"]) for r in rows)
    longer = Counter(len(r["chosen"]) > len(r["rejected"]) for r in rows)
    assert min(longer.values()) > 100  # length alone does not give the answer away


def test_close_pairs_are_one_story_with_an_asked_word_exchanged():
    for row in world.rows("pocket:preferences?items=300&difficulty=4"):
        chosen, rejected = (row[side].replace(".", " ").split() for side in ("chosen", "rejected"))
        exchanged = {(mine, other) for mine, other in zip(chosen, rejected, strict=True) if mine != other}
        assert len(exchanged) == 1
        assert exchanged.pop()[0] in asked(row["prompt"])


def test_a_judge_that_never_looks_at_the_prompt_is_right_of_seven_pairs_in_eight():
    """What reading the prompt adds is the rest: a reward model below this has not learned to."""
    rows = world.rows("pocket:preferences/validation?items=4000")
    gains = [
        true_reward("story of x and y: ", r["chosen"]) - true_reward("story of x and y: ", r["rejected"]) for r in rows
    ]
    right = sum(1.0 if gain > 0 else 0.5 if gain == 0 else 0.0 for gain in gains) / len(rows)
    assert right == pytest.approx(0.88, abs=0.005)


# Addresses


def test_an_address_says_how_many_how_hard_and_which():
    assert len(world.rows("pocket:calc?items=7")) == 7
    assert world.rows("pocket:calc?seed=1&items=5") != world.rows("pocket:calc?items=5")
    assert {tuple(row) for row in world.rows("pocket:cipher?items=3")} == {("text",)}
    easy, hard = (world.rows(f"pocket:calc?items=50&difficulty={d}") for d in (1, 5))
    assert sum(len(r["completion"]) for r in easy) < sum(len(r["completion"]) for r in hard)
    assert {item.split for item in world.suite("pocket:sort/validation")} == {"validation"}


def test_source_has_ten_graded_skills_and_stories_in_training():
    assert Counter(item.skill for item in world.suite("pocket:source", items=5)) == dict.fromkeys(world.GRADED, 5)
    assert len(world.GRADED) == 10
    skills = Counter(i.skill for i in itertools.islice(world.draws(world.parse("pocket:source")), 5000))
    assert set(skills) == set(world.SOURCE)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("pocket:clac", "did you mean pocket:calc"),
        ("pocket:", "names: "),
        ("pocket:calc/tset", "splits: train"),
        ("pocket:calc?items=0", "items=0"),
        ("pocket:calc?items=many", "items=many"),
        ("pocket:calc?difficulty=6", "difficulty=6"),
        ("pocket:calc?itms=6", "itms=6"),
        ("pocket:calc?seed=", "seed="),
        ("pocket:calc?items=5&items=6", "items stands twice"),
        ("pocket:calc?items=٣", "items=٣"),
        (f"pocket:calc?items={'9' * 5000}", "is no setting"),
        ("Pocket:calc?items=5", "write pocket:calc?items=5"),
    ],
)
def test_a_wrong_address_says_what_is_wrong(path, says):
    with pytest.raises(DataError) as error:
        world.rows(path)
    assert says in str(error.value)


@pytest.mark.parametrize("name", ["story", "preferences"])
def test_what_has_no_right_answer_is_no_suite(name):
    with pytest.raises(DataError, match="no right answer"):
        world.suite(f"pocket:{name}")


def test_drawing_leaves_the_global_generator_alone():
    random.seed(5)
    before = random.getstate()
    world.suite("pocket:source", items=3)
    assert random.getstate() == before
