"""Tasks: accuracy against real generation, choices against the likelihood of each alone, scores against their formulas."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from tiny_tokenizers import byte_tokenizer
from transformers import AutoTokenizer, PreTrainedModel

from little_world import make_base
from loralab.base import attention
from loralab.base.text import Example, encode, prompted
from loralab.errors import DataError, ModelError
from loralab.evals.generate import generate
from loralab.evals.probe import Cost, counting
from loralab.evals.samples import Samples, samples_of_tasks, samples_of_texts
from loralab.evals.stats import skill_scores
from loralab.evals.tasks import AccuracyProbe, ChoiceProbe, Task, probes_of
from loralab.training.loss import LanguageHead
from tiny import tiny

END = 2
LETTERS = "abcdefghij0123456789"


@dataclass(frozen=True)
class Item:
    skill: str
    prompt: str
    completion: str
    choices: tuple[str, ...] = ()
    right: int = 0


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Return a tokenizer of single characters, so that every text has one way of being tokens."""
    return AutoTokenizer.from_pretrained(make_base(tmp_path_factory.mktemp("base")))


def model_of(tokenizer, family: str = "llama", packs: bool = True) -> PreTrainedModel:
    """Give a model of the tokenizer's vocabulary that often ends its answers early."""
    model = tiny(family, vocab_size=len(tokenizer)).requires_grad_(False)
    if family == "gpt2":  # biases of a random model would drown what the prompt says
        for name, parameter in model.named_parameters():
            parameter.mul_(3 if "attn" in name else 1).mul_(0 if name.endswith("bias") else 1)
    model.get_output_embeddings().weight[END] *= 3
    model.set_attn_implementation(attention.NAME if packs else "eager")
    return model


@torch.no_grad()
def writes(model: PreTrainedModel, prompt: list[int], most: int = 12) -> list[int]:
    """Take the most likely token of a whole forward pass until the end token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + most and (len(tokens) == len(prompt) or tokens[-1] != END):
        tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def items_of(model: PreTrainedModel, tokenizer, count: int = 120) -> list[Item]:
    """Make items of what the model writes, some of them spoilt: a letter changed, added or left out, or the end missed."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        prompt = "".join(rng.choice(list(LETTERS), rng.integers(1, 8)))
        tokens = writes(model, tokenizer(prompt)["input_ids"])
        if min(tokens[:-1], default=0) < 4 or len(tokens) < 2:
            continue  # special tokens are no text
        text = tokenizer.decode(tokens[:-1])
        spoilt = text[:-1] + ("a" if text[-1] != "a" else "b"), text + "a", text[:-1]
        made.append(Item(f"skill{len(made) % 3}", prompt, [text, text, text, *spoilt][number % 6]))
    return made


# Accuracy


@pytest.mark.parametrize(("family", "packs"), [("llama", True), ("gpt2", True), ("llama", False)])
def test_one_pass_over_prompt_and_answer_tells_what_writing_it_would(tokenizer, family, packs):
    model = model_of(tokenizer, family, packs)
    head, items = LanguageHead(model), items_of(model, tokenizer)
    assert head.packs == packs
    expected = []
    for item in items:
        written = writes(model, tokenizer(item.prompt)["input_ids"], most=len(item.completion) + 1)
        expected.append(written == [*tokenizer(item.completion)["input_ids"], END])
    assert 10 <= sum(expected) <= len(items) - 10
    by_pass = AccuracyProbe("target/accuracy", [Task(items)], head, tokenizer).read_base()
    assert [row["right"] for row in by_pass.items] == [float(right) for right in expected]
    by_writing = AccuracyProbe("target/accuracy", [Task(items, lambda i, t: t == i.completion)], head, tokenizer)
    assert by_writing.read_base() == by_pass


