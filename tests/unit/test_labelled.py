"""Judged answers: what the model reads of pairs and thumbs, where it is read, and what it costs."""

import pytest
import torch
from labelled_rows import BYTES, PAIRS, alike, corpus, sides, texts, whole
from tiny_tokenizers import byte_tokenizer, chatml_tokenizer

from loralab.base.attention import document_mask
from loralab.base.labelled import collate_labelled
from loralab.base.sources import Template
from tiny import tiny

# Pairs


def test_a_pair_is_both_texts_with_what_they_begin_with_once(tmp_path):
    found = corpus(tmp_path, PAIRS)
    assert (found.kind, len(found), found.classes) == ("pairs", 3, ())
    for row, pair in zip(PAIRS, map(found.__getitem__, range(3)), strict=True):
        chosen, rejected = sides([row])
        shared = alike(chosen, rejected)  # a byte is a token
        assert pair.segments == (shared, len(chosen) + 1 - shared, len(rejected) + 1 - shared)
        assert pair.answers == (len(row["chosen"]) + 1, len(row["rejected"]) + 1)
        assert pair.label == row.get("margin", 0.0)
        assert BYTES.decode(pair.tokens[: pair.segments[0]].tolist()) == chosen[:shared]


@pytest.mark.parametrize("share", [True, False])
def test_a_batch_of_pairs_costs_the_prompt_once_and_reads_every_side_at_its_end(tmp_path, share):
    found = corpus(tmp_path, PAIRS)
    batch = collate_labelled([found[i] for i in (2, 0, 1)], share=share)
    order = [PAIRS[i] for i in (2, 0, 1)]
    given = sides(order)
    shared = [alike(*given[i : i + 2]) for i in (0, 2, 4)]
    full = sum(len(text) + 1 for text in given)
    assert batch.num_tokens == full - (sum(shared) if share else 0)
    assert [BYTES.decode(tokens.tolist()) for tokens in batch.documents()] == [f"{text}</s>" for text in given]
    assert batch.tokens[0, batch.reads].tolist() == [BYTES.eos_token_id] * 6
    assert batch.row.positions[0, batch.reads].tolist() == [len(text) for text in given]
    assert batch.row.positions[0, batch.firsts].tolist() == [0] * 6
    assert BYTES.decode(batch.tokens[0, batch.firsts].tolist()) == "".join(text[0] for text in given)
    assert batch.labels.tolist() == [0.0, 0.0, 2.5]
    assert batch.answers.tolist() == [len(row[side]) + 1 for row in order for side in ("chosen", "rejected")]
    assert (batch.weight, batch.types, batch.document_types()) == (3, None, None)


@torch.no_grad()
def test_a_model_reads_both_sides_as_if_each_stood_alone(tmp_path):
    model = tiny("llama", vocab_size=300, max_position_embeddings=128)
    model.set_attn_implementation("loralab")
    batch = whole(corpus(tmp_path, PAIRS))
    assert batch.row.parents
    mask = document_mask(batch.row.lengths, parents=batch.row.parents)
    hidden = model.model(batch.tokens, position_ids=batch.row.positions, attention_mask=mask, use_cache=False)[0][0]
    for place, text in zip(batch.reads.tolist(), sides(PAIRS), strict=True):
        tokens = [*BYTES(text)["input_ids"], BYTES.eos_token_id]
        alone = model.model(torch.tensor([tokens]), use_cache=False)[0][0, -1]
        torch.testing.assert_close(hidden[place], alone, rtol=1e-5, atol=1e-5)


def test_sides_that_share_no_token_are_documents_of_their_own(tmp_path):
    joined = byte_tokenizer(merges=[("a", "b")])  # `a` and its answer `b` become one token
    found = corpus(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}], joined)
    assert found[0].segments == (0, 2, 3)
    batch = whole(found)
    assert batch.row.lengths == (2, 3)
    assert (batch.firsts.tolist(), batch.reads.tolist()) == ([0, 2], [1, 4])
    assert texts(found, joined) == ["ab</s>", "ac</s>"]


def asked(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


CHAT = [asked("Hi"), said("Yo"), asked("Who?")]
SHAREGPT = [{"from": "human" if t["role"] == "user" else "gpt", "value": t["content"]} for t in CHAT]
RENDERED = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n<|im_start|>user\nWho?<|im_end|>\n"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": CHAT, "chosen": [said("An owl")], "rejected": [said("A fox")]},
        {"chosen": [*CHAT, said("An owl")], "rejected": [*CHAT, said("A fox")]},
        {"prompt": CHAT, "chosen": [*CHAT, said("An owl")], "rejected": [*CHAT, said("A fox")]},
        {"prompt": "Who?", "chosen": [*CHAT, said("An owl")], "rejected": [*CHAT, said("A fox")]},  # UltraFeedback
        {"prompt": CHAT, "chosen": "An owl", "rejected": "A fox"},
        {
            "conversations": SHAREGPT,
            "chosen": {"from": "gpt", "value": "An owl"},
            "rejected": {"from": "gpt", "value": "A fox"},
        },
    ],
)
def test_conversations_are_rendered_and_end_with_the_turn_that_was_judged(tmp_path, row):
    tokenizer = chatml_tokenizer()
    found = corpus(tmp_path, [row], tokenizer)
    turns = [f"{RENDERED}<|im_start|>assistant\n{answer}<|im_end|>" for answer in ("An owl", "A fox")]
    assert texts(found, tokenizer) == turns
    assert found[0].answers == (7, 6)  # the bytes and the token that ends the turn
    assert found.report.total.equal == found.report.total.empty == 0


