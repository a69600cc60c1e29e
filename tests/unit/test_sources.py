import json
import logging

import datasets
import pandas as pd
import pytest

from loralab.base import sources
from loralab.base.sources import Source, read_rows
from loralab.errors import DataError

ROWS = [
    {"question": "one?", "answer": "1"},
    {"question": "zwei – 二?", "answer": "2"},
    {"question": "", "answer": "NA"},
]


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def write_rows(path, rows=ROWS):
    frame = pd.DataFrame(rows)
    if path.suffix == ".jsonl":
        write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    elif path.suffix == ".json":
        write(path, json.dumps(rows, indent=1))
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, sep="\t" if path.suffix == ".tsv" else ",", index=False)
    return path


def read(path, **options):
    return [row for batch in read_rows(Source(str(path), **options)).batches(2) for row in batch]


def refusal(path, **options):
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return caught.value


@pytest.mark.parametrize("ending", ["jsonl", "json", "parquet", "csv", "tsv"])
def test_every_ending_gives_the_same_rows(tmp_path, ending):
    rows = read_rows(Source(str(write_rows(tmp_path / f"data.{ending}"))))
    assert len(rows) == 3
    assert rows.columns == ["question", "answer"]
    assert [{k: str(v) for k, v in row.items()} for batch in rows.batches(2) for row in batch] == ROWS


def test_a_text_file_is_one_document(tmp_path):
    text = "First.\n\nSecond paragraph,\nsecond line.\n"
    assert read(write(tmp_path / "book.txt", text)) == [{"text": text}]


def test_a_list_of_strings_is_a_list_of_texts(tmp_path):
    assert read(write(tmp_path / "stories.json", '["Once", "Twice"]')) == [{"text": "Once"}, {"text": "Twice"}]


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    write_rows(tmp_path / "deep" / "b.jsonl", ROWS[1:])
    write_rows(tmp_path / "a.json", ROWS[:1])
    write_rows(tmp_path / ".git" / "c.jsonl")
    write(tmp_path / "README.md", "not data")
    assert read(tmp_path) == ROWS


def test_columns_of_changing_type_stay_what_they_are(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "hi", "loss_weight": 0}], "tools": "[]"},
        {"messages": [{"role": "user", "content": [{"type": "text", "value": "ho"}]}], "tools": [{"name": "f"}]},
    ]
    found = read(write_rows(tmp_path / "ragged.jsonl", rows))
    contents = [row["messages"][0]["content"] for row in found]
    assert contents[0] == "hi"
    assert {k: v for k, v in contents[1][0].items() if v is not None} == {"type": "text", "value": "ho"}
    assert [row["tools"] for row in found] == ["[]", [{"name": "f"}]]


