"""Bad input to `loralab evaluate`: said in words, with what to do, and exit code 2; nothing that was written is lost."""

import json
from pathlib import Path

import pytest

from exam_world import make_adapter, make_exam_world, pick_rows
from little_world import loralab, make_base, write_rows

UNSAFE = """
task: unsafe
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pick.jsonl}}}}
unsafe_code: true
output_type: generate_until
test_split: test
doc_to_text: "{{{{asked}}}}"
doc_to_target: asked
generation_kwargs: {{until: ["z"], max_gen_toks: 3}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    made = make_exam_world(tmp_path_factory.mktemp("exams"))
    (made / "tasks" / "unsafe.yaml").write_text(UNSAFE.format(folder=made), encoding="utf-8")
    write_rows(made / "lacking.jsonl", [{"asked": "dog", "choices": ["a", "b"]}])
    write_rows(made / "unasked.jsonl", [{"choices": ["a", "b"], "right": 0}])
    write_rows(made / "wrong.jsonl", [{"asked": "dog", "choices": ["a", "b"], "right": right} for right in (1, 2, -1)])
    write_rows(made / "empty.jsonl", [])
    (made / "more").mkdir()
    (made / "broken").mkdir()
    (made / "broken" / "torn.yaml").write_text("task: torn\ndoc_to_text: [unclosed\n", encoding="utf-8")
    write_rows(made / "more" / "items.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    (made / "broken" / "lame.yaml").write_text("task: lame\noutput_type: multiple_choice\n", encoding="utf-8")
    (made / "rows.txt").write_text("a", encoding="utf-8")
    (made / "torn.jsonl").write_text('{"asked": "dog', encoding="utf-8")
    write_rows(made / "noitem.jsonl", [{"prompt": "1+1="}])
    write_rows(made / "noprogram.jsonl", [{"prompt": "def f():", "test": "x"}])
    make_adapter(made / "other", 4, r=2, target_modules=["q_proj"])
    weights = made / "other" / "adapter_config.json"
    weights.write_text(weights.read_text().replace('"LORA"', '"LOHA"'), encoding="utf-8")
    make_base(made / "narrow", hidden_size=16, intermediate_size=24, seed=5)
    make_base(made / "mute")
    for file in made.glob("mute/tokenizer*"):
        file.unlink()
    (made / "nothing").mkdir()
    (made / "nothing" / "note.txt").write_text("mine", encoding="utf-8")
    return made


def said_of(world: Path, capsys, *words) -> str:
    """Run the command in the world's folder, check that it ends in words and not in a traceback, and give them."""
    code = loralab("evaluate", *words)
    said = capsys.readouterr()
    assert (code, said.out) == (2, ""), said
    assert "Traceback" not in said.err
    return " ".join(said.err.replace("│", " ").split())  # typer draws boxes around what it refuses itself


