"""Heads of base weights: converged, trimmed, and kept on disk by what the weight holds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loralab.errors import DeltaError
from loralab.spectral.heads import KEPT, HeadCache, head_of
from loralab.spectral.krylov import Triplets


def weight_of(out: int, into: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float32 weight with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    sides = [torch.randn(n, len(values), generator=generator, dtype=torch.float64) for n in (out, into)]
    U, V = (torch.linalg.qr(side).Q for side in sides)
    return ((U * values.double()) @ V.t()).float()


def falling(count: int) -> Tensor:
    return 10.0 / torch.arange(1, count + 1).double() ** 0.6


@pytest.fixture(scope="module")
def weight() -> Tensor:
    """Larger than the limit up to which a head comes from a dense decomposition."""
    return weight_of(600, 640, falling(600))


def same(one: Triplets, other: Triplets) -> bool:
    parts = ("left", "values", "right", "residuals")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


@pytest.mark.parametrize("shape", [(600, 640), (640, 600), (90, 120), (120, 90)])
def test_a_head_is_what_a_dense_decomposition_begins_with(shape: tuple[int, int]) -> None:
    base = weight_of(*shape, falling(min(shape)))
    head = head_of(base, 24)
    U, s, Vh = torch.linalg.svd(base.double(), full_matrices=False)
    assert len(head) == 24 and head.left.dtype == head.right.dtype == torch.float32
    torch.testing.assert_close(head.values, s[:24], rtol=1e-6, atol=0)
    for side, true in ((head.left.double(), U[:, :24]), (head.right.double(), Vh[:24].t())):
        signs = (side * true).sum(0).sign()
        assert float((side * signs - true).norm(dim=0).max()) < 5e-4


def test_columns_that_did_not_converge_are_trimmed() -> None:
    # Twenty values stand out, the others lie too near each other to be found in 200 + 10 · 64 dimensions.
    base = weight_of(1800, 1800, torch.cat([torch.linspace(9, 6, 20), torch.linspace(3, 2.5, 1780)]))
    head = head_of(base)
    assert 20 <= len(head) < 64
    u, v = head.left.double(), head.right.double()
    assert float((base.double().t() @ u - v * head.values).norm(dim=0).max()) <= 1.5 * KEPT * 9


def test_a_head_stops_where_the_weight_does() -> None:
    assert len(head_of(weight_of(60, 50, torch.tensor([3.0, 2.0, 1.0])))) == 3
    assert len(head_of(weight_of(600, 700, torch.tensor([3.0, 2.0, 1.0])))) == 3
    assert len(head_of(torch.randn(5, 9))) == 5
    empty = head_of(torch.zeros(7, 4))
    assert len(empty) == 0 and empty.left.shape == (7, 0) and empty.right.shape == (4, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_floating_dtype_has_a_head(dtype: torch.dtype) -> None:
    base = weight_of(40, 30, falling(30)).to(dtype)
    torch.testing.assert_close(head_of(base, 5).values, torch.linalg.svdvals(base.double())[:5], rtol=1e-5, atol=0)


def test_broken_weights_are_refused(tmp_path: Path) -> None:
    broken = torch.randn(6, 6)
    broken[2, 3] = float("nan")
    with pytest.raises(DeltaError, match="NaN"):
        head_of(broken)
    with pytest.raises(DeltaError, match="NaN"):
        HeadCache(tmp_path).of(broken)


def test_a_head_is_computed_once_and_then_read(tmp_path: Path, weight: Tensor) -> None:
    cache = HeadCache(tmp_path / "not there yet", size=8)
    first = cache.of(weight)
    files = list((tmp_path / "not there yet").iterdir())
    assert len(files) == 1
    assert same(HeadCache(tmp_path / "not there yet", size=8).of(weight), first)
    # The file of another weight under this one's name: were it not read, the head would be the right one.
    other = cache.of(weight_of(600, 640, falling(600), seed=3))
    theirs = next(file for file in (tmp_path / "not there yet").iterdir() if file != files[0])
    files[0].write_bytes(theirs.read_bytes())
    assert same(cache.of(weight), other)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "other"])
def test_a_damaged_file_costs_only_time(tmp_path: Path, damage: str) -> None:
    base = weight_of(50, 40, falling(40))
    cache = HeadCache(tmp_path)
    head = cache.of(base)
    (path,) = tmp_path.iterdir()
    good = path.read_bytes()
    flipped = bytearray(good)
    flipped[-100] ^= 1
    path.write_bytes(
        {"cut": good[:-40], "empty": b"", "flipped": bytes(flipped), "other": b"no head at all" * 99}[damage]
    )
    assert same(cache.of(base), head)
    assert path.read_bytes() == good  # written anew


def test_a_folder_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    base = weight_of(30, 20, falling(20))
    assert same(HeadCache(tmp_path / "file" / "heads").of(base), head_of(base))


def test_the_key_is_what_the_weight_holds() -> None:
    cache, base = HeadCache(Path("nowhere")), weight_of(32, 16, falling(16))
    bits = base.view(torch.int32)
    nudged = (bits + (torch.arange(512).view(32, 16) == 511)).view(torch.float32)
    others = [
        nudged,  # one bit of the last number
        base.reshape(16, 32),
        base.view(torch.float16),
        base.view(torch.bfloat16),
    ]
    keys = {cache.key(each) for each in [base, *others]} | {HeadCache(Path("nowhere"), size=8).key(base)}
    assert len(keys) == 6
    assert cache.key(base.t().contiguous().t()) == cache.key(base)  # the same numbers, stored by columns
    assert cache.key(base.clone()) == cache.key(base)


def test_the_environment_says_where_heads_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORALAB_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared"))
    assert HeadCache().folder == tmp_path / "own" / "heads"
    monkeypatch.delenv("LORALAB_CACHE")
    assert HeadCache().folder == tmp_path / "shared" / "loralab" / "heads"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert HeadCache().folder == Path.home() / ".cache" / "loralab" / "heads"
    assert HeadCache(tmp_path).folder == tmp_path
