"""A corpus of judged rows: divided, fed, identified, and read from real files."""

import json

import numpy as np
import pytest
import torch
from labelled_rows import BYTES, PAIRS, SENTENCES, corpus, encoder, sides, texts, whole
from tiny_tokenizers import byte_tokenizer

from loralab.base.data import Feed
from loralab.base.labelled import collate_labelled, read_labelled
from loralab.base.sources import Source, Template, read_rows


def many(prompts=40):
    return [
        {"prompt": f"prompt {i % prompts}: ", "chosen": f"yes {i}", "rejected": f"no {i} or so"} for i in range(100)
    ]


def test_answers_to_one_prompt_are_held_out_together(tmp_path):
    found = corpus(tmp_path, many())
    train, held = found.hold_out(0.25)
    prompts = [{text.partition(":")[0] for text in texts(part)} for part in (train, held)]
    assert not prompts[0] & prompts[1]
    assert len(prompts[0] | prompts[1]) == 40
    assert 0 < len(held) < 50 and len(train) + len(held) == 100
    assert sorted(texts(train) + texts(held)) == sorted(texts(found))
    for part, other in ((train, held), (held, None)):
        total = part.report.total
        assert (total.examples, total.tokens, total.labelled) == (len(part), len(part.tokens), 2 * len(part))
        assert total.held_out == (len(other) if other else 0)
    assert train[3].answers == tuple(len(t.partition(": ")[2]) - len("</s>") + 1 for t in texts(train)[6:8])


def test_answers_to_nothing_are_held_out_each_by_itself(tmp_path):
    rows = [{"prompt": "", "completion": f"answer {i % 20}", "label": i % 2} for i in range(40)]
    rows.append({"prompt": "Q", "completion": "A", "label": 1})
    train, held = ({*texts(part)} for part in corpus(tmp_path, rows).hold_out(0.5))
    assert not train & held
    assert min(len(train), len(held)) > 3


def test_the_counts_of_held_out_examples_are_those_of_their_source(tmp_path):
    paths = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for path, length in zip(paths, (1, 5), strict=True):
        rows = [{"text": "t" * length + str(10 + i), "label": i % 2} for i in range(30)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part in read_labelled([Source(str(path)) for path in paths], BYTES).hold_out(0.4):
        for source, report in enumerate(part.report.sources):
            count = int((part.source == source).sum())
            assert count and (report.examples, report.tokens) == (count, count * (4, 8)[source])


def test_equal_texts_are_held_out_together_whatever_their_class(tmp_path):
    rows = [{"text": f"text {i % 20}", "label": i % 3} for i in range(60)]
    train, held = corpus(tmp_path, rows).hold_out(0.3)
    assert not {*texts(train)} & {*texts(held)}
    assert train.classes == held.classes == ("0", "1", "2")


def test_the_fingerprint_is_of_everything_that_training_sees(tmp_path):
    rows = [{"text": "a", "label": 0}, {"text": "b", "label": 1}]
    prints = {
        corpus(tmp_path, rows).fingerprint,
        corpus(tmp_path, rows[::-1]).fingerprint,
        corpus(tmp_path, [{**row, "label": 1 - row["label"]} for row in rows]).fingerprint,
        corpus(tmp_path, rows, classes=["no", "yes"]).fingerprint,
        corpus(tmp_path, rows, kind="regression").fingerprint,
        corpus(tmp_path, PAIRS).fingerprint,
        corpus(tmp_path, [{**row, "margin": 1.0} for row in PAIRS]).fingerprint,
    }
    assert len(prints) == 7
    assert corpus(tmp_path, rows).fingerprint == corpus(tmp_path, rows, name="copy.jsonl").fingerprint


def test_a_feed_gives_every_pair_once_and_goes_on_where_it_stopped(tmp_path):
    found = corpus(tmp_path, many())

    def feed():
        return Feed(found, batch_size=8, micro_batch=3, packing=False, seed=5, collate=collate_labelled)

    first = feed()
    steps = [first.next_step() for _ in range(5)]
    assert [[batch.weight for batch in step] for step in steps] == [[3, 3, 2]] * 5
    read = [BYTES.decode(t.tolist()) for step in steps for batch in step for t in batch.documents()]
    assert len({*read}) == 80 and {*read} <= {*texts(found)}
    second, middle = feed(), feed()
    for _ in range(2):
        middle.next_step()
    second.load_state(json.loads(json.dumps(middle.state())))
    for mine, theirs in zip(second.next_step(), steps[2], strict=True):
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.reads, theirs.reads)