PICK = ("--tasks", "pick")
CASES = {
    "an unknown task": (("--tasks", "pikc"), ("there is no task 'pikc'", "did you mean 'pick'?")),
    "an unknown task of the catalogue": (("--tasks", "pick,hela_swag"), ("'hela_swag'", "did you mean 'hellaswag'?")),
    "an unknown suite of the pocket world": (("--tasks", "pocket:clac"), ("did you mean pocket:calc",)),
    "no task": (("--tasks", ""), ("no task is named", "--tasks hellaswag")),
    "commas alone": (("--tasks", " , ,"), ("no task is named",)),
    "a file of items that is not there": (("--tasks", "none.jsonl"), ("none.jsonl",)),
    "a file of items with an odd row": (("--tasks", "{world}/noitem.jsonl"), ("`completion` is missing", "row 1")),
    "data for what is not asked": ((*PICK, "--data", "say={world}/pick.jsonl"), ("'say', which is not asked", "pick")),
    "data without a file": ((*PICK, "--data", "pick"), ("does not say which file", "--data hellaswag=")),
    "data of no task": ((*PICK, "--data", "={world}/pick.jsonl"), ("does not say which file",)),
    "data that are not there": ((*PICK, "--data", "pick=none.jsonl"), ("no such file", "none.jsonl")),
    "data of another type": ((*PICK, "--data", "pick={world}/rows.txt"), ("'.txt' cannot be read", ".jsonl")),
    "data of two types": (
        (*PICK, "--data", "pick={world}/pick.jsonl", "--data", "pick:test={world}/rows.csv"),
        ("rows.csv",),
    ),
    "data of no split": ((*PICK, "--data", "pick:tset={world}/pick.jsonl"), ("no split 'tset'", "test")),
    "data that lack a column": (
        (*PICK, "--data", "pick={world}/lacking.jsonl"),
        ("no column 'right'", "there are: asked, choices", "lacking.jsonl"),
    ),
    "data that lack a column inside a template": (
        (*PICK, "--data", "pick={world}/unasked.jsonl"),
        ("'asked' is undefined", "choices, right", "unasked.jsonl"),
    ),
    "rows without their right choice": (
        (*PICK, "--data", "pick={world}/wrong.jsonl"),
        ("of 2 of 3 items the right choice is none of their choices, of item 2 for one", "wrong.jsonl"),
    ),
    "a file of items without rows": (("--tasks", "{world}/empty.jsonl"), ("empty.jsonl",)),
    "problems without rows": (("--tasks", "humaneval", "--data", "humaneval={world}/empty.jsonl"), ("empty.jsonl",)),
    "two files of one name": (
        ("--tasks", "{world}/items.jsonl,{world}/more/items.jsonl"),
        ("two tasks are named 'items'",),
    ),
    "data that are torn": ((*PICK, "--data", "pick={world}/torn.jsonl"), ("do not fit the task 'pick'", "torn.jsonl")),
    "data without rows": ((*PICK, "--data", "pick={world}/empty.jsonl"), ("empty.jsonl",)),
    "problems that lack columns": (
        ("--tasks", "humaneval", "--data", "humaneval={world}/noprogram.jsonl"),
        ("no column `task_id`", "prompt, test"),
    ),
    "no folder of tasks": (("--tasks", "pick", "--include", "{world}/none"), ("no such folder of tasks", "none")),
    "a torn task": (("--tasks", "torn", "--include", "{world}/broken"), ("cannot read this file", "torn.yaml")),
    "a task without data": (("--tasks", "lame", "--include", "{world}/broken"), ("the task 'lame' cannot be made",)),
    "a task that runs code": (("--tasks", "unsafe"), ("without protection", "--unsafe")),
    "no samples": ((*PICK, "--samples", "0"), ("samples",)),
    "half a sample": ((*PICK, "--samples", "0.5"), ("samples",)),
    "no items": ((*PICK, "--limit", "0"), ("limit",)),
    "fewer than no examples": ((*PICK, "--fewshot", "-1"), ("fewshot",)),
    "a temperature below zero": ((*PICK, "--temperature", "-0.5"), ("temperature", "-0.5")),
    "a top-p of nothing": ((*PICK, "--samples", "2", "--top-p", "0"), ("top_p", "0")),
    "a temperature that is no number": ((*PICK, "--temperature", "nan"), ("temperature",)),
    "no chat template": ((*PICK, "--chat"), ("no chat template", "--chat")),
    "examples before programs": (
        ("--tasks", "code", "--fewshot", "3"),
        ("fewshot says nothing to humaneval", "--fewshot", "asked as they stand"),
    ),
    "a chat template for items": (
        ("--tasks", "pocket:copy,{world}/items.jsonl", "--chat"),
        ("chat says nothing to ", "items.jsonl, pocket:copy: ", "where: --chat"),
    ),
    "a delta that is not there": ((*PICK, "--delta", "{world}/lroa"), ("lroa", "did you mean")),
    "a folder without a delta": ((*PICK, "--delta", "{world}/nothing"), ("holds no delta", "adapter_config|PEFT")),
    "a delta of another kind": ((*PICK, "--delta", "{world}/other"), ("not made of plain low-rank pairs", "LOHA")),
    "a checkpoint of another base": ((*PICK, "--delta", "{world}/narrow"), ("no fine-tuning of the base",)),
    "an unknown type of numbers": ((*PICK, "--dtype", "float8"), ("float8",)),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_said_in_words(world, capsys, monkeypatch, case):
    import re

    monkeypatch.chdir(world)
    words, expected = CASES[case]
    given = [word.format(world=world) for word in words]
    include = [] if "--include" in given else ["--include", world / "tasks"]
    said = said_of(world, capsys, world / "base", *given, *include, "--device", "cpu")
    for part in expected:
        assert re.search(part if "|" in part else re.escape(part), said), said


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        ("none", ("no such folder",)),
        ("mute", ("this model has no tokenizer", "copy the tokenizer's files")),
        ("nothing", ("config.json",)),
    ],
)
def test_a_base_that_cannot_be_asked_is_said(world, capsys, base, expected):
    said = said_of(world, capsys, world / base, *PICK, "--include", world / "tasks", "--device", "cpu")
    assert all(part in said for part in expected), said


