"""Probes: losses, their standard errors and the distance from the base, each against a direct computation."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from battery import World as MethodWorld
from battery import fresh_base
from battery import world as world_of

from loralab.base.data import Batch, collate
from loralab.base.text import Example
from loralab.errors import DeltaError
from loralab.evals.drift import TextProbe, exact_kl, lower_bound_kl, on_prompts
from loralab.evals.probe import Reading
from loralab.evals.stats import mean_score, ratio_mean
from loralab.training.loss import LanguageHead
from tiny import tiny

TOKENS = 101


def documents(count: int = 7, seed: int = 0) -> list[Example]:
    """Make documents of different lengths; the third has nothing to predict."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        length = int(rng.integers(4, 15))
        labelled = rng.random(length) < (0.0 if number == 2 else 0.7)
        labelled[-1] = number != 2
        made.append(Example(rng.integers(4, 97, length).tolist(), labelled.tolist()))
    return made


def batches(found: list[Example]) -> list[Batch]:
    return [collate(found[:4]), collate(found[4:])]


class World:
    """A tiny model, its tuned copy (weights moved), and a probe on documents."""

    def __init__(self, *, drift: bool = True, top_k: int = TOKENS, family: str = "llama") -> None:
        self.model = fresh_base(family).model
        self.documents = documents()
        self.probe = TextProbe(
            "target", batches(self.documents), LanguageHead(self.model, chunk=5), drift=drift, top_k=top_k
        )

    def move(self, by: float = 0.05) -> None:
        torch.manual_seed(1)
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=by)

    @torch.no_grad()
    def alone(self) -> tuple[np.ndarray, np.ndarray, list[torch.Tensor]]:
        """Give summed loss and tokens of each document that has targets by the model's own loss, and log-probabilities."""
        sums, counts, log_q = [], [], []
        for document in self.documents:
            if not document.num_labelled:
                continue
            tokens = torch.tensor(document.tokens.astype(np.int64))[None]
            labels = torch.where(torch.from_numpy(document.labelled), tokens[0], -100)[None]
            output = self.model(input_ids=tokens, labels=labels)
            counts.append(document.num_labelled)
            sums.append(float(output.loss) * document.num_labelled)
            log_q.append(output.logits[0, :-1][labels[0, 1:] != -100].double().log_softmax(-1))
        return np.array(sums), np.array(counts, float), log_q


def column(reading: Reading, name: str) -> np.ndarray:
    return np.array([row[name] for row in reading.items])


def test_the_probes_loss_is_the_models_own_loss_on_each_document_alone():
    world = World(drift=False)
    reading = world.probe.read_base()
    sums, counts, _ = world.alone()
    np.testing.assert_array_equal(column(reading, "num_tokens"), counts)
    np.testing.assert_allclose(column(reading, "loss_sum"), sums, rtol=2e-5)
    (score,) = reading.scores
    assert (score.name, score.unit, score.n) == ("target/loss", "nats/token", len(counts))
    assert score.value == pytest.approx(sums.sum() / counts.sum(), rel=1e-5)
    mean = score.value
    residuals = [s - mean * c for s, c in zip(column(reading, "loss_sum"), counts, strict=True)]
    n = len(counts)
    assert score.standard_error == pytest.approx(math.sqrt(n / (n - 1) * sum(r * r for r in residuals)) / counts.sum())


def test_the_standard_error_treats_documents_as_clusters():
    rng = np.random.default_rng(0)
    values = rng.normal(size=40)
    mean, error = ratio_mean(values, np.ones(40))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(values.std(ddof=1) / math.sqrt(40))
    # Ten equal tokens in each document tell no more than one.
    assert ratio_mean(10 * values, np.full(40, 10.0)) == pytest.approx((mean, error))
    assert ratio_mean(np.array([3.0]), np.array([2.0])) == (1.5, None)
    assert mean_score("a", "b", np.array([3.0]), np.array([2.0])).interval() is None


