"""Requests in words against lm-eval's own Hugging Face backend: the same tokens, decisions and texts."""

from contextlib import nullcontext
from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_tokenizers import BOS, EOS, byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from loralab.base.attention import NAME
from loralab.base.model import load
from loralab.errors import EvaluationError
from loralab.evals.taskfiles import quiet
from loralab.evals.texts import TextEngine
from loralab.pocket import BASE
from loralab.training.loss import LanguageHead
from tiny import tiny

PLAIN = [nullcontext]
MERGES = (("t", "h"), ("Ġ", "a"), ("Ġ", "th"), ("e", "r"))
TOKENIZERS: dict[str, dict[str, Any]] = {
    "no first token": {},
    "a first token": {"bos": True},
    "merges over spaces": {"merges": MERGES},
    "merges and a first token": {"merges": MERGES, "bos": True},
}
PAIRS = [
    ("the other", " one"),
    ("the other", " two"),
    ("the other ", "one"),
    ("the other  ", "one"),
    ("a line\n", "and a line\n\n"),
    ("", "a father"),
    ("", " a"),
    ("", f"{BOS}there"),
    (f"{BOS}the other", " one"),
    (f"{EOS}the other", " one"),
    ("the oth", "er"),
    ("é ü", " ß"),
    ("the other", " one"),
    ("far " * 60, "the end"),
    ("q", "w" * 128),
]


class Peer(HFLM):
    """lm-eval's backend; keeps what it tokenised."""

    def _loglikelihood_tokens(self, requests, **others):
        self.asked = [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        return super()._loglikelihood_tokens(requests, **others)


def instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, one, number) for number, one in enumerate(arguments)]


def both(tokenizer: dict[str, Any], family: str = "llama", **chosen: Any) -> tuple[TextEngine, Peer]:
    """Make our engine and lm-eval's backend over equal models, each with a tokenizer of its own."""
    mine, other = (tiny(family, vocab_size=300, max_position_embeddings=128, **chosen) for _ in range(2))
    if family == "gpt2":
        mine, other = (tiny(family, vocab_size=300, n_positions=128, **chosen) for _ in range(2))
    mine.set_attn_implementation(NAME)
    for model in (mine, other):
        model.generation_config.eos_token_id = model.config.eos_token_id = byte_tokenizer(**tokenizer).eos_token_id
    with quiet():
        peer = Peer(pretrained=other, tokenizer=byte_tokenizer(**tokenizer), batch_size=4, device="cpu")
    return TextEngine(LanguageHead(mine), byte_tokenizer(**tokenizer)), peer


@pytest.fixture(scope="module", params=["pocket", "stories260K"])
def real(request) -> tuple[TextEngine, Peer]:
    folder = str(BASE) if request.param == "pocket" else None
    if folder is None:
        folder = str(request.getfixturevalue("assets") / "models/stories260K")
    base = load(folder, dtype="float32", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with quiet():
        peer = Peer(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=4, device="cpu")
    return TextEngine(LanguageHead(base.model), base.tokenizer), peer


def check_pairs(engine: TextEngine, peer: Peer, pairs: list[tuple[str, str]], tolerance: float = 1e-4) -> None:
    with quiet():
        theirs = peer.loglikelihood(instances("loglikelihood", pairs), disable_tqdm=True)
    assert [tuple(request) for request in engine.pairs(pairs)] == peer.asked
    (ours,) = engine.log_likelihoods(pairs, PLAIN)
    for mine, other, pair in zip(ours, theirs, pairs, strict=True):
        assert mine.log_likelihood == pytest.approx(other[0], abs=tolerance), pair
        assert mine.is_greedy == other[1], pair


# Log-likelihoods


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_pairs_have_the_tokens_and_likelihoods_of_lm_evals_backend(tokenizer, family):
    engine, peer = both(TOKENIZERS[tokenizer], family)
    # A random tiny model's logits are huge, and log p a sum over up to 128 of them.
    check_pairs(engine, peer, PAIRS, tolerance=1e-3)
    too_long = [pair for pair in peer.asked if len(pair[0]) + len(pair[1]) > 129]
    assert engine.likelihood.tally.truncated == len(too_long) > 0


def test_a_context_of_spaces_alone_is_read_behind_the_first_token():
    engine, peer = both(TOKENIZERS["a first token"])
    check_pairs(engine, peer, [("  ", "one"), ("\n", "one")])


def test_real_models_agree_with_lm_evals_backend(real):
    engine, peer = real
    words = ["Once upon a time", "the little girl went to the park and", "copy abc = "]
    pairs = [(word * times, end) for word in words for times in (1, 3) for end in (" there was", " a", "abc", "\n")]
    pairs += [("", "Lily"), (f"{words[0]} ", "there"), ("a b " * 400, "c"), (f"{engine._first_text}The", " dog")]
    check_pairs(engine, peer, pairs)


def test_a_continuation_without_a_token_of_its_own_is_refused():
    engine, _ = both(TOKENIZERS["merges over spaces"])
    for pair in (("the oth", ""), ("", ""), ("o", "")):
        with pytest.raises(EvaluationError, match="no token of its own"):
            engine.pairs([pair])


def test_each_text_is_tokenised_once():
    engine, _ = both({})
    seen: list[str] = []

    class Counting:
        def __getattr__(self, name):
            return getattr(inner, name)

        def __call__(self, texts, **chosen):
            seen.extend([texts] if isinstance(texts, str) else texts)
            return inner(texts, **chosen)

    inner, engine.tokenizer = engine.tokenizer, Counting()
    engine.pairs([("the context", f" {end}") for end in "abc"] * 2)
    assert sorted(seen) == ["the context", "the context a", "the context b", "the context c"]


def test_a_tokenizer_without_first_and_end_token_is_refused():
    model = tiny("llama", vocab_size=300)
    with pytest.raises(EvaluationError, match="neither a first nor an end token"):
        TextEngine(LanguageHead(model), byte_tokenizer(eos=None))


# Whole texts


TEXTS = ["the father of all", "word by word " * 30, "x" * 128, "x" * 127, "y" * 257, f"{BOS}one", "z"]


@pytest.mark.parametrize("tokenizer", ["no first token", "merges and a first token"])
def test_whole_texts_agree_with_lm_evals_backend_beyond_the_window(tokenizer):
    engine, peer = both(TOKENIZERS[tokenizer])
    with quiet():
        theirs = peer.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in TEXTS]), True)
    (ours,) = engine.rolling(TEXTS, PLAIN)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert engine.likelihood.tally.truncated == 0