def test_pairs_can_be_packed_although_a_pair_is_longer_than_a_text(tmp_path):
    found = corpus(tmp_path, [{"prompt": "p", "chosen": "abcdef", "rejected": "uvwxyz"}] * 3, max_length=8)
    (batch,) = Feed(found, batch_size=1, collate=collate_labelled).next_step()
    assert batch.num_tokens == 15 and found.max_length == 16


def test_moving_keeps_everything(tmp_path):
    rows = [{"premise": a, "hypothesis": b, "label": i % 2} for i, (a, b) in enumerate(SENTENCES)]
    batch = whole(corpus(tmp_path, rows, encoder())).to("meta")
    tensors = (batch.tokens, batch.reads, batch.firsts, batch.labels, batch.types, batch.answers)
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    assert (batch.kind, batch.weight) == ("classify", 3)


def test_the_pocket_worlds_preferences_are_pairs(tmp_path):
    source = Source("pocket:preferences?items=50")
    found = read_labelled([source], BYTES)
    rows = read_rows(source).table
    assert texts(found) == [f"{text}</s>" for text in sides(rows)]


# Real files


def texts_of(found, place):
    return [BYTES.decode(tokens.tolist()) for tokens in collate_labelled([found[place]]).documents()]


@pytest.mark.parametrize("name, up, down", [("tm4", 2775, 453), ("tm3", 573, 3094)])
def test_thumbs_of_taskmaster(assets, name, up, down):
    files = sorted((assets / "data" / f"taskmaster_{name}_reward").glob("*.json"))
    source = Source(str(files[0].parent), template=Template("Ticket or coffee?\n", "{generation}"))
    found = read_labelled([source], BYTES, max_length=4096)
    assert (found.kind, len(found), found.report.total.dropped) == ("thumbs", up + down, 0)
    assert np.bincount(found.labels.astype(int)).tolist() == [down, up]
    first = json.loads(files[0].read_text())[0]
    assert texts_of(found, 0) == [f"Ticket or coffee?\n{first['generation']}</s>"]


def test_pairs_of_llama_factory(assets):
    path = assets / "data/llamafactory_demo/dpo_en_demo.json"
    rows = json.loads(path.read_text())
    found = read_labelled([Source(str(path))], byte_tokenizer(), chat_template="plain", max_length=10**6)
    assert (found.kind, len(found), found.report.total.rows) == ("pairs", 300, 300)
    for place in (0, 17, 299):
        row = rows[place]
        for text, side in zip(texts_of(found, place), ("chosen", "rejected"), strict=True):
            assert text.endswith(f"Assistant: {row[side]['value']}</s>")
            assert all(turn["value"] in text for turn in row["conversations"])


def test_sentences_of_sst2_and_superglue(assets):
    found = read_labelled([Source(str(assets / "data/sst2/dev.tsv"))], BYTES)
    assert (found.classes, np.bincount(found.labels.astype(int)).tolist()) == (("0", "1"), [428, 444])
    found = read_labelled([Source(str(assets / "data/superglue_cb/dev.jsonl"))], BYTES, max_length=4096)
    assert found.classes == ("contradiction", "entailment", "neutral")
    assert np.bincount(found.labels.astype(int)).tolist() == [28, 23, 5]
