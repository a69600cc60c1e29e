"""The policy's loss on a model of three tokens, whose answers can all be listed: means over them against the gradient of J."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loralab.base.attention import NAME
from loralab.base.model import Base
from loralab.errors import DataError
from loralab.methods.full import Full
from loralab.methods.lora import Lora
from loralab.methods.value import Value, WithValue
from loralab.training.checkpoint import read_checkpoint, write_checkpoint
from loralab.training.loop import Loop, StepReport
from loralab.training.loss import LanguageHead
from loralab.training.objectives.policy import PolicyObjective, Rollout
from loralab.training.optim import schedule, torch_optimizer
from loralab.training.recompute import recompute_
from tiny import tiny

END, PROMPT, LONGEST = 2, [0, 1, 1], 2
ANSWERS = [[END], *([first, second] for first, second in itertools.product((0, 1), (0, 1, END)))]
"""Every answer of at most two tokens; one of two tokens may lack its end."""
REWARDS = [0.5, -1.0, 2.0, 0.0, 1.5, -0.5, 1.0]
LAYERS = ["q_proj", "down_proj"]


class World:
    """A tiny policy that has moved away from its base, in float64."""

    def __init__(self, how: str = "lora", vocab: int = 3, wide: bool = True) -> None:
        model = tiny("llama", vocab_size=vocab, pad_token_id=None, bos_token_id=None)
        model.set_attn_implementation(NAME)
        model.requires_grad_(False)
        self.model = model.double() if wide else model
        self.base = Base(self.model, None, "tiny", None, "mark")
        self.method = Lora(rank=2, alpha=2.0, targets=LAYERS) if how == "lora" else Full(targets=[*LAYERS, "lm_head"])
        self.value = Value(rank=2, alpha=2.0, targets=LAYERS)
        self.both = WithValue(self.method, self.value)
        self.both.attach(self.base, 0)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in [*self.tensors, *self.value.tensors().values()]:
                parameter.data = parameter.data.to(self.model.dtype)
                parameter += 0.5 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        self.head = LanguageHead(self.model, chunk=3)

    @property
    def tensors(self) -> list[Tensor]:
        return [p for group in self.method.param_groups(1.0, 0.0) for p in group.tensors.values()]

    def objective(self, rollouts: list[Rollout], **keys: Any) -> PolicyObjective:
        given = {"algorithm": "rloo", "beta": 0.0, "kl": "low_variance", "reference": self.both.without, **keys}
        return PolicyObjective(lambda step: rollouts, self.head, **given)

    def log_probs(self, answer: list[int], temperature: float = 1.0, prompt: list[int] = PROMPT) -> Tensor:
        """Log-probabilities (tokens, vocab) from which an answer is written, by the model's own forward pass."""
        logits = self.model(torch.tensor([prompt + answer]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        return torch.log_softmax(logits / temperature, -1)

    def of(self, answer: list[int], temperature: float = 1.0, prompt: list[int] = PROMPT) -> Tensor:
        """Log-probability of each token of an answer."""
        return self.log_probs(answer, temperature, prompt)[torch.arange(len(answer)), torch.tensor(answer)]

    def exact(self, beta: float, temperature: float) -> list[Tensor]:
        """The gradient of J = Σ p(y) ((1 − β) r(y) − β log p(y)/q(y)), over the listed answers."""
        with self.method.without(), torch.no_grad():
            reference = torch.stack([self.of(a, temperature).sum() for a in ANSWERS])
        log_p = torch.stack([self.of(a, temperature).sum() for a in ANSWERS])
        assert float(log_p.exp().sum().detach()) == pytest.approx(1), "the answers are all there are"
        if beta:
            assert float((log_p.exp() * (log_p - reference)).sum().detach()) > 0.01, "the policy has moved"
        J = (log_p.exp() * ((1 - beta) * torch.tensor(REWARDS) - beta * (log_p - reference))).sum()
        return list(torch.autograd.grad(J, self.tensors))

    def gradient(self, objective: PolicyObjective) -> list[Tensor]:
        """The gradient of one step's loss, divided once as the loop does."""
        weight = 0.0
        everything = [*self.tensors, *self.value.tensors().values()]
        for tensor in everything:
            tensor.grad = None
        for batch in next(objective.batches(self.model)):
            loss = objective.loss(self.model, batch)
            if loss.weight:
                loss.total.backward()
            weight += loss.weight
        return [torch.zeros_like(t) if t.grad is None else t.grad / weight for t in everything]

    def mean_gradient(self, samples: int, **keys: Any) -> list[Tensor]:
        """The mean over all ways to draw so many answers, each with its probability."""
        temperature = keys.get("temperature", 1.0)
        with torch.no_grad():
            p = [float(self.of(answer, temperature).sum().exp()) for answer in ANSWERS]
        total = [torch.zeros_like(t) for t in self.tensors]
        for drawn in itertools.combinations_with_replacement(range(len(ANSWERS)), samples):
            ways = 1 if len(set(drawn)) == 1 else samples
            assert samples <= 2
            rollout = Rollout(PROMPT, [ANSWERS[i] for i in drawn], [REWARDS[i] for i in drawn])
            chance = ways * float(torch.tensor([p[i] for i in drawn]).prod())
            for mine, part in zip(total, self.gradient(self.objective([rollout], **keys)), strict=False):
                mine += chance * part
        return total


def same(mine: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-6) -> None:
    assert max(float(t.abs().max()) for t in theirs) > 1e-3, "there is something to compare"
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def opposite(tensors: list[Tensor]) -> list[Tensor]:
    return [-t for t in tensors]


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


def two_prompts() -> list[Rollout]:
    return [
        Rollout(PROMPT, [ANSWERS[1], ANSWERS[0], ANSWERS[6]], [1.0, 4.0, 1.5]),
        Rollout([1, 0], [ANSWERS[3], ANSWERS[5], ANSWERS[2]], [0.0, -1.0, 3.0]),
        Rollout([0, 0, 1, 0], [ANSWERS[0], ANSWERS[4], ANSWERS[4]], [2.0, 2.0, 2.0]),
        Rollout([1], [ANSWERS[2], ANSWERS[0], ANSWERS[1]], [0.5, 0.0, -3.0]),
    ]


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


@pytest.mark.parametrize("algorithm, kl", [("reinforce", "low_variance"), ("rloo", "exact"), ("grpo", "low_variance")])
def test_neither_micro_batches_nor_sharing_change_loss_gradient_or_averages(algorithm: str, kl: str) -> None:
    world = World()
    value = world.value if algorithm == "reinforce" else None
    keys: dict[str, Any] = {"algorithm": algorithm, "beta": 0.2, "kl": kl, "value": value}

    def run(**more: Any) -> tuple[list[Tensor], float, dict[str, float], int]:
        objective = world.objective(two_prompts(), **keys, **more)
        batches = next(objective.batches(world.model))
        losses = [objective.loss(world.model, batch) for batch in batches]
        metrics: dict[str, float] = {}
        for loss in losses:
            metrics |= loss.metrics
        total = sum(float(loss.total.detach()) for loss in losses) / sum(loss.weight for loss in losses)
        num_tokens = sum(batch.tokens.numel() for batch in batches)
        return world.gradient(world.objective(two_prompts(), **keys, **more)), total, metrics, num_tokens

    whole, loss, metrics, _ = run()
    assert {"reward", "kl", "kl_per_token", "entropy", "length"} <= metrics.keys()
    for changed in ({"micro_batch": 1}, {"micro_batch": 3}, {"share": False}):
        found, other, others, tokens = run(**changed)
        same(found, whole)
        assert other == pytest.approx(loss, abs=1e-6) and others == pytest.approx(metrics, abs=1e-6)
        answers, prompts = sum(r.num_tokens for r in two_prompts()), sum(len(r.prompt) for r in two_prompts())
        assert tokens == answers + prompts * (3 if "share" in changed else 1)


@pytest.mark.parametrize("recompute", ["full", "selective"])
@pytest.mark.parametrize("how", ["lora", "full"])
def test_recomputing_blocks_changes_no_gradient(how: str, recompute: Any) -> None:
    """In backward the value's blocks must be computed again by the value, the policy's by the policy."""
    keys: dict[str, Any] = {"algorithm": "reinforce", "beta": 0.2, "kl": "exact"}
    plain, world = World(how), World(how)
    recompute_(world.model, recompute)
    world.model.train()
    found = world.gradient(world.objective(two_prompts(), value=world.value, **keys))
    same(found, plain.gradient(plain.objective(two_prompts(), value=plain.value, **keys)))


def test_what_is_said_of_a_batch() -> None:
    world = World()
    rollouts = [
        Rollout(PROMPT, [[0, 1], [END]], [1.0, 3.0], {"graded": [1.0, 0.0], "length": [0.0, 3.0]}, [True, False]),
        Rollout([1], [[END], [1, END]], [2.0, 2.0], {"graded": [0.0, 0.0], "length": [2.0, 2.0]}, [False, False]),
    ]
    metrics: dict[str, float] = {}
    objective = world.objective(rollouts, beta=0.5, micro_batch=1)
    for batch in next(objective.batches(world.model)):
        metrics |= objective.loss(world.model, batch).metrics
    tokens = [(r.prompt, a) for r in rollouts for a in r.answers]
    kls, entropies = [], []
    with torch.no_grad():
        for prompt, answer in tokens:
            log_p = world.of(answer, prompt=prompt)
            with world.method.without():
                log_q = world.of(answer, prompt=prompt)
            kls.append(float(((log_q - log_p).exp() - 1 - (log_q - log_p)).sum()))
            every = world.log_probs(answer, prompt=prompt)
            entropies += (-(every.exp() * every).sum(-1)).tolist()
    expected = {"reward": 2.0, "reward/graded": 0.25, "reward/length": 7 / 4, "length": 6 / 4, "truncated": 0.25}
    expected |= {"equal_rewards": 1.0, "kl": sum(kls) / 4, "kl_per_token": sum(kls) / 6, "entropy": sum(entropies) / 6}
    assert metrics == pytest.approx(expected)


def test_a_step_without_signal_weighs_nothing() -> None:
    """Equal rewards: nothing to learn, unless the KL pulls a policy that has moved; the learned value always can."""
    equal = [Rollout(PROMPT, [ANSWERS[0], ANSWERS[1]], [1.0, 1.0])]
    mixed = [*equal, Rollout([1], [ANSWERS[0], ANSWERS[1]], [1.0, 0.0])]

    def weights(world: World, rollouts: list[Rollout], **keys: Any) -> list[float]:
        objective = world.objective(rollouts, micro_batch=1, **keys)
        return [objective.loss(world.model, batch).weight for batch in next(objective.batches(world.model))]

    world = World()
    for algorithm in ("rloo", "grpo"):
        assert weights(world, equal, algorithm=algorithm) == [0]
        per_prompt = 2 if algorithm == "rloo" else 3
        assert weights(world, mixed, algorithm=algorithm) == [per_prompt, per_prompt], "one normaliser for the step"
        assert weights(world, equal, algorithm=algorithm, beta=0.1) == [per_prompt]
        assert weights(world, equal, algorithm=algorithm, beta=0.1, epochs=2) == [per_prompt]
    assert weights(world, equal, algorithm="reinforce", value=world.value) == [2]
    for kl in ("low_variance", "exact"):
        assert weights(world, equal, beta=0.1, kl=kl, reference=nullcontext) == [0], "the policy is its reference"


def test_at_beta_0_the_reference_is_never_asked() -> None:
    world = World()

    def forbidden() -> Any:
        raise AssertionError("the reference was asked")

    for algorithm, epochs in itertools.product(("rloo", "grpo"), (1, 2)):
        objective = world.objective(two_prompts(), algorithm=algorithm, epochs=epochs, reference=forbidden)
        (batch,) = next(objective.batches(world.model))
        assert "kl" not in objective.loss(world.model, batch).metrics


class Silent:
    """Looks on, keeps the reports, and writes a checkpoint after three steps."""

    def __init__(self, folder: Path | None = None) -> None:
        self.reports: list[StepReport] = []
        self.folder = folder

    def measure(self, step: int, *, last: bool = False) -> None: ...

    def validation_loss(self, step: int) -> None: ...

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def on_knot(self, knot: Any, step: int) -> None: ...

    def on_warning(self, message: str, step: int) -> None: ...

    def save_if_due(self, step: int, state: Any, *, now: bool = False) -> None:
        if step == 3 and self.folder is not None:
            write_checkpoint(self.folder, state())

    def stop_requested(self) -> bool:
        return False

    def is_enough(self) -> bool:
        return False


@pytest.mark.parametrize(
    "algorithm, keys",
    [
        ("reinforce", {"epochs": 2, "minibatches": 2}),  # four steps to a batch: step 3 lies in the middle
        ("reinforce", {"epochs": 2, "kl": "exact"}),
        ("grpo", {"minibatches": 2}),
        ("rloo", {}),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_by_bit(
    algorithm: str, keys: dict[str, Any], tmp_path: Path
) -> None:
    """Six steps, and the last three of them again from a checkpoint: safetensors and JSON."""

    def answers(step: int) -> list[Rollout]:
        generator = torch.Generator().manual_seed(step)

        def some(count: int) -> list[int]:
            return torch.randint(0, 40, (count,), generator=generator).tolist()

        rollouts = []
        for prompt in range(4):
            written = [some(2 + (prompt + i) % 3) for i in range(3)]
            rewards = [sum(answer) / 40 for answer in written]
            rollouts.append(Rollout(some(3 + prompt), written, rewards, {"sum": rewards}, [False] * 3))
        return rollouts

    def loop() -> tuple[World, Loop]:
        world = World(vocab=41, wide=False)
        value = world.value if algorithm == "reinforce" else None
        given = {"algorithm": algorithm, "beta": 0.1, "kl": "low_variance", "value": value, "micro_batch": 1, **keys}
        objective = PolicyObjective(answers, world.head, reference=world.method.without, **given)
        method = world.both if value is not None else world.method
        make = torch_optimizer("adamw")
        rates = {"learning_rate": 0.01, "weight_decay": 0.0, "schedule": schedule("constant"), "total_steps": 6}
        loop = Loop(
            model=world.model, method=method, objective=objective, make_optimizer=make, **rates, clip=1.0, spike=None
        )
        return world, loop

    whole, unbroken = loop()
    seen = Silent(tmp_path)
    unbroken.run(seen)
    assert len(seen.reports) == 6 and seen.reports[-1].loss != seen.reports[0].loss

    broken, resumed = loop()
    resumed.load_state(read_checkpoint(tmp_path / "step-3"))
    again = Silent()
    resumed.run(again)
    assert [r.metrics for r in again.reports] == [r.metrics for r in seen.reports[3:]]
    assert [r.loss for r in again.reports] == [r.loss for r in seen.reports[3:]]
    tensors = broken.both.state()[0]
    for name, tensor in whole.both.state()[0].items():
        assert torch.equal(tensor, tensors[name]), name


def test_answers_in_hand_that_were_read_for_other_settings_are_given_up() -> None:
    world, asked = World(), []

    def sample(step: int) -> list[Rollout]:
        asked.append(step)
        return two_prompts()

    def objective(**keys: Any) -> PolicyObjective:
        given = {"algorithm": "rloo", "beta": 0.1, "kl": "low_variance", "epochs": 3, **keys}
        return PolicyObjective(sample, world.head, reference=world.method.without, **given)

    first = objective()
    next(first.batches(world.model))
    for keys, drawn in (({}, [0]), ({"kl": "exact"}, [0, 1]), ({"epochs": 1}, [0, 1, 1])):
        branch = objective(**keys)
        branch.load_state(first.state())
        (batch,) = next(branch.batches(world.model))
        assert branch.loss(world.model, batch).weight == 12 and asked == drawn


def test_one_answer_at_a_time_where_the_model_cannot_pack() -> None:
    world = World()
    keys: dict[str, Any] = {"beta": 0.2, "kl": "exact"}
    together = world.gradient(world.objective(two_prompts(), **keys))
    world.head.packs = False
    objective = world.objective(two_prompts(), **keys)
    assert len(next(objective.batches(world.model))[0].rows) == 12
    same(world.gradient(world.objective(two_prompts(), **keys)), together)


def test_what_cannot_be_learned_from_is_refused() -> None:
    world = World()
    for answers, rewards, parts in (
        ([], [], {}),
        ([[]], [1.0], {}),
        ([[1]], [1.0, 2.0], {}),
        ([[1]], [1.0], {"a": []}),
    ):
        with pytest.raises(ValueError):
            Rollout(PROMPT, answers, rewards, parts)
    objective = world.objective(two_prompts(), minibatches=5)
    with pytest.raises(DataError, match="4 prompts do not fill 5 minibatches"):
        next(objective.batches(world.model))
    with pytest.raises(ValueError, match="no use for a value"):
        world.objective(two_prompts(), value=world.value)


def test_minibatches_take_every_prompt_once_in_a_pass_in_another_order() -> None:
    world = World()
    batches = world.objective(two_prompts(), minibatches=2, epochs=2, reference=nullcontext).batches(world.model)
    orders = []
    for _ in range(2):
        orders.append([tuple(r.prompt) for _ in range(2) for batch in next(batches) for r in batch.rollouts])
        assert sorted(orders[-1]) == sorted(tuple(r.prompt) for r in two_prompts())
    assert orders[0] != orders[1]
