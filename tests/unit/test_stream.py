import gc
import json
from collections import Counter

import pandas as pd
import pytest
from tiny_tokenizers import byte_tokenizer

from loralab.base.corpus import tokenise
from loralab.base.rowstream import RowStream
from loralab.base.sources import Source
from loralab.base.stream import StreamingFeed, tokenise_head
from loralab.errors import DataError

TOKENIZER = byte_tokenizer()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def texts(path, name, count):
    return write(path / f"{name}.jsonl", [{"text": f"{name}{i}" + "." * (i % 7)} for i in range(count)])


def feed(*sources, **options):
    options = {"batch_size": 3, "max_length": 24, "window": 10, **options}
    return StreamingFeed(list(sources), TOKENIZER, **options)


def step_texts(stream):
    """Texts of one step, micro-batch by micro-batch."""
    found = []
    for batch in stream.next_step():
        parts = batch.tokens[0].split(list(batch.lengths))
        found.append([TOKENIZER.decode(part.tolist()).removesuffix("</s>").rstrip(".") for part in parts])
    return found


def flat(steps):
    return [text for step in steps for batch in step for text in batch]


@pytest.fixture(params=["table", "list", "parquet"])
def source(request, tmp_path):
    """One source of 25 rows: a file that fits a table, one that does not, and another kind."""
    if request.param == "list":
        rows = [{"text": f"a{i}", "extra": [1] if i % 2 else "x"} for i in range(25)]
        return Source(write(tmp_path / "a.jsonl", rows))
    if request.param == "parquet":
        pd.DataFrame({"text": [f"a{i}" for i in range(25)]}).to_parquet(tmp_path / "a.parquet", row_group_size=10)
        return Source(str(tmp_path / "a.parquet"))
    return Source(texts(tmp_path, "a", 25))


def test_rows_come_in_order_and_again_after_a_restart(source):
    stream = RowStream(source)
    assert "text" in stream.columns
    taken = [row["text"].rstrip(".") for row in [*stream.take(7), *stream.take(30)]]
    assert taken == [f"a{i}" for i in range(25)]
    assert stream.take(1) == []
    stream.restart()
    assert stream.take(1)[0]["text"] == "a0"


@pytest.mark.parametrize("place", [0, 1, 13, 25])
def test_a_row_stream_resumes_at_its_cursor(source, place):
    first, second = RowStream(source), RowStream(source)
    first.take(place)
    second.take(3)
    second.load_state(json.loads(json.dumps(first.state())))
    assert second.take(30) == first.take(30)


@pytest.mark.parametrize("packing", [True, False])
def test_a_pass_sees_every_row_once(source, packing):
    stream = feed(source, window=25, packing=packing, batch_size=1)
    found = []
    while len(found) < 25:
        found += flat([step_texts(stream)])
    assert sorted(found) == sorted(f"a{i}" for i in range(25))
    assert found != [f"a{i}" for i in range(25)]


@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 8, 13])
def test_a_resumed_stream_goes_on_as_if_nothing_had_happened(tmp_path, stop):
    sources = [Source(texts(tmp_path, "a", 25)), Source(texts(tmp_path, "b", 9), weight=0.5)]
    uninterrupted, stopped = feed(*sources, micro_batch=2), feed(*sources, micro_batch=2)
    for _ in range(stop):
        uninterrupted.next_step()
        stopped.next_step()
    resumed = feed(*sources, micro_batch=2)
    resumed.load_state(json.loads(json.dumps(stopped.state())))
    assert [step_texts(resumed) for _ in range(8)] == [step_texts(uninterrupted) for _ in range(8)]


def test_weights_mix_the_sources(tmp_path):
    stream = feed(Source(texts(tmp_path, "a", 30)), Source(texts(tmp_path, "b", 30), weight=0.5), window=9)
    found = Counter(text[0] for text in flat(step_texts(stream) for _ in range(60)))
    assert found["a"] / found["b"] == pytest.approx(2, rel=0.1)


