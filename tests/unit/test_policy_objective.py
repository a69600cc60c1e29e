"""The policy's loss on a model of three tokens, whose answers can all be listed: means over them against the gradient of J."""

import pytest
import torch
from enumerated_policy import ANSWERS, END, PROMPT, World, opposite, same, two_prompts
from torch import Tensor

from loralab.spec.objective import PolicySpec
from loralab.training.objectives.policy import Rollout


@pytest.mark.parametrize("how", ["lora", "full"])
@pytest.mark.parametrize("beta, kl", [(0.0, "exact"), (0.3, "low_variance"), (0.3, "exact"), (1.0, "low_variance")])
@pytest.mark.parametrize("baseline", [False, True])
def test_reinforce_climbs_j_without_bias_whatever_the_baseline(how: str, beta: float, kl: str, baseline: bool) -> None:
    world = World(how)
    value = world.value if baseline else None
    found = world.mean_gradient(1, algorithm="reinforce", beta=beta, kl=kl, value=value, temperature=0.7)
    same(found, opposite(world.exact(beta, 0.7)))


@pytest.mark.parametrize("beta, kl", [(0.0, "exact"), (0.3, "low_variance"), (0.3, "exact"), (1.0, "exact")])
def test_rloo_climbs_j_without_bias(beta: float, kl: str) -> None:
    world = World()
    same(world.mean_gradient(2, algorithm="rloo", beta=beta, kl=kl), opposite(world.exact(beta, 1.0)))


@pytest.mark.parametrize("kl", ["low_variance", "exact"])
def test_grpo_is_its_own_formula(kl: str) -> None:
    """(1/tokens) Σ −A + β KL, with Â = (r − mean)/(sd + 10⁻⁴), written out answer by answer."""
    world, beta, total, tokens = World(), 0.2, torch.zeros(()).double(), 0
    for rollout in two_prompts():
        rewards = torch.tensor(rollout.rewards, dtype=torch.float64)
        for reward, answer in zip(rewards, rollout.answers, strict=True):
            A = (reward - rewards.mean()) / (rewards.var(correction=1).sqrt() + 1e-4)
            log_p = world.log_probs(answer, prompt=rollout.prompt)
            with world.method.without(), torch.no_grad():
                log_q = world.log_probs(answer, prompt=rollout.prompt)
            chosen = torch.arange(len(answer)), torch.tensor(answer)
            ratio = log_q[chosen] - log_p[chosen]
            low, full = ratio.exp() - ratio - 1, (log_p.exp() * (log_p - log_q)).sum(-1)
            total = total - (A * log_p[chosen]).sum() + beta * (low if kl == "low_variance" else full).sum()
            tokens += len(answer)
    expected = torch.autograd.grad(total / tokens, world.tensors)
    found = world.gradient(world.objective(two_prompts(), algorithm="grpo", beta=beta, kl=kl))
    same(found[: len(expected)], list(expected), 1e-8)


@pytest.mark.parametrize("moves", [False, True])
def test_the_unbiased_kl_of_grpo_has_the_gradient_of_the_kl_also_when_the_policy_has_moved(moves: bool) -> None:
    """Mean over all answers of the policy that wrote them, equally rewarded: Σ p_old(s) ∇KL(s) over the places s of a token."""
    world = World()
    generator = torch.Generator().manual_seed(11)
    shifts = [0.2 * torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in world.tensors]

    def move(sign: int) -> None:
        with torch.no_grad():
            for tensor, shift in zip(world.tensors, shifts, strict=True):
                tensor += sign * shift

    with torch.no_grad():
        chances = [float(world.of(answer).sum().exp()) for answer in ANSWERS]
        first = world.log_probs([END])[0].exp()  # of the first token
    move(moves)
    places = [([END], 0, 1.0), ([0, END], 1, float(first[0])), ([1, END], 1, float(first[1]))]
    total = torch.zeros(()).double()
    for answer, place, chance in places:
        log_p = world.log_probs(answer)[place]
        with world.method.without(), torch.no_grad():
            log_q = world.log_probs(answer)[place]
        total = total + chance * (log_p.exp() * (log_p - log_q)).sum()
    expected = list(torch.autograd.grad(total, world.tensors))
    move(-moves)

    def mean_gradient(kl: str) -> list[Tensor]:
        mean = [torch.zeros_like(t) for t in world.tensors]
        for answer, chance in zip(ANSWERS, chances, strict=True):
            alike = Rollout(PROMPT, [answer, answer], [1.0, 1.0])
            objective = world.objective([alike], algorithm="grpo", beta=1.0, kl=kl, epochs=1 + moves)
            steps = objective.batches(world.model)
            (batch,) = next(steps)
            if moves:
                (batch,) = next(steps)
            move(moves)
            loss = objective.loss(world.model, batch)
            for mine, part in zip(mean, torch.autograd.grad(loss.total, world.tensors), strict=True):
                mine += chance * part / 2
            move(-moves)
        return mean

    same(mean_gradient("unbiased"), expected)
    same(mean_gradient("exact"), expected)
    far = [float((a - b).abs().max()) for a, b in zip(mean_gradient("low_variance"), expected, strict=True)]
    assert max(far) > 1e-4, "without the ratio it is another divergence"


def test_the_unbiased_kl_is_of_answers_drawn_from_the_whole_policy() -> None:
    with pytest.raises(ValueError, match="not drawn from the policy"):
        PolicySpec(algorithm="grpo", reward="grade", kl="unbiased", top_p=0.9)


