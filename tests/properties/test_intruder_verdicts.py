"""Verdicts of the certified route equal those of two dense float64 decompositions, and its bounds hold, on whatever is drawn."""

from collections import Counter
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loralab.delta.lowrank import Dense, LayerDelta, LowRank
from loralab.spectral.bounds import largest_share
from loralab.spectral.heads import head_of
from loralab.spectral.intruders import intruders

F64 = torch.float64
SPECTRA = ("heavy", "flat", "noise")
FORMS = ("pair", "dense", "full")


def base_of(out: int, into: int, spectrum: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A base and orthonormal columns on both sides that are its own singular vectors, or nearly."""
    generator = torch.Generator().manual_seed(seed)
    count = min(out, into)
    U, V = (torch.linalg.qr(torch.randn(n, count, generator=generator)).Q for n in (out, into))
    i = torch.arange(count)
    bulk = 2 * (1 - i / count).clamp_min(1e-3) ** 0.7
    if spectrum == "noise":  # a few strong directions in Gaussian noise, as a trained weight looks
        noise = torch.randn(out, into, generator=generator) * (2 / (out**0.5 + into**0.5))
        return (U[:, :40] * (8 / (i[:40] + 1) ** 0.7)) @ V[:, :40].t() + noise, U, V
    head = 10 / (i + 1) ** 0.7 if spectrum == "heavy" else 0.2 / (i + 1) ** 0.5
    return (U * (bulk + head)) @ V.t(), U, V


def change_to(U: Tensor, V: Tensor, size: float, rank: int, form: str, seed: int) -> LayerDelta:
    """A change of random directions, every other one mixed with a base direction, so that many cosines lie near the threshold."""
    generator = torch.Generator().manual_seed(seed)
    B, A = (torch.linalg.qr(torch.randn(len(side), rank, generator=generator)).Q for side in (U, V))
    share = torch.rand(rank, generator=generator) * 0.75 * (torch.arange(rank) % 2)
    near = torch.randint(0, min(64, U.shape[1]), (rank,), generator=generator)
    B, A = (side * (1 - share**2).sqrt() + base[:, near] * share for side, base in ((B, U), (A, V)))
    B = B * torch.logspace(0, -1.3, rank) * size
    if form == "pair":
        return LowRank(A.t().contiguous(), B / 2, 2.0)
    full = B @ A.t()
    if form == "full":  # every element moves, as in full fine-tuning
        full += torch.randn(full.shape, generator=generator) * (
            0.1 * size / (full.shape[0] ** 0.5 + full.shape[1] ** 0.5)
        )
    return Dense(full)


def counted(out: int, into: int, spectrum: str, seed: int, cases: Iterator[tuple[int, float, str]]) -> Counter[str]:
    """Judge ten vectors of each change of one base, and count what the certified route says against the definition."""
    weight, U, V = base_of(out, into, spectrum, seed)
    left = torch.linalg.svd(weight.double(), full_matrices=False).U
    head, counts = head_of(weight), Counter[str]()
    top = float(torch.linalg.matrix_norm(weight, 2))
    for number, (rank, strength, form) in enumerate(cases):
        change = change_to(U, V, 0.6 * strength * top, rank, form, 1000 * seed + number)
        tuned = torch.linalg.svd(weight.double() + change.dense(F64), full_matrices=False).U[:, :10]
        cosines = (left.t() @ tuned).abs().amax(0).numpy()
        found = intruders(weight, change, head=head, dense_below=2)
        counts["vectors"] += 10
        counts["wrong"] += int((np.array(found.verdicts) != (cosines < 0.5)).sum())
        counts["outside"] += int(((cosines < found.lower - 1e-9) | (cosines > found.upper + 1e-9)).sum())
        counts["intruders"] += int((cosines < 0.5).sum())
        counts["near"] += int((np.abs(cosines - 0.5) < 0.02).sum())
        counts.update(found.routes)
    return counts


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", [(400, 400), (540, 270), (270, 540)], ids=["square", "tall", "wide"])
def test_verdicts_are_those_of_the_definition(shape: tuple[int, int], spectrum: str) -> None:
    cases = [(4, 0.6, "pair"), (16, 1.0, "pair"), (64, 1.6, "pair"), (16, 1.0, "dense"), (8, 1.0, "full")]
    counts = counted(*shape, spectrum, 7, iter(cases))
    assert counts["vectors"] == 50 and counts["intruders"] >= 5
    assert counts["wrong"] == counts["outside"] == 0
    if spectrum != "flat":
        assert counts["certified"] >= 40


@pytest.mark.slow
def test_no_verdict_of_thousands_is_wrong() -> None:
    total = Counter[str]()
    for shape, spectrum, seed in product([(768, 768), (1024, 512), (512, 1024), (600, 560)], SPECTRA, (1,)):
        total += counted(*shape, spectrum, seed, product((1, 4, 16, 64), (0.5, 1.0, 1.6), FORMS))
    print(dict(total))
    assert total["vectors"] >= 2000 and total["near"] >= 20
    assert total["wrong"] == total["outside"] == 0


@st.composite
def measures(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """Singular values above 0, masses that sum to 1, and a number of steps."""
    count = draw(st.integers(12, 60))
    generator = np.random.default_rng(draw(st.integers(0, 2**32)))
    values = np.sort(generator.uniform(0.01, 1, count))
    if draw(st.booleans()):  # two that are nearly one
        values[count // 2] = values[count // 2 - 1] * (1 + 10.0 ** -draw(st.integers(2, 10)))
    masses = generator.exponential(size=count) ** draw(st.integers(1, 3))
    if draw(st.booleans()):  # one that stands out
        masses[draw(st.integers(0, count - 1))] += masses.sum()
    return values, masses / masses.sum(), draw(st.integers(2, 9))


def golub_kahan(values: np.ndarray, masses: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The bidiagonal coefficients of diag(values) from the left vector √masses, with full reorthogonalisation."""
    left, right, a, b = [np.sqrt(masses)], list[np.ndarray](), list[float](), list[float]()
    for _ in range(steps + 1):
        v = values * left[-1]
        v -= sum((np.dot(v, old) * old for old in right), np.zeros_like(v))
        a.append(float(np.linalg.norm(v)))
        right.append(v / a[-1])
        u = values * right[-1]
        for _ in range(2):
            u -= sum((np.dot(u, old) * old for old in left), np.zeros_like(u))
        b.append(float(np.linalg.norm(u)))
        left.append(u / b[-1])
    return np.array(a), np.array(b[:-1])


@settings(max_examples=60)
@given(measures())
def test_no_direction_holds_more_than_the_bound(measure: tuple[np.ndarray, np.ndarray, int]) -> None:
    values, masses, steps = measure
    a, b = golub_kahan(values, masses, steps)
    bound = largest_share(a, b, 2.0)
    assert masses.max() <= bound * (1 + 1e-9)
    # A mass of less than that would not be missed: seen from far enough, the bound is no looser than the quadrature's weights.
    alpha = a[:-1] ** 2 + np.append(0.0, b[:-1]) ** 2
    beta = (a[:-1] * b)[:-1]
    weights = np.linalg.eigh(np.diag(alpha) + np.diag(beta, 1) + np.diag(beta, -1))[1][0] ** 2
    assert bound <= 1.06 * max(1.0 if steps < 2 else float((weights[1:] + weights[:-1]).max()), float(weights.max()))


@settings(max_examples=20)
@given(measures(), st.floats(0.02, 0.9))
def test_a_bound_that_is_given_up_lies_above_its_target(
    measure: tuple[np.ndarray, np.ndarray, int], target: float
) -> None:
    values, masses, steps = measure
    share = largest_share(*golub_kahan(values, masses, steps), target)
    assert share > target or share >= masses.max() * (1 - 1e-9)
