"""Tasks in lm-eval's format on our engines: its prompts and its judgements, item by item; what a task is known by."""

import json
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
from catalogue_world import CHOICE, FORMS, PLAIN, choice_rows, harness, made_engine, made_peer, make_tasks, one
from lm_eval.api.metrics import mean_stderr
from lm_eval.models.huggingface import HFLM
from tiny_tokenizers import CHATML_TEMPLATE, CHATML_TOKENS

from little_world import write_rows
from loralab.errors import EvaluationError
from loralab.evals.catalogue import _templates, load_tasks
from loralab.evals.harness import HarnessModel
from loralab.evals.taskfiles import Wanted
from loralab.evals.texts import TextEngine
from loralab.lab.judge import Judged


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def engine() -> TextEngine:
    return made_engine()


@pytest.fixture(scope="module")
def peer() -> HFLM:
    return made_peer()


# The same outcomes as lm-eval's evaluator, on its backend and on ours


@pytest.mark.parametrize("name", ["own_choice", "own_scores", "own_written", "own_rolling", "own_last_word"])
@pytest.mark.parametrize("backend", ["hf", "ours"])
def test_outcomes_and_scores_are_those_of_lm_evals_evaluator(engine, peer, folder, name, backend):
    task = one(engine, name, folder)
    (outcomes,) = task.outcomes(PLAIN)
    found = harness(peer if backend == "hf" else HarnessModel(engine), folder, name)
    theirs = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    filters = {sample["filter"] for sample in theirs}
    for key in filters:
        mine = [sample for sample in theirs if sample["filter"] == key]
        assert len(mine) == len(outcomes) == len(task)
        for (prompt, _), outcome, sample in zip(task.items(), outcomes, mine, strict=True):
            assert prompt in ("", sample["arguments"][0][0])
            for metric in sample["metrics"]:
                ours = outcome.values[f"{metric}:{key}" if len(filters) > 1 else metric]
                assert ours == pytest.approx(sample[metric], rel=1e-5, abs=1e-5)
    metrics = list(outcomes[0].values)
    assert len(metrics) == sum("stderr" not in key and "," in key for key in found["results"][name])
    for metric in metrics:
        bare, _, key = metric.partition(":")
        judged = Judged(task, metric, ["base"], [outcomes])
        expected = found["results"][name][f"{bare},{key or 'none'}"]
        assert judged.scores["base"].value == pytest.approx(expected, rel=1e-5)
        if judged.is_mean:
            error = mean_stderr([float(outcome.values[metric]) for outcome in outcomes])
            assert judged.scores["base"].standard_error == pytest.approx(error, rel=1e-6)
        else:
            assert judged.scores["base"].standard_error > 0


def test_outcomes_of_the_tests_differ_so_that_they_show_something(engine, folder):
    for name, metric in [("own_choice", "acc"), ("own_choice", "acc_norm"), ("own_written", "exact_match:strict")]:
        (outcomes,) = one(engine, name, folder).outcomes(PLAIN)
        assert {float(outcome.values[metric]) for outcome in outcomes} == {0.0, 1.0}, name


def test_the_error_of_an_aggregated_metric_is_a_bootstrap_over_items(engine, folder):
    task = one(engine, "own_scores", folder)
    (outcomes,) = task.outcomes(PLAIN)
    judged = Judged(task, "mcc", ["base"], [outcomes])
    assert not judged.is_mean and not judged.is_right_or_wrong
    pairs = np.array([outcome.values["mcc"] for outcome in outcomes], float)  # (right choice, taken choice)
    draws = pairs[np.random.default_rng(7).integers(0, len(pairs), (4000, len(pairs)))]
    x, y = (draws - draws.mean(1, keepdims=True)).transpose(2, 0, 1)
    spread = np.sqrt((x**2).sum(1) * (y**2).sum(1))
    correlations = np.where(
        spread > 0, (x * y).sum(1) / np.where(spread > 0, spread, 1), 0.0
    )  # of two zero-one variables
    assert judged.scores["base"].value == pytest.approx(np.corrcoef(pairs.T)[0, 1])
    assert judged.scores["base"].standard_error == pytest.approx(correlations.std(), rel=0.15)


def test_a_change_of_an_aggregated_metric_pairs_items(engine, folder):
    """Two models that agree on every item have a change of exactly 0, however uncertain each score is."""
    task = one(engine, "own_scores", folder)
    (outcomes,) = task.outcomes(PLAIN)
    judged = Judged(task, "mcc", ["base", "same"], [outcomes, outcomes])
    change = judged.changes["same"]
    assert (change.value, change.standard_error, change.interval) == (0.0, 0.0, (0.0, 0.0))
    assert judged.scores["same"].standard_error > 0.05


def test_every_view_is_judged_by_its_own_answers(engine, folder):
    model = engine.head.model

    @contextmanager
    def negated():
        model.lm_head.weight.data.neg_()
        yield
        model.lm_head.weight.data.neg_()

    for name in ("own_choice", "own_written", "own_rolling"):
        task = one(engine, name, folder)
        base, tuned, again = task.outcomes([nullcontext, negated, nullcontext])
        assert base == again != tuned
        with negated():
            (alone,) = task.outcomes(PLAIN)
        assert [outcome.values for outcome in alone] == [outcome.values for outcome in tuned]