def test_every_end_token_ends_an_answer(tokenizer):
    model = model_of(tokenizer)
    model.get_output_embeddings().weight[3] = 2 * model.get_output_embeddings().weight[END]  # a second one, likelier
    prompt = next(p for p in LETTERS if writes(model, tokenizer(p)["input_ids"], 1) == [3])
    items = [Item("a", prompt, "")]
    probe = AccuracyProbe("target/accuracy", [Task(items)], LanguageHead(model), tokenizer)
    assert probe.read_base().scores[0].value == 0
    model.generation_config.eos_token_id = [END, 3]
    for grade in (None, lambda item, text: text == ""):
        probe = AccuracyProbe("target/accuracy", [Task(items, grade)], LanguageHead(model), tokenizer)
        assert probe.read_base().scores[0].value == 1


def test_a_grader_is_given_the_item_and_what_the_model_writes(tokenizer):
    model = model_of(tokenizer)
    items = [item for item in items_of(model, tokenizer) if len(item.completion) < 4][:9]
    seen = []

    def grade(item: Item, text: str) -> bool:
        seen.append((item, text))
        return len(seen) % 2 == 0

    tasks = [Task(items[:2]), Task(items[2:], grade)]
    reading = AccuracyProbe("source/accuracy", tasks, LanguageHead(model), tokenizer).read_base()
    assert [row["prompt"] for row in reading.items] == [item.prompt for item in items]
    assert [row["right"] for row in reading.items[2:]] == [0, 1, 0, 1, 0, 1, 0]
    for item, text in seen:
        tokens = writes(model, tokenizer(item.prompt)["input_ids"], most=2 * (len(item.completion) + 1) + 16)
        assert text == tokenizer.decode(tokens, skip_special_tokens=True)


def test_a_token_that_reaches_over_the_end_of_the_prompt_belongs_to_the_answer():
    tokenizer = byte_tokenizer(merges=[("=", "4")])
    model = tiny("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.set_attn_implementation(attention.NAME)
    item, seen = Item("sums", "2+2=", "4"), []
    probe = AccuracyProbe(
        "a/accuracy", [Task([item], lambda i, t: seen.append(t) or True)], LanguageHead(model), tokenizer
    )
    (example,) = encode([prompted(item.prompt, item.completion)], tokenizer)
    assert probe._prompts[0].tokens == example.tokens[:3].tolist() == tokenizer("2+2")["input_ids"]
    probe.read_base()
    assert len(seen) == 1


def test_items_longer_than_the_model_reads_are_refused(tokenizer):
    head = LanguageHead(model_of(tokenizer))
    for kind in (AccuracyProbe, ChoiceProbe):
        fits, too_long = (Item("a", "b" * length, "c", ("c", "d")) for length in (62, 63))
        kind("target/x", [Task([fits])], head, tokenizer).read_base()
        with pytest.raises(DataError, match="65 tokens, but the model reads 64"):
            kind("target/x", [Task([too_long])], head, tokenizer)
    written = AccuracyProbe("target/x", [Task([fits], lambda i, t: True)], head, tokenizer)
    assert written.read_base().scores[0].value == 1, "answers end where the positions do"


def test_a_model_that_cannot_generate_still_answers_what_one_pass_tells(tokenizer, monkeypatch):
    model = model_of(tokenizer)
    monkeypatch.setattr(type(model), "can_generate", classmethod(lambda _: False))
    head, items = LanguageHead(model), items_of(model, tokenizer, 20)
    assert AccuracyProbe("target/accuracy", [Task(items)], head, tokenizer).read_base().scores[0].n == len(items)
    with pytest.raises(ModelError, match="cannot generate") as caught:
        AccuracyProbe("target/accuracy", [Task(items, lambda i, t: True)], head, tokenizer)
    assert caught.value.where == "probes.target"


# Choice


@torch.no_grad()
def log_likelihood(model: PreTrainedModel, prompt: list[int], tokens: list[int]) -> float:
    log_p = model(input_ids=torch.tensor([prompt + tokens])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[len(prompt) + i - 1, token]) for i, token in enumerate(tokens))


