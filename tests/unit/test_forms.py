import datetime

import pytest

from loralab.base.forms import FORMS, Chat, Prompted, as_text, find_form, template_form
from loralab.base.sources import Template
from loralab.errors import DataError


def read(form, **row):
    return FORMS[form].read(row, "rows.jsonl, row 7")


def refusal(call, *given, **row):
    with pytest.raises(DataError) as caught:
        call(*given, **row)
    return caught.value


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["id", "text"], "text"),
        (["messages", "tools"], "messages"),
        (["conversations"], "sharegpt"),
        (["prompt", "completion", "text"], "prompt_completion"),
        (["instruction", "input", "output", "answer"], "alpaca"),
    ],
)
def test_a_form_is_known_by_its_columns(columns, name):
    assert find_form("auto", columns, "rows.jsonl")[0] == name


def test_no_form_fits_names_the_columns_and_what_was_tried():
    error = refusal(find_form, "auto", ["question", "answer"], "rows.jsonl")
    assert all(word in error.what for word in ("question, answer", *FORMS))
    assert "template" in error.fix
    assert "needs" not in refusal(find_form, "alpaca", ["text"], "rows.jsonl").what
    assert "unknown form `chat`" in refusal(find_form, "chat", ["text"], "rows.jsonl").what


def test_alpaca_is_written_in_its_classic_words():
    bare = read("alpaca", instruction="Name a colour.", input="", output="Red.")
    assert bare == Prompted(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a colour.\n\n### Response:\n",
        "Red.",
    )
    given = read("alpaca", instruction="Sum.", input="1 2", output="3")
    assert "paired with an input that provides further context" in given.prompt
    assert given.prompt.endswith("### Instruction:\nSum.\n\n### Input:\n1 2\n\n### Response:\n")


def test_alpaca_reads_system_and_history():
    row = {"instruction": "And now?", "input": None, "output": "Later.", "system": "Be short."}
    text = read("alpaca", **row, history=[["Now?", "No."]])
    assert text.prompt == (
        "Be short.\n\n### Instruction:\nNow?\n\n### Response:\nNo.\n\n### Instruction:\nAnd now?\n\n### Response:\n"
    )
    assert text.completion == "Later."


def test_sharegpt_roles_and_calls_become_those_of_chat_templates():
    turns = [
        {"from": "human", "value": "Find"},
        {"from": "function_call", "value": '{"name": "find", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "found"},
        {"from": "gpt", "value": "Here"},
        {"from": "function_call", "value": "not json"},
    ]
    chat = read("sharegpt", conversations=turns, system="Help.", tools='[{"name": "find"}]')
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "tool", "assistant", "assistant"]
    assert chat.messages[2]["tool_calls"] == [{"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}]
    assert chat.messages[5]["content"] == "not json"
    assert chat.tools == [{"name": "find"}]


def test_messages_join_parts_and_read_weights():
    parts = [{"type": "text", "value": "Good"}, {"type": "text", "text": "bye"}]
    chat = read(
        "messages",
        messages=[{"role": "user", "content": parts}, {"role": "assistant", "content": "Hi", "loss_weight": 0}],
        tools="",
    )
    assert chat == Chat(
        [{"role": "user", "content": "Goodbye"}, {"role": "assistant", "content": "Hi"}], None, [1.0, 0.0]
    )


def test_a_prompt_of_messages_is_a_chat_whose_prompt_is_not_learned():
    prompt = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    chat = read("prompt_completion", prompt=prompt, completion=[{"role": "assistant", "content": "d"}])
    assert [m["content"] for m in chat.messages] == ["a", "b", "c", "d"]
    assert chat.weights == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("form", "row", "what"),
    [
        ("text", {"txet": "a"}, "no column `text`"),
        ("text", {"text": {"a": 1}}, "an object found"),
        ("text", {"text": datetime.datetime(2020, 1, 1)}, "for dates"),
        ("messages", {"messages": [{"content": "a"}]}, "no role"),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image", "text": "x"}]}]}, "image"),
        ("messages", {"messages": [], "tools": "{"}, "`tools` is not JSON"),
        ("sharegpt", {"messages": []}, "no column `conversations`"),
        ("sharegpt", {"conversations": "hello"}, "not an object"),
        ("alpaca", {"instruction": "a", "output": "b", "history": ["c"]}, "list of pairs"),
    ],
)
def test_a_row_that_does_not_fit_is_named(form, row, what):
    error = refusal(read, form, **row)
    assert what in error.what
    assert "rows.jsonl, row 7" in error.where
    assert error.fix


def test_a_near_column_is_suggested():
    assert "did you mean `txet`" in refusal(read, "text", txet="a").fix


def test_cells_become_text():
    assert [as_text(cell, "") for cell in (None, "a", 3, 2.5)] == ["", "a", "3", "2.5"]


def test_a_template_is_filled_with_columns():
    form = template_form(Template("Q: {question}\n{{A}}:", " {answer}"), ["question", "answer", "id"], "rows.jsonl")
    assert form.read({"question": "{x}?", "answer": 4}, "") == Prompted("Q: {x}?\n{A}:", " 4")
    assert set(form.columns) == {"question", "answer"}


@pytest.mark.parametrize(
    ("template", "what", "fix"),
    [
        (Template("{questions}", "{answer}"), "`{questions}`, which is not a column", "did you mean `{question}`"),
        (Template("{question}", "{}"), "`{}`", "question, answer"),
        (Template("{question", "{answer}"), "cannot be read", "double braces"),
        (Template("{question.__class__}", "{answer}"), "not a column", "question, answer"),
        (Template("{question:>9}", "{answer}"), "layout", "double braces"),
    ],
)
def test_a_wrong_template_is_named(template, what, fix):
    error = refusal(template_form, template, ["question", "answer"], "rows.jsonl")
    assert what in error.what
    assert error.where.startswith("template.")
    assert fix in error.fix
