"""Classifiers and reward models as runs: what they learn, refuse, save for stock tools, and how they go on."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

from little_world import CHARACTERS, loralab, make_base, overrides, same_bits, write_rows
from loralab.base.labelled import collate_labelled
from loralab.delta.store import load_lowrank
from loralab.errors import DataError, LoralabError, SpecError
from loralab.lab.check import check
from loralab.lab.experiment import train
from loralab.lab.objectives import prepare
from loralab.lab.result import Result
from loralab.lab.watch import Silent
from loralab.run.folder import RunFolder, read_lines
from loralab.spec.recipes import read
from loralab.training.checkpoint import read_checkpoint
from tiny import tiny

STEPS = 24


def words(rng: random.Random, letters: str) -> str:
    return "".join(rng.choice(letters) for _ in range(rng.randint(4, 8)))


def judged(kind: str, count: int, seed: int) -> list[dict[str, Any]]:
    """Make rows that can be learned: digits are better than letters, and more of them is a larger number."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        prompt, good, bad = f"say {words(rng, 'abc')}: ", words(rng, "0123"), words(rng, "defg")
        up = rng.random() < 0.6
        rows = {
            "pairs": {"prompt": prompt, "chosen": good, "rejected": bad},
            "thumbs": {"prompt": prompt, "completion": good if up else bad, "label": up},
            "classify": {"sentence1": prompt, "sentence2": good if up else bad, "label": "number" if up else "letters"},
            "regression": {"text": prompt + (good if up else bad), "label": 2.0 if up else -1.0},
        }
        found.append(rows[kind])
    return found