@pytest.mark.parametrize("packs", [True, False])
def test_the_likeliest_choice_is_taken(tokenizer, packs):
    model, rng = model_of(tokenizer, packs=packs), np.random.default_rng(1)
    items, expected = [], []
    for number in range(40):
        prompt, *choices = ("".join(rng.choice(list(LETTERS), rng.integers(2, 6))) for _ in range(2 + number % 4))
        if number % 5 == 0:
            choices.append(choices[0] + "x")
        end = [END] if number % 5 == 0 else []
        tokens = [tokenizer(choice)["input_ids"] + end for choice in choices]
        sums = [log_likelihood(model, tokenizer(prompt)["input_ids"], part) for part in tokens]
        items.append(Item("a", prompt, choices[0], tuple(choices), 0))
        expected.append(max(range(len(choices)), key=sums.__getitem__) == 0)
    probe = ChoiceProbe("target/choice", [Task(items)], LanguageHead(model), tokenizer)
    assert [row["right"] for row in probe.read_base().items] == [float(right) for right in expected]
    assert 5 < sum(expected) < 35
    assert probe.chance == pytest.approx(sum(1 / len(item.choices) for item in items) / 40)


def test_the_end_counts_only_where_one_choice_begins_another(tokenizer):
    model = model_of(tokenizer)
    model.get_output_embeddings().weight[END] *= 4  # now the end token decides wherever it counts
    rng = np.random.default_rng(2)
    head, taken = LanguageHead(model), {True: 0, False: 0}
    for _ in range(30):
        prompt, short = ("".join(rng.choice(list(LETTERS), 3)) for _ in range(2))
        for choices in ((short, short + "a"), (short, ("k" if short[0] != "k" else "l") + short[1:] + "a")):
            probe = ChoiceProbe("target/choice", [Task([Item("a", prompt, short, choices)])], head, tokenizer)
            begins = choices[1].startswith(short)
            taken[begins] += int(probe.read_base().scores[0].value)
            tokens = [tokenizer(choice)["input_ids"] + [END] * begins for choice in choices]
            alone = [log_likelihood(model, tokenizer(prompt)["input_ids"], part) for part in tokens]
            assert probe.log_likelihoods()[0] == pytest.approx(alone, abs=1e-5)
    assert 0 < taken[True] < 30, "a choice that begins another can lose"


