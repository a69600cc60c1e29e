"""How tokens are drawn: the distribution against the exact one, and streams that hang on nothing but their numbers."""

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from loralab.errors import EvaluationError
from loralab.evals.sampling import NOTHING, Sampling, _draw, choose, log_probabilities, uniform

VOCAB = 12
LOGITS = torch.tensor([2.0, -1.0, 0.5, 3.0, 0.0, -4.0, 1.0, 1.5, -0.5, 2.5, -2.0, 0.2])


def drawn(sampling: Sampling, logits: torch.Tensor = LOGITS, count: int = 20000) -> torch.Tensor:
    """Draw from as many streams once each."""
    streams = torch.tensor([sampling.stream(i // 50, i % 50) for i in range(count)])
    return choose(logits.expand(count, -1), sampling, streams, torch.zeros(count, dtype=torch.long))


def exact(temperature: float, top_k: int = 0, top_p: float = 1.0) -> np.ndarray:
    """Give the probabilities in double precision: temperature, then top-k, then top-p over what is left."""
    p = np.exp(LOGITS.double().numpy() / temperature)
    order = np.argsort(-p)
    kept = order[: top_k or VOCAB]
    share = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: 1 + int(np.sum(share < top_p))]
    left = np.zeros(VOCAB)
    left[kept] = p[kept] / p[kept].sum()
    return left


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 5])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_follow_the_exact_distribution(temperature, top_k, top_p):
    expected = exact(temperature, top_k, top_p)
    found = np.bincount(drawn(Sampling(temperature, top_p, top_k, seed=5)).numpy(), minlength=VOCAB)
    assert found[expected == 0].sum() == 0
    left = expected > 0
    assert left.sum() == 1 or chisquare(found[left], 20000 * expected[left]).pvalue > 0.001


def test_the_order_is_temperature_then_top_k_then_top_p():
    # Of the five likeliest at temperature 2.5, those up to 0.8 of the five's probability; 0.8 of all would leave more.
    assert (exact(2.5, 5, 0.8) > 0).sum() == 4 and (exact(2.5, 0, 0.8) > 0).sum() > 5
    assert set(drawn(Sampling(2.5, 0.8, 5)).tolist()) == set(np.flatnonzero(exact(2.5, 5, 0.8)).tolist())


def test_one_streams_draws_are_uniform_and_streams_are_independent():
    sampling = Sampling(1.0, seed=3)
    along = uniform(torch.full((20000,), sampling.stream(0, 0)), torch.arange(20000))
    across = uniform(torch.tensor([sampling.stream(i, 0) for i in range(20000)]), torch.zeros(20000, dtype=torch.long))
    samples = uniform(torch.tensor([sampling.stream(0, i) for i in range(20000)]), torch.zeros(20000, dtype=torch.long))
    for u in (along, across, samples):
        assert u.min() >= 0 and u.max() < 1
        assert kstest(u.numpy(), "uniform").pvalue > 0.01
        assert abs(np.corrcoef(u[1:], u[:-1])[0, 1]) < 0.03
    assert abs(np.corrcoef(along, across)[0, 1]) < 0.03
    assert abs(np.corrcoef(across, samples)[0, 1]) < 0.03


def test_numbers_are_those_of_splitmix64():
    # The first outputs for the seed 1234567, as the algorithm's public test vectors give them.
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    found = uniform(torch.full((5,), 1234567), torch.arange(5))
    assert found.tolist() == [(number >> 12) / 2**52 for number in expected]


def test_seeds_prompts_and_samples_have_streams_of_their_own():
    keys = {Sampling(1.0, seed=s).stream(i, k) for s in range(10) for i in range(30) for k in range(30)}
    assert len(keys) == 9000
    assert all(-(2**63) <= key < 2**63 for key in keys)
    assert Sampling(1.0, seed=-1).stream(0, 0) != Sampling(1.0, seed=1).stream(0, 0)


def test_the_largest_number_of_a_stream_draws_no_token_of_probability_zero():
    u = torch.tensor([1 - 2.0**-52, 0.0], dtype=torch.float64)
    assert u[0] < 1
    scores = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    assert _draw(scores, u).tolist() == [2, 1]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, top_k=1), Sampling(3.0, top_p=1e-9), Sampling(1e-30)])
def test_the_likeliest_token_is_taken_at_temperature_zero_and_where_nothing_else_is_left(sampling):
    assert set(drawn(sampling, count=200).tolist()) == {int(LOGITS.argmax())}


def test_a_huge_temperature_draws_evenly_among_what_is_possible():
    logits = torch.where(torch.arange(VOCAB) < 8, LOGITS, -torch.inf)
    found = np.bincount(drawn(Sampling(1e30), logits).numpy(), minlength=VOCAB)
    assert found[8:].sum() == 0 and chisquare(found[:8]).pvalue > 0.001


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7, 0.9, 5)])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_logits_that_are_not_numbers_choose_nothing(sampling, wrong):
    logits = torch.stack([LOGITS, LOGITS, torch.full((VOCAB,), -torch.inf)])
    logits[1, 4] = wrong
    found = choose(logits, sampling, torch.arange(3), torch.zeros(3, dtype=torch.long)).tolist()
    assert found[0] in range(VOCAB) and found[1:] == [NOTHING, NOTHING]


def test_log_probabilities_are_the_models_own():
    found = log_probabilities(LOGITS.expand(3, -1), torch.tensor([0, 3, 5]))
    assert torch.allclose(found, torch.log_softmax(LOGITS, -1)[[0, 3, 5]])


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"top_k": -1}, "top_k"),
    ],
)
def test_values_that_no_distribution_has_are_refused(values, where):
    with pytest.raises(EvaluationError) as caught:
        Sampling(**values)
    assert caught.value.where == where and caught.value.fix