def test_a_model_that_reads_both_ways_is_refused(world, capsys, tmp_path):
    from transformers import AutoTokenizer

    from tiny import tiny

    tiny("bert").save_pretrained(tmp_path / "bert")
    AutoTokenizer.from_pretrained(world / "base").save_pretrained(tmp_path / "bert")
    capsys.readouterr()
    said = said_of(world, capsys, tmp_path / "bert", *PICK, "--include", world / "tasks", "--device", "cpu")
    assert "reads both ways" in said


def test_a_delta_for_another_base_is_refused_naming_what_differs(world, capsys, tmp_path):
    base = make_base(tmp_path / "narrow", hidden_size=16, intermediate_size=24)
    capsys.readouterr()
    words = ("--include", world / "tasks", "--device", "cpu")
    said = said_of(world, capsys, base, *PICK, "--delta", world / "lora", *words)
    assert (
        "belongs to another base" in said
        and "model.layers.0.self_attn.q_proj is (16, 16), the delta has (32, 32)" in said
    )
    facts = {"base_fingerprint": "f" * 64}
    (world / "wide" / "loralab.json").write_text(json.dumps(facts), encoding="utf-8")
    said = said_of(world, capsys, world / "base", *PICK, "--delta", world / "wide", *words)
    (world / "wide" / "loralab.json").unlink()
    assert "trained on other base weights" in said and "ffffffffffff" in said


def test_an_item_too_long_for_the_model_is_cut_and_counted(world, capsys):
    rows = [{**row, "asked": row["asked"] * 30} for row in pick_rows(3)]
    file = write_rows(world / "long.jsonl", rows)
    words = ("--include", world / "tasks", "--data", f"pick={file}", "--device", "cpu")
    assert loralab("evaluate", world / "base", *PICK, *words) == 0
    said = capsys.readouterr().out
    requests = sum(len(row["choices"]) for row in rows)
    assert f"{requests} contexts were longer than the model reads, and were cut at their beginning." in said


def test_a_choice_too_long_for_the_model_is_refused(world, capsys):
    rows = [{**row, "choices": ["dog" * 30, "cat"]} for row in pick_rows(3)]
    file = write_rows(world / "choices.jsonl", rows)
    words = ("--include", world / "tasks", "--data", f"pick={file}", "--device", "cpu")
    said = said_of(world, capsys, world / "base", *PICK, *words)
    assert "a continuation has 91 tokens, but the model reads 64" in said


def test_a_folder_that_holds_something_else_is_left_alone(world, capsys):
    words = ("--include", world / "tasks", "--device", "cpu", "--out", world / "nothing")
    said = said_of(world, capsys, world / "base", *PICK, *words)
    assert "holds something that is no evaluation" in said
    assert (world / "nothing" / "note.txt").read_text() == "mine"
    assert [file.name for file in (world / "nothing").iterdir()] == ["note.txt"]


def test_an_older_evaluation_stays_when_the_new_one_fails(world, capsys, tmp_path):
    words = ("--include", world / "tasks", "--device", "cpu", "--out", tmp_path / "out")
    assert loralab("evaluate", world / "base", *PICK, *words) == 0
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    said_of(world, capsys, world / "base", "--tasks", "pick,pikc", *words)
    said_of(world, capsys, world / "base", *PICK, "--delta", world / "other", *words)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_folder_that_cannot_take_the_results_is_refused_before_anything_is_loaded(world, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    said = said_of(world, capsys, "no-such-base", "--tasks", "pocket:copy", "--out", str(tmp_path))
    assert "holds something that is no evaluation" in said
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_sampling_what_is_not_sampled_is_refused(world, capsys):
    said = said_of(world, capsys, "pocket", "--tasks", "hellaswag", "--samples", "5")
    assert "none of these tasks is sampled" in said