def test_a_choice_of_which_nothing_can_be_predicted_is_certain():
    tokenizer = byte_tokenizer(merges=[("=", "4")])
    model = tiny("llama", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    model.set_attn_implementation(attention.NAME)
    probe = ChoiceProbe("a/choice", [Task([Item("a", "=", "5", ("4", "5"), 1)])], LanguageHead(model), tokenizer)
    ((merged, plain),) = probe.log_likelihoods()
    assert merged == 0 > plain and probe.read_base().scores[0].value == 0


def test_a_prompt_is_computed_once_for_all_its_choices(tokenizer):
    model, cost = model_of(tokenizer), Cost()
    prompt, choices = "abcdefghij" * 3, ("ab", "cd", "ef", "gh")
    probe = ChoiceProbe("a/choice", [Task([Item("a", prompt, "ab", choices)])], LanguageHead(model), tokenizer)
    with counting(model, cost):
        probe.read_base()
    assert (cost.forwards, cost.tokens) == (1, len(prompt) + len(choices))  # the last token of a choice is never read


# Scores


def test_the_mean_over_skills_weighs_them_equally_and_adds_their_errors():
    values = np.array([1, 1, 0, 1, 0, 1], float)
    skills = ["a", "a", "a", "a", "b", "b"]
    mean, a, b = skill_scores("source/accuracy", "share of items", values, skills)
    assert (mean.name, a.name, b.name) == ("source/accuracy", "source/a/accuracy", "source/b/accuracy")
    assert (a.value, b.value, mean.value) == (0.75, 0.5, 0.625)
    assert (a.n, b.n, mean.n) == (4, 2, 6)
    assert a.standard_error == pytest.approx(math.sqrt(0.25 / 4))  # variance of 1, 1, 0, 1 with n - 1
    assert b.standard_error == pytest.approx(math.sqrt(0.5 / 2))
    assert mean.standard_error == pytest.approx(math.sqrt(0.25 / 4 + 0.5 / 2) / 2)
    (single,) = skill_scores("source/accuracy", "share of items", values, ["a"] * 6)
    assert single.name == "source/accuracy" and single.value == pytest.approx(4 / 6)
    alone = skill_scores("source/accuracy", "share of items", values[:5], ["a"] * 4 + ["b"])
    assert alone[0].standard_error is None and alone[0].interval() is None
    sure = skill_scores("source/accuracy", "share of items", np.ones(8), ["a", "b"] * 4)
    assert sure[0].standard_error == 0
    assert sure[0].interval() == pytest.approx(
        (8 / (8 + 1.96**2), 1), abs=1e-4
    )  # Wilson's: eight items are not certain


def test_the_error_of_the_mean_is_that_of_resampled_items():
    rng = np.random.default_rng(0)
    skills = np.repeat(["a", "b", "c"], [40, 60, 150])
    values = (rng.random(250) < np.repeat([0.9, 0.5, 0.2], [40, 60, 150])).astype(float)
    mean, *_ = skill_scores("source/choice", "", values, skills.tolist())
    drawn = [rng.choice(values[skills == skill], (4000, sum(skills == skill))).mean(1) for skill in "abc"]
    assert mean.standard_error == pytest.approx(np.mean(drawn, 0).std(), rel=0.06)


def test_intervals_end_where_shares_do():
    scores = skill_scores("source/accuracy", "", np.array([1, 1, 1, 0.0]), ["a"] * 4)
    assert scores[0].interval()[1] == 1
    change = skill_scores("source/accuracy_change", "", np.array([-1, -1, -1, 0.0]), ["a"] * 4)
    assert change[0].interval()[0] == -1


def test_readings_of_a_tuned_model_pair_with_the_base(tokenizer):
    model = model_of(tokenizer)
    items = items_of(model, tokenizer)
    probe = AccuracyProbe("source/accuracy", [Task(items)], LanguageHead(model), tokenizer)
    base = probe.read_base()
    assert [score.name for score in base.scores] == [
        "source/accuracy",
        *(f"source/skill{i}/accuracy" for i in range(3)),
    ]
    same = probe.read(0)
    assert same.items == base.items
    assert [s.value for s in same.scores if s.name.endswith("_change")] == [0, 0, 0, 0]
    model.get_output_embeddings().weight[END] /= 2
    tuned = probe.read(1)
    before, after = (np.array([row["right"] for row in reading.items]) for reading in (base, tuned))
    scores = {score.name: score for score in tuned.scores}
    errors = []
    for number in range(3):
        mine = [i for i, item in enumerate(items) if item.skill == f"skill{number}"]
        change = (after - before)[mine]
        score = scores[f"source/skill{number}/accuracy_change"]
        assert score.value == pytest.approx(change.mean())
        errors.append(change.std(ddof=1) / math.sqrt(len(mine)))
        assert score.standard_error == pytest.approx(errors[-1])
    assert scores["source/accuracy_change"].value < 0
    assert scores["source/accuracy_change"].standard_error == pytest.approx(math.sqrt(sum(e * e for e in errors)) / 3)
    assert {score.unit for score in tuned.scores} == {"share of items"}


def test_the_base_is_read_with_the_delta_switched_off(tokenizer):
    model = model_of(tokenizer)
    items = items_of(model, tokenizer)
    probe = AccuracyProbe("target/accuracy", [Task(items)], LanguageHead(model), tokenizer)
    expected, head = probe.read_base(), model.get_output_embeddings().weight
    tuned, pristine = -head.clone(), head.clone()

    @contextmanager
    def without() -> Iterator[None]:
        head.copy_(pristine)
        yield
        head.copy_(tuned)

    head.copy_(tuned)
    assert probe.read_base(without()) == expected
    assert torch.equal(head, tuned)
    assert probe.read(3).items != expected.items


def test_a_role_has_an_accuracy_and_where_there_are_choices_a_choice(tokenizer):
    head = LanguageHead(model_of(tokenizer))
    plain, chosen = Item("a", "b", "c"), Item("a", "b", "c", ("c", "d"))
    names = [
        [p.name for p in probes_of("source", [Task(found)], head, tokenizer)] for found in ([plain], [plain, chosen])
    ]
    assert names == [["source/accuracy"], ["source/accuracy", "source/choice"]]
    assert list(probes_of("source", [], head, tokenizer)) == []


# Samples


def test_where_a_text_goes_on_only_choices_are_asked(tokenizer):
    """An answer that stops is right for a task, but text in which the answer's word stands never teaches to stop there."""
    head = LanguageHead(model_of(tokenizer))
    item = Item("cloze", "ab", "c", ("c", "d"), 0)
    (probe,) = probes_of("target", [Task([item], ends=False)], head, tokenizer)
    assert probe.name == "target/choice"
    both = list(probes_of("target", [Task([item], ends=False), Task([Item("plain", "ab", "c")])], head, tokenizer))
    assert [[item.skill for item in probe.items] for probe in both] == [["plain"], ["cloze"]]
    (sample,) = samples_of_tasks("target", [Task([item], ends=False)], head.model, tokenizer, 3)
    assert sample.grade is None and sample.reference == "c"


def test_samples_are_spread_over_the_skills_and_graded(tokenizer):
    model = model_of(tokenizer)
    items = [Item(skill, f"{skill}{i}", str(i)) for skill in "abc" for i in range(3)]
    tasks = [Task(items[:6]), Task(items[6:], lambda item, text: item.completion == "0")]
    found = list(samples_of_tasks("source", tasks, model, tokenizer, 7))
    assert [sample.shown for sample in found] == ["a0", "b0", "c0", "a1", "b1", "c1", "a2"]
    assert len(list(samples_of_tasks("source", tasks, model, tokenizer, 99))) == 9
    lines = Samples(found, model, tokenizer).lines(5, "tuned")
    tokens = [writes(model, tokenizer(sample.shown)["input_ids"], 20) for sample in found]
    assert [line["output"] for line in lines] == [tokenizer.decode(t, skip_special_tokens=True) for t in tokens]
    assert [line["right"] for line in lines if line["skill"] == "c"] == [True, False]
    keys = ["step", "model", "role", "skill", "prompt", "reference", "output", "right"]
    assert all(list(line) == keys for line in lines)
    assert (lines[0]["step"], lines[0]["model"], lines[0]["role"], lines[0]["reference"]) == (5, "tuned", "source", "0")
    assert all(line["right"] == (line["output"] == line["reference"]) for line in lines if line["skill"] != "c")


def test_samples_of_rows_take_the_prompt_or_the_first_half(tokenizer):
    model = model_of(tokenizer)
    rows, texts = (
        encode([prompted(*pair) for pair in pairs], tokenizer)
        for pairs in ([("ask", "answer"), ("a" * 9, "b" * 40)], [("", "0123456789a"), ("", "f" * 60), ("", "")])
    )
    found = list(samples_of_texts("target", [*rows, *texts], model, tokenizer, 9))
    shown = [(sample.shown, sample.reference, sample.skill) for sample in found]
    assert shown[:2] == [("ask", "answer", "answer"), ("a" * 9, "b" * 40, "answer")]
    assert shown[2:] == [("012345", "6789a", "text"), ("f" * 31, "f" * 29, "text")], "a text of nothing is left out"
    lines = Samples(found, model, tokenizer).lines(0, "base")
    assert all(line["right"] is None and line["role"] == "target" for line in lines)
    limits = [sample.prompt.limit for sample in found]
    assert limits == [61, 55, 58, 33], "as far as the positions reach"
    prompts = [sample.prompt.tokens for sample in found]
    written = generate(model, prompts, limits=limits, stops=[END])
    assert [line["output"] for line in lines] == [tokenizer.decode(t, skip_special_tokens=True) for t in written]


def test_of_many_turns_the_first_answer_is_the_reference(tokenizer):
    model = model_of(tokenizer)
    tokens = tokenizer("hi: hello. and: bye.")["input_ids"]
    labelled = [4 <= i < 10 or i >= 16 for i in range(20)]
    (sample,) = samples_of_texts("target", [Example(tokens, labelled)], model, tokenizer, 1)
    assert (sample.shown, sample.reference) == ("hi: ", "hello.")
