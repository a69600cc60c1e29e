"""The low-rank linear layer against plain autograd, and what it keeps for backward."""

import itertools

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from loralab.delta.linear import LowRankEmbedding, LowRankLinear, Pair, _kept, _rescaled


def layer_of(base: nn.Module, ranks: list[int], *, dtype: torch.dtype, dropout: float = 0.0) -> LowRankLinear:
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    layer = LowRankLinear(base.requires_grad_(False), weight, dropout)
    out, into = weight.shape
    for number, rank in enumerate(ranks):
        A = torch.randn(rank, into, dtype=dtype) / into**0.5
        layer.add_pair(f"p{number}", Pair(A, torch.randn(out, rank, dtype=dtype), 0.5 + number))
    return layer


def reference(layer: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
    """The formula itself, in plain autograd."""
    y = layer.base(x)
    for name in layer.active:
        pair = layer.pair(name)
        y = y + pair.scale * (x @ pair.A.t()) @ pair.B.t()
    return y


@pytest.mark.parametrize("ranks", [[4], [4, 2], [1, 3, 2]])
@pytest.mark.parametrize("kind", ["linear", "bias", "conv1d"])
def test_value_and_gradients_equal_plain_autograd_in_float64(kind: str, ranks: list[int]) -> None:
    torch.manual_seed(0)
    base = {"linear": nn.Linear(6, 9, bias=False), "bias": nn.Linear(6, 9), "conv1d": Conv1D(9, 6)}[kind].double()
    layer = layer_of(base, ranks, dtype=torch.float64)
    x = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    tensors = [x, *(getattr(layer.pair(n), f) for n, f in itertools.product(layer.active, "AB"))]
    dy = torch.randn(2, 5, 9, dtype=torch.float64)
    got, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(got, tensors, dy), torch.autograd.grad(expected, tensors, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    layer = layer_of(nn.Linear(4, 3).double(), [2], dtype=torch.float64)
    pair = layer.pair("p0")
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *_: layer(x), (x, pair.A, pair.B))


def test_a_trained_bias_receives_its_gradient() -> None:
    layer = layer_of(nn.Linear(4, 3).double(), [2], dtype=torch.float64)
    layer.base.bias.requires_grad_(True)
    layer(torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(layer.base.bias.grad, torch.full((3,), 5.0, dtype=torch.float64))


def test_only_chosen_pairs_act_and_none_is_the_base_exactly() -> None:
    torch.manual_seed(0)
    layer = layer_of(nn.Linear(6, 9), [4, 2], dtype=torch.float32)
    x = torch.randn(5, 6)
    both = layer(x)
    layer.active = ("p1",)
    one = layer(x)
    torch.testing.assert_close(one, reference(layer, x))
    assert not torch.allclose(one, both)
    layer.active = ()
    assert torch.equal(layer(x), layer.base(x))


def saved_bytes(run, *, but: tuple[torch.Tensor, ...]) -> int:
    """Bytes that autograd keeps, each storage once, without weights that exist anyway."""
    known = {t.untyped_storage().data_ptr() for t in but}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda t: t):
        result = run()
    del result
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_projections_of_one_input_keep_it_once(dtype: torch.dtype) -> None:
    """x once and h for each: T·(in + 3·rank) numbers, PEFT's default keeps 3·T·in in float32 (peers.md 4.3)."""
    tokens, into, rank = 64, 48, 4
    layers = [layer_of(nn.Linear(into, into, bias=False).to(dtype), [rank], dtype=torch.float32) for _ in range(3)]
    x = torch.randn(tokens, into, dtype=dtype, requires_grad=True)
    parameters = tuple(p for layer in layers for p in layer.parameters())
    kept = saved_bytes(lambda: [layer(x) for layer in layers], but=parameters)
    lean = tokens * (into + 3 * rank) * x.element_size()
    assert lean <= kept <= 1.15 * lean


def test_dropout_regenerates_its_mask_and_keeps_no_more() -> None:
    torch.manual_seed(0)
    layer = layer_of(nn.Linear(6, 9, bias=False).double(), [4], dtype=torch.float64, dropout=0.5).train()
    x = torch.randn(200, 6, dtype=torch.float64, requires_grad=True)
    pair = layer.pair("p0")

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return layer(x)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    numeric = torch.autograd.gradcheck(lambda *_: run(3), (x, pair.A, pair.B), fast_mode=True)
    assert numeric
    parameters = tuple(layer.parameters())
    with_dropout = saved_bytes(lambda: layer(x), but=parameters)
    layer.eval()
    assert with_dropout == saved_bytes(lambda: layer(x), but=parameters)
    torch.testing.assert_close(
        torch.stack([_train_once(layer, x, s) for s in range(400)]).mean(0), layer(x), atol=0.5, rtol=0
    )


def _train_once(layer: LowRankLinear, x: torch.Tensor, seed: int) -> torch.Tensor:
    torch.manual_seed(seed)
    layer.train()
    with torch.no_grad():
        y = layer(x)
    layer.eval()
    return y


def test_float32_masters_on_a_bfloat16_base() -> None:
    torch.manual_seed(0)
    layer = layer_of(nn.Linear(32, 32, bias=False).bfloat16(), [4], dtype=torch.float32)
    x = torch.randn(16, 32).bfloat16().requires_grad_(True)
    y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    pair = layer.pair("p0")
    assert pair.A.grad.dtype == pair.B.grad.dtype == torch.float32
    exact = x.detach().float() @ (layer.base.weight.float() + 0.5 * pair.B.detach() @ pair.A.detach()).t()
    assert float((y.detach().float() - exact).norm() / exact.norm()) < 1e-2


def test_no_input_gradient_where_nothing_below_needs_it() -> None:
    layer = layer_of(nn.Linear(6, 9, bias=False), [2], dtype=torch.float32)
    x = torch.randn(5, 6)
    with torch.autograd.profiler.profile() as profile:
        layer(x).sum().backward()
    shapes = [e for e in profile.function_events if e.name == "aten::mm"]
    # Forward: base, A; backward: dB, dh, dA. Neither dY·W nor dh·A.
    assert len(shapes) == 5
    assert x.grad is None


def test_a_base_that_only_multiplies_by_itself_gives_the_same() -> None:
    """Quantised bases go through plain autograd; the result equals the fused path."""
    torch.manual_seed(0)
    fused = layer_of(nn.Linear(6, 9), [4], dtype=torch.float32)
    other = LowRankLinear(fused.base, None)
    other.add_pair("p0", fused.pair("p0"))
    x = torch.randn(5, 6, requires_grad=True)
    torch.testing.assert_close(other(x), fused(x))
    pair = fused.pair("p0")
    ours = torch.autograd.grad(other(x).square().sum(), [x, pair.A, pair.B])
    theirs = torch.autograd.grad(fused(x).square().sum(), [x, pair.A, pair.B])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_embedding_adds_the_columns_of_its_pair() -> None:
    torch.manual_seed(0)
    base = nn.Embedding(11, 6).requires_grad_(False)
    layer = LowRankEmbedding(base)
    layer.add_pair("p0", Pair(torch.randn(2, 11), torch.randn(6, 2), 0.5))
    ids = torch.tensor([[1, 3, 3], [0, 10, 2]])
    pair = layer.pair("p0")
    table = base.weight + 0.5 * (pair.B @ pair.A).t()
    torch.testing.assert_close(layer(ids), F.embedding(ids, table))
    layer.active = ()
    assert torch.equal(layer(ids), base(ids))


@pytest.mark.parametrize(("trains", "kept"), [("AB", 6 + 4), ("A", 6), ("B", 4), ("", 0)])
def test_a_frozen_factor_keeps_nothing(trains: str, kept: int) -> None:
    """LoRA-FA's whole gain: with A frozen the input is not kept, only h (tokens, rank)."""
    layer = layer_of(nn.Linear(6, 9, bias=False), [4], dtype=torch.float32)
    pair = layer.pair("p0")
    pair.A.requires_grad_("A" in trains)
    pair.B.requires_grad_("B" in trains)
    x = torch.randn(32, 6, requires_grad=True)
    assert saved_bytes(lambda: layer(x), but=tuple(layer.parameters())) == 32 * kept * 4


@pytest.mark.parametrize("dropout", [1e-7, 0.01, 0.5, 0.9999, 0.999999])
def test_dropout_keeps_the_mean_at_every_share(dropout: float) -> None:
    kept = _kept(500, 1000, dropout, 3, torch.device("cpu"))
    share = 1.0 if kept is None else float(kept.double().mean())
    expected = 1 / _rescaled(1.0, dropout)
    assert expected == pytest.approx(1 - dropout, abs=2**-16)
    assert abs(share - expected) < 5 * (expected * (1 - expected) / 500_000) ** 0.5 + 1e-9
    assert kept is None or torch.equal(kept, _kept(500, 1000, dropout, 3, torch.device("cpu")))
