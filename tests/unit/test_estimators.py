"""Estimators against closed forms: means over all outcomes of a small softmax, and log-probabilities through a head in chunks."""

import pytest
import torch
from torch.nn import functional as F

from loralab.base import attention
from loralab.base.trees import forest
from loralab.training import estimators
from loralab.training.loss import LanguageHead, chunked_written
from tiny import tiny

VOCAB = 5


def two_softmaxes() -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a policy (with gradient) and of its reference, far apart."""
    generator = torch.Generator().manual_seed(3)
    logits, reference = torch.randn(2, VOCAB, dtype=torch.float64, generator=generator)
    return logits.requires_grad_(True), reference


def by_hand(logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    p, q = torch.softmax(logits, -1), torch.softmax(reference, -1)
    return (p * (p / q).log()).sum(-1)


@pytest.mark.parametrize("estimate", [estimators.log_ratio, estimators.kl_per_token])
def test_the_mean_of_an_estimate_over_all_tokens_is_the_kl(estimate) -> None:
    logits, reference = two_softmaxes()
    log_p, log_q = torch.log_softmax(logits, -1).detach(), torch.log_softmax(reference, -1)
    found = (log_p.exp() * estimate(log_p, log_q)).sum()
    assert float(found) == pytest.approx(float(by_hand(logits, reference).detach()), abs=1e-12)
    assert float(found) > 0.1, "the two distributions differ"


def test_the_low_variance_estimate_is_never_negative_and_varies_less_near_the_reference() -> None:
    logits, reference = two_softmaxes()
    near = reference + 0.05 * logits.detach()
    log_p, log_q = torch.log_softmax(near, -1), torch.log_softmax(reference, -1)
    k1, k3 = estimators.log_ratio(log_p, log_q), estimators.kl_per_token(log_p, log_q)
    assert float(k1.min()) < 0 <= float(k3.min())

    def variance(k: torch.Tensor) -> float:
        mean = (log_p.exp() * k).sum()
        return float((log_p.exp() * (k - mean).square()).sum())

    assert variance(k3) < 0.01 * variance(k1)


def test_exact_kl_and_entropy_and_their_gradients() -> None:
    logits, reference = two_softmaxes()
    found = estimators.exact_kl(logits, reference)
    expected = by_hand(logits, reference)
    assert float(found.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)
    mine, theirs = (torch.autograd.grad(kl, logits)[0] for kl in (found, expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    p = torch.softmax(logits.detach(), -1)
    assert float(estimators.entropy(logits).detach()) == pytest.approx(float(-(p * p.log()).sum()), abs=1e-12)


def test_gradients_of_estimates_are_what_the_module_says_of_them() -> None:
    """k₁ alone: 0. k₁ as a reward: ∇KL(π‖q). k₃ as a loss: ∇KL(q‖π), which is another direction."""
    logits, reference = two_softmaxes()
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    p = log_p.detach().exp()

    def mean_gradient(losses: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad((p * losses).sum(), logits, retain_graph=True)[0]

    forward = torch.autograd.grad(by_hand(logits, reference), logits, retain_graph=True)[0]
    backward = torch.autograd.grad(by_hand(reference, logits), logits, retain_graph=True)[0]
    k1, k3 = estimators.log_ratio(log_p, log_q), estimators.kl_per_token(log_p, log_q)
    torch.testing.assert_close(mean_gradient(k1), torch.zeros(VOCAB).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(mean_gradient(log_p * k1.detach()), forward, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(mean_gradient(k3), backward, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(forward, backward, rtol=0.1)


@pytest.mark.parametrize("moved", [0.0, 0.7])
def test_k3_weighted_by_the_ratio_is_unbiased_in_value_and_gradient(moved: float) -> None:
    """Over tokens of the policy that wrote, which may have moved since: KL(π‖q) and ∇KL(π‖q). Without the weight, neither."""
    logits, reference = two_softmaxes()
    apart = torch.randn(VOCAB, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    old = torch.log_softmax(logits.detach() + moved * apart, -1)
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(reference, -1)
    kl = by_hand(logits, reference)
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    weighted = estimators.weighted_kl(log_p, old, log_q)
    assert float(weighted.detach().min()) >= 0
    found = (old.exp() * weighted).sum()
    assert float(found.detach()) == pytest.approx(float(kl.detach()), abs=1e-12)
    (gradient,) = torch.autograd.grad(found, logits, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)
    (plain,) = torch.autograd.grad((old.exp() * estimators.kl_per_token(log_p, log_q)).sum(), logits)
    assert float((plain - expected).norm()) > 0.1 * float(expected.norm())


def test_advantages_of_both_kinds_by_hand() -> None:
    rewards = torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]], dtype=torch.float64)
    expected = torch.tensor([[1 - 8 / 2, 2 - 7 / 2, 6 - 3 / 2], [0, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(estimators.rloo_advantages(rewards), expected)
    sd = (((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2) ** 0.5
    expected = torch.tensor([[-2, -1, 3], [0, 0, 0]], dtype=torch.float64) / (sd + 1e-4)
    torch.testing.assert_close(estimators.grpo_advantages(rewards), expected)


def test_returns_sum_a_reward_and_those_after_it() -> None:
    found = estimators.returns(torch.tensor([[1.0, 10.0, 100.0], [5.0, -2.0, 0.0]]))
    assert found.tolist() == [[111.0, 110.0, 100.0], [3.0, -2.0, 0.0]]


def test_explained_variance() -> None:
    targets = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64)
    assert estimators.explained_variance(targets - 7, targets) == pytest.approx(1), "a constant shift explains all"
    assert estimators.explained_variance(torch.zeros(3).double(), targets) == pytest.approx(0)
    assert estimators.explained_variance(-targets, targets) == pytest.approx(1 - 4)
    assert estimators.explained_variance(targets, torch.ones(3).double()) is None


@pytest.mark.parametrize(
    "ratio, advantage, loss, slope",
    [
        (1.1, 2.0, -2.2, -2.2),  # within the band: −ρ A, and ∂/∂log π = −ρ A
        (1.5, 2.0, -2.4, 0.0),  # likelier by more than 20 % already, and good: held back
        (1.5, -2.0, 3.0, 3.0),  # likelier, but bad: goes down
        (0.5, -2.0, 1.6, 0.0),  # less likely by more than 20 %, and bad: held back
        (0.5, 2.0, -1.0, -1.0),  # less likely, but good: goes up
    ],
)
def test_a_clipped_token(ratio: float, advantage: float, loss: float, slope: float) -> None:
    old = torch.tensor([-1.0], dtype=torch.float64)
    log_probs = (old + torch.tensor(ratio).double().log()).requires_grad_(True)
    found, ratios, held = estimators.clipped(log_probs, old, torch.tensor([advantage]).double(), 0.2)
    assert float(found.detach()) == pytest.approx(loss) and float(ratios) == pytest.approx(ratio)
    assert float(torch.autograd.grad(found.sum(), log_probs)[0]) == pytest.approx(slope)
    assert bool(held) == (slope == 0)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compare", [False, True])
@pytest.mark.parametrize("chunk, temperature", [(1, 1.0), (3, 0.7), (64, 1.0)])
def test_written_tokens_equal_plain_autograd(
    trains: bool, bias: bool, compare: bool, chunk: int, temperature: float
) -> None:
    torch.manual_seed(0)
    H = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    W = torch.randn(17, 6, dtype=torch.float64, requires_grad=trains)
    b = torch.randn(17, dtype=torch.float64, requires_grad=trains) if bias else None
    other, t = torch.randn(10, 17, dtype=torch.float64), torch.randint(17, (10,))
    of_log_p, of_kl = torch.randn(2, 10, dtype=torch.float64)
    logits = F.linear(H, W, b) / temperature
    reference = other.__getitem__ if compare else None
    found = chunked_written(H, W, b, t, chunk=chunk, temperature=temperature, reference=reference)

    log_p = torch.log_softmax(logits, -1)
    chosen = log_p[torch.arange(10), t]
    kl = (log_p.exp() * (log_p - torch.log_softmax(other / temperature, -1))).sum(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(found.log_probs, chosen, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.entropy, entropy.detach(), rtol=1e-10, atol=1e-12)
    assert not found.entropy.requires_grad
    total, expected = (found.log_probs * of_log_p).sum(), (chosen * of_log_p).sum()
    if compare:
        assert found.kl is not None
        torch.testing.assert_close(found.kl, kl, rtol=1e-10, atol=1e-12)
        total, expected = total + (found.kl * of_kl).sum(), expected + (kl * of_kl).sum()
    else:
        assert found.kl is None
    inputs = [x for x in (H, W, b) if x is not None and x.requires_grad]
    for mine, theirs in zip(torch.autograd.grad(total, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("trains", [False, True])
def test_nothing_as_wide_as_the_vocabulary_is_kept_for_backward(trains: bool) -> None:
    rows, vocab, hidden = 64, 500, 8
    H, W = torch.randn(rows, hidden, requires_grad=True), torch.randn(vocab, hidden, requires_grad=trains)
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        found = chunked_written(H, W, None, torch.randint(vocab, (rows,)), chunk=16)
    assert found.log_probs.requires_grad
    assert sum(t.numel() for t in kept if t.shape != W.shape) <= 3 * rows * hidden


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("head_trains", [False, True])
def test_a_model_says_of_answers_in_a_forest_what_it_says_of_each_alone(family: str, head_trains: bool) -> None:
    """Log-probabilities, entropies and KL, and their gradient in a weight that moves; gemma2 caps its logits."""
    model, other = (tiny(family, seed=seed).requires_grad_(False) for seed in (0, 1))
    for one in (model, other):
        one.set_attn_implementation(attention.NAME)
    moving = [next(p for n, p in model.named_parameters() if "down_proj.weight" in n or "c_proj.weight" in n)]
    if head_trains:
        moving.append(model.get_output_embeddings().weight)
    for parameter in moving:
        parameter.requires_grad_(True)
    groups = [([3, 4, 5], [[6, 7], [8], [6, 9, 9]]), ([10, 11], [[12, 13]])]
    laid = forest(groups)
    head, reference = LanguageHead(model, chunk=3), LanguageHead(other, chunk=2)
    found = head.written(
        laid.row,
        laid.before,
        laid.next_tokens(),
        temperature=0.8,
        reference=reference.logits_of(laid.row, laid.before),
    )
    expected: list[list[torch.Tensor]] = [[], [], []]
    for prefix, tails in groups:
        for tail in tails:
            tokens, rows = torch.tensor([prefix + tail]), slice(len(prefix) - 1, -1)
            p, q = (torch.log_softmax(m(tokens, use_cache=False).logits[0, rows] / 0.8, -1) for m in (model, other))
            numbers = (
                p[torch.arange(len(tail)), torch.tensor(tail)],
                -(p.exp() * p).sum(-1),
                (p.exp() * (p - q)).sum(-1),
            )
            for place, number in zip(expected, numbers, strict=True):
                place.append(number)
    log_probs, entropy, kl = map(torch.cat, expected)
    assert found.kl is not None
    for mine, theirs in ((found.log_probs, log_probs), (found.entropy, entropy), (found.kl, kl)):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4, check_device=False)
    gain = torch.linspace(-1, 1, len(kl))
    grads = [
        torch.autograd.grad((a * gain + b * gain.flip(0)).sum(), moving)
        for a, b in ((found.log_probs, found.kl), (log_probs, kl))
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    alone = head.log_probs(laid.row, laid.before, laid.next_tokens(), 0.8)
    torch.testing.assert_close(alone, found.log_probs, rtol=1e-5, atol=1e-5)