def test_the_unbiased_kl_is_for_grpo() -> None:
    with pytest.raises(ValueError, match="in the reward"):
        World().objective(two_prompts(), algorithm="rloo", beta=0.1, kl="unbiased")


def test_later_passes_take_the_clipped_surrogate() -> None:
    """The policy moves after the first pass; ratios are to the policy that wrote, advantages and KL are as it was then."""
    world, beta, clip = World(), 0.1, 0.2
    rollouts = two_prompts()
    objective = world.objective(rollouts, beta=beta, epochs=2, clip=clip)
    batches = objective.batches(world.model)
    first = objective.loss(world.model, next(batches)[0])
    assert first.metrics["ratio_max"] == pytest.approx(1) and first.metrics["clipped"] == 0
    advantages, old = [], []
    with torch.no_grad():
        for rollout in rollouts:
            logs = [world.of(a, prompt=rollout.prompt) for a in rollout.answers]
            with world.method.without():
                others = [world.of(a, prompt=rollout.prompt) for a in rollout.answers]
            worth = [
                (1 - beta) * r - beta * float((p - q).sum())
                for r, p, q in zip(rollout.rewards, logs, others, strict=True)
            ]
            advantages += [w - (sum(worth) - w) / (len(worth) - 1) for w in worth]
            old += logs
        for tensor in world.tensors:
            tensor += 0.3 * torch.randn_like(tensor)
    second = objective.loss(world.model, next(batches)[0])
    total, held, largest, tokens = torch.zeros(()).double(), 0, 0.0, 0
    answers = [(rollout.prompt, answer) for rollout in rollouts for answer in rollout.answers]
    for (prompt, answer), A, before in zip(answers, advantages, old, strict=True):
        for ratio in (world.of(answer, prompt=prompt) - before).exp():
            bound = ratio.clamp(1 - clip, 1 + clip)
            total = total - torch.minimum(ratio * A, bound * A)
            held += bool(bound * A < ratio * A)
            largest, tokens = max(largest, float(ratio.detach())), tokens + 1
    assert 0 < held < tokens, "some are held back, some are not"
    assert float(second.total.detach()) == pytest.approx(float(total.detach()), rel=1e-8)
    assert second.metrics["clipped"] == pytest.approx(held / tokens)
    assert second.metrics["ratio_max"] == pytest.approx(largest)
    mine = torch.autograd.grad(second.total, world.tensors)
    same(list(mine), list(torch.autograd.grad(total, world.tensors)), 1e-7)


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("how", ["lora", "full"])
def test_reinforce_is_its_own_formula(how: str, beta: float) -> None:
    """(1/answers) Σ −log π (Z − V) for the policy and Σ (V − Z)² for the value, written out answer by answer."""
    world, rollouts = World(how), two_prompts()
    objective = world.objective(rollouts, algorithm="reinforce", beta=beta, value=world.value)
    found, of_policy = world.gradient(objective), len(world.tensors)
    squared, weighed, tokens = torch.zeros(()).double(), torch.zeros(()).double(), 0
    pairs = [(r.prompt, a, reward) for r in rollouts for a, reward in zip(r.answers, r.rewards, strict=True)]
    targets = []
    for prompt, answer, reward in pairs:
        with torch.no_grad():
            k1 = world.of(answer, prompt=prompt)
            with world.method.without():
                k1 = k1 - world.of(answer, prompt=prompt)
        rewards = [-beta * float(k) for k in k1]
        rewards[-1] += (1 - beta) * reward
        targets.append([sum(rewards[t:]) for t in range(len(answer))])
    apart = []
    with world.method.without(), world.value.acting():
        for (prompt, answer, _), Z in zip(pairs, targets, strict=True):
            states = world.model.model(torch.tensor([prompt + answer]), use_cache=False).last_hidden_state[0]
            apart.append(torch.tensor(Z) - world.value.values(states[len(prompt) - 1 : -1]))
            squared, tokens = squared + apart[-1].square().sum(), tokens + len(Z)
        expected = torch.autograd.grad(squared / len(pairs), list(world.value.tensors().values()))
    same(found[of_policy:], list(expected), 1e-7)
    for (prompt, answer, _), advantages in zip(pairs, apart, strict=True):
        weighed = weighed - (world.of(answer, prompt=prompt) * advantages.detach()).sum()
    same(found[:of_policy], list(torch.autograd.grad(weighed / len(pairs), world.tensors)), 1e-7)
    (batch,) = next(objective.batches(world.model))
    assert objective.loss(world.model, batch).metrics["value_loss"] == pytest.approx(float(squared.detach()) / tokens)


def test_a_baseline_stays_what_it_was_when_the_answers_were_written() -> None:
    """In later passes a value that has meanwhile seen the returns would know the answers, and its baseline would be biased."""
    world = World()
    objective = world.objective(two_prompts(), algorithm="reinforce", beta=0.1, value=world.value, epochs=2)
    batches = objective.batches(world.model)
    first = objective.loss(world.model, next(batches)[0])
    of_first = torch.autograd.grad(first.total, world.tensors)
    with torch.no_grad():
        world.value.head.bias += 1
    second = objective.loss(world.model, next(batches)[0])
    same(list(torch.autograd.grad(second.total, world.tensors)), list(of_first), 1e-9)
    assert second.metrics["value_loss"] != pytest.approx(first.metrics["value_loss"])