def test_a_text_without_tokens_is_certain():
    engine, _ = both({})
    assert engine.rolling(["", "a"], PLAIN)[0][0] == 0.0


def test_real_texts_agree_with_lm_evals_backend(real):
    engine, peer = real
    texts = ["Once upon a time there was a dog. " * times for times in (1, 20, 60)]
    with quiet():
        theirs = peer.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]), True)
    assert engine.rolling(texts, PLAIN)[0] == pytest.approx(theirs, rel=1e-5, abs=1e-4)


# Answers


def check_written(engine: TextEngine, peer: Peer, asked: list[tuple[str, dict[str, Any]]]) -> list[str]:
    with quiet():
        theirs = peer.generate_until(instances("generate_until", asked), disable_tqdm=True)
    (ours,) = engine.written(asked, PLAIN)
    assert ours == theirs
    return ours


def asked_of(prompts: list[str], limits=(1, 7, 30)) -> list[tuple[str, dict[str, Any]]]:
    stops: list[Any] = [[], ["\n"], "e", ["he", " a", "zz"]]
    return [
        (prompt, {"until": stop, "max_gen_toks": limit, **({"do_sample": False} if number % 2 else {"temperature": 0})})
        for number, prompt in enumerate(prompts)
        for stop in stops
        for limit in limits
    ]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("tokenizer", ["no first token", "merges and a first token"])
def test_answers_are_those_of_lm_evals_backend(tokenizer, family):
    engine, peer = both(TOKENIZERS[tokenizer], family)
    asked = asked_of(["the other", "a", "one two "], limits=(1, 12))
    asked += [("far and wide " * 30, {"until": ["\n"], "max_gen_toks": 20}), ("a", {"until": [], "max_new_tokens": 5})]
    check_written(engine, peer, asked)
    assert engine.likelihood.tally.truncated == 1


def test_real_answers_are_those_of_lm_evals_backend(real):
    engine, peer = real
    found = check_written(engine, peer, asked_of(["Once upon a time", "copy abc = ", "The dog said: "]))
    assert len(set(found)) > 3


def test_an_answer_as_long_as_the_window_is_refused():
    engine, _ = both({})
    with pytest.raises(EvaluationError, match="answers of up to 128 tokens leave no room"):
        engine.written([("a", {"until": ["\n"], "max_gen_toks": 128})], PLAIN)


def test_a_setting_that_is_not_known_is_named():
    engine, _ = both({})
    with pytest.raises(EvaluationError, match="'num_beams'"):
        engine.written([("a", {"until": ["\n"], "max_gen_toks": 3, "num_beams": 4})], PLAIN)


def test_settings_of_a_task_are_left_as_they_are():
    engine, _ = both({})
    settings = {"until": ["\n"], "max_gen_toks": 3}
    engine.written([("a", settings), ("b", settings)], PLAIN)
    assert settings == {"until": ["\n"], "max_gen_toks": 3}


def test_tasks_that_sample_are_sampled_by_seed():
    engine, _ = both({})
    settings = {"until": ["\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.9}
    asked = [("the other", settings)] * 4
    (first,), (again,), (other,) = (engine.written(asked, PLAIN, seed=seed) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) > 1
