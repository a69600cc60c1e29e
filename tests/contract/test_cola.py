"""Chains: a knot changes no output, the sum exports exactly, and one merge loses one rounding."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import FixedFeed, NoWatch, World, fresh_base, logits, loop_on
from peft import PeftModel
from torch import Tensor, nn

from loralab.delta.layers import load_delta_
from loralab.delta.lowrank import LowRank, add
from loralab.delta.merge import merge_, merged_weight
from loralab.delta.store import load_lowrank, save_lowrank
from loralab.errors import DataError, TargetError
from loralab.methods.cola import Cola
from loralab.training.loop import StepReport
from loralab.training.loss import LanguageHead
from loralab.training.optim import schedule
from tiny import tiny


def chain(*, dtype: torch.dtype = torch.float32, **keys: Any) -> tuple[World, Cola]:
    base = fresh_base(dtype=dtype)
    method = Cola(**{"rank": 4, "alpha": 8.0, **keys})
    method.attach(base, 0)
    return World(base, method, LanguageHead(base.model)), method


def row_logits(model: nn.Module) -> Tensor:
    """Logits of two rows, as any model of Transformers gives them."""
    tokens = torch.randint(4, 97, (2, 9), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=tokens).logits
    return found


class KnotWatch(NoWatch):
    """Measures the output after every step and again after a knot that follows it."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world, self.jumps, self.moves = world, [], []
        self._now = logits(world)

    def on_step(self, report: StepReport) -> None:
        super().on_step(report)
        before, self._now = self._now, logits(self.world)
        self.moves.append(float((self._now - before).abs().max()))

    def on_knot(self, knot: Any, step: int) -> None:
        super().on_knot(knot, step)
        self.jumps.append(float((logits(self.world) - self._now).abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_knot_changes_no_output(dtype: torch.dtype) -> None:
    world, method = chain(dtype=dtype, links=4, ranks=[4, 2, 3, 1], scaling="alpha/sqrt(r)")
    watch = KnotWatch(world)
    loop_on(world, steps=12).run(watch)
    assert watch.knots == [3, 6, 9]
    assert max(watch.jumps) <= 1e-5
    assert min(watch.moves) > 1e-3, "steps must move what knots do not"
    assert [link["model.layers.0.mlp.up_proj"].rank for link in method.links()] == [4, 2, 3, 1]


def trained_chain() -> tuple[World, Cola]:
    """Three links of differing ranks and scales, each trained, norms too."""
    world, method = chain(links=3, ranks=[4, 2, 3], alpha_pattern={"v_proj": 3.0}, also_train=["*norm*"])
    loop_on(world, steps=9).run(NoWatch())
    assert len(method.links()) == 3
    return world, method


def test_stock_peft_reproduces_the_chain_from_its_rank_sum(tmp_path: Path) -> None:
    world, method = trained_chain()
    method.save(tmp_path)
    stock = PeftModel.from_pretrained(tiny("llama"), str(tmp_path))
    torch.testing.assert_close(row_logits(stock), row_logits(world.base.model), rtol=0, atol=1e-5)
    assert {pair.rank for pair in load_lowrank(tmp_path).values() if isinstance(pair, LowRank)} == {9}


def saved_links(method: Cola, folder: Path) -> list[Path]:
    folders = []
    for number, link in enumerate(method.links(), start=1):
        folders.append(folder / f"link-{number}")
        save_lowrank(folders[-1], link, "tiny")
    return folders


def test_links_saved_alone_sum_to_the_whole(tmp_path: Path) -> None:
    world, method = trained_chain()
    expected, whole = logits(world), method.delta()
    links = [load_lowrank(folder) for folder in saved_links(method, tmp_path)]
    together = add(links)
    assert set(together) == set(whole)
    for name, pair in together.items():
        torch.testing.assert_close(pair.dense(torch.float64), whole[name].dense(torch.float64), rtol=0, atol=1e-9)
    assert all(torch.equal(together.whole[name], value) for name, value in whole.whole.items())
    back = fresh_base().model
    for number, link in enumerate(links):
        load_delta_(back, link, name=f"link-{number}")
    world.carry(back)
    torch.testing.assert_close(logits(world), expected, rtol=0, atol=1e-5)


def test_stock_peft_runs_the_links_side_by_side(tmp_path: Path) -> None:
    world, method = chain(links=3, ranks=[4, 2, 3])
    loop_on(world, steps=9).run(NoWatch())
    first, *others = saved_links(method, tmp_path)
    model = PeftModel.from_pretrained(tiny("llama"), str(first), adapter_name=first.name)
    for folder in others:
        model.load_adapter(str(folder), adapter_name=folder.name)
    model.base_model.set_adapter([first.name, *(folder.name for folder in others)])
    torch.testing.assert_close(row_logits(model), row_logits(world.base.model), rtol=0, atol=1e-5)


class Validated(NoWatch):
    """Answers with prepared validation losses."""

    def __init__(self, losses: dict[int, float | None]) -> None:
        super().__init__()
        self.validation = losses
        self.gains: list[float | None] = []

    def validation_loss(self, step: int) -> float | None:
        return self.validation[step]

    def on_knot(self, knot: Any, step: int) -> None:
        super().on_knot(knot, step)
        self.gains.append(knot.gain)


@pytest.mark.parametrize(
    ("losses", "steps", "links"),
    [
        ({0: 3.0, 2: 2.5, 4: 2.45, 6: 1.0}, 4, 2),  # the second link gains 0.05
        ({0: 3.0, 2: 3.2}, 2, 1),  # the first link loses
        ({0: 3.0, 2: 2.8, 4: 2.6, 6: 2.4}, 8, 4),  # each gains enough
    ],
)
def test_a_chain_ends_when_a_link_gains_too_little(losses: dict[int, float | None], steps: int, links: int) -> None:
    world, method = chain(links=4, stop_gain=0.1)
    watch = Validated(losses)
    loop = loop_on(world, steps=8)
    loop.run(watch)
    assert (loop.step, len(watch.losses), len(method.links())) == (steps, steps, links)
    measured = [losses[step] for step in (0, *watch.knots)]
    expected = [None if a is None else pytest.approx(a - b) for a, b in itertools.pairwise(measured)]
    assert watch.gains == expected


def test_a_stop_rule_without_validation_rows_is_refused() -> None:
    world, _ = chain(links=4, stop_gain=0.1)
    with pytest.raises(DataError, match="needs validation rows"):
        loop_on(world, steps=8).run(Validated({0: None}))


def test_more_links_than_steps_are_refused() -> None:
    world, _ = chain(links=4)
    with pytest.raises(TargetError, match="cannot train 4 links"):
        loop_on(world, steps=3).run(NoWatch())


def test_without_a_stop_rule_nothing_is_measured() -> None:
    world, _ = chain(links=2)
    loop_on(world, steps=4).run(Validated({}))


@pytest.mark.parametrize(
    ("budgets", "steps", "knots"),
    [
        ([3, 2], 40, [24, 40]),
        ([3.0, 2.0], 7, [4, 7]),
        ([1, 1, 1], 10, [3, 7, 10]),
        ([1, 100], 10, [1, 10]),
        ([1], 5, [5]),
    ],
)
def test_budgets_place_the_knots(budgets: list[float], steps: int, knots: list[int]) -> None:
    method = Cola(links=len(budgets), budgets=budgets)
    assert method.knots(steps) == knots


def test_knots_come_where_the_budgets_place_them() -> None:
    world, method = chain(links=2, budgets=[3, 2])
    watch = NoWatch()
    loop_on(world, steps=10).run(watch)
    assert watch.knots == [6]
    assert len(method.links()) == 2


def test_a_knot_forgets_the_optimizers_state() -> None:
    world, method = chain(links=2)
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def keep(step: int, state: Any) -> None:
        seen[step] = {name: tensor.clone() for name, tensor in state().tensors["optimizer"].items()}

    loop_on(world, steps=6).run(NoWatch(keep))
    layer = "model.layers.0.mlp.up_proj"
    counts = {s: {n: int(t) for n, t in group.items() if n.endswith("/step")} for s, group in seen.items()}
    assert counts[2][f"{layer}.link-1.A/step"] == 2
    assert counts[3] == {}, "the third step tied the knot"
    assert counts[4][f"{layer}.link-2.A/step"] == 1
    assert counts[6][f"{layer}.link-2.A/step"] == 3
    assert not any("link-1" in name for step in (4, 5, 6) for name in seen[step])
    assert not any(p.requires_grad for x in method.layers.values() for p in x.pair("link-1").parameters())


class RateWatch(NoWatch):
    """Keeps the learning rates."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def on_step(self, report: StepReport) -> None:
        self.rates.append(report.learning_rates["matrices"])


@pytest.mark.parametrize("kind", ["restart", "global"])
def test_the_schedule_restarts_with_a_link_or_spans_the_chain(kind: str) -> None:
    world, _ = chain(links=2, budgets=[3, 2], schedule=kind)
    watch = RateWatch()
    loop_on(world, steps=10, lr=1e-3).run(watch)
    rates = [rate / 1e-3 for rate in watch.rates]
    cosine = schedule("cosine", warmup=0.1)
    parts = [6, 4] if kind == "restart" else [10]
    assert rates == pytest.approx([cosine(step, part) for part in parts for step in range(part)])
    assert (rates[6] > rates[5]) == (kind == "restart")


def test_ten_links_merged_once_in_bfloat16_lose_one_rounding() -> None:
    world, method = chain(dtype=torch.bfloat16, links=10)
    loop_on(world, steps=20, lr=2e-3, feed=FixedFeed(sequences=2, micro=2)).run(NoWatch())
    links, delta = method.links(), method.delta()
    assert len(links) == 10
    errors = merge_(fresh_base(dtype=torch.bfloat16).model, delta)
    assert {error.name for error in errors} == set(delta)
    base = fresh_base(dtype=torch.bfloat16).model
    for error in errors:
        assert error.rounded_error == pytest.approx(error.half_ulp_error, rel=0.01)
        assert error.float32_error < 1e-3 * error.rounded_error
        # The control: each link rounded into the weight before the next is added.
        begin = base.get_submodule(error.name).weight.detach()
        exact, rounded = begin.double(), begin
        for link in links:
            exact = exact + link[error.name].dense(torch.float64)
            rounded, _ = merged_weight(rounded, link[error.name], torch.bfloat16)
        lost = float((rounded.double() - exact).norm() / (exact - begin.double()).norm())
        assert lost > 1.5 * error.rounded_error