def test_the_standard_error_is_that_of_resampled_documents():
    rng = np.random.default_rng(1)
    weights = rng.integers(1, 30, 200).astype(float)
    sums = weights * rng.normal(2.0, 0.5, 200)
    _, error = ratio_mean(sums, weights)
    drawn = rng.integers(0, 200, (4000, 200))
    assert error == pytest.approx((sums[drawn].sum(1) / weights[drawn].sum(1)).std(), rel=0.06)


@pytest.mark.parametrize("family", ["llama", "gemma2"])  # gemma2 caps its logits: the other way through the head
def test_readings_of_a_tuned_model_pair_with_the_base(family):
    world = World(family=family)
    world.model.config.final_logit_softcapping = 30.0  # the tiny one is so low that tokens tie
    before = world.probe.read_base()
    base_sums, counts, log_p = world.alone()
    world.move()
    reading = world.probe.read(5)
    tuned_sums, _, log_q = world.alone()
    scores = {score.name: score for score in reading.scores}
    assert {"target/loss", "target/loss_rise", "drift/kl", "drift/top1_flips"} <= set(scores)
    np.testing.assert_allclose(column(reading, "loss_sum"), tuned_sums, rtol=2e-5)
    rise = mean_score("", "", column(reading, "loss_sum") - column(before, "loss_sum"), counts)
    assert scores["target/loss_rise"].value == pytest.approx((tuned_sums - base_sums).sum() / counts.sum(), rel=1e-4)
    assert scores["target/loss_rise"].standard_error == pytest.approx(rise.standard_error)
    exact = np.array([float((p.exp() * (p - q)).sum()) for p, q in zip(log_p, log_q, strict=True)])
    assert scores["drift/kl"].value == pytest.approx(exact.sum() / counts.sum(), rel=1e-4)
    flips = np.array([float((p.argmax(-1) != q.argmax(-1)).sum()) for p, q in zip(log_p, log_q, strict=True)])
    assert flips.sum() > 0
    assert scores["drift/top1_flips"].value == pytest.approx(flips.sum() / counts.sum())
    assert scores["drift/top1_flips"].standard_error == pytest.approx(ratio_mean(flips, counts)[1])


def test_tokens_that_tie_are_no_flips():
    world = World(family="gemma2")  # capped so low that several tokens share the top
    world.probe.read_base()
    log_p = torch.cat(world.alone()[2])
    assert bool(((log_p == log_p.amax(-1, keepdim=True)).sum(-1) > 1).any())
    assert next(s.value for s in world.probe.read(0).scores if s.name == "drift/top1_flips") == 0


def test_a_shorter_list_of_tokens_bounds_the_divergence_from_below():
    found = {}
    for top_k in (1, 8, 64, TOKENS):
        world = World(top_k=top_k)
        world.probe.read_base()
        world.move()
        found[top_k] = next(s.value for s in world.probe.read().scores if s.name == "drift/kl")
    assert 0 < found[1] < found[8] < found[64] < found[TOKENS]


