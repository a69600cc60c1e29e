"""Optimizers against their references, masters in half precision, schedules by their definitions."""

import itertools
import math

import pytest
import torch
from torch.nn import Parameter

from loralab.methods.base import ParamGroup
from loralab.training.optim import Optimizer, schedule, steps_of, torch_optimizer


def group(tensors: dict[str, Parameter], lr: float = 1e-2, decay: float = 0.0, name: str = "all") -> ParamGroup:
    return ParamGroup(name, tensors, lr, decay)


def set_gradients(tensors: dict[str, Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in tensors.values():
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def test_lionw_follows_algorithm_2_with_decoupled_decay() -> None:
    torch.manual_seed(0)
    p = Parameter(torch.randn(4, 3))
    w, m = p.detach().clone().double(), torch.zeros(4, 3).double()
    lr, decay, b1, b2 = 1e-2, 1e-3, 0.9, 0.95
    optimizer = Optimizer([group({"w": p}, lr, decay)], torch_optimizer("lionw", betas=(b1, b2)))
    for step in range(5):
        set_gradients({"w": p}, step)
        g = p.grad.double()
        factor = 1.0 if step < 3 else 0.5
        optimizer.step(factor)
        # Chen et al. algorithm 2; the decay is times the schedule only.
        w = w * (1 - decay * factor) - lr * factor * torch.sign(b1 * m + (1 - b1) * g)
        m = b2 * m + (1 - b2) * g
        torch.testing.assert_close(p.detach().double(), w, rtol=1e-5, atol=1e-6)


def test_adamw_is_torchs_and_the_factor_scales_its_rate() -> None:
    torch.manual_seed(0)
    ours, theirs = Parameter(torch.randn(5)), None
    theirs = Parameter(ours.detach().clone())
    optimizer = Optimizer([group({"w": ours}, 1e-2, 0.1)], torch_optimizer("adamw", betas=(0.9, 0.99)))
    reference = torch.optim.AdamW([theirs], lr=5e-3, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(4):
        set_gradients({"w": ours}, step)
        theirs.grad = ours.grad.clone()
        optimizer.step(0.5)
        reference.step()
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", ["adamw", "lionw", "adafactor"])
def test_every_optimizer_descends(name: str) -> None:
    torch.manual_seed(0)
    p = Parameter(torch.randn(8, 8))
    optimizer = Optimizer([group({"w": p}, 3e-2)], torch_optimizer(name))
    before = float(p.detach().square().mean())
    for _ in range(60):
        p.grad = 2 * p.detach()
        optimizer.step(1.0)
    assert float(p.detach().square().mean()) < 0.1 * before


def test_bfloat16_tensors_move_on_float32_masters() -> None:
    """A step far below half an ulp of 1 must add up instead of vanishing."""
    p = Parameter(torch.ones(16, dtype=torch.bfloat16))
    optimizer = Optimizer([group({"w": p}, 1e-4)], torch_optimizer("adamw"))
    for _ in range(100):
        p.grad = torch.ones_like(p)
        optimizer.step(1.0)
    assert p.dtype == torch.bfloat16
    assert float(p[0].detach()) == float(torch.tensor(1 - 100 * 1e-4).bfloat16())


@pytest.mark.parametrize("name", ["adamw", "lionw", "adafactor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    def fresh() -> dict[str, Parameter]:
        torch.manual_seed(0)
        return {"a": Parameter(torch.randn(4, 3).to(dtype)), "b": Parameter(torch.randn(3).to(dtype))}

    def build(tensors: dict[str, Parameter]) -> Optimizer:
        groups = [group({"a": tensors["a"]}, 1e-2, 0.1, "a"), group({"b": tensors["b"]}, 3e-2, name="b")]
        return Optimizer(groups, torch_optimizer(name))

    whole = fresh()
    optimizer = build(whole)
    for step in range(3):
        set_gradients(whole, step)
        optimizer.step(1.0)
    tensors, facts = optimizer.state()
    resumed = {key: Parameter(p.detach().clone()) for key, p in whole.items()}
    other = build(resumed)
    other.load_state({key: t.clone() for key, t in tensors.items()}, facts)
    for step in range(3, 6):
        for o, ts in ((optimizer, whole), (other, resumed)):
            set_gradients(ts, step)
            o.step(0.7)
    for key in whole:
        assert torch.equal(whole[key], resumed[key])


def test_clipping_does_not_depend_on_the_grouping() -> None:
    torch.manual_seed(0)
    names = [f"t{i}" for i in range(20)]
    values = {n: torch.randn(7, 5) for n in names}

    def clipped(groups: list[list[str]]) -> dict[str, torch.Tensor]:
        tensors = {n: Parameter(values[n].clone()) for n in names}
        for i, n in enumerate(names):
            tensors[n].grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(i))
        made = [group({n: tensors[n] for n in part}, name=str(k)) for k, part in enumerate(groups)]
        Optimizer(made, torch_optimizer("adamw")).clip(1.0)
        return {n: tensors[n].grad for n in names}

    one, two = clipped([names]), clipped([names[1::2], names[0::2]])
    assert all(torch.equal(one[n], two[n]) for n in names)
    norm = math.sqrt(sum(float(g.square().sum()) for g in one.values()))
    assert norm == pytest.approx(1.0, rel=1e-4)


def test_amounts_below_one_are_shares() -> None:
    assert steps_of(0.1, 200) == 20
    assert steps_of(7.0, 200) == 7


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "inverse_sqrt"])
def test_schedules_rise_to_one_and_never_exceed_it(name: str) -> None:
    factor = schedule(name, warmup=10)
    values = [factor(step, 100) for step in range(100)]
    assert max(values) <= 1.0
    assert values[10] == pytest.approx(1.0)
    assert all(a < b for a, b in itertools.pairwise(values[:11]))
    after = values[10:]
    assert all(a >= b for a, b in itertools.pairwise(after))


def test_cosine_ends_at_its_final_factor() -> None:
    factor = schedule("cosine", warmup=0.1, final=0.01)
    assert factor(1000, 1000) == pytest.approx(0.01)
    assert factor(550, 1000) == pytest.approx((1 + 0.01) / 2)


def test_inverse_sqrt_branches_agree_until_their_cooldown() -> None:
    """P1: one long run and cooldown branches: before its cooldown a branch has the long run's rate."""
    factor = schedule("inverse_sqrt", warmup=100, scale=1000, cooldown=0.2)
    assert [factor(s, 1000) for s in range(800)] == [factor(s, 5000) for s in range(800)]
    assert factor(799, 1000) == pytest.approx(1 / math.sqrt(1 + 699 / 1000))
    assert factor(900, 1000) == pytest.approx(0.5 * factor(800, 1000))
    assert factor(1000, 1000) == 0.0


def test_narrow_gradients_accumulate_in_float32() -> None:
    """64 gradients of 1/3 and one of 100: in bfloat16 the small ones would stop adding up."""
    p = Parameter(torch.zeros(4, dtype=torch.bfloat16))
    optimizer = Optimizer([group({"w": p})], torch_optimizer("adamw"))
    third = torch.tensor(1 / 3).bfloat16()
    for value in [torch.tensor(100.0).bfloat16(), *[third] * 64]:
        p.grad = value.expand(4).clone()
        optimizer.collect()
    assert p.grad is None
    torch.testing.assert_close(optimizer.gradients()["w"], torch.full((4,), 100 + 64 * float(third)))


def test_a_state_of_other_tensors_is_an_error() -> None:
    optimizer = Optimizer([group({"w": Parameter(torch.zeros(2))})], torch_optimizer("adamw"))
    with pytest.raises(KeyError):
        optimizer.load_state({"other/exp_avg": torch.zeros(2)}, {})