def make_encoder(folder: Path, family: str) -> None:
    """Save a tiny encoder of masked language modelling, with a tokenizer that joins and ends texts."""
    tiny(family, type_vocab_size=2).save_pretrained(folder)
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {token: number for number, token in enumerate([*special, *CHARACTERS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    ends = [("<s>", 1), ("</s>", 2)]
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=ends
    )
    names = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    PreTrainedTokenizerFast(tokenizer_object=backend, model_input_names=inputs, **names).save_pretrained(folder)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Write bases of three families, and rows of each kind."""
    folder = tmp_path_factory.mktemp("judged")
    make_base(folder / "base")
    for family in ("bert", "roberta"):
        make_encoder(folder / family, family)
    for kind in ("pairs", "thumbs", "classify", "regression"):
        write_rows(folder / f"{kind}.jsonl", judged(kind, 160, 1))
        write_rows(folder / f"{kind}-held.jsonl", judged(kind, 40, 2))
    return folder


def spec(world: Path, kind: str = "pairs", base: str = "base", method: str = "lora", **keys: Any):
    """Give the spec of a short run on rows of a kind."""
    objective = {"name": "reward"} if kind in ("pairs", "thumbs") else {"name": "classify"}
    objective |= {"regression": True} if kind == "regression" else {}
    found = {
        **{"model.path": str(world / base), "model.device": "cpu", "train.steps": STEPS, "train.batch_size": 8},
        **{"data.train": str(world / f"{kind}.jsonl"), "data.validation": str(world / f"{kind}-held.jsonl")},
        **{"data.max_length": 48, "data.packing": False, "method.name": method, "objective": objective},
        **{
            "optimizer.learning_rate": 3e-3 if method == "full" else 0.01,
            "probes.every": 0.5,
            "checkpoints.every": 0.5,
        },
    }
    found |= {} if method in ("full", "peft") else {"method.rank": 4}
    found |= {"method.keys": {"r": 4, "lora_alpha": 8}} if method == "peft" else {}
    found |= {"method.links": 2} if method == "cola" else {}
    found |= {name.replace("__", "."): value for name, value in keys.items()}
    recipe = world / "empty.yaml"
    recipe.write_text("name: judged\n", encoding="utf-8")
    return read(recipe, [f"{name}={json.dumps(value)}" for name, value in found.items()])


def scores_of(run: Any, step: int | None = None) -> dict[str, float]:
    return {name: score.value for name, score in run.after.items()}


# What is learned


@pytest.mark.parametrize(
    ("kind", "score", "least"),
    [("pairs", "accuracy", 0.9), ("thumbs", "auc", 0.9), ("classify", "accuracy", 0.9), ("regression", "pearson", 0.8)],
)
def test_what_people_judged_is_learned(world, tmp_path, kind, score, least):
    run = train(spec(world, kind), tmp_path)
    found, before = scores_of(run), {name: value.value for name, value in run.before.items()}
    assert found[f"target/{score}"] > least
    assert found["target/loss"] < 0.75 * before["target/loss"]
    lines = [line for line in read_lines(run.folder.metrics) if "loss" in line]
    assert all(line["labelled"] == 8 for line in lines), "the loss is a mean over rows"


def test_the_best_checkpoint_is_what_is_saved(world, tmp_path):
    run = train(spec(world, train__steps=12, probes__every=2, checkpoints__every=2), tmp_path)
    shares = {
        line["step"]: line["value"] for line in read_lines(run.folder.scores) if line["name"] == "target/accuracy"
    }
    best = max(shares, key=lambda step: (shares[step], -step))
    assert run.status["delta_step"] == best
    assert_saved(run, best)


def test_a_run_that_only_gets_worse_keeps_its_start(world, tmp_path):
    keys = {"train__steps": 4, "optimizer__learning_rate": 1e-6, "schedule__name": "constant"}
    run = train(spec(world, **keys, probes__every=1, checkpoints__every=1), tmp_path)
    shares = {line["value"] for line in read_lines(run.folder.scores) if line["name"] == "target/accuracy"}
    assert len(shares) == 1, "at this rate nothing is won, and of equal ones the first counts"
    assert run.status["delta_step"] == 0
    assert_saved(run, 0)


def assert_saved(run: Result, step: int) -> None:
    """Compare the saved pairs with those of the checkpoint of a step."""
    kept = read_checkpoint(run.folder.checkpoints / f"step-{step}").tensors["method"]
    saved = load_lowrank(run.folder.delta)
    assert saved.keys()
    for name, pair in saved.items():
        assert torch.equal(pair.A, kept[f"{name}.link-1.A"]) and torch.equal(pair.B, kept[f"{name}.link-1.B"])


def test_a_step_reads_each_prompt_once(world, tmp_path):
    prepared = prepare(spec(world))
    (batch,) = next(prepared.objective.batches(prepared.base.model))
    feed = prepared.data.feed
    chosen = [prepared.data.train[i] for [i] in feed.sequences(0)[:8]]
    parts = np.array([example.segments for example in chosen])
    assert parts[:, 0].min() > 5
    assert batch.tokens.numel() == parts.sum()
    apart = prepare(spec(world, objective__share_prompts=False))
    (batch,) = next(apart.objective.batches(apart.base.model))
    assert batch.tokens.numel() == parts.sum() + parts[:, 0].sum()
    run = train(spec(world, train__steps=1), tmp_path)
    assert run.status["tokens"] == parts.sum()


def test_words_need_no_head(world, tmp_path):
    run = train(spec(world, "classify", objective__words=["b", "a"]), tmp_path)
    assert scores_of(run)["target/accuracy"] > 0.9
    facts = json.loads((run.folder.delta / "adapter_config.json").read_text())
    assert facts["task_type"] == "CAUSAL_LM" and facts["modules_to_save"] is None


# What stock tools read


def logits_of(model: torch.nn.Module, rows: list[torch.Tensor], types: list[torch.Tensor] | None) -> torch.Tensor:
    """Let a stock model score texts one by one."""
    named = [{} if types is None else {"token_type_ids": t[None]} for t in types or [None] * len(rows)]
    with torch.no_grad():
        return torch.cat([model.eval()(row[None], **more).logits for row, more in zip(rows, named, strict=True)])


@pytest.mark.parametrize(
    ("method", "base", "kind"),
    [
        *[(method, "base", "pairs") for method in ("lora", "lora_plus", "cola", "peft", "full")],
        *[(method, base, "classify") for method in ("lora", "peft", "full") for base in ("bert", "roberta")],
    ],
)
def test_stock_tools_read_what_a_run_saved(world, tmp_path, method, base, kind):
    chosen = spec(world, kind, base, method, train__steps=4)
    run = train(chosen, tmp_path)
    delta = run.folder.delta
    outputs = 1 if kind == "pairs" else 2
    if method == "full":
        stock = AutoModelForSequenceClassification.from_pretrained(delta)
        assert kind == "pairs" or stock.config.id2label == {0: "letters", 1: "number"}
    else:
        torch.manual_seed(99)  # another head, which the adapter must replace
        stock = AutoModelForSequenceClassification.from_pretrained(world / base, num_labels=outputs)
        stock = PeftModel.from_pretrained(stock, delta)
        assert json.loads((delta / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    assert len(AutoTokenizer.from_pretrained(delta)) == len(AutoTokenizer.from_pretrained(world / base))
    prepared = prepare(chosen)
    fresh = prepared.objective.head.scores(next(prepared.objective.batches(prepared.base.model))[0])
    batch = collate_labelled([prepared.data.validation[i] for i in range(6)], share=False)
    theirs = logits_of(
        stock, batch.documents(), batch.document_types() if base == "bert" or base == "roberta" else None
    )
    # The items' table holds what the run measured last: of pairs and classes the loss, which the logits give again.
    found = torch.nn.functional.softplus(theirs[1::2, 0] - theirs[0::2, 0])
    if kind == "classify":
        found = torch.nn.functional.cross_entropy(theirs, batch.labels.long(), reduction="none")
    order = np.random.default_rng(0).permutation(len(prepared.data.validation))
    items = pd.read_parquet(run.folder.path / "items.parquet")["tuned_loss_sum"].to_numpy()
    measured = [items[list(order).index(i)] for i in range(6)]
    np.testing.assert_allclose(found.numpy(), measured, rtol=1e-4, atol=1e-5)
    assert fresh.shape[1] == outputs


# How runs go on


class StopAt(Silent):
    """A display that falls over in the middle of a run."""

    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        if line["step"] == self.at:
            raise OSError("the machine is gone")


@pytest.mark.parametrize(("kind", "base"), [("pairs", "base"), ("classify", "bert")])
def test_a_broken_off_run_goes_on_to_the_same_bits(world, tmp_path, kind, base):
    keys = {
        "train__steps": 6,
        "checkpoints__every": 2,
        "probes__every": 2,
        "method__dropout": 0.1,
        "checkpoints__keep_last": 2,
    }
    chosen = spec(world, kind, base, **keys)
    whole = train(chosen, tmp_path / "whole")
    with pytest.raises(OSError, match="the machine is gone"):
        train(chosen, tmp_path / "broken", display=StopAt(5))
    train(chosen, tmp_path / "broken")
    same_bits(tmp_path / "broken" / chosen.folder_name, whole.folder.path)


def test_the_head_follows_the_seed(world):
    first, same, other = (prepare(spec(world, seed=seed)).base for seed in (1, 1, 2))
    assert torch.equal(first.model.score.weight, same.model.score.weight)
    assert not torch.equal(first.model.score.weight, other.model.score.weight)
    assert first.fingerprint == other.fingerprint


# What is refused, and shown


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data.streaming", True),
        ("probes.source", "pocket:source"),
        ("probes.target", "pocket:calc"),
    ],
)
def test_what_only_text_has_is_refused_by_name(world, tmp_path, key, value):
    with pytest.raises(SpecError, match=f"{key} means nothing here") as caught:
        train(spec(world, **{key.replace(".", "__"): value}), tmp_path)
    assert caught.value.exit_code == 2 and not list(tmp_path.iterdir())


def test_wrong_words_and_rows_are_refused(world, tmp_path):
    for wrong, kind, message in (
        ({"objective__words": ["a", "b", "c"]}, "classify", "3 words cannot stand for the 2 classes letters, number"),
        ({"objective": {"name": "reward"}}, "classify", "a text and a label"),
        ({"data__max_length": 80}, "pairs", "exceed the 64 positions"),
        ({"objective__words": ["aaaaaaaaaa", "b"], "data__max_length": 64}, "classify", "no room is left for a word"),
    ):
        with pytest.raises(LoralabError, match=message) as caught:
            train(spec(world, kind, **wrong), tmp_path)
        problems = getattr(caught.value, "problems", [caught.value])
        assert caught.value.exit_code == 2 and all(problem.fix for problem in problems)


def test_thumbs_of_one_kind_are_refused_before_the_model_is_loaded(world, tmp_path):
    rows = [row for row in judged("thumbs", 40, 3) if row["label"]]
    write_rows(tmp_path / "up.jsonl", rows)
    with pytest.raises(DataError, match="thumbs are up"):
        train(spec(world, "thumbs", data__train=str(tmp_path / "up.jsonl")), tmp_path / "runs")
    # Held out, they are measured all the same; there is no area under the curve to choose by.
    run = train(spec(world, "thumbs", data__validation=str(tmp_path / "up.jsonl"), train__steps=2), tmp_path / "runs")
    assert "target/auc" not in run.after and "target/accuracy" in run.after


def test_check_shows_what_is_judged(world):
    found = check(spec(world, train__steps=3), measure=True)
    row = json.loads((world / "pairs.jsonl").read_text().splitlines()[0])
    (prompt, is_answer), (chosen, _), (rejected, _) = found.examples[0]
    assert prompt.endswith(row["prompt"]) and not is_answer
    assert f"chosen: {row['chosen']}" in chosen and f"rejected: {row['rejected']}" in rejected
    assert found.total_steps == 3 and found.stop.runs == 0
    json.dumps(found.summary())
    for kind, last in (("thumbs", ("label: up", "label: down")), ("classify", ("label: number", "label: letters"))):
        shown = check(spec(world, kind)).examples[0]
        assert shown[-1][1] and shown[-1][0].strip() in last


def test_the_command_line_trains_and_says_what_is_wrong(world, tmp_path, capsys):
    given = overrides(world)[:2]
    rows = [f"data.train={world / 'pairs.jsonl'}", "data.max_length=48", "data.general=null"]
    assert loralab("train", "reward-lora", *given, *rows, "train.steps=2", "--runs", tmp_path) == 0
    (run,) = tmp_path.iterdir()
    assert RunFolder(run).read_status()["state"] == "done"
    assert (
        loralab("train", "reward-lora", *given, *rows, "train.steps=2", "data.streaming=true", "--runs", tmp_path) == 2
    )
    assert "data.streaming means nothing here" in " ".join(capsys.readouterr().err.split())
