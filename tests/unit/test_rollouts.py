"""Prompts from rows, and rollouts: what is asked, in which order, what is written, and what belongs to it."""

import json

import numpy as np
import pytest
import torch

from little_world import make_base, write_rows
from loralab.base.corpus import tokenise
from loralab.base.model import Base, load
from loralab.base.sources import Source, Template
from loralab.errors import DataError
from loralab.evals.generate import Writer
from loralab.lab.prompts import Batches, Prompts, read_prompts
from loralab.lab.rewards import Rewarded
from loralab.lab.rollouts import Rollouts, seed_of

ASK = "reverse abc = "


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return load(str(make_base(tmp_path_factory.mktemp("rollouts") / "base")), device="cpu")


def read(base: Base, *sources: Source, max_length: int = 64, max_tokens: int = 8, chat: str | None = None) -> Prompts:
    assert base.tokenizer is not None
    return read_prompts(sources, base.tokenizer, chat_template=chat, max_length=max_length, max_tokens=max_tokens)


def file(tmp_path, *rows: object, name: str = "rows.jsonl") -> Source:
    return Source(str(write_rows(tmp_path / name, list(rows))))


def decoded(base: Base, tokens: list[int]) -> str:
    assert base.tokenizer is not None
    return base.tokenizer.decode(tokens)


# Prompts


def test_a_prompt_is_what_instruction_tuning_on_the_row_reads_before_its_answer(base, tmp_path):
    source = file(tmp_path, {"prompt": ASK, "completion": "cba"})
    (asked,) = read(base, source).asked
    assert base.tokenizer is not None
    (example,) = [tokenise([source], base.tokenizer)[0]]
    before = example.tokens[: int(np.argmax(example.labelled))].tolist()
    assert asked.prompt.tokens == before and decoded(base, before) == asked.text == ASK
    assert (asked.known, asked.prompt.limit, asked.row) == ("cba", 8, {"prompt": ASK, "completion": "cba"})


@pytest.mark.parametrize(
    ("row", "known"),
    [
        ({"prompt": ASK}, None),
        ({"prompt": ASK, "answer": "cba"}, "cba"),
        ({"prompt": ASK, "answer": 7}, "7"),
        ({"prompt": ASK, "chosen": "cba", "rejected": "abc"}, None),
    ],
)
def test_rows_without_a_completion_are_asked_all_the_same(base, tmp_path, row, known):
    (asked,) = read(base, file(tmp_path, row)).asked
    assert (asked.text, decoded(base, asked.prompt.tokens), asked.known) == (ASK, ASK, known)