def both(log_p: torch.Tensor, log_q: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Give the bound from the k likeliest tokens, and the exact divergence."""
    top = log_p.topk(k, -1)
    exact = (log_p.double().exp() * (log_p.double() - log_q.double())).sum(-1)
    return lower_bound_kl(top.values, log_q.gather(-1, top.indices)), exact


@pytest.mark.parametrize("spread", [0.01, 1.0, 8.0])
def test_the_bound_is_never_above_the_divergence_and_equals_it_for_all_tokens(spread):
    torch.manual_seed(0)
    log_p, log_q = (torch.randn(64, 50).mul(spread).log_softmax(-1) for _ in range(2))
    before = torch.zeros(64, dtype=torch.float64)
    for k in (1, 5, 20, 49):
        bound, exact = both(log_p, log_q, k)
        assert bool((bound <= exact * (1 + 1e-5) + 1e-6).all())
        assert bool((bound >= before * (1 - 1e-4) - 1e-6).all()), "more tokens never say less"
        before = bound
    torch.testing.assert_close(bound, exact, rtol=1e-4, atol=1e-6)


def test_the_bound_is_never_negative():
    torch.manual_seed(0)
    log_p = torch.randn(500, 50).mul(4).log_softmax(-1)
    for log_q in (
        log_p,
        (log_p + 1e-7 * torch.randn_like(log_p)).log_softmax(-1),
        torch.zeros(500, 50).log_softmax(-1),
    ):
        for k in (1, 10, 49):
            assert bool((both(log_p, log_q, k)[0] >= 0).all())
    # Nothing is left outside the tokens, so what rounding leaves there must not count.
    certain = torch.full((3, 50), -200.0)
    certain[:, 0] = 0.0
    found = both(certain.log_softmax(-1), log_p[:3], 5)[0]
    assert bool(torch.isfinite(found).all()) and bool((found >= 0).all())


def test_a_model_that_differs_from_its_base_before_training_is_refused():
    world = World()
    world.probe.read_base()
    assert next(s.value for s in world.probe.read(0).scores if s.name == "drift/kl") == 0
    world.move(0.01)
    with pytest.raises(DeltaError, match="differs from its base") as caught:
        world.probe.read(0)
    assert caught.value.where == "step 0"
    world.probe.read(1)
    world.probe.read()


def test_the_base_is_read_with_the_delta_switched_off():
    world = World(drift=False)
    expected = column(world.probe.read_base(), "loss_sum")
    head = world.model.lm_head.weight
    pristine = head.detach().clone()
    tuned = pristine + 0.3 * torch.arange(len(head))[:, None]

    @contextmanager
    def without() -> Iterator[None]:
        head.copy_(pristine)
        yield
        head.copy_(tuned)

    with torch.no_grad():
        head.copy_(tuned)
        np.testing.assert_array_equal(column(world.probe.read_base(without()), "loss_sum"), expected)
    assert torch.equal(head, tuned)
    assert not np.allclose(column(world.probe.read(), "loss_sum"), expected, rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_a_probe_leaves_random_state_and_mode_as_they_were(training):
    world = World()
    world.model.train(training)
    modes = []

    def look(module: torch.nn.Module, _: object) -> None:
        modes.append(module.training)
        torch.rand(3)  # as a layer would that draws in evaluation mode

    world.model.model.register_forward_pre_hook(look)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    world.probe.read_base()
    world.probe.read()
    assert torch.equal(torch.get_rng_state(), before)
    assert world.model.training == training
    assert modes and not any(modes), "a probe reads in evaluation mode"
    assert all(p.grad is None for p in world.model.parameters())


def train(w: MethodWorld, by: float) -> None:
    """Move what a method trains."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in w.base.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=by)


# The two historic mistakes


def counting_model() -> torch.nn.Module:
    """Make a model that is sure that token t is followed by t + 1: no layer adds anything, the head reads the embedding."""
    model = fresh_base().model
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.zero_()
    embedding = torch.nn.functional.one_hot(torch.arange(101) % 32, 32).float()
    model.model.embed_tokens.weight.copy_(embedding)
    model.model.norm.weight.fill_(1.0)
    model.lm_head.weight.copy_(10 * embedding.roll(1, 0))  # row v holds the embedding of v − 1
    return model


def test_targets_are_the_next_tokens():
    """A text that counts is read without loss; with targets that were not shifted, the same probe finds it improbable."""
    model = counting_model()
    batch = collate([Example(list(range(start, start + 12)), [True] * 12) for start in (0, 5, 15)])
    probe = TextProbe("general", [batch], LanguageHead(model))
    # Four of the 101 tokens share an embedding modulo 32: the right one and up to three like it.
    assert probe.read_base().scores[0].value == pytest.approx(math.log(4), abs=0.3)
    late = Batch(batch.tokens, batch.positions, batch.tokens, batch.lengths)
    assert TextProbe("general", [late], LanguageHead(model)).read_base().scores[0].value > 20


@pytest.mark.parametrize("case", ["lora", "full", "peft-pissa"])
@pytest.mark.parametrize("exact", [True, False])
def test_the_base_is_the_base_under_a_delta_that_is_not_nothing(case, exact):
    """A 'before' taken on a model that wears a trained adapter would hide what that adapter had done already."""
    w = world_of(case)
    pristine = TextProbe("general", batches(documents()), LanguageHead(fresh_base().model)).read_base()
    train(w, 0.3)
    found = {}
    for name, without in (("right", w.method.without()), ("wrong", None)):
        probe = TextProbe(
            "general", batches(documents()), w.head, drift=True, exact=w.method.without if exact and without else None
        )
        base = probe.read_base(without)
        found[name] = column(base, "loss_sum"), {s.name: s.value for s in probe.read(1).scores}
        if without:
            with pytest.raises(DeltaError, match="differs from its base before training"):
                probe.read(0)
    tolerance = {"rtol": 1e-5} if case == "peft-pissa" else {"rtol": 0}
    np.testing.assert_allclose(found["right"][0], column(pristine, "loss_sum"), **tolerance)
    assert not np.allclose(found["wrong"][0], column(pristine, "loss_sum"), rtol=1e-2)
    assert found["wrong"][1]["general/loss_rise"] == found["wrong"][1]["drift/kl"] == 0, "the mistake sees no change"
    assert abs(found["right"][1]["general/loss_rise"]) > 0.01 and found["right"][1]["drift/kl"] > 0.01


# Exact, and what the bound leaves out


@pytest.mark.parametrize("case", ["lora", "full", "lora-embedding", "peft-head"])
def test_a_second_forward_gives_the_exact_divergence(case):
    w = world_of(case)
    train(w, 0.1)
    found = {}
    for kind, keys in {
        "exact": {"exact": w.method.without},
        "bound": {"top_k": 8},
        "whole": {"top_k": TOKENS},
    }.items():
        probe = TextProbe("general", batches(documents()), LanguageHead(w.base.model, chunk=5), drift=True, **keys)
        base = {s.name: s for s in probe.read_base(w.method.without()).scores}
        scores = {s.name: s for s in probe.read(1).scores}
        found[kind] = scores["drift/kl"]
        assert ("drift/covered" in base) == (kind != "exact") == (probe.cached_bytes > 0)
        assert scores["drift/top1_flips"].value > 0
    assert found["exact"].unit == "nats/token" and found["bound"].unit == "nats/token (lower bound)"
    assert found["bound"].value < found["exact"].value == pytest.approx(found["whole"].value, rel=1e-4)
    assert found["exact"].standard_error == pytest.approx(found["whole"].standard_error, rel=1e-3)


def test_an_exact_reading_leaves_the_delta_on():
    w = world_of("lora")
    probe = TextProbe("general", batches(documents()), w.head, drift=True, exact=w.method.without)
    probe.read_base(w.method.without())
    assert {s.name: s.value for s in probe.read(0).scores}["drift/kl"] == 0
    train(w, 0.1)
    assert probe.read(1) == probe.read(2)
    assert probe.read(1).scores[1].value != 0


def test_the_exact_divergence_is_finite_where_a_token_is_impossible():
    log_p = torch.tensor([[0.5, 0.5, 0.0]]).log()
    log_q = torch.tensor([[0.25, 0.5, 0.25]]).log()
    assert float(exact_kl(log_p, log_q)) == pytest.approx(0.5 * math.log(2))
    assert float(exact_kl(log_p, log_p)) == 0


def test_it_is_said_how_much_of_the_base_the_kept_tokens_cover():
    for top_k in (3, 64):
        world = World(top_k=top_k)
        score = next(s for s in world.probe.read_base().scores if s.name == "drift/covered")
        _, counts, log_p = world.alone()
        mass = [float(p.exp().topk(top_k).values.sum()) for p in log_p]
        assert score.value == pytest.approx(sum(mass) / counts.sum(), rel=1e-5)
        assert score.n == len(counts) and score.unit == "share of probability"


def test_drift_on_the_new_task_has_its_own_name():
    world = World()
    probe = TextProbe("target", world.probe.batches, world.probe.head, drift=True, prefix="target_")
    names = [s.name for s in probe.read_base().scores]
    assert names == ["target/loss", "drift/target_covered"]
    names = [s.name for s in probe.read(0).scores]
    assert names == ["target/loss", "target/loss_rise", "drift/target_kl", "drift/target_top1_flips"]


@pytest.mark.parametrize(
    ("labelled", "read"),
    [
        ([0, 0, 0, 1, 1], [0, 1, 1, 1, 0]),  # a prompt of three: its tokens, and the first of the answer
        ([0, 1, 1, 1, 1], [0, 1, 1, 1, 1]),  # text without a prompt
        ([0, 0, 0, 0, 0], [0, 1, 1, 1, 1]),
        ([0, 0, 1, 0, 1], [0, 1, 1, 0, 0]),
    ],
)
def test_prompts_are_read_up_to_the_first_token_of_the_answer(labelled, read):
    example = Example([7, 8, 9, 10, 11], [bool(x) for x in labelled])
    (found,) = on_prompts([example])
    assert found.labelled.tolist() == [bool(x) for x in read] and found.tokens.tolist() == example.tokens.tolist()


# Cost


@pytest.mark.parametrize(("vocab", "bytes_of_number"), [(101, 2), (70_000, 4)])
def test_the_base_is_kept_in_few_bytes(vocab, bytes_of_number):
    """64 numbers and log-probabilities and the best token: 388 bytes a position, 25 MB for 65,536, as the reference plans."""
    model = tiny("llama", vocab_size=vocab).requires_grad_(False)
    found = [Example(rng.integers(vocab - 60, vocab, 9), np.ones(9, bool)) for rng in [np.random.default_rng(0)] * 4]
    probe = TextProbe("general", [collate([e]) for e in found], LanguageHead(model), drift=True)
    probe.read_base()
    positions = sum(example.num_labelled for example in found)
    assert probe.cached_bytes == positions * (64 * (bytes_of_number + 4) + 4)
    assert 65_536 * (64 * 6 + 4) < 26e6
    # Numbers beyond 32,767, or beyond 65,535, come back as they were.
    assert {s.name: s.value for s in probe.read(0).scores}["drift/kl"] == 0
    with torch.no_grad():
        model.lm_head.weight.mul_(1.1)
    kept = {s.name: s.value for s in probe.read(1).scores}["drift/kl"]
    assert 0 < kept < 1


def forwards_of(world: World) -> list[int]:
    """Collect the tokens of every forward pass from here on."""
    seen: list[int] = []
    world.model.model.register_forward_pre_hook(
        lambda module, given, named: seen.append(named["input_ids"].numel()), with_kwargs=True
    )
    return seen


def test_a_reading_is_one_forward_and_no_pass_of_the_base():
    """Hence at most 1 % of a step: the forward of a token is at most half of its training.

    With frozen weights training costs forward (2 floating-point operations a weight) and the gradient of the input (2 more);
    full fine-tuning adds that of the weights (2). So a probe of P tokens every 100 steps of T costs at most P / 2 of 100 T:
    for 65,536 each, 0.5 %.
    """
    world = World()
    text = sum(batch.num_tokens for batch in world.probe.batches)
    seen = forwards_of(world)
    world.probe.read_base()
    assert seen == [batch.num_tokens for batch in world.probe.batches]
    for step in (0, 100, 200):
        seen.clear()
        world.probe.read(step)
        assert seen == [batch.num_tokens for batch in world.probe.batches] and sum(seen) == text
    forward_of_training = 2 / (2 + 2)
    assert forward_of_training * sum(seen) / (100 * text) <= 0.01
    exact = TextProbe("general", world.probe.batches, world.probe.head, drift=True, exact=nullcontext)
    exact.read_base()
    seen.clear()
    exact.read(1)
    assert sum(seen) == 2 * text