# What stands before an item


@pytest.mark.parametrize("fewshot", [0, 3])
def test_examples_are_those_that_lm_eval_draws(engine, folder, fewshot):
    task = one(engine, "own_choice", folder, fewshot=fewshot)
    found = harness(HarnessModel(engine), folder, "own_choice", num_fewshot=fewshot)
    theirs = sorted(found["samples"]["own_choice"], key=lambda sample: sample["doc_id"])
    prompts = [prompt for prompt, _ in task.items()]
    assert prompts == [sample["arguments"][0][0] for sample in theirs]
    assert task.card.fewshot == fewshot and prompts[0].count("Which one is") == fewshot + 1
    asked = {row["asked"] for row in choice_rows(9, seed=1)}
    assert sum(words in prompts[0] for words in asked) == fewshot, "examples come from the training split"


def test_chat_templates_are_put_around_prompts_as_lm_eval_does(folder):
    engine = made_engine(special=CHATML_TOKENS, chat_template=CHATML_TEMPLATE)
    for fewshot in (0, 2):
        task = one(engine, "own_choice", folder, chat=True, fewshot=fewshot)
        found = harness(HarnessModel(engine), folder, "own_choice", apply_chat_template=True, num_fewshot=fewshot)
        theirs = sorted(found["samples"]["own_choice"], key=lambda sample: sample["doc_id"])
        prompts = [prompt for prompt, _ in task.items()]
        assert prompts == [sample["arguments"][0][0] for sample in theirs]
        assert prompts[0].startswith("<|im_start|>user\n") and prompts[0].endswith("<|im_start|>assistant\n")


def test_a_chat_template_that_there_is_not_is_said(engine, folder):
    with pytest.raises(EvaluationError, match="no chat template"):
        one(engine, "own_choice", folder, chat=True)


def test_a_limit_takes_the_first_items(engine, folder):
    whole, some = (one(engine, "own_choice", folder, limit=limit) for limit in (None, 4))
    assert list(some.items()) == list(whole.items())[:4] and len(some) == 4


# What a task is


def test_the_card_says_what_was_asked(engine, folder):
    task = one(engine, "own_choice", folder)
    assert (task.card.name, task.card.version, task.card.fewshot) == ("own_choice", "2.5", 0)
    assert task.card.chances == tuple(1 / len(row["choices"]) for row in choice_rows(15, seed=2))
    assert [reference for _, reference in task.items()] == [row["choices"][row["right"]] for row in choice_rows(15, 2)]
    assert one(engine, "own_written", folder).card.chances is None
    assert one(engine, "own_last_word", folder).card.worse_if_more == {"perplexity"}
    assert "word_perplexity" in one(engine, "own_rolling", folder).card.worse_if_more


def test_hashes_tell_prompts_and_templates_apart(engine, folder, tmp_path):
    base = one(engine, "own_choice", folder).card
    again = one(engine, "own_choice", folder).card
    assert (base.prompt_hash, base.template_hash) == (again.prompt_hash, again.template_hash)
    limited = one(engine, "own_choice", folder, limit=3).card
    assert limited.prompt_hash != base.prompt_hash and limited.template_hash == base.template_hash
    other = tmp_path / "own_choice.yaml"
    other.write_text(CHOICE.format(folder=folder).replace("acc_norm, agg", "acc_mutual_info, agg"), encoding="utf-8")
    (tmp_path / "forms.py").write_text(FORMS, encoding="utf-8")
    changed = one(engine, "own_choice", tmp_path).card
    assert changed.template_hash != base.template_hash
    (tmp_path / "forms.py").write_text(FORMS.replace("Which", "What"), encoding="utf-8")
    other.write_text(CHOICE.format(folder=folder), encoding="utf-8")
    reworded = one(engine, "own_choice", tmp_path).card
    assert reworded.prompt_hash != base.prompt_hash
    moved = tmp_path / "test.jsonl"
    write_rows(moved, choice_rows(15, seed=2))
    same = one(engine, "own_choice", folder, data={"test": str(moved)}).card
    assert (same.prompt_hash, same.template_hash) == (base.prompt_hash, base.template_hash), "wherever the rows lie"


def test_groups_and_tags_give_all_of_their_tasks_once(engine, folder):
    wanted = [Wanted(name, include=(str(folder),), limit=2) for name in ("own_group", "own_tag", "own_choice")]
    assert [task.name for task in load_tasks(wanted, engine)] == ["own_choice", "own_scores"]


def test_repeats_are_drawn_anew(engine, folder):
    task = one(engine, "own_sampled", folder)
    task.outcomes(PLAIN)
    answers = [instance.resps for instance in task.instances]
    assert [len(mine) for mine in answers] == [5] * len(task)
    assert all(len(set(mine)) > 1 for mine in answers)


def test_hashes_are_those_of_any_other_process(engine, folder):
    """What differs from process to process, such as addresses in memory, is not hashed."""
    text = json.dumps(_templates(one(engine, "own_choice", folder).task), default=repr)
    assert " at 0x" not in text and str(folder) not in text and "def question(doc)" in text
