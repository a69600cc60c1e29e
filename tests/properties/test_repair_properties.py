"""Edits and compressions of drawn changes equal their formulas, formed densely by NumPy in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank
from loralab.spectral.intruders import Intruders
from loralab.spectral.krylov import Triplets
from loralab.spectral.repair import FAMILIES, MATCHED, Edit, compressed, edited, norm_of, sharpened
from loralab.spectral.thresholds import omega

quick = settings(max_examples=60)

sides = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(0.01, 64) | st.sampled_from([1.0, -1.0, 1 / 3, 0.0])
strengths = st.floats(0, 2)
UNIT = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}


Case = tuple[np.ndarray, LayerDelta, tuple[bool, ...]]
"""A base weight, its change, and which of the leading vectors of their sum are called intruders."""


def tensor(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def pairs(draw: st.DrawFn) -> LowRank:
    """Draw a pair of any shape, rank (over the sides too), scale and dtype."""
    out, into, rank, generator = draw(sides), draw(sides), draw(sides), torch.Generator().manual_seed(draw(seeds))
    dtype = draw(st.sampled_from(list(UNIT)))
    return LowRank(tensor(generator, rank, into).to(dtype), tensor(generator, out, rank).to(dtype), draw(scales))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Draw a base weight, a change of it, and which of its leading vectors are called intruders."""
    pair = draw(pairs())
    change: LayerDelta = pair
    if draw(st.booleans()):
        change = Dense(torch.from_numpy(array(pair)).to(draw(st.sampled_from([torch.float64, torch.float32]))))
    weight = tensor(torch.Generator().manual_seed(draw(seeds)), *pair.shape).numpy()
    return weight, change, tuple(draw(st.lists(st.booleans(), min_size=1, max_size=min(pair.shape))))


def known_of(case: Case) -> Intruders:
    """Decompose the tuned weight whole."""
    weight, change, verdicts = case
    U, s, Vt = np.linalg.svd(weight + array(change), full_matrices=False)
    k = len(verdicts)
    found = Triplets(*(torch.from_numpy(m.copy()) for m in (U[:, :k], s[:k], Vt[:k].T, np.zeros(k))))
    flat = np.zeros(k)
    return Intruders(found, flat, flat, verdicts, ("exact",) * k, flat, (True,) * k, np.zeros((1, k)), 1.0, 0.5)


def array(change: LayerDelta) -> np.ndarray:
    if isinstance(change, Dense):
        return change.weight.double().numpy()
    return change.scale * (change.B.double().numpy() @ change.A.double().numpy())


def chosen(family: str, verdicts: tuple[bool, ...], s: np.ndarray) -> list[int]:
    """Say from the definition which singular values a family moves."""
    intruders = [j for j, intrudes in enumerate(verdicts) if intrudes]
    if family == "all" or not intruders:
        return intruders
    if family == "top1":
        return [intruders[0]]
    distances = [math.inf if intrudes else abs(s[j] - s[intruders[0]]) for j, intrudes in enumerate(verdicts)]
    return [] if all(verdicts) else [int(np.argmin(distances))]


def by_formula(case: Case, family: str, strength: float) -> tuple[np.ndarray, float]:
    """Give the change after the edit, and the largest number that rounding is relative to."""
    weight, change, verdicts = case
    U, s, Vt = np.linalg.svd(weight + array(change), full_matrices=False)
    after = s.copy()
    for j in chosen(family, verdicts, s):
        after[j] *= strength
    size = s[0] + np.linalg.norm(array(change), 2)
    if isinstance(change, LowRank):  # A large B against a small A: what rounds is their product's parts.
        size += abs(change.scale) * float(change.B.double().norm(dim=0) @ change.A.double().norm(dim=1))
    return (U * after) @ Vt - weight, size


def unit(change: LayerDelta) -> float:
    return UNIT[change.A.dtype if isinstance(change, LowRank) else change.weight.dtype]


def of(change: LayerDelta) -> Delta:
    return Delta({"q": change})


@quick
@given(cases(), st.sampled_from(["top1", "all", "neighbour"]), strengths)
def test_an_edit_of_singular_vectors_is_its_formula(case, family: str, strength: float) -> None:
    change, known = case[1], known_of(case)
    found = edited(of(change), Edit(family, strength), found={"q": known})["q"]
    right, size = by_formula(case, family, strength)
    np.testing.assert_allclose(array(found), right, rtol=0, atol=unit(change) * size)
    assert type(found) is type(change)
    if isinstance(found, LowRank) and isinstance(change, LowRank) and found is not change:
        moved = chosen(family, known.verdicts, known.triplets.values.numpy())
        assert found.rank == change.rank + len(moved)
        torch.testing.assert_close(found.A[change.rank :].norm(dim=1), found.B[:, change.rank :].norm(dim=0))


