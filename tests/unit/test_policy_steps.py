"""Steps of a policy's objective: how answers are laid out, what is said of them, when a step rests, and how it goes on."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from enumerated_policy import ANSWERS, END, PROMPT, World, same, two_prompts
from torch import Tensor

from loralab.errors import DataError
from loralab.training.checkpoint import read_checkpoint, write_checkpoint
from loralab.training.loop import Loop, StepReport
from loralab.training.objectives.policy import PolicyObjective, Rollout
from loralab.training.optim import schedule, torch_optimizer
from loralab.training.recompute import recompute_


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
