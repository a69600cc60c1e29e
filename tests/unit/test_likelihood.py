"""The likelihood engine: what a naive pass over each request alone says, with less computed."""

from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch

from loralab.base.attention import NAME
from loralab.errors import EvaluationError
from loralab.evals.likelihood import ROWS_AT_ONCE, Engine, Likelihood, Request
from loralab.evals.probe import Cost, counting
from loralab.training.loss import LanguageHead
from tiny import tiny

FAMILIES = ("llama", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "opt")
PLAIN = [nullcontext]


def model_of(family: str, *, packs: bool = True, **changes):
    model = tiny(family, **changes)
    if packs:
        model.set_attn_implementation(NAME)
    return model


def engine_of(family: str = "llama", *, packs: bool = True, **chosen) -> Engine:
    head = LanguageHead(model_of(family, packs=packs))
    assert head.packs is packs
    return Engine(head, **chosen)


def drawn(seed: int, count: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(3, 101, count).tolist())


def requests_of() -> list[Request]:
    """Make requests of all kinds: shared contexts long and short, equal ones, one token before and behind, a full window."""
    long, short, examples = drawn(1, 30), drawn(2, 5), drawn(3, 20)
    found = [Request(long, drawn(10 + i, 1 + 2 * i)) for i in range(4)]
    found += [Request(short, drawn(20 + i, 1)) for i in range(4)]
    found += [Request(examples + drawn(30 + i, 3), drawn(40 + j, 2)) for i in range(3) for j in range(2)]
    found += [
        Request((7,), drawn(50, 6)),
        Request((7,), (8,)),
        found[1],
        found[5],
        Request(long, found[3].continuation),
    ]
    return [*found, Request(drawn(51, 60), drawn(52, 5)), Request((1,), drawn(53, 64))]


@torch.no_grad()
def alone(model, request: Request) -> Likelihood:
    """Read one request by itself, with Transformers' own attention."""
    read = torch.tensor([[*request.context, *request.continuation[:-1]]])
    logits = model(input_ids=read, use_cache=False).logits[0, -len(request.continuation) :].double()
    target = torch.tensor(request.continuation)
    log_p = torch.log_softmax(logits, -1).gather(-1, target[:, None]).sum()
    return Likelihood(float(log_p), bool((logits.argmax(-1) == target).all()))


def check_equal(found: list[Likelihood], expected: list[Likelihood], tolerance: float = 1e-5) -> None:
    for mine, right in zip(found, expected, strict=True):
        assert mine.log_likelihood == pytest.approx(right.log_likelihood, rel=tolerance, abs=tolerance)
        assert mine.is_greedy == right.is_greedy


# Equal to reading each alone


@pytest.mark.parametrize("row_tokens", [2048, 40, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_requests_are_scored_as_if_each_were_read_alone(family, row_tokens):
    asked = requests_of()
    expected = [alone(tiny(family), request) for request in asked]
    engine = engine_of(family, row_tokens=row_tokens)
    (found,) = engine.score(asked, PLAIN)
    check_equal(found, expected)
    assert engine.tally.truncated == 0
    if row_tokens == 1:
        return
    (again,) = engine.score(list(reversed(asked)), PLAIN)
    check_equal(again, expected[::-1])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_that_cannot_pack_reads_one_request_at_a_time(family):
    asked = requests_of()
    engine = engine_of(family, packs=False)
    (found,) = engine.score(asked, PLAIN)
    check_equal(found, [alone(tiny(family), request) for request in asked])
    assert engine.tally.forwards == len(set(asked))


def test_a_model_with_a_state_along_the_row_is_read_one_request_at_a_time():
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"vocab_size": 101, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "use_mambapy": False}
    model = MambaForCausalLM(MambaConfig(**sizes)).eval()
    asked = [request for request in requests_of() if len(request.context) < 40]
    engine = Engine(LanguageHead(model))
    (found,) = engine.score(asked, PLAIN)
    check_equal(found, [alone(model, request) for request in asked])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_greedy_is_what_greedy_decoding_would_write(family):
    model = tiny(family)
    context = drawn(4, 20)
    read = list(context)
    with torch.no_grad():
        for _ in range(6):
            read.append(int(model(input_ids=torch.tensor([read])).logits[0, -1].argmax()))
    written = tuple(read[20:])
    asked = [Request(context, written[:k]) for k in range(1, 7)]
    asked += [Request(context, (*written[:k], (written[k] + 1) % 101, *written[k + 1 :])) for k in range(6)]
    (found,) = engine_of(family).score(asked, PLAIN)
    assert [one.is_greedy for one in found] == [True] * 6 + [False] * 6


def test_of_two_tokens_that_are_equally_likely_greedy_decoding_writes_the_first():
    model = model_of("llama")
    with torch.no_grad():
        best = int(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].argmax())
        other = (best + 1) % 101
        model.lm_head.weight[other] = model.lm_head.weight[best]
    (found,) = Engine(LanguageHead(model)).score([Request((5, 6, 7), (t,)) for t in sorted((best, other))], PLAIN)
    assert found[0].log_likelihood == pytest.approx(found[1].log_likelihood)
    assert [one.is_greedy for one in found] == [True, False]