def test_held_out_rows_never_come(tmp_path):
    source = Source(texts(tmp_path, "a", 40))
    _, held = tokenise_head([source], TOKENIZER, rows=30, max_length=24).hold_out(0.2)
    kept_back = {TOKENIZER.decode(held[i].tokens.tolist()).removesuffix("</s>").rstrip(".") for i in range(len(held))}
    stream = feed(source, excluded=held.keys.tolist())
    found = set(flat(step_texts(stream) for _ in range(30)))
    assert kept_back
    assert found == {f"a{i}" for i in range(40)} - kept_back


def test_the_head_is_the_first_rows_of_each_source(tmp_path):
    sources = [Source(texts(tmp_path, "a", 9)), Source(texts(tmp_path, "b", 3))]
    head = tokenise_head(sources, TOKENIZER, rows=5)
    assert head.source.tolist() == [0] * 5 + [1] * 3
    assert head.report.total.rows == 8
    whole = tokenise(sources, TOKENIZER)
    assert head.keys.tolist() == [*whole.keys[:5].tolist(), *whole.keys[9:].tolist()]


def test_a_text_file_streams_by_paragraphs(tmp_path):
    (tmp_path / "book.txt").write_text("First\nstill first\n\nSecond\n")
    stream = RowStream(Source(str(tmp_path / "book.txt")))
    assert [row["text"].strip() for row in stream.take(9)] == ["First\nstill first", "Second"]


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_csv_file_streams_row_by_row(tmp_path):
    (tmp_path / "a.csv").write_text("text\n" + "".join(f"a{i}\n" for i in range(25)))
    first, second = (RowStream(Source(str(tmp_path / "a.csv"))) for _ in range(2))
    first.take(13)
    second.load_state(first.state())
    assert [row["text"] for row in second.take(30)] == [f"a{i}" for i in range(13, 25)]
    del first, second
    gc.collect()  # `datasets` leaves csv files open: they must be closed while the warning is ignored


def test_the_report_counts_what_was_read(tmp_path):
    stream = feed(Source(texts(tmp_path, "a", 25)), window=20)
    stream.next_step()
    assert (stream.report.total.rows, stream.report.total.examples) == (20, 20)


def test_a_cursor_into_other_data_is_refused(tmp_path):
    state = feed(Source(texts(tmp_path, "a", 5))).state()
    with pytest.raises(DataError, match="another corpus"):
        feed(Source(texts(tmp_path, "b", 5))).load_state(state)
    with pytest.raises(DataError, match="another rows"):
        feed(Source(texts(tmp_path, "a", 5)), window=4).load_state(state)


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.jsonl", "\n", "no rows"),
        ("a.jsonl", '{"text": "x"}\n{"text"\n', "not JSON"),
        ("a.parquet", "no", "cannot be read"),
        ("a.jsonl", '{"question": "x"}\n', "no form fits"),
    ],
)
def test_what_cannot_be_streamed_is_named(tmp_path, name, text, what):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=what):
        feed(Source(str(tmp_path / name)))


def test_a_broken_connection_can_be_resumed(tmp_path):
    def rows():
        yield {"text": "a"}
        raise ConnectionError("no route")

    stream = RowStream(Source(texts(tmp_path, "a", 5)))
    stream._rows = rows()
    with pytest.raises(DataError, match="broke off: no route") as caught:
        stream.take(3)
    assert "run again" in caught.value.fix


def test_a_source_without_anything_to_learn_ends_with_an_error(tmp_path):
    source = Source(write(tmp_path / "a.jsonl", [{"prompt": "p", "completion": ""}] * 4))
    with pytest.raises(DataError, match="no example is left"):
        feed(source).next_step()


def test_a_source_whose_rows_are_all_held_out_ends_with_an_error(tmp_path):
    source = Source(texts(tmp_path, "a", 4))
    with pytest.raises(DataError, match="no example is left"):
        feed(source, excluded=tokenise([source], TOKENIZER).keys.tolist()).next_step()
