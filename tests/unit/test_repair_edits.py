"""Every edit of a delta against its formula, formed densely in float64; what is refused, and what stays as it is."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank
from loralab.errors import DeltaError
from loralab.spectral.intruders import Intruders
from loralab.spectral.krylov import Triplets
from loralab.spectral.repair import Edit, compressed, default_sweep, depth_of, edited, sharpened, touched
from loralab.spectral.thresholds import omega, threshold, thresholded

Q = "model.layers.0.self_attn.q_proj"


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(out: int, into: int, rank: int = 3, *, seed: int = 1, scale: float = 0.5, dtype=torch.float32) -> LowRank:
    return LowRank(normal(rank, into, seed=seed, dtype=dtype), normal(out, rank, seed=seed + 1, dtype=dtype), scale)


def oracle(weight: Tensor, change: LayerDelta, verdicts: tuple[bool, ...], noise: float = 0.0) -> Intruders:
    """Decompose W₀ + ΔW whole in float64 and call the vectors intruders that the test says are."""
    U, s, Vt = np.linalg.svd((weight.double() + change.dense(torch.float64)).numpy(), full_matrices=False)
    k = len(verdicts)
    left, right = (torch.from_numpy(m.copy()) for m in (U[:, :k], Vt[:k].T))
    left, right = (m + noise * normal(*m.shape, seed=9, dtype=torch.float64) for m in (left, right))
    flat = np.zeros(k)
    found = Triplets(left, torch.from_numpy(s[:k].copy()), right, torch.full((k,), noise, dtype=torch.float64))
    return Intruders(
        found, flat, flat, verdicts, ("dense",) * k, flat, (True,) * k, np.zeros((1, k)), float(s @ s), epsilon=0.5
    )


def expected(weight: Tensor, change: LayerDelta, factors: dict[int, float]) -> np.ndarray:
    """Give the change after the singular values of W₀ + ΔW at these positions are multiplied by these factors."""
    W0 = weight.double().numpy()
    U, s, Vt = np.linalg.svd(W0 + change.dense(torch.float64).numpy(), full_matrices=False)
    for position, factor in factors.items():
        s[position] *= factor
    return (U * s) @ Vt - W0


def close(found: LayerDelta, right: np.ndarray, atol: float = 1e-6) -> None:
    np.testing.assert_allclose(found.dense(torch.float64).numpy(), right, rtol=0, atol=atol * np.linalg.norm(right, 2))


def delta_of(change: LayerDelta, **more: object) -> Delta:
    return Delta({Q: change}, **more)  # type: ignore[arg-type]


class TestWriting:
    @pytest.mark.parametrize(
        "text", ["scale 0.25", "top1 0.75", "all 1.5", "matched top1 0.7", "threshold 0", "taper 1"]
    )
    def test_what_is_read_is_written(self, text):
        assert str(Edit.parse(text)) == text
        assert Edit.parse(str(Edit.parse(f"  {text} "))) == Edit.parse(text)

    def test_the_parts(self):
        edit = Edit.parse("matched all 0.3")
        assert (edit.family, edit.strength, edit.of) == ("matched", 0.3, "all")
        assert (edit.curve, edit.acts) == ("matched all", "all")
        assert edit.needs_intruders and edit.neutral == 1
        assert not Edit("scale", 0.5).needs_intruders and not Edit("matched", 2.0, "threshold").needs_intruders
        assert Edit("threshold", 2.0).neutral == Edit("matched", 2.0, "threshold").neutral == 0
        assert str(Edit("all", np.float64(0.5))) == "all 0.5"

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("", "ends in its strength"),
            ("top1", "ends in its strength"),
            ("top1 much", "ends in its strength"),
            ("0.5", "a family and its strength"),
            ("matched top1 all 0.5", "a family and its strength"),
            ("tpo1 0.5", "did you mean top1?"),
            ("frobnicate 0.5", "take one of scale, taper"),
            ("scale -0.5", "0 or above"),
            ("top1 nan", "0 or above"),
            ("all inf", "0 or above"),
            ("taper 1.5", "from 0 to 1"),
            ("matched 0.5", "names the edit that it is a control of"),
            ("matched scale 0.5", "matched top1 or all"),
            ("scale all 0.5", "names the edit that it is a control of"),
        ],
    )
    def test_nonsense_is_refused_with_a_way_out(self, text, says):
        with pytest.raises(DeltaError) as refusal:
            Edit.parse(text)
        assert says in str(refusal.value) and refusal.value.fix
        assert repr(text) in str(refusal.value) or text in str(refusal.value)

    def test_the_default_sweep_has_every_family_once_per_strength(self):
        for kind, thresholds in (("low-rank", 0), ("dense", 4)):
            edits = default_sweep(kind)
            assert len(set(edits)) == len(edits) == 33 + thresholds
            assert sum(edit.acts == "threshold" for edit in edits) == thresholds
            strengths = {curve: {e.strength for e in edits if e.curve == curve} for curve in ("top1", "matched top1")}
            assert strengths["top1"] == strengths["matched top1"] == {0, 0.3, 0.5, 0.7, 0.9}
            assert all(Edit.parse(str(edit)) == edit for edit in edits)


class TestScaleAndTaper:
    def test_of_a_pair_only_the_scale_changes(self):
        change = pair(6, 5, dtype=torch.bfloat16)
        found = edited(delta_of(change), Edit("scale", 0.25))[Q]
        assert isinstance(found, LowRank)
        assert found.A is change.A and found.B is change.B and found.scale == 0.125

    def test_a_dense_change_is_multiplied(self):
        change = Dense(normal(6, 5))
        found = edited(delta_of(change), Edit("scale", 0.25))[Q]
        assert torch.equal(found.dense(), change.weight / 4)

    def test_whole_parameters_lie_between_base_and_tuned(self):
        name, base, tuned = "model.norm.weight", normal(7, seed=3).bfloat16(), normal(7, seed=4)
        delta = delta_of(pair(6, 5), whole={name: tuned})
        found = {c: edited(delta, Edit("scale", c), whole={name: base}.__getitem__).whole[name] for c in (0, 0.25, 2)}
        assert torch.equal(found[0], base.float())
        exact = base.double() + 0.25 * (tuned.double() - base.double())
        torch.testing.assert_close(found[0.25], exact.float(), rtol=1e-7, atol=0)
        torch.testing.assert_close(found[2], 2 * tuned - base.float(), rtol=1e-5, atol=1e-6)
        assert all(value.dtype == tuned.dtype for value in found.values())

    def test_without_the_base_whole_parameters_are_not_scaled(self):
        delta = delta_of(pair(6, 5), whole={"model.norm.weight": torch.ones(7)})
        for whole in (None, {"other": torch.ones(7)}.__getitem__):
            with pytest.raises(DeltaError, match="base's value is needed") as refusal:
                edited(delta, Edit("scale", 0.5), whole=whole)
            assert refusal.value.where == "model.norm.weight" and "whole" in (refusal.value.fix or "")
        with pytest.raises(DeltaError, match=r"\(1,\) here, the delta \(7,\)"):
            edited(delta, Edit("scale", 0.5), whole=lambda _: torch.ones(1))

    def test_the_taper_rises_evenly_with_depth(self):
        factors = {
            "model.embed_tokens": 0.2,
            "model.layers.0.mlp.up_proj": 0.2,
            "model.layers.1.mlp.up_proj": 0.4,
            "model.layers.2.mlp.up_proj": 0.6,
            "model.layers.4.mlp.up_proj": 1.0,
            "lm_head": 1.0,
            "transformer.wte": 0.2,
            "gpt_neox.embed_in": 0.2,
            "embed_out": 1.0,
            "score": 1.0,
            "table": 0.2,  # an embedding by the delta's own word
        }
        delta = Delta({name: pair(4, 4, scale=3.0) for name in factors}, embeddings=frozenset({"table"}))
        found = edited(delta, Edit("taper", 0.2))
        assert {name: found[name].scale / 3 for name in factors} == pytest.approx(factors)
        assert found["lm_head"] is delta["lm_head"]
        # Of nine blocks, block 4 is the middle.
        assert edited(delta, Edit("taper", 0.2), blocks=9)["model.layers.4.mlp.up_proj"].scale == pytest.approx(1.8)
        # One block is the last.
        assert edited(delta_of(delta["score"]), Edit("taper", 0.3))[Q] is delta["score"]

    def test_the_taper_moves_whole_parameters_too(self):
        whole = {f"model.layers.{i}.input_layernorm.weight": torch.full((3,), 2.0) for i in range(3)}
        delta = Delta({}, whole | {"model.norm.weight": torch.full((3,), 2.0)})
        found = edited(delta, Edit("taper", 0.0), whole=lambda _: torch.ones(3))
        assert [float(value[0]) for value in found.whole.values()] == [1.0, 1.5, 2.0, 2.0]
        assert found.whole["model.norm.weight"] is delta.whole["model.norm.weight"]

    def test_depth_is_the_first_number_in_a_name(self):
        assert [depth_of(name) for name in ("h.3.experts.7.up", "lm_head", "layer2.up")] == [3, -1, -1]


VERDICTS = (False, True, False, True, False)


class TestIntruders:
    @pytest.mark.parametrize("kind", ["float32", "bfloat16", "dense", "negative scale"])
    @pytest.mark.parametrize(("family", "moved"), [("top1", [1]), ("all", [1, 3])])
    @pytest.mark.parametrize("strength", [0.0, 0.3, 1.5])
    def test_they_are_scaled_exactly(self, kind, family, moved, strength):
        weight = normal(12, 9, seed=5)
        change: LayerDelta = pair(12, 9, dtype=getattr(torch, kind, torch.float32))
        if kind == "negative scale":
            change = pair(12, 9, scale=-0.7)
        if kind == "dense":
            change = Dense(change.dense())
        found = edited(delta_of(change), Edit(family, strength), found={Q: oracle(weight, change, VERDICTS)})[Q]
        close(found, expected(weight, change, dict.fromkeys(moved, strength)))
        if isinstance(change, LowRank):
            assert isinstance(found, LowRank)
            assert found.rank == change.rank + len(moved) and found.scale == change.scale
            assert found.A.dtype == found.B.dtype == torch.float32
            assert torch.equal(found.A[:3], change.A.float()) and torch.equal(found.B[:, :3], change.B.float())
            # Both factors of a new column are of one size, so neither leaves the range of half precision.
            torch.testing.assert_close(found.A[3:].norm(dim=1), found.B[:, 3:].norm(dim=0))

    def test_a_planted_intruder_is_gone_although_it_was_found_roughly(self):
        U, V = (torch.linalg.qr(normal(n, 40, seed=n, dtype=torch.float64)).Q for n in (64, 48))
        weight = ((U * torch.linspace(3, 0.01, 40)) @ V.t()).float()
        u, v = normal(64, 1, seed=2), normal(1, 48, seed=3)
        change = LowRank(v / v.norm(), 2.5 * u / u.norm(), 1.0)
        W = (weight.double() + change.dense(torch.float64)).numpy()
        left, s, right = np.linalg.svd(W)
        position = int(np.argmax(np.abs(left.T @ u.double().numpy())))
        known = oracle(weight, change, tuple(j == position for j in range(8)), noise=1e-5)
        left_over = {}
        for name, triplets in (("rough", known), ("sharp", sharpened(weight, change, known))):
            gone = edited(delta_of(change), Edit("top1", 0.0), found={Q: triplets})[Q]
            after = weight.double().numpy() + gone.dense(torch.float64).numpy()
            sides = (after.T @ left[:, position], after @ right[position])
            left_over[name] = max(np.linalg.norm(side) for side in sides) / s[0]
        assert left_over["sharp"] < 1e-6 < left_over["rough"]
        # All other singular values are what they were.
        np.testing.assert_allclose(np.linalg.svd(after)[1][:-1], np.delete(s, position), rtol=0, atol=1e-6)

    def test_the_neighbour_has_the_nearest_value_and_is_no_intruder(self):
        weight, change = torch.diag(torch.tensor([9.0, 7.0, 6.5, 6.0, 1.0])), Dense(torch.zeros(5, 5))
        cases = {
            (False, True, False, False, False): [2],
            (False, True, True, False, False): [3],
            (True, True, False, False, False): [2],
            (False, False, False, True, False): [2],
            (False, False, False, False, True): [3],
            (True,) * 5: [],
            (False,) * 5: [],
        }
        for verdicts, positions in cases.items():
            known = oracle(weight, change, verdicts)
            assert touched(Edit("neighbour", 0.5), known) == positions
            found = edited(delta_of(change), Edit("neighbour", 0.5), found={Q: known})[Q]
            np.testing.assert_allclose(found.dense().numpy(), expected(weight, change, dict.fromkeys(positions, 0.5)))
            assert (found is change) == (not positions) and touched(Edit("scale", 0.5), known) == []
        # Of two as near, the larger.
        even = oracle(torch.diag(torch.tensor([3.0, 2.0, 1.0])), Dense(torch.zeros(3, 3)), (False, True, False))
        assert touched(Edit("neighbour", 0.5), even) == [0]

    def test_a_pair_that_changes_nothing_can_carry_an_edit(self):
        weight, change = normal(12, 9, seed=5), pair(12, 9, scale=0.0)
        found = edited(delta_of(change), Edit("top1", 0.5), found={Q: oracle(weight, change, VERDICTS)})[Q]
        close(found, expected(weight, change, {1: 0.5}))
        control = edited(delta_of(change), Edit("matched", 0.5, "top1"), found={Q: oracle(weight, change, VERDICTS)})
        assert control[Q] is change

    def test_what_is_missing_is_named(self):
        weight, change = normal(12, 9, seed=5), pair(12, 9)
        edit = Edit("matched", 0.5, "all")
        for found in (None, {}, {"other": oracle(weight, change, VERDICTS)}):
            with pytest.raises(DeltaError, match="not looked for") as refusal:
                edited(delta_of(change), edit, found=found)
            assert refusal.value.where == Q
        with pytest.raises(DeltaError, match=r"of a matrix \(12, 9\), the change is \(9, 12\)"):
            edited(delta_of(pair(9, 12)), edit, found={Q: oracle(weight, change, VERDICTS)})
        with pytest.raises(DeltaError, match=r"all 0\.5 acts on weight matrices"):
            edited(Delta({}, {"lm_head.weight": weight}), Edit("all", 0.5), found={})


class TestSharpening:
    @pytest.mark.parametrize("shape", [(70, 50), (50, 70), (600, 40), (9, 9)])
    @pytest.mark.parametrize("kind", ["pair", "dense", "turned", "bfloat16"])
    def test_it_converges_to_the_triplets_of_a_dense_decomposition(self, shape, kind):
        weight, change = normal(*shape, seed=5), pair(*shape, scale=2.0)
        weight = weight.t().contiguous().t() if kind == "turned" else weight
        weight = weight.bfloat16() if kind == "bfloat16" else weight
        given: LayerDelta = Dense(change.dense()) if kind in ("dense", "turned") else change
        rough, right = (oracle(weight, given, VERDICTS, noise=noise) for noise in (1e-4, 0.0))
        found = sharpened(weight, given, rough)
        assert found.verdicts == rough.verdicts and found.similarity is rough.similarity
        for j in {1, 3, *touched(Edit("neighbour", 0.0), rough)}:
            assert float(found.triplets.residuals[j]) <= 1e-9
            parts = [t.values[j] * torch.outer(t.left[:, j], t.right[:, j]) for t in (found.triplets, right.triplets)]
            torch.testing.assert_close(*parts, rtol=0, atol=1e-8 * float(right.triplets.values[0]))

    def test_nothing_is_done_without_an_intruder_and_nothing_breaks_at_zero(self):
        weight, change = normal(12, 9, seed=5), pair(12, 9)
        known = oracle(weight, change, (False,) * 4)
        assert sharpened(weight, change, known) is known
        nothing = oracle(torch.zeros(12, 9), Dense(torch.zeros(12, 9)), (True,) * 4)
        assert sharpened(torch.zeros(12, 9), Dense(torch.zeros(12, 9)), nothing) is nothing
        # Of a matrix of rank 2, all of whose vectors are called intruders, the first two are sharpened.
        weight = normal(12, 2, seed=6) @ normal(2, 9, seed=7)
        still = Dense(torch.zeros(12, 9))
        rough = oracle(weight, still, (True,) * 5, noise=1e-4)
        found = sharpened(weight, still, rough)
        assert bool((found.triplets.residuals[:2] < 1e-9).all())
        assert torch.equal(found.triplets.left[:, 2:], rough.triplets.left[:, 2:])
        close(edited(delta_of(still), Edit("all", 0.0), found={Q: found})[Q], -weight.double().numpy())

    def test_a_vector_keeps_its_position_among_nearly_equal_values(self):
        weight, still = torch.diag(torch.tensor([3.0, 2.0, 2.0 - 1e-5, 1.0])), Dense(torch.zeros(4, 4))
        known = oracle(weight, still, (False, True, False), noise=1e-6)
        known.triplets.left[:, [1, 2]] = known.triplets.left[:, [2, 1]]
        known.triplets.right[:, [1, 2]] = known.triplets.right[:, [2, 1]]
        found = sharpened(weight, still, known).triplets
        assert found.values.tolist() == pytest.approx([3, 2 - 1e-5, 2], rel=1e-7) and found.values[1] < found.values[2]
        assert abs(float(found.left[2, 1])) == pytest.approx(1, abs=1e-6)

    def test_another_shape_is_refused(self):
        weight, change = normal(12, 9, seed=5), pair(12, 9)
        with pytest.raises(DeltaError, match=r"the delta is \(12, 9\), the weight \(9, 12\)"):
            sharpened(weight.t(), change, oracle(weight, change, VERDICTS))


class TestThreshold:
    @pytest.mark.parametrize(("beta", "published"), [(0.05, 1.5194), (0.5, 2.1711), (1.0, 2.8582)])
    def test_omega_is_the_published_table(self, beta, published):
        # As printed in the paper, whose integrals end in the fourth digit; and its cubic, good to 0.02.
        assert omega(beta) == pytest.approx(published, abs=3e-4)
        assert omega(beta) == pytest.approx(0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43, abs=0.02)

    @pytest.mark.parametrize("shape", [(400, 400), (800, 200), (200, 800)])
    def test_the_median_of_noise_gives_its_size(self, shape):
        noise, beta = 0.3 * np.random.default_rng(0).standard_normal(shape), min(shape) / max(shape)
        known_size = math.sqrt(2 * (beta + 1) + 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1)))
        known_size *= 0.3 * math.sqrt(max(shape))
        assert threshold(np.linalg.svd(noise)[1], shape) == pytest.approx(known_size, rel=0.01)

    def test_what_has_no_bulk_stays(self):
        small, vector = Dense(normal(2, 30)), Dense(normal(30))
        delta = Delta({"score": small, "norm": vector, Q: Dense(torch.eye(16))})
        found = edited(delta, Edit("threshold", 0.3))
        assert all(found[name] is delta[name] for name in delta)
        assert not edited(delta, Edit("threshold", 1.0))[Q].dense().any()

    def test_pairs_and_infinite_numbers_are_refused(self):
        for edit in (Edit("threshold", 1.0), Edit("matched", 1.5, "threshold")):
            with pytest.raises(DeltaError, match="no bulk of noise") as refusal:
                edited(delta_of(pair(20, 20)), edit)
            assert refusal.value.where == Q
        with pytest.raises(DeltaError, match="not finite"):
            thresholded(Dense(torch.full((20, 20), math.nan)), 1.0)


class TestUnchanged:
    def delta(self) -> Delta:
        layers: dict[str, LayerDelta] = {
            Q: pair(12, 9),
            "model.layers.1.up": Dense(normal(12, 9)),
            "b": Dense(normal(12)),
        }
        return Delta(layers, {"norm.weight": torch.ones(3)}, "f" * 64, frozenset({"table"}), keeps_ties=True)

    @pytest.mark.parametrize(
        "text", ["scale 1", "taper 1", "top1 1", "all 1", "neighbour 1", "matched all 1", "threshold 0"]
    )
    def test_strength_one_gives_the_same_objects(self, text):
        delta = self.delta()
        found = edited(delta, Edit.parse(text))
        assert all(found[name] is delta[name] for name in delta)
        assert found.whole["norm.weight"] is delta.whole["norm.weight"]

    @pytest.mark.parametrize("text", ["scale 0.5", "taper 0.5", "top1 0.5", "matched all 0.5"])
    def test_what_else_a_delta_holds_is_kept(self, text):
        delta, weight = self.delta(), normal(12, 9, seed=5)
        known = {name: oracle(weight, delta[name], VERDICTS) for name in (Q, "model.layers.1.up")}
        before = {name: change.dense(torch.float64).clone() for name, change in delta.items()}
        found = edited(delta, Edit.parse(text), found=known, whole=lambda _: torch.zeros(3))
        assert (found.base_fingerprint, found.embeddings, found.keeps_ties) == ("f" * 64, {"table"}, True)
        assert list(found) == list(delta) and found[Q] is not delta[Q]
        assert all(torch.equal(delta[name].dense(torch.float64), value) for name, value in before.items())
        if Edit.parse(text).needs_intruders:
            assert found["b"] is delta["b"] and found.whole["norm.weight"] is delta.whole["norm.weight"]

    def test_a_matrix_without_intruder_is_left_alone(self):
        weight, change = normal(12, 9, seed=5), pair(12, 9)
        known = {Q: oracle(weight, change, (False,) * 5)}
        for text in ("top1 0", "all 0.5", "neighbour 0", "matched top1 0"):
            assert edited(delta_of(change), Edit.parse(text), found=known)[Q] is change


class TestCompression:
    def test_a_repaired_pair_goes_back_to_its_rank(self):
        weight, change = normal(12, 9, seed=5), pair(12, 9)
        delta = Delta({Q: change, "other": pair(12, 9)})
        known = {Q: oracle(weight, change, VERDICTS), "other": oracle(weight, delta["other"], (False,) * 3)}
        repaired = edited(delta, Edit("all", 0.3), found=known)
        small, table = compressed(repaired, {Q: 3})
        assert small[Q].rank == 3 and small["other"] is delta["other"]
        assert table["rank_before"].tolist() == [5, 3] and table["rank"].tolist() == [3, 3]
        assert table.loc[0, "discarded"] > 1e-3 and table.loc[1, "discarded"] == 0
        assert compressed(repaired, 8)[0][Q] is repaired[Q]

    def test_zero_stays_zero(self):
        for change in (pair(12, 9, scale=0.0), LowRank(torch.zeros(3, 9), torch.zeros(12, 3), 2.0)):
            small, table = compressed(delta_of(change), 1)
            assert not small[Q].dense().any() and small[Q].rank == 1
            assert table.loc[0, "discarded"] == table.loc[0, "discarded_norm"] == 0

    def test_what_cannot_be_compressed_is_refused(self):
        with pytest.raises(DeltaError, match="this layer is dense"):
            compressed(delta_of(Dense(normal(4, 4))), 2)
        with pytest.raises(DeltaError, match="rank 1 or more"):
            compressed(delta_of(pair(4, 4)), 0)
        with pytest.raises(DeltaError, match="not finite"):
            compressed(delta_of(LowRank(torch.full((3, 9), math.nan), torch.ones(12, 3), 1.0)), 2)