def test_bfloat16_is_read_as_precisely_as_it_can_be():
    model = model_of("llama").to(torch.bfloat16)
    asked = requests_of()
    (found,) = Engine(LanguageHead(model)).score(asked, PLAIN)
    expected = [alone(tiny("llama").to(torch.bfloat16), request) for request in asked]
    for mine, right, request in zip(found, expected, asked, strict=True):
        assert mine.log_likelihood == pytest.approx(right.log_likelihood, abs=0.3 * len(request.continuation) ** 0.5)


# What is computed


def test_a_context_is_computed_once_for_all_its_continuations():
    context = drawn(1, 30)
    asked = [Request(context, drawn(60 + i, 4)) for i in range(5)]
    engine = engine_of()
    engine.score(asked, PLAIN)
    assert engine.tally.tokens == 30 + 5 * 3, "the last token of a continuation is predicted, not read"
    assert (engine.tally.forwards, engine.tally.plain_tokens) == (1, 5 * 33)


def test_one_token_continuations_cost_their_context():
    engine = engine_of()
    engine.score([Request(drawn(1, 6), (token,)) for token in range(3, 90)], PLAIN)
    assert (engine.tally.tokens, engine.tally.forwards) == (6, 1)


def test_equal_requests_are_computed_once_and_each_is_answered():
    context, other = drawn(1, 9), drawn(2, 9)
    engine = engine_of()
    asked = [Request(context, (4, 5)), Request(other, (4, 5)), Request(context, (4, 5)), Request(context, (4, 5))]
    (found,) = engine.score(asked, PLAIN)
    assert engine.tally.tokens == 2 * 10
    assert found[0] == found[2] == found[3] != found[1]


def test_rows_hold_no_more_than_their_budget():
    asked = [Request(drawn(i, 20), drawn(100 + i, 5)) for i in range(12)]
    engine = engine_of(row_tokens=50)
    prepared = engine.prepared(asked)
    assert [row.batch.num_tokens for row in prepared._rows] == [48] * 6
    assert prepared.num_tokens == 12 * 24
    prepared.score(PLAIN)
    assert engine.tally.forwards == 6
    assert Engine(engine.head, 10).prepared(asked[:3]).num_tokens == 3 * 24, "one request may be longer"


def test_only_positions_that_predict_go_through_the_head():
    engine, asked = engine_of(), [Request(drawn(i, 20), (5, 6)) for i in range(3)]
    assert [row.places.tolist() for row in engine.prepared(asked)._rows] == [[19, 20, 40, 41, 61, 62]]


def test_requests_are_laid_out_once_and_scored_again_and_again():
    engine = engine_of()
    prepared = engine.prepared(requests_of())
    (first,) = prepared.score(PLAIN)
    forwards = engine.tally.forwards
    (again,) = prepared.score(PLAIN)
    assert first == again and engine.tally.forwards == 2 * forwards