def test_a_prompt_in_words_before_messages_is_the_users(tmp_path):
    tokenizer = chatml_tokenizer()
    found = corpus(tmp_path, [{"prompt": "Hi", "chosen": [said("A")], "rejected": [said("B")]}], tokenizer)
    assert texts(found, tokenizer)[0] == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nA<|im_end|>"


def test_a_conversation_that_is_the_beginning_of_the_other_keeps_a_token_of_its_own(tmp_path):
    tokenizer = chatml_tokenizer()
    row = {"chosen": CHAT[:2], "rejected": [*CHAT, said("An owl")]}
    found = corpus(tmp_path, [row], tokenizer)
    assert found[0].segments[1] == 1
    short, long = texts(found, tokenizer)
    assert long.startswith(short) and short.endswith("Yo<|im_end|>") and long.endswith("An owl<|im_end|>")


def test_a_template_that_ends_no_turn_is_followed_by_the_end_of_the_sequence(tmp_path):
    tokenizer = byte_tokenizer(
        chat_template="{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    found = corpus(tmp_path, [{"prompt": [asked("Hi")], "chosen": [said("A")], "rejected": [said("B")]}], tokenizer)
    assert texts(found, tokenizer) == ["u:Hi;a:A;</s>", "u:Hi;a:B;</s>"]


HH = "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: Who?\n\nAssistant:"


def test_whole_texts_without_a_prompt_begin_with_it(tmp_path):
    rows = [{"chosen": f"{HH} An owl", "rejected": f"{HH} A fox"}, {"chosen": "One two", "rejected": "One six"}]
    found = corpus(tmp_path, rows)
    assert texts(found) == [f"{row[side]}</s>" for row in rows for side in ("chosen", "rejected")]
    assert found[0].answers == (8, 7)  # the answers begin alike, but they begin behind `Assistant:`
    assert found[1].answers == (4, 4)


def test_instructions_and_templates_can_be_the_prompt_of_a_pair(tmp_path):
    given = {"instruction": "Add.", "input": "1 2", "chosen": "3", "rejected": "4"}
    (first, second) = texts(corpus(tmp_path, [given]))
    assert first.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n3</s>")
    assert second == first.replace("3</s>", "4</s>")
    row = {"system": "S", "question": "Q", "chosen": "A", "rejected": "B"}
    assert texts(corpus(tmp_path, [row], template=Template("{system}|{question}|", ""))) == ["S|Q|A</s>", "S|Q|B</s>"]


@pytest.mark.parametrize("bos", [False, True])
def test_long_prompts_lose_their_beginning_and_answers_nothing(tmp_path, bos):
    tokenizer = byte_tokenizer(bos=bos)
    rows = [
        {"prompt": "abcdefgh", "chosen": "ijk", "rejected": "xy"},
        {"prompt": "a", "chosen": "ijklmnopq", "rejected": "xy"},  # an answer that does not fit
        {"prompt": "ab", "chosen": "ijklmnop"[bos:], "rejected": "x"},  # one that leaves no place for a prompt
        {"prompt": "ab", "chosen": "ij", "rejected": "x"},
    ]
    found = corpus(tmp_path, rows, tokenizer, max_length=9, overlong="truncate")
    begin = "<s>" if bos else ""
    kept = "efgh" if bos else "defgh"
    assert texts(found, tokenizer) == [f"{begin}{t}</s>" for t in (f"{kept}ijk", f"{kept}xy", "abij", "abx")]
    assert max(len(t) for t in whole(found).documents()) == 9
    total = found.report.total
    assert (total.rows, total.examples, total.truncated, total.dropped) == (4, 2, 1, 2)
    dropping = corpus(tmp_path, rows, tokenizer, max_length=9)
    assert (dropping.report.total.examples, dropping.report.total.dropped) == (1, 3)


def test_what_teaches_nothing_is_counted_and_left_out(tmp_path):
    rows = [
        *PAIRS,
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": " \n", "rejected": "some"},
        {"prompt": "p", "chosen": "some", "rejected": None},
        {"chosen": [asked("Hi")], "rejected": [asked("Ho")]},
    ]
    total = corpus(tmp_path, rows, chatml_tokenizer()).report.total
    assert (total.rows, total.examples, total.equal, total.empty) == (7, 3, 1, 3)


# Thumbs


@pytest.mark.parametrize("column", ["label", "reward", "thumb"])
@pytest.mark.parametrize("up, down", [(True, False), (1, 0), (1.0, 0.0), ("up", "Down"), ("good", "bad"), ("1", "0")])
def test_thumbs_however_they_are_written(tmp_path, column, up, down):
    rows = [{"prompt": "Q", "completion": f"A{i}", column: thumb} for i, thumb in enumerate((up, down, up))]
    found = corpus(tmp_path, rows)
    assert (found.kind, found.labels.tolist()) == ("thumbs", [1.0, 0.0, 1.0])
    assert texts(found) == ["QA0</s>", "QA1</s>", "QA2</s>"]
    assert found[0].answers == (3,)


def test_thumbs_of_conversations_and_of_columns_in_a_template(tmp_path):
    tokenizer = chatml_tokenizer()
    rows = [{"messages": [*CHAT, said("An owl")], "label": True}, {"messages": [*CHAT, said("A fox")], "label": False}]
    found = corpus(tmp_path, rows, tokenizer)
    assert (found.kind, texts(found, tokenizer)[1]) == ("thumbs", f"{RENDERED}<|im_start|>assistant\nA fox<|im_end|>")
    rows = [{"context": "C", "generation": f"G{i}", "reward": float(i)} for i in (0, 1)]
    found = corpus(tmp_path, rows, template=Template("{context}>", "{generation}"))
    assert (found.kind, texts(found), found.labels.tolist()) == ("thumbs", ["C>G0</s>", "C>G1</s>"], [0.0, 1.0])
