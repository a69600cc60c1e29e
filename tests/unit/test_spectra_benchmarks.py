"""The benchmarks of spectra rest on weights whose decomposition is known: it is what a dense one finds."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch

HERE = Path(__file__).parents[2] / "benchmarks" / "_synthetic.py"


def _module():
    spec = importlib.util.spec_from_file_location("_synthetic", HERE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


synthetic = _module()


@pytest.mark.parametrize("kind", ["llm", "power", "flat"])
@pytest.mark.parametrize("shape", [(96, 96), (160, 64), (64, 160)])
def test_the_decomposition_of_a_synthetic_weight_is_the_one_it_was_made_of(shape, kind):
    base = synthetic.known(*shape, kind, seed=3)
    U, s, Vh = torch.linalg.svd(base.weight.double(), full_matrices=False)
    positions = np.arange(5)
    left, right = base.left.columns(positions), base.right.columns(positions)
    assert base.weight.shape == shape
    assert np.all(np.diff(base.values) <= 0)
    np.testing.assert_allclose(s.numpy(), base.values, atol=1e-5)
    signs = (U[:, :5].numpy() * left).sum(0)
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-5)
    np.testing.assert_allclose((Vh[:5].T.numpy() * right).sum(0) * signs, 1, atol=1e-5)


def test_the_bulk_follows_the_law_of_random_matrices():
    drawn = np.random.default_rng(0).standard_normal((800, 400)) / 800**0.5
    np.testing.assert_allclose(np.linalg.svd(drawn, compute_uv=False), synthetic.bulk(800, 400), atol=0.03)


def test_changes_make_vectors_on_both_sides_of_the_threshold_and_near_it():
    base = synthetic.known(256, 256, "llm", seed=0)
    cosines = []
    for seed in range(4):
        pair, dense = synthetic.pair(base, 16, 1.0, seed), synthetic.dense(base, 16, 1.0, seed)
        assert np.linalg.matrix_rank(pair.dense(torch.float64).numpy(), tol=1e-4) == 16
        assert int(torch.linalg.matrix_rank(dense.weight.double())) == 256
        size = float(torch.linalg.matrix_norm(pair.dense(), 2))
        assert size == pytest.approx(base.values[0], rel=0.35)
        for change in (pair, dense):
            tuned = torch.linalg.svd(base.weight.double() + change.dense(torch.float64)).U[:, :10].numpy()
            cosines += np.abs(tuned.T @ base.left.columns(np.arange(256))).max(1).tolist()
    near = [c for c in cosines if abs(c - 0.5) < 0.1]
    assert sum(c < 0.5 for c in cosines) >= 8
    assert sum(c > 0.5 for c in cosines) >= 8
    assert len(near) >= 4
