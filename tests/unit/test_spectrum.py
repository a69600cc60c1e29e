"""The spectrum of a delta is that of the matrix it stands for, and its table says so of every matrix."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from loralab.base.targets import weight_of
from loralab.delta.layers import shape_of, unwrapped
from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank, rank_sum
from loralab.errors import DeltaError
from loralab.spectral import spectrum as room
from loralab.spectral.spectrum import (
    COLUMNS,
    LEADING,
    LIMIT,
    effective_rank,
    frobenius,
    rank_interval,
    rank_share,
    row,
    spectrum,
    stable_rank,
    table,
)
from tiny import tiny


def pair(out: int, into: int, rank: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank(torch.randn(rank, into).to(dtype), torch.randn(out, rank).to(dtype), scale)


def formed(change: LowRank) -> np.ndarray:
    """Form the matrix as it is defined, in float64."""
    return change.scale * (change.B.double().numpy() @ change.A.double().numpy())


def dense_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix, compute_uv=False)


def same_values(found: np.ndarray, matrix: np.ndarray) -> None:
    """Compare with the dense decomposition, to 1e-12 of its largest value; those beyond the ones found are rounding."""
    expected = dense_values(matrix)
    assert found.dtype == np.float64 and np.all(np.diff(found) <= 0)
    padded = np.pad(found, (0, len(expected) - len(found)))
    np.testing.assert_allclose(padded, expected, rtol=0, atol=1e-12 * max(expected[0], 1e-300))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("out", "into", "rank"), [(40, 30, 4), (7, 50, 4), (50, 7, 1), (5, 8, 6), (3, 2, 9), (1, 1, 2)]
)
def test_a_pair_has_the_spectrum_of_its_product(out: int, into: int, rank: int, dtype: torch.dtype) -> None:
    change = pair(out, into, rank, -0.37, dtype)
    found = spectrum(change)
    assert len(found) == min(out, into, rank)
    same_values(found, formed(change))


def test_a_pair_of_lower_rank_than_its_width_shows_it() -> None:
    change = pair(30, 20, 3)
    doubled = LowRank(change.A.repeat(2, 1), torch.cat([change.B, torch.randn(30, 3)], 1), 1.0)
    found = spectrum(doubled)
    same_values(found, formed(doubled))
    assert len(found) == 6 and np.count_nonzero(found) == 3


def test_links_of_a_chain_are_measured_as_their_sum() -> None:
    links = [pair(30, 20, rank, scale) for rank, scale in ((2, 1.0), (3, -0.25), (1, 8.0))]
    same_values(spectrum(rank_sum(links)), sum(formed(link) for link in links))


@pytest.mark.parametrize("scale", [2.0, -2.0])
def test_links_that_cancel_leave_nothing(scale: float) -> None:
    first, second = pair(300, 200, 4, scale), pair(300, 200, 2, 0.5)
    back = LowRank(first.A, -first.B, scale)
    assert not spectrum(rank_sum([first, back])).any()
    left = spectrum(rank_sum([first, second, back]))
    assert np.count_nonzero(left) == 2
    same_values(left, formed(second))


def test_small_values_of_a_badly_scaled_pair_are_kept() -> None:
    A = torch.diag(torch.tensor([1e12, 1e-12], dtype=torch.float64))
    B = torch.diag(torch.tensor([1e-12, 1e12], dtype=torch.float64))
    for scale in (1.0, 1e-30, 1e30):
        np.testing.assert_allclose(spectrum(LowRank(A, B, scale)), [scale, scale], rtol=1e-12)


def test_a_pair_is_never_formed() -> None:
    side = 200_000  # formed in float64 it would take 320 GB
    A, B = torch.zeros(2, side), torch.zeros(side, 2)
    A[0, 5], A[1, 7], B[9, 0], B[side - 1, 1] = 2, 3, 4, 5
    np.testing.assert_allclose(spectrum(LowRank(A, B, 0.5)), [7.5, 4], rtol=1e-12)


def test_a_dense_change_is_decomposed_in_float64() -> None:
    matrix = torch.randn(12, 30)
    same_values(spectrum(Dense(matrix)), matrix.double().numpy())
    same_values(spectrum(Dense(matrix.bfloat16())), matrix.bfloat16().double().numpy())


def test_a_large_dense_change_is_decomposed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(40, 33, dtype=torch.float64)
    expected = dense_values(matrix.numpy())
    monkeypatch.setattr(room, "FLOAT64_SIDE", 33)
    np.testing.assert_allclose(spectrum(Dense(matrix)), expected, rtol=1e-12)
    monkeypatch.setattr(room, "FLOAT64_SIDE", 32)
    error = np.abs(spectrum(Dense(matrix)) - expected).max() / expected[0]
    assert 1e-10 < error < 1e-5


@pytest.mark.parametrize(
    "change", [pair(6, 4, 2, 0.0), Dense(torch.zeros(4, 6)), LowRank(torch.ones(2, 4), torch.zeros(6, 2), 3.0)]
)
def test_no_change_has_rank_zero(change: LayerDelta) -> None:
    s = spectrum(change)
    assert not s.any()
    assert (rank_share(s), effective_rank(s), stable_rank(s)) == (0, 0, 0)


def test_a_vector_has_no_spectrum() -> None:
    with pytest.raises(DeltaError, match="matrix"):
        spectrum(Dense(torch.ones(3)))


def test_ranks_of_known_spectra() -> None:
    assert [rank_share(np.ones(10), share) for share in (0.01, 0.1, 0.5, 0.9, 0.91, 1.0)] == [1, 1, 5, 9, 10, 10]
    assert [rank_share(np.ones(100), k / 100) for k in range(1, 101)] == list(range(1, 101))
    assert rank_share(np.array([3.0, 1.0])) == 1  # 9 of 10
    assert rank_share(np.array([2.0, 1.0])) == 2  # 4 of 5
    assert effective_rank(np.ones(7)) == pytest.approx(7)
    assert effective_rank(np.array([5.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(np.array([1.0, 0.5])) == pytest.approx(3 / 2 ** (2 / 3))
    assert stable_rank(np.array([2.0, 1.0, 1.0])) == pytest.approx(1.5)
    for rank in (rank_share, effective_rank, stable_rank):
        assert rank(np.array([])) == 0
        assert math.isnan(rank(np.array([math.inf, 1.0])))
        assert rank(np.array([1e300, 1e300, 1e-320])) == pytest.approx(2)
    for share in (0.0, -1.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="share"):
            rank_share(np.ones(2), share)


def made() -> tuple[Delta, dict[str, Tensor]]:
    """Make a delta of every kind of entry, and its base."""
    names = ["model.layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "h2.3.experts.5.w1"]
    layers: dict[str, LayerDelta] = {
        names[0]: pair(8, 6, 2, 0.5),
        names[1]: Dense(torch.randn(5, 9)),
        names[2]: pair(7, 4, 9, 2.0),
        names[3]: Dense(torch.zeros(3, 3)),
    }
    dtypes = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
    weights = {name: torch.randn(layers[name].shape).to(dtype) for name, dtype in zip(names, dtypes, strict=True)}
    return Delta(layers | {"model.norm": Dense(torch.ones(6))}, {"norm.weight": torch.ones(6)}), weights


def test_a_table_has_a_row_for_every_matrix() -> None:
    delta, weights = made()
    found, left_out = table(delta, weights)
    assert left_out == [] and tuple(found.columns) == COLUMNS
    assert found["layer"].tolist() == list(weights)
    assert found["module"].tolist() == ["q_proj", "up_proj", "lm_head", "w1"]
    assert found["depth"].tolist() == [0, 11, -1, 3]
    assert found["rank"].tolist() == [2, 5, 4, 3]
    for told in found.to_dict("records"):
        change = delta[told["layer"]]
        matrix = formed(change) if isinstance(change, LowRank) else change.dense().double().numpy()
        expected = dense_values(matrix)
        assert (told["out_features"], told["in_features"]) == matrix.shape
        np.testing.assert_allclose(told["singular_values"], expected[: told["rank"]], rtol=1e-10, atol=1e-12)
        assert told["frobenius"] == pytest.approx(np.linalg.norm(matrix), rel=1e-10)
        assert told["spectral"] == pytest.approx(expected[0], rel=1e-10)
        assert told["base_frobenius"] == pytest.approx(
            np.linalg.norm(weights[told["layer"]].double().numpy()), rel=1e-6
        )
        assert told["relative_norm"] == pytest.approx(told["frobenius"] / told["base_frobenius"], rel=1e-12)
        for column, rank in (("rank90", rank_share), ("effective_rank", effective_rank), ("stable_rank", stable_rank)):
            assert told[column] == pytest.approx(rank(expected), rel=1e-10)
    pd.testing.assert_frame_equal(found, table(delta, weights.__getitem__)[0])


def test_a_table_comes_back_from_parquet(tmp_path: Path) -> None:
    found, _ = table(*made())
    found.to_parquet(tmp_path / "spectra.parquet")
    back = pd.read_parquet(tmp_path / "spectra.parquet")
    back["singular_values"] = [values.tolist() for values in back["singular_values"]]
    pd.testing.assert_frame_equal(back, found)
    assert table(Delta({}), {})[0].empty


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("dense", [True, False])
def test_numbers_that_are_not_finite_mark_their_row_only(bad: float, dense: bool) -> None:
    delta, weights = made()
    name, low_rank, matrix = "model.layers.0.self_attn.q_proj", pair(8, 6, 2), torch.randn(8, 6)
    (matrix if dense else low_rank.A)[1, 3] = bad
    marked, _ = table(Delta(delta.layers | {name: Dense(matrix) if dense else low_rank}), weights)
    numbers = ["rank90", "effective_rank", "stable_rank", "frobenius", "spectral", "relative_norm"]
    assert marked.loc[0, "layer"] == name and marked.loc[0, "rank"] == (6 if dense else 2)
    assert marked.loc[0, numbers].isna().all() and np.isnan(marked.loc[0, "singular_values"]).all()
    pd.testing.assert_frame_equal(marked[1:], table(delta, weights)[0][1:])


def test_a_dense_matrix_over_the_limit_is_left_out_unless_asked_for() -> None:
    above, at_limit = torch.zeros(1, LIMIT + 1), torch.zeros(1, LIMIT)
    above[0, 3] = 2
    weights = {"a": above, "b": at_limit, "c": above}
    delta = Delta({"a": Dense(above), "b": Dense(at_limit), "c": LowRank(above, torch.ones(1, 1), 1.0)})
    found, left_out = table(delta, weights)
    assert found["layer"].tolist() == ["b", "c"] and left_out == ["a"]
    found, left_out = table(delta, weights, exact=True)
    assert found["spectral"].tolist() == [2, 0, 2] and left_out == []


def test_sizes_relative_to_a_zero_base_are_not_known() -> None:
    found, _ = table(Delta({"a": Dense(torch.ones(2, 2))}), {"a": torch.zeros(2, 2)})
    assert found.loc[0, "base_frobenius"] == 0 and math.isnan(found.loc[0, "relative_norm"])


def test_another_base_is_refused() -> None:
    delta, weights = made()
    with pytest.raises(DeltaError, match="no such layer") as error:
        table(delta, {name: weight for name, weight in weights.items() if name != "lm_head"})
    assert error.value.where == "lm_head"
    with pytest.raises(DeltaError, match="the weight") as error:
        table(delta, weights | {"lm_head": torch.ones(4, 7)})
    assert error.value.where == "lm_head"


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_gives_its_weights_by_name(family: str) -> None:
    """Conv1D and embeddings are stored transposed; `weight_of` turns them as deltas have them."""
    modules = unwrapped(tiny(family))
    delta = Delta({name: pair(*shape_of(module), 2) for name, module in modules.items()})
    found, _ = table(delta, lambda name: weight_of(modules[name]))
    assert set(found["layer"]) == set(modules)
    assert found["base_frobenius"].tolist() == pytest.approx(
        [float(m.weight.detach().norm()) for m in modules.values()], rel=1e-5
    )


def falling(out: int, into: int, power: float) -> Tensor:
    """Make a matrix whose i-th singular value is i^-power."""
    left, right = (torch.linalg.qr(torch.randn(side, min(out, into), dtype=torch.float64)).Q for side in (out, into))
    return ((left * torch.arange(1, min(out, into) + 1) ** -power) @ right.t()).float()


@pytest.mark.parametrize("length", [1, 7, 60])
@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_the_interval_of_a_rank_holds_it_whatever_lies_behind(length: int, share: float) -> None:
    rng = np.random.default_rng(length)
    spectra = [np.sort(rng.gamma(shape, size=length))[::-1] for shape in (0.05, 1.0, 50.0)] + [np.ones(length)]
    for s in spectra:
        true, energy = rank_share(s, share), float((s**2).sum())
        for known in range(length + 1):
            off = np.maximum(s[:known] + rng.uniform(-1e-3, 1e-3, known), 0)
            for values, error in ((s[:known], 0.0), (np.sort(off)[::-1], 2e-3)):
                low, high = rank_interval(values, energy, length, share, error)
                assert low <= true <= high <= length
        assert rank_interval(s, energy, length, share) == (true, true)
    assert rank_interval(np.array([3.0, 1.0]), 10.0, 50, 0.9) == (1, 1)
    # 9 of 10 are needed: one value of 4 is known, so the others are at most 4 each and hold 6 among 5.
    assert rank_interval(np.array([2.0]), 10.0, 6, 0.9) == (1 + 2, 1 + 5)
    assert rank_interval(np.zeros(2), 0.0, 6) == (0, 0)


def test_a_row_is_that_of_the_table() -> None:
    delta, weights = made()
    expected, _ = table(delta, weights)
    for found in expected.to_dict("records"):
        name = found["layer"]
        assert row(name, delta[name], frobenius(weights[name])) == (found, "")


@pytest.mark.parametrize("power", [1.5, 0.5])
def test_a_large_dense_matrix_shows_its_leading_values(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = falling(300, 220, power)
    whole, said = row("a", Dense(matrix), 2.0, exact=True)
    assert said == ""
    monkeypatch.setattr(room, "LIMIT", matrix.numel() - 1)
    assert row("a", Dense(matrix), 2.0, exact=True) == (whole, "")
    found, note = row("a", Dense(matrix), 2.0)
    leading = found.pop("singular_values")
    np.testing.assert_allclose(leading, whole.pop("singular_values")[: len(leading)], rtol=1e-5)
    assert 10 <= len(leading) <= LEADING and str(len(leading)) in note
    assert math.isnan(found.pop("effective_rank")) and whole.pop("effective_rank") > 1
    rank90 = whole.pop("rank90")
    if power > 1:  # a few values hold nearly all
        assert found.pop("rank90") == rank90 and "hold" not in note
    else:
        assert math.isnan(found.pop("rank90"))
        low, high = (int(word) for word in note.split() if word.isdecimal() and word not in ("90", str(len(leading))))
        assert low <= rank90 <= high and low > len(leading)
    assert {key: found[key] for key in ("layer", "module", "depth")} == {
        key: whole[key] for key in ("layer", "module", "depth")
    }
    for key in set(found) - {"layer", "module"}:
        assert found[key] == pytest.approx(whole[key], rel=1e-5), key


def test_a_large_dense_matrix_may_be_zero_or_hold_no_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "LIMIT", 10)
    found, note = row("a", Dense(torch.zeros(30, 20)), 1.0)
    assert (found["rank90"], found["frobenius"], found["relative_norm"], note) == (0, 0, 0, "")
    matrix = torch.ones(30, 20)
    matrix[3, 4] = math.nan
    with pytest.raises(DeltaError, match="not finite"):
        row("a", Dense(matrix), 1.0)
