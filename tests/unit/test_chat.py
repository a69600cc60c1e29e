import pytest
from tiny_tokenizers import CHATML_TEMPLATE, byte_tokenizer, chatml_tokenizer, labelled_text

from loralab.base.chat import ChatTemplate
from loralab.base.forms import Chat
from loralab.base.text import encode, prove_stop
from loralab.errors import DataError

MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}"
    "{% endgeneration %}<|im_end|>\n{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
FORGETFUL = (  # as in reasoning models: only the last answer keeps what stands before the bar
    "{% for m in messages %}{% if m.role == 'assistant' %}A:{{ m.content if loop.last else m.content.split('|')[-1] }}"
    "<|im_end|>{% else %}U:{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
)


def chat(*contents, weights=None, tools=None):
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Chat(messages, tools, [float(weight) for weight in weights or [1] * len(messages)])


def documents(tokenizer, given, template=None):
    return ChatTemplate(tokenizer, template).documents(given, "row 1")


def learned(tokenizer, given, template=None):
    return [labelled_text(example, tokenizer) for example in encode(documents(tokenizer, given, template), tokenizer)]


def test_only_the_assistant_and_its_stop_token_are_learned():
    tokenizer = chatml_tokenizer()
    assert learned(tokenizer, chat("hi", "Hello!", "bye", "Bye.")) == ["Hello!<|im_end|>|Bye.<|im_end|>"]


def test_the_rendered_text_is_that_of_the_tokenizers_own_template():
    tokenizer = chatml_tokenizer(bos=True)
    given = chat("hé 🙂", "Hello!", "bye", "Bye.")
    (example,) = encode(documents(tokenizer, given), tokenizer)
    assert example.tokens.tolist() == tokenizer.apply_chat_template(given.messages, return_dict=False)


def test_markers_and_prefixes_learn_the_same():
    given = chat("hi", "Hello!", "bye", "Bye.")
    marked = byte_tokenizer(special=["<|im_start|>", "<|im_end|>"], chat_template=MARKED)
    assert learned(marked, given) == learned(chatml_tokenizer(), given) == ["Hello!<|im_end|>|Bye.<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML_TEMPLATE, MARKED])
def test_a_turn_of_weight_zero_is_not_learned(template):
    tokenizer = byte_tokenizer(special=["<|im_start|>", "<|im_end|>"], chat_template=template)
    assert learned(tokenizer, chat("hi", "Hello!", "bye", "Bye.", weights=[1, 0, 1, 1])) == ["Bye.<|im_end|>"]


def test_a_chat_without_an_answer_gives_no_document():
    tokenizer = chatml_tokenizer()
    assert documents(tokenizer, chat("hi")) == []
    assert documents(tokenizer, chat("hi", "ho", weights=[1, 0])) == []


@pytest.mark.parametrize("bos", [False, True])
def test_plain_needs_only_an_end_token(bos):
    tokenizer = byte_tokenizer(bos=bos)
    (document,) = documents(tokenizer, chat("hi", "Hello!", "bye", "Bye."), "plain")
    begin = "<s>" if bos else ""
    assert document.text == f"{begin}User: hi\n\nAssistant: Hello!</s>\n\nUser: bye\n\nAssistant: Bye.</s>"
    (example,) = encode([document], tokenizer)
    assert labelled_text(example, tokenizer) == " Hello!</s>| Bye.</s>"
    assert example.tokens.tolist().count(tokenizer.eos_token_id) == 2
    assert prove_stop([example], tokenizer).holds


def test_chatml_by_name_equals_a_tokenizer_that_has_it():
    given = chat("hi", "Hello!")
    own = documents(chatml_tokenizer(), given)
    assert documents(byte_tokenizer(special=["<|im_start|>", "<|im_end|>"]), given, "chatml") == own


def test_a_jinja_file_is_a_template(tmp_path):
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    assert learned(byte_tokenizer(), chat("hi", "ho"), str(path)) == ["ho</s>"]


def test_special_tokens_that_a_user_writes_are_text():
    tokenizer = chatml_tokenizer()
    given = chat("a<|im_end|>b</s>", "c<|im_start|>", "<|im_end|>", "d")
    (document,) = documents(tokenizer, given)
    (example,) = encode([document], tokenizer)
    assert (
        tokenizer.decode(example.tokens.tolist())
        == document.text
        == tokenizer.apply_chat_template(given.messages, tokenize=False)
    )
    start, end = (tokenizer.convert_tokens_to_ids(f"<|im_{word}|>") for word in ("start", "end"))
    assert [example.tokens.tolist().count(token) for token in (start, end, tokenizer.eos_token_id)] == [4, 4, 0]
    assert labelled_text(example, tokenizer) == "c<|im_start|><|im_end|>|d<|im_end|>"


def test_private_characters_of_the_user_survive_the_guard():
    tokenizer = chatml_tokenizer()
    (document,) = documents(tokenizer, chat("\ue000</s>\ue001", "\ue000"))
    assert "\ue000</s>\ue001" in document.text
    assert [document.text[a:b] for a, b in document.literal] == ["</s>"]


def test_a_template_that_forgets_gives_one_document_a_turn():
    tokenizer = byte_tokenizer(special=["<|im_end|>"], chat_template=FORGETFUL)
    found = documents(tokenizer, chat("1", "think|one", "2", "think|two"))
    assert [document.text for document in found] == [
        "U:1A:think|one<|im_end|>",
        "U:1A:one<|im_end|>U:2A:think|two<|im_end|>",
    ]
    assert learned(tokenizer, chat("1", "think|one", "2", "think|two")) == [
        "think|one<|im_end|>",
        "think|two<|im_end|>",
    ]


def test_tool_calls_are_written_even_where_the_template_knows_none():
    call = {"type": "function", "function": {"name": "find", "arguments": {"x": 1}}}
    messages = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "Done."},
    ]
    given = Chat(messages, [{"name": "find"}], [1.0] * 4)
    assert learned(byte_tokenizer(), given, "plain") == [' {"name": "find", "arguments": {"x": 1}}</s>| Done.</s>']
    (document,) = documents(byte_tokenizer(), given, "plain")
    assert document.text.startswith('System: Tools: [{"name": "find"}]\n\nUser: go')


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}", "turn 2"),
        ("{{ raise_exception('no system') }}", "no system"),
        ("{% if %}", "refuses"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template, what):
    tokenizer = byte_tokenizer(chat_template=template)
    with pytest.raises(DataError) as caught:
        documents(tokenizer, chat("hi", "ho"))
    assert what in caught.value.what
    assert caught.value.where == "row 1"
    assert caught.value.fix


@pytest.mark.parametrize(
    ("tokenizer", "template", "what"),
    [
        (byte_tokenizer(), None, "has no chat template"),
        (byte_tokenizer(), "chatml", "no token <|im_end|>"),
        (byte_tokenizer(eos=None), "plain", "no token for the end"),
        (byte_tokenizer(), "chat_ml", "not a file"),
    ],
)
def test_a_missing_template_or_token_is_named(tokenizer, template, what):
    with pytest.raises(DataError, match=what):
        ChatTemplate(tokenizer, template)


def test_marks_that_cannot_be_matched_to_weights_are_refused():
    once = MARKED.replace("{% for", "{% generation %}{% endgeneration %}{% for", 1)
    tokenizer = byte_tokenizer(special=["<|im_start|>", "<|im_end|>"], chat_template=once)
    with pytest.raises(DataError, match="marks 3 spans for 2"):
        documents(tokenizer, chat("hi", "Hello!", "bye", "Bye.", weights=[1, 0, 1, 1]))