@quick
@given(cases(), st.sampled_from(["top1", "all"]), strengths)
def test_the_matched_control_is_the_change_itself_at_the_edits_norm(case, family: str, strength: float) -> None:
    change, known = case[1], known_of(case)
    assume(np.linalg.norm(array(change)) > 1e-3)
    control = edited(of(change), Edit("matched", strength, family), found={"q": known})["q"]
    right, size = by_formula(case, family, strength)
    share = np.linalg.norm(right) / np.linalg.norm(array(change))
    np.testing.assert_allclose(array(control), share * array(change), rtol=0, atol=3 * unit(change) * size)
    if isinstance(control, LowRank) and isinstance(change, LowRank):
        assert control.A is change.A and control.B is change.B


@quick
@given(cases(), strengths)
def test_the_norm_of_a_change_is_that_of_its_dense_form(case, strength: float) -> None:
    change = case[1]
    assert norm_of(change) == pytest.approx(float(np.linalg.norm(array(change))), rel=1e-9, abs=1e-9)
    scaled = edited(of(change), Edit("scale", strength))["q"]
    assert norm_of(scaled) == pytest.approx(strength * norm_of(change), rel=1e-6, abs=1e-9)


@quick
@given(cases())
def test_sharpening_finds_the_exact_triplets(case) -> None:
    weight, change, known = *case[:2], known_of(case)
    values = known.triplets.values
    padded = np.append(np.linalg.svd(weight + array(change))[1], 0)
    # Vectors of values that are nearly equal are arbitrary, and rough ones of small values are lost.
    assume(np.diff(padded).max() < -1e-2 * padded[0])
    noise = [
        1e-4 * tensor(torch.Generator().manual_seed(0), *side.shape)
        for side in (known.triplets.left, known.triplets.right)
    ]
    rough = Triplets(
        known.triplets.left + noise[0], values, known.triplets.right + noise[1], torch.ones(len(values)).double()
    )
    found = sharpened(torch.from_numpy(weight), change, Intruders(rough, *list(vars(known).values())[1:])).triplets
    for j in known.indices:
        product = values[j] * torch.outer(known.triplets.left[:, j], known.triplets.right[:, j])
        again = found.values[j] * torch.outer(found.left[:, j], found.right[:, j])
        torch.testing.assert_close(again, product, rtol=0, atol=1e-6 * padded[0])


@quick
@given(pairs(), st.integers(1, 12))
def test_a_compressed_pair_is_the_best_of_its_rank_and_says_what_it_lost(pair: LowRank, rank: int) -> None:
    small, table = compressed(of(pair), rank)
    found, row = small["q"], table.loc[0]
    U, s, Vt = np.linalg.svd(array(pair), full_matrices=False)
    size = float(abs(pair.scale) * (pair.B.double().norm(dim=0) @ pair.A.double().norm(dim=1)))
    assert isinstance(found, LowRank) and found.rank == row["rank"]
    assert found.rank == (pair.rank if pair.rank <= rank else min(rank, *pair.shape))
    assert row["rank_before"] == pair.rank and (found is pair) == (rank >= pair.rank)
    np.testing.assert_allclose(array(found), (U[:, :rank] * s[:rank]) @ Vt[:rank], rtol=0, atol=unit(pair) * size)
    measured = np.linalg.norm(array(found) - array(pair))
    assert row["discarded_norm"] == pytest.approx(measured, rel=1e-9, abs=1e-12 * size)
    assert row["discarded"] == pytest.approx(measured / np.linalg.norm(s) if s.any() else 0, rel=1e-6, abs=1e-12)
    assert measured == pytest.approx(np.linalg.norm(s[rank:]), abs=unit(pair) * size)


@quick
@given(st.integers(16, 30), st.integers(16, 30), st.floats(0.1, 2), seeds)
def test_a_threshold_keeps_the_values_above_and_nothing_else(out: int, into: int, strength: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    signal = tensor(generator, out, 3) @ tensor(generator, 3, into)
    change = Dense((tensor(generator, out, into) + 5 * signal).float())
    U, s, Vt = np.linalg.svd(array(change), full_matrices=False)
    tau = strength * omega(min(out, into) / max(out, into)) * np.median(s)
    assume(np.abs(s - tau).min() > 1e-6 * s[0])
    found = edited(of(change), Edit("threshold", strength))["q"]
    np.testing.assert_allclose(array(found), (U * np.where(s > tau, s, 0)) @ Vt, rtol=0, atol=1e-6 * s[0])
    control = edited(of(change), Edit("matched", strength, "threshold"))["q"]
    share = np.linalg.norm(s[s > tau]) / np.linalg.norm(s)
    np.testing.assert_allclose(array(control), share * array(change), rtol=0, atol=1e-6 * s[0])


@given(st.sampled_from(sorted(FAMILIES)), st.floats(0, 1) | st.floats(0, 1e300), st.sampled_from(MATCHED))
def test_an_edit_reads_what_it_writes(family: str, strength: float, of: str) -> None:
    assume(strength <= FAMILIES[family][1])
    edit = Edit(family, strength, of if family == "matched" else None)
    assert Edit.parse(str(edit)) == edit
