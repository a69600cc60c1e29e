"""Where answers end and what their text is: stop texts found while tokens come, against a look at the whole each time."""

import random

import pytest
from tiny_tokenizers import byte_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, PreTrainedTokenizerFast

from loralab.evals.written import Prompt, Row, Stops, cut, text_behind

MERGES = [("a", "b"), ("ab", "c"), ("Ċ", "Ċ"), ("Ġ", "a"), ("c", "Ċ"), ("Ã", "¼"), ("b", "Ã")]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Words that begin with a space of their own, which is lost where a text begins; bytes for the rest."""
    words = ["▁a", "▁b", "a", "b", "c", "▁", "bc", "\n", "▁ab"]
    vocab = {"<unk>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    vocab |= {word: 258 + i for i, word in enumerate(words)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


def first_end(prompt: Prompt, tokens: list[int], tokenizer) -> int | None:
    """Decode every beginning whole, and give the length of the first that holds a stop text."""
    for length in range(1, len(tokens) + 1):
        text = text_behind(prompt, tokens[:length], tokenizer)
        if any(stop in text for stop in prompt.stop_texts if stop):
            return length
    return None


@pytest.mark.parametrize("kind", ["bytes", "words"])
@pytest.mark.parametrize(
    "stop_texts", [("\n\n",), ("bc\n",), ("ü",), (" a",), ("b ",), ("abca", "cc"), ("bü a",), ("",)]
)
def test_a_stop_text_is_found_with_the_token_that_completes_it(kind, stop_texts):
    tokenizer = byte_tokenizer(merges=MERGES, bos=True) if kind == "bytes" else word_tokenizer()
    known = tokenizer.convert_tokens_to_ids(
        ["a", "b", "c", "ab", "abc", "Ċ", "ĊĊ", "Ġ", "Ġa", "cĊ", "Ã", "¼", "Ã¼", "bÃ", "</s>", "<s>"]
        if kind == "bytes"
        else ["▁a", "▁b", "a", "b", "c", "▁", "bc", "\n", "<0x0A>", "<0xC3>", "<0xBC>", "</s>", "▁ab"]
    )
    assert None not in known and len(set(known)) == len(known)
    choose = random.Random(0)
    ended = 0
    for _ in range(150):
        prompt = Prompt(choose.choices(known, k=choose.randint(1, 4)), None, 99, stop_texts)
        tokens = choose.choices(known, k=30)
        stops = Stops([], tokenizer)
        found = next((n for n in range(1, 31) if stops.text_ends(prompt, tokens[:n])), None)
        assert found == first_end(prompt, tokens, tokenizer)
        ended += found is not None
    assert ended > 20 or stop_texts in (("",), ("bü a",))


def test_a_stop_text_of_the_prompt_ends_nothing():
    tokenizer = byte_tokenizer()
    prompt = Prompt(tokenizer("Q: 1\n\n")["input_ids"], "Q: 1\n\n", 9, ("\n\n", "Q:"))
    stops, newline = Stops([], tokenizer), tokenizer("\n")["input_ids"]
    assert not stops.text_ends(prompt, newline), "the newlines of the prompt are not the answer's"
    assert stops.text_ends(prompt, newline * 2)


@pytest.mark.parametrize("named", [True, False])
def test_a_stop_text_that_is_a_special_token_ends_the_answer_as_a_token(named):
    tokenizer = byte_tokenizer(special=["<|im_end|>"] if named else [])
    if not named:
        tokenizer.add_tokens([AddedToken("<|im_end|>", special=True)])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (end in tokenizer.all_special_ids) == named and tokenizer.decode([end], skip_special_tokens=True) == ""
    stops = Stops([5], tokenizer)
    assert stops.tokens_of(Prompt([1], None, 9, ("<|im_end|>", "a", ""))) == {5, end}
    assert stops.tokens_of(Prompt([1], None, 9)) == {5}


def test_most_tokens_are_not_decoded_again():
    class Counting(PreTrainedTokenizerFast):
        def decode(self, tokens, **kinds):
            decoded.append(len(tokens))
            return super().decode(tokens, **kinds)

    decoded: list[int] = []
    tokenizer = Counting(tokenizer_object=byte_tokenizer().backend_tokenizer)
    text = "no end in sight " * 40 + "\n "
    tokens = tokenizer(text)["input_ids"]
    prompt, stops = Prompt([1], None, len(tokens), ("\n\n",)), Stops([], tokenizer)
    assert not any(stops.text_ends(prompt, tokens[:n]) for n in range(1, len(tokens) + 1))
    assert sorted(decoded)[:-1] == [1] * len(set(text)), "each token once alone"
    assert max(decoded) < 10, "and a short tail behind the newline"


def test_text_is_cut_before_each_stop_text_in_turn_as_lm_eval_does():
    from lm_eval.models.utils import postprocess_generated_text

    for stops in (["b", "ab"], ["ab", "b"], ["\n\n", "c"], ["z"], ["", "c"], []):
        for text in ("xab", "xabc\n\nab", "", "b", "ccc"):
            assert cut(text, stops) == postprocess_generated_text(text, stops, None)


def test_a_row_ends_at_its_stop_token_before_its_limit():
    stops = Stops([7], None)
    row = Row(Prompt([1, 2], None, 3), stream=0, group=0, stop_tokens=stops.tokens)
    row.take(5, -0.5, stops)
    assert row.ended is None and row.cached == 2 and row.read == [1, 2, 5] and row.longest == 5
    row.take(7, -0.1, stops)
    assert row.ended == "stop" and row.log_probs == [-0.5, -0.1]
    row = Row(Prompt([1, 2], None, 1), stream=0, group=0, stop_tokens=stops.tokens)
    row.take(5, None, stops)
    assert row.ended == "limit" and row.log_probs == []


def test_special_tokens_within_a_stop_text_do_not_hide_it():
    tokenizer = byte_tokenizer()
    prompt, stops = Prompt([1], None, 99, ("\n#",)), Stops([], tokenizer)
    newline, sign = tokenizer("\n#")["input_ids"]
    tokens = [newline, *[tokenizer.eos_token_id] * 40, sign]
    assert stops.text_ends(prompt, tokens) and not stops.text_ends(prompt, tokens[:-1])
