import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_tokenizers import byte_tokenizer, chatml_tokenizer, labelled_text

from loralab.base import text
from loralab.base.chat import Document
from loralab.base.text import Example, encode, pieces, prompted, prove_stop
from loralab.errors import DataError

PLAIN = byte_tokenizer()
WITH_BOS = byte_tokenizer(bos=True)
TRIMMING = byte_tokenizer(trim_offsets=True, merges=[("Ġ", "Ġ"), ("Ċ", "Ċ")])


def one(document, tokenizer=PLAIN):
    (example,) = encode([document], tokenizer)
    return example


def test_the_first_token_is_never_labelled_and_lists_will_do():
    example = Example([5, 6, 7], [True, True, False])
    assert example.labelled.tolist() == [False, True, False]
    assert (len(example), example.num_labelled, example.tokens.dtype) == (3, 1, np.uint32)
    with pytest.raises(ValueError, match="2 tokens but 1 labels"):
        Example([1, 2], [True])


@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20))
def test_the_completion_and_nothing_else_is_learned(prompt, completion):
    example = one(prompted(prompt, completion), WITH_BOS)
    labelled = bytes_of(example.tokens[example.labelled], WITH_BOS)
    assert labelled == completion.encode() + b"</s>"
    assert bytes_of(example.tokens, WITH_BOS) == b"<s>" + (prompt + completion).encode() + b"</s>"


def bytes_of(tokens, tokenizer):
    """Decode token by token, as one byte need not be a character."""
    alphabet = {c: bytes([b]) for b, c in text_alphabet().items()}
    names = tokenizer.convert_ids_to_tokens([int(token) for token in tokens])
    return b"".join(name.encode() if name in ("<s>", "</s>") else b"".join(map(alphabet.get, name)) for name in names)


def text_alphabet():
    """The byte alphabet of GPT-2: printable bytes stand for themselves, the others for characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {**{b: chr(b) for b in printable}, **{b: chr(256 + i) for i, b in enumerate(others)}}


@given(prompt=st.text("ab \n", max_size=8), completion=st.text("ab \n", min_size=1, max_size=8))
def test_white_space_that_offsets_leave_out_is_learned_too(prompt, completion):
    example = one(prompted("p" + prompt, completion), TRIMMING)
    decoded = bytes_of(example.tokens[example.labelled], TRIMMING).decode().removesuffix("</s>")
    assert (prompt + completion).endswith(decoded)
    # Two spaces are one token here, and that token may straddle the boundary.
    assert len(completion) <= len(decoded) <= len(completion) + 1


def test_a_token_across_the_boundary_counts_as_completion():
    tokenizer = byte_tokenizer(merges=[(":", "Ġ")])
    example = one(prompted("A:", " 4"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(example.tokens.tolist()) == ["A", ":Ġ", "4", "</s>"]
    assert labelled_text(example, tokenizer) == ": 4</s>"


def test_text_is_learned_whole_and_ends():
    example = one(prompted("", "abc"), WITH_BOS)
    assert example.labelled.tolist() == [False, True, True, True, True]
    assert labelled_text(one(prompted("", "abc")), PLAIN) == "bc</s>"


def test_special_tokens_in_text_are_text():
    example = one(prompted("a</s>", "b<s></s>"), WITH_BOS)
    ids = example.tokens.tolist()
    assert ids.count(WITH_BOS.eos_token_id) == 1
    assert ids.count(WITH_BOS.bos_token_id) == 1
    assert labelled_text(example, WITH_BOS) == "b<s></s></s>"


def test_an_end_that_the_tokenizer_adds_is_not_added_again():
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    end = ("</s>", tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[end])
    example = one(prompted("a", "b"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(example.tokens.tolist()) == ["a", "b", "</s>"]
    assert example.labelled.tolist() == [False, True, True]


def test_order_is_kept_whatever_the_kind():
    tokenizer = chatml_tokenizer()
    chat = Document("x<|im_end|>", ((0, 11),), rendered=True)
    guarded = Document("y</s><|im_end|>", ((0, 15),), rendered=True, literal=((1, 5),))
    found = encode([prompted("a", "b"), guarded, chat, prompted("c", "d")], tokenizer)
    assert [tokenizer.decode(e.tokens.tolist()) for e in found] == [
        "ab</s>",
        "y</s><|im_end|>",
        "x<|im_end|>",
        "cd</s>",
    ]
    assert len(found[1]) == 6
    assert encode([], tokenizer) == []


@pytest.mark.parametrize("tokenizer", [PLAIN, WITH_BOS])
def test_a_long_text_is_tokenised_in_parts_with_the_same_result(tokenizer, monkeypatch):
    long = prompted("Questions:\n" * 5, "line one\nline two </s>\n" * 20 + "x" * 90)
    whole = one(long, tokenizer)
    monkeypatch.setattr(text, "LONGEST", 64)
    parts = one(long, tokenizer)
    assert parts.tokens.tolist() == whole.tokens.tolist()
    assert parts.labelled.tolist() == whole.labelled.tolist()


def test_pieces_join_to_the_whole_text():
    example = one(prompted("Größe? ", "Ja 🙂"), WITH_BOS)
    assert pieces(example, WITH_BOS) == [("<s>Größe? ", False), ("Ja 🙂</s>", True)]


def test_the_proof_finds_runs_that_do_not_stop():
    tokenizer = chatml_tokenizer()
    stopping = Document("q:a<|im_end|>q:b<|im_end|>", ((2, 13), (15, 26)), rendered=True)
    endless = Document("q:a<|im_end|>", ((2, 3),), rendered=True)
    good, bad = encode([stopping, endless], tokenizer)
    proof = prove_stop([good], tokenizer)
    assert (proof.holds, proof.runs, dict(proof.stops)) == (True, 2, {"<|im_end|>": 2})
    assert not prove_stop([good, bad], tokenizer).holds
    assert not prove_stop([], tokenizer).holds


def test_a_tokenizer_that_cannot_end_a_text_is_refused():
    with pytest.raises(DataError, match="no end-of-sequence token"):
        one(prompted("a", "b"), byte_tokenizer(eos=None))


def test_a_real_tokenizer_learns_the_completion_with_its_stop(assets):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260K")
    example = one(prompted("Once upon a time</s>", " there was\n a girl."), tokenizer)
    assert pieces(example, tokenizer) == [("<s> Once upon a time</s>", False), (" there was\n a girl.</s>", True)]
    assert example.tokens.tolist().count(tokenizer.eos_token_id) == 1
    assert example.tokens[0] == tokenizer.bos_token_id
