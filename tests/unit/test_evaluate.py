"""Whole evaluations: a base and several deltas in one pass, what is found and kept, and the command."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from exam_world import DELTAS, WORDS, make_exam_world, pick_rows
from little_world import loralab, rows, write_rows
from loralab.base.model import load
from loralab.evals.texts import TextEngine
from loralab.lab import evaluate as evaluation
from loralab.lab.deltas import names_of, read_delta
from loralab.lab.evaluate import evaluate
from loralab.lab.evaluation import read_evaluation
from loralab.lab.questions import Questions, unheeded


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_exam_world(tmp_path_factory.mktemp("exams"))


def asked(world: Path, tasks: list[str], deltas=(), **more: Any):
    include = (str(world / "tasks"),)
    paths = [str(world / name) for name in deltas]
    return evaluate(str(world / "base"), tasks, deltas=paths, device="cpu", include=include, **more)


ALL = ["pick", "say", "read"]


@pytest.fixture(scope="module")
def together(world):
    return asked(world, [*ALL, str(world / "items.jsonl")], DELTAS)


# A base and its deltas at once


def test_each_delta_scores_as_if_it_were_evaluated_alone(world, together):
    assert together.models == ["base", *DELTAS]
    for name in DELTAS:
        alone = asked(world, [*ALL, str(world / "items.jsonl")], [name])
        assert alone.models == ["base", name]
        for mine in alone.measured:
            other = together.find(mine.model, mine.name)
            assert other.score.value == pytest.approx(mine.score.value, rel=1e-6), (name, mine.name)
            assert other.score.standard_error == pytest.approx(mine.score.standard_error, rel=1e-4)
        outputs = [row["tuned_output"] for row in together.items if row["model"] == name]
        assert outputs == [row["tuned_output"] for row in alone.items]
    assert len({together.find(model, "read/bits_per_byte").score.value for model in together.models}) == 5


def test_a_fine_tuned_checkpoint_scores_as_when_it_is_the_base(world, together):
    own = evaluate(str(world / "full"), ALL, include=(str(world / "tasks"),), device="cpu")
    for name in ("pick/acc", "pick/acc_norm", "say/exact_match", "read/bits_per_byte"):
        assert own.find("base", name).score.value == pytest.approx(together.find("full", name).score.value, rel=1e-5)


def test_loading_and_tokenising_happen_once_and_forwards_grow_with_the_models(world, monkeypatch):
    loaded, tokenised = [], []
    sound, tokens = evaluation.load, TextEngine.tokens

    def counted_load(path, **chosen):
        loaded.append(path)
        return sound(path, **chosen)

    def counted_tokens(self, texts, **chosen):
        found = tokens(self, texts, **chosen)
        tokenised.append(len(found))
        return found

    monkeypatch.setattr(evaluation, "load", counted_load)
    monkeypatch.setattr(TextEngine, "tokens", counted_tokens)
    one = asked(world, ["pick", "read"])
    texts = sum(tokenised)
    tokenised.clear()
    four = asked(world, ["pick", "read"], DELTAS[:3])
    assert loaded == [str(world / "base")] * 2
    assert sum(tokenised) <= 2 * texts, "a text read again for each model would make it four times"
    before, after = one.facts["cost"], four.facts["cost"]
    assert after["forwards"] == 4 * before["forwards"] > 0
    assert after["tokens"] == 4 * before["tokens"] < after["plain_tokens"]


def test_the_base_is_bit_for_bit_what_it_was(world, monkeypatch):
    bases = []
    sound = evaluation.load
    monkeypatch.setattr(evaluation, "load", lambda path, **chosen: bases.append(sound(path, **chosen)) or bases[-1])
    asked(world, ALL, DELTAS)
    fresh = load(str(world / "base"), device="cpu").model.state_dict()
    worn = {name.replace(".base.", "."): value for name, value in bases[0].model.state_dict().items()}
    assert all(torch.equal(worn[name], value) for name, value in fresh.items())


def test_a_run_folder_stands_for_its_base_and_its_delta(tmp_path):
    from little_world import make_world, only_run, overrides

    made = make_world(tmp_path / "w")
    assert loralab("train", "sft-lora", *overrides(made, train__steps=2), "--runs", tmp_path / "runs", "--json") == 0
    run = only_run(tmp_path / "runs")
    items = write_rows(tmp_path / "items.jsonl", rows(4, seed=9))
    by_run = evaluate(str(run), [str(items)], device="cpu")
    by_name = evaluate(str(made / "base"), [str(items)], deltas=[str(run)], device="cpu")
    assert by_run.models == by_name.models == ["base", run.name]
    values = [[(one.name, one.score.value) for one in found.measured] for found in (by_run, by_name)]
    assert values[0] == values[1]


def test_deltas_are_named_by_their_folders():
    assert names_of(["runs/a/delta", "runs/b", "x/b/", "b"]) == ["a", "b", "b (2)", "b (3)"]
    assert names_of(["base"]) == ["base's delta"]


def test_what_a_checkpoint_did_not_change_is_no_part_of_its_delta(world, tmp_path):
    base = load(str(world / "base"), device="cpu")
    tuned = load(str(world / "base"), device="cpu")
    with torch.no_grad():
        tuned.model.model.norm.weight.add_(1)
    tuned.model.save_pretrained(tmp_path / "tuned")
    assert list(read_delta(str(tmp_path / "tuned"), base).whole) == ["model.norm.weight"]


# What is found


def test_scores_items_and_changes_belong_together(together):
    for task, metric, n in [
        ("pick", "acc", 12),
        ("say", "exact_match", 12),
        ("reverse", "accuracy", 6),
        ("items", "choice", 8),
    ]:
        name = f"{task}/{metric}"
        for model in DELTAS:
            mine = [row for row in together.items if row["model"] == model and row["probe"] == name]
            assert [row["item"] for row in mine] == list(range(n))
            one, base = together.find(model, name), together.find("base", name)
            assert one.score.n == n
            assert one.score.value == pytest.approx(sum(row["tuned_right"] for row in mine) / n)
            assert base.score.value == pytest.approx(sum(row["base_right"] for row in mine) / n)
            lost = sum(row["base_right"] > row["tuned_right"] for row in mine)
            assert one.change["lost"] == lost and one.change["won"] - lost == round(n * one.change["value"])
    pick = together.find("base", "pick/acc")
    chances = [1 / len(row["choices"]) for row in pick_rows()]
    assert pick.chance == pytest.approx(sum(chances) / 12) and together.find("base", "say/exact_match").chance is None
    assert (pick.version, pick.fewshot, len(pick.prompt_hash), len(pick.template_hash)) == ("1.5", 0, 64, 64)
    assert not together.find("base", "read/bits_per_byte").higher_is_better


def test_outputs_are_kept_and_choices_are_named(together):
    for row in together.items:
        if row["probe"].startswith("pick/"):
            number = row["item"]
            assert row["reference"] == pick_rows()[number]["choices"][number % 2]
            assert row["base_output"] in pick_rows()[number]["choices"]
        if row["probe"] == "say/exact_match":
            assert row["reference"] == WORDS[row["item"] % 10] and isinstance(row["tuned_output"], str)
    read = [row for row in together.items if row["probe"].startswith("read/") and row["model"] == "lora"]
    base = together.find("base", "read/bits_per_byte").score.value
    total, size = (sum(row[key] for row in read) for key in ("base_loss_sum", "num_tokens"))
    assert base == pytest.approx(total / size / 0.6931471805599453)


def test_a_folder_holds_all_of_it(world, together, tmp_path):
    found = asked(world, ["pick"], ["lora"], out=tmp_path / "out")
    again = read_evaluation(tmp_path / "out")
    assert again.summary()["scores"] == json.loads(json.dumps(found.summary()["scores"]))
    assert len(again.items) == 2 * 12
    for mine, read in zip(found.items, again.items, strict=True):
        assert {key: value for key, value in read.items() if value is not None} == dict(mine)
    assert again.facts["deltas"] == {"lora": {"path": str(world / "lora")}}
    assert again.facts["fingerprint"] == load(str(world / "base"), device="cpu").fingerprint
    assert loralab("report", tmp_path / "out") == 0
    assert "pick" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_perplexity_beyond_all_numbers_is_left_out_and_said(world, tmp_path, capsys):
    task = (world / "tasks" / "read.yaml").read_text(encoding="utf-8").replace("bits_per_byte", "word_perplexity")
    kept = [line for line in task.splitlines() if not line.startswith(("task:", "doc_to_target"))]
    (tmp_path / "huge.yaml").write_text("\n".join(["task: huge", "doc_to_target: asked", *kept]), encoding="utf-8")
    long = [{"asked": "q" * 300, "choices": ["z" * 300, "y" * 300]}] * 2
    data = {"huge": str(write_rows(tmp_path / "rows.jsonl", long))}
    found = evaluate(str(world / "base"), ["huge"], include=(str(tmp_path),), data=data, device="cpu")
    assert found.measured == [] and found.facts["left_out"] == ["huge/word_perplexity"]
    assert "too large for a number: huge/word_perplexity." in " ".join(found.notes())
    assert read_evaluation(found.write(tmp_path / "out")).measured == []
    words = ["--include", tmp_path, "--data", f"huge={data['huge']}", "--device", "cpu"]
    capsys.readouterr()
    assert loralab("evaluate", world / "base", "--tasks", "huge", *words) == 0
    assert "Left out" in capsys.readouterr().out


# The command


def test_the_command_prints_json(world, capsys):
    words = [
        "--include",
        world / "tasks",
        "--delta",
        world / "lora",
        "--delta",
        world / "full",
        "--device",
        "cpu",
        "--json",
    ]
    assert loralab("evaluate", world / "base", "--tasks", "pick,read", "--limit", 5, *words) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["models"] == ["base", "lora", "full"] and said.err == ""
    names = {(line["model"], line["name"]) for line in found["scores"]}
    assert ("full", "pick/acc_norm") in names and ("base", "read/bits_per_byte") in names
    assert all(line["n"] == 5 for line in found["scores"])
    assert all((line["change"] is None) is (line["model"] == "base") for line in found["scores"])


def test_tasks_that_an_option_says_nothing_to_are_named(world, tmp_path, capfd):
    plain = (world / "tasks" / "pick.yaml").read_text()
    shown = plain.replace("test: ", f"train: {world / 'pick.jsonl'}, test: ", 1).replace("task: pick", "task: shown")
    (tmp_path / "shown.yaml").write_text(f"{shown}training_split: train\n")
    items = world / "items.jsonl"
    words = ["evaluate", world / "base", "--tasks", f"shown,{items}", "--include", tmp_path, "--device", "cpu"]
    assert loralab(*words, "--limit", "2", "--fewshot", "1") == 0
    said = " ".join(capfd.readouterr().out.split())
    assert f"warning: fewshot said nothing to {items}: these are asked as they stand" in said
    assert loralab(*words, "--limit", "2", "--fewshot", "0") == 0
    assert "warning" not in capfd.readouterr().out, "none were asked for, and items have none"
    found = Questions(["code", "hellaswag", "pocket:calc"], fewshot=2, chat=True)
    deaf = ["humaneval", "pocket:calc"]
    assert unheeded(found) == {"fewshot": deaf, "chat": deaf}
    assert unheeded(Questions(["hellaswag"], fewshot=2, chat=True)) == unheeded(Questions(["code"])) == {}


def test_the_command_prints_a_table_and_writes_a_folder(world, tmp_path, capfd):
    words = ["--include", world / "tasks", "--delta", world / "lora", "--device", "cpu", "--out", tmp_path / "out"]
    assert loralab("evaluate", world / "base", "--tasks", "pick,say", *words) == 0
    said = capfd.readouterr()
    assert said.err == ""
    lines = said.out.splitlines()
    assert lines[0].split()[:4] == ["task", "base", "after", "change"]
    assert any(line.startswith("pick/acc ") for line in lines) and lines[-1] == f"wrote {tmp_path / 'out'}"
    assert pd.read_parquet(tmp_path / "out" / "items.parquet").model.unique().tolist() == ["lora"]
    assert loralab("report", tmp_path / "out", "--out", tmp_path / "page.html") == 0
    assert (tmp_path / "page.html").stat().st_size > 1000