def test_pairs_without_a_prompt_are_asked_what_both_sides_begin_with(base, tmp_path):
    sides = {"chosen": "Human: a\n\nAssistant: no b", "rejected": "Human: a\n\nAssistant: no c"}
    (asked,) = read(base, file(tmp_path, sides)).asked
    assert (asked.text, asked.known) == ("Human: a\n\nAssistant:", None)
    turns = [{"role": "user", "content": "a"}]
    chats = {side: [*turns, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    (asked,) = read(base, file(tmp_path, chats, name="chats.jsonl"), chat="plain").asked
    assert (asked.text, asked.known) == ("User: a\n\nAssistant:", None)


def test_a_template_says_what_is_asked(base, tmp_path):
    source = file(tmp_path, {"question": "abc", "solution": "cba"})
    told = Source(source.path, template=Template("reverse {question} = ", "{solution}"))
    (asked,) = read(base, told).asked
    assert (asked.text, asked.known) == (ASK, "cba")


@pytest.mark.parametrize("ends_with_answer", [True, False])
def test_chats_are_asked_up_to_their_last_answer(base, tmp_path, ends_with_answer):
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    answer = [{"role": "assistant", "content": "d"}] if ends_with_answer else []
    for name, row in (("m", {"messages": messages + answer}), ("p", {"prompt": messages, "answer": "d"})):
        (asked,) = read(base, file(tmp_path, row, name=f"{name}.jsonl"), chat="plain").asked
        assert asked.text == "User: a\n\nAssistant: b</s>\n\nUser: c\n\nAssistant:"
        assert decoded(base, asked.prompt.tokens) == asked.text.replace("U", "<unk>").replace("A", "<unk>")
        assert asked.known == ("d" if ends_with_answer or name == "p" else None)


def test_prompts_without_room_for_an_answer_are_dropped_and_counted(base, tmp_path):
    rows = [{"prompt": "a" * size} for size in (50, 56, 57, 60)] + [{"prompt": ""}]
    found = read(base, file(tmp_path, *rows), max_length=64, max_tokens=8)
    assert [len(one.prompt.tokens) for one in found.asked] == [50, 56], "56 and 8 fill 64"
    total = found.report.total
    assert (total.rows, total.examples, total.dropped, total.empty, total.tokens) == (5, 2, 2, 1, 106)
    with pytest.raises(DataError, match="no prompt is left of 5 rows: 1 are empty, 4 have no room"):
        read(base, file(tmp_path, *rows), max_length=20, max_tokens=8)


def test_texts_without_a_prompt_are_refused(base, tmp_path):
    with pytest.raises(DataError, match="asks for nothing"):
        read(base, file(tmp_path, {"text": "abc"}))


def test_addresses_give_items_with_all_that_grades_them(base):
    stack, calc = (read(base, Source(f"pocket:{n}?items=3"), max_length=400).asked for n in ("stack", "calc"))
    assert all(one.item is not None and one.row["tests"] == one.item.tests for one in stack)
    assert [one.known for one in calc] == [one.item.completion for one in calc if one.item]
    assert len(read(base, Source("pocket:preferences?items=3"), max_length=400)) == 3


def test_held_out_prompts_are_never_trained_on(base, tmp_path):
    rows = [{"prompt": f"ask {i % 30}", "completion": str(i)} for i in range(60)]
    train, held = read(base, file(tmp_path, *rows)).hold_out(0.2)
    sides = {one.text for one in train.asked}, {one.text for one in held.asked}
    assert not sides[0] & sides[1] and len(sides[0] | sides[1]) == 30 and len(held) == 2 * len(sides[1])
    assert 1 <= len(sides[1]) <= 15
    assert (train.report.total.examples, train.report.total.held_out) == (len(train), len(held))
    assert [one.text for one in held.different()] == list(dict.fromkeys(one.text for one in held.asked))
    with pytest.raises(DataError, match="one prompt cannot be divided"):
        read(base, file(tmp_path, rows[0], rows[0])).hold_out(0.5)


def test_the_fingerprint_is_of_prompts_and_rows(base, tmp_path):
    rows = [{"prompt": "a", "k": 1}, {"prompt": "b", "k": 2}]
    known = read(base, file(tmp_path, *rows)).fingerprint
    assert read(base, file(tmp_path, *rows, name="again.jsonl")).fingerprint == known
    for changed in ([{"prompt": "a", "k": 3}, rows[1]], [{"prompt": "c", "k": 1}, rows[1]], rows[::-1]):
        assert read(base, file(tmp_path, *changed)).fingerprint != known


# Order


def test_each_epoch_asks_everything_once_in_an_order_of_its_own(base, tmp_path):
    prompts = read(base, file(tmp_path, *({"prompt": f"ask {i}"} for i in range(12))))
    batches = Batches(prompts, batch_size=4, seed=1)
    texts = [[one.text for one in batches.batch(number)] for number in range(6)]
    epochs = [[text for batch in part for text in batch] for part in (texts[:3], texts[3:])]
    assert all(sorted(epoch) == sorted(one.text for one in prompts.asked) for epoch in epochs)
    assert epochs[0] != epochs[1]
    other = Batches(prompts, batch_size=4, seed=1)
    assert [[one.text for one in other.batch(n)] for n in (4, 1, 5)] == [texts[4], texts[1], texts[5]]
    assert [one.text for one in Batches(prompts, batch_size=4, seed=2).batch(0)] != texts[0]


# Rollouts


def rollouts(base: Base, prompts: Prompts, *, seed: int = 0, samples: int = 3, grade=None) -> Rollouts:
    def by_length(answers):
        return Rewarded([float(len(a.text)) for a in answers], {"n": [float(i) for i in range(len(answers))]})

    batches = Batches(prompts, batch_size=2, seed=0)
    writer = Writer(base.model, base.tokenizer)
    return Rollouts(writer, batches, grade or by_length, samples=samples, temperature=0.9, top_p=0.95, seed=seed)


def test_rollouts_belong_to_their_prompts_and_have_their_own_rewards(base, tmp_path):
    prompts = read(base, file(tmp_path, *({"prompt": f"ask {i} = "} for i in range(4))))
    play = rollouts(base, prompts)
    found = play(0)
    assert [decoded(base, one.prompt) for one in found] == [one.text for one in play.batches.batch(0)]
    assert [one.parts["n"] for one in found] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert base.tokenizer is not None
    end = base.tokenizer.eos_token_id
    for one in found:
        assert one.rewards == [float(len(text)) for text in one.texts]
        for tokens, text, cut in zip(one.answers, one.texts, one.truncated, strict=True):
            assert text == base.tokenizer.decode([t for t in tokens if t > 3])
            assert cut == (tokens[-1] != end) and (not cut or len(tokens) == 8)
    assert any(len({tuple(a) for a in one.answers}) > 1 for one in found), "samples of a prompt differ"


def test_a_batch_is_the_same_whatever_was_written_before(base, tmp_path):
    prompts = read(base, file(tmp_path, *({"prompt": f"ask {i} = "} for i in range(4))))
    play = rollouts(base, prompts)
    first = [play(number) for number in range(3)]
    torch.manual_seed(99)
    random = torch.get_rng_state()
    again = rollouts(base, prompts)(2)
    assert torch.equal(torch.get_rng_state(), random)
    assert [one.answers for one in again] == [one.answers for one in first[2]]
    assert [one.answers for one in first[0]] != [one.answers for one in first[2]], "the same prompts, another batch"
    assert [one.prompt for one in first[0]] != [one.prompt for one in first[1]]
    assert [one.answers for one in rollouts(base, prompts, seed=1)(2)] != [one.answers for one in again]
    assert len({seed_of(seed, number) for seed in range(3) for number in range(-1, 5)}) == 18


def test_the_row_reaches_the_reward(base, tmp_path):
    seen = []

    def note(answers):
        seen.extend(json.dumps(a.asked.row) for a in answers)
        return Rewarded([0.0] * len(answers), {})

    prompts = read(base, file(tmp_path, {"prompt": "a", "k": 1}, {"prompt": "b", "k": 2}))
    rollouts(base, prompts, grade=note)(0)
    assert sorted(seen) == sorted([json.dumps({"prompt": "a", "k": 1})] * 3 + [json.dumps({"prompt": "b", "k": 2})] * 3)