def test_views_are_scored_in_one_pass_over_the_data():
    model = model_of("llama")
    engine, entered = Engine(LanguageHead(model), 40), []

    @contextmanager
    def negated():
        entered.append(True)
        model.lm_head.weight.data.neg_()
        yield
        model.lm_head.weight.data.neg_()

    asked = requests_of()
    base, tuned, again = engine.score(asked, [nullcontext, negated, nullcontext])
    assert base == again
    rows = len(engine.prepared(asked)._rows)
    assert engine.tally.forwards == 3 * rows and len(entered) == -(-rows // ROWS_AT_ONCE)
    with negated():
        check_equal(engine.score(asked, PLAIN)[0], tuned, 1e-6)
    assert any(a != b for a, b in zip(base, tuned, strict=True))


def test_scoring_leaves_mode_and_random_state_as_they_were():
    engine, before = engine_of(), torch.get_rng_state()
    engine.head.model.train()
    engine.score(requests_of(), PLAIN)
    assert engine.head.model.training and torch.equal(before, torch.get_rng_state())


def test_nothing_asked_is_nothing_answered():
    assert engine_of().score([], [nullcontext, nullcontext]) == [[], []]


# What is too long, or not there


@pytest.mark.parametrize("packs", [True, False])
def test_what_is_too_long_loses_the_beginning_of_its_context_and_is_counted(packs):
    context, continuation = drawn(5, 70), drawn(6, 7)
    engine = engine_of("gpt2", packs=packs)
    asked = [Request(context, continuation), Request(context[:58], continuation), Request(context[:57], continuation)]
    found = engine.score(asked, PLAIN * 2)[1]
    assert engine.tally.truncated == 1, (
        "once, however many deltas; 58 + 7 tokens are one more than 64, but one is not read"
    )
    kept = Request(context[-58:], continuation)
    check_equal(found, [alone(tiny("gpt2"), request) for request in (kept, *asked[1:])])


def test_a_continuation_may_fill_the_window_and_no_more():
    model, engine = tiny("llama"), engine_of()
    full = Request(drawn(7, 9), drawn(8, 64))
    (found,) = engine.score([full], PLAIN)
    check_equal(found, [alone(model, Request(full.context[-1:], full.continuation))])
    with pytest.raises(EvaluationError, match="has 65 tokens, but the model reads 64"):
        engine.score([Request((1,), drawn(8, 65))], PLAIN)


@pytest.mark.parametrize("request_, what", [(Request((), (1,)), "a context"), (Request((1,), ()), "a continuation")])
def test_nothing_to_read_or_to_score_is_refused(request_, what):
    with pytest.raises(EvaluationError, match=f"{what} is empty"):
        engine_of().score([request_], PLAIN)


def test_logits_that_are_not_numbers_are_refused_with_the_model_that_gives_them():
    model = model_of("llama")
    engine = Engine(LanguageHead(model))

    @contextmanager
    def diverged():
        before = model.model.norm.weight.data
        model.model.norm.weight.data = torch.full_like(before, float("nan"))
        yield
        model.model.norm.weight.data = before

    with pytest.raises(EvaluationError, match="not numbers") as caught:
        engine.score(requests_of(), [nullcontext, diverged])
    assert caught.value.where == "model 2 of 2"


def test_several_threads_give_what_one_gives_and_count_the_same():
    requests = requests_of()
    before = torch.get_num_threads()
    found, costs = [], []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            engine, cost = engine_of(row_tokens=24), Cost()
            with counting(engine.head.model, cost):
                found.append(engine.score(requests, PLAIN)[0])
            costs.append((cost.forwards, cost.tokens))
            assert (cost.forwards, cost.tokens) == (engine.tally.forwards, engine.tally.tokens)
            assert torch.get_num_threads() == threads and not torch.is_inference_mode_enabled()
            assert torch.is_grad_enabled()
    finally:
        torch.set_num_threads(before)
    check_equal(found[1], found[0])
    assert costs[0] == costs[1] and costs[0][0] > 3