def test_rows_that_no_table_can_hold_are_read_all_the_same(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise StopIteration

    monkeypatch.setattr(datasets, "load_dataset", fail)
    assert read(write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": [1]}\n')) == [{"a": 1}, {"a": [1]}]
    assert read(write(tmp_path / "b.json", '[{"a": 1}, "text"]')) == [{"a": 1}, {"text": "text"}]
    assert "StopIteration" in str(refusal(write_rows(tmp_path / "c.csv")))


def test_the_fingerprint_is_of_the_content(tmp_path):
    first = read_rows(Source(str(write_rows(tmp_path / "a.jsonl")))).fingerprint
    again = read_rows(Source(str(write_rows(tmp_path / "other.jsonl")))).fingerprint
    other = read_rows(Source(str(write_rows(tmp_path / "c.jsonl", ROWS[:2])))).fingerprint
    assert first == again != other
    assert len(first) == 64


def test_a_missing_file_is_answered_with_a_near_one(tmp_path):
    write_rows(tmp_path / "train.jsonl")
    error = refusal(tmp_path / "trains.jsonl")
    assert "does not exist" in error.what
    assert "train.jsonl" in str(error.fix)


def test_a_missing_folder_is_named(tmp_path):
    assert str(tmp_path / "no") in str(refusal(tmp_path / "no" / "where.jsonl").where)


@pytest.mark.parametrize(
    ("name", "text", "where", "what"),
    [
        ("a.jsonl", '{"a": 1}\n{"a":\n{"a": 2}\n', "a.jsonl:2", "not JSON"),
        ("a.json", '[{"a": 1},\n {"a": }]', "a.json:2", "not JSON"),
        ("a.jsonl", '{"a": 1}\n7\n', "a.jsonl:2", "number"),
        ("a.json", '[{"a": 1}, [2]]', "a.json: row 2", "list"),
        ("a.jsonl", "", "a.jsonl", "no rows"),
        ("a.jsonl", "\n\n", "a.jsonl", "no rows"),
        ("a.json", "[]", "a.json", "no rows"),
        ("a.csv", "question,answer\n", "a.csv", "no rows"),
        ("a.txt", "", "a.txt", "no rows"),
        ("a.xml", "<a/>", "a.xml", "ending `.xml`"),
        ("a.parquet", "not parquet", "a.parquet", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, name, text, where, what):
    error = refusal(write(tmp_path / name, text))
    assert what in error.what
    assert str(error.where).endswith(where)
    assert error.fix


def test_a_file_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes('{"a": "é"}'.encode("latin-1"))
    assert "UTF-8" in refusal(tmp_path / "latin.jsonl").what


def test_a_folder_without_data_or_with_two_kinds_is_refused(tmp_path):
    assert "no data files" in refusal(tmp_path).what
    write_rows(tmp_path / "a.jsonl")
    write_rows(tmp_path / "b.csv")
    assert ".csv, .jsonl" in refusal(tmp_path).what


def test_a_split_of_a_local_file_is_refused(tmp_path):
    assert "split `test`" in refusal(write_rows(tmp_path / "a.jsonl"), split="test").what


@pytest.mark.parametrize(
    ("failure", "what", "fix"),
    [
        (ConnectionError("no route"), "cannot be reached", "resumes"),
        (datasets.exceptions.DatasetNotFoundError("gone"), "neither a local file", "check the path"),
        (ValueError("Unknown split"), "Unknown split", "owner/name:subset"),
    ],
)
def test_what_the_hub_refuses_is_told_with_a_way_on(monkeypatch, failure, what, fix):
    def fail(*_, **__):
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    error = refusal("owner/name:main")
    assert what in error.what
    assert fix in str(error.fix)


def test_a_hub_id_names_data_set_subset_and_split(monkeypatch):
    asked = {}

    def answer(name, subset, **options):
        asked.update(name=name, subset=subset, **options)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", answer)
    assert read("owner/name:main", split="test") == ROWS
    assert asked == {"name": "owner/name", "subset": "main", "split": "test", "streaming": False}


def test_reading_is_quiet_and_leaves_the_settings_as_they_were(tmp_path, capfd):
    logger = logging.getLogger("datasets")
    before = logger.level, datasets.are_progress_bars_disabled()
    read(write_rows(tmp_path / "a.jsonl"))
    refusal(write(tmp_path / "b.jsonl", "1\n2\n"))
    assert capfd.readouterr() == ("", "")
    assert (logger.level, datasets.are_progress_bars_disabled()) == before


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("gsm8k/test.jsonl", 1319),
        ("llamafactory_demo/v1_sft_demo.jsonl", 500),
        ("superglue_cb/dev.jsonl", 56),
        ("tinystories/train_1000.json", 1000),
        ("tinyshakespeare/input.txt", 1),
        ("sst2/dev.tsv", 872),
        ("taskmaster_tm4_reward", 3228),
    ],
)
def test_real_files_have_the_rows_that_they_should(assets, name, count):
    assert len(read_rows(Source(str(assets / "data" / name)))) == count


def test_endings_named_in_errors_are_those_that_are_read():
    assert sources.ENDINGS == "json, jsonl, parquet, csv, tsv, txt"
