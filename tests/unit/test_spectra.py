"""Spectra of base and deltas: every number is that of dense float64 matrices, and folders give back what was written."""

import json
import math
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers
from safetensors.torch import save_file

from little_world import loralab, make_base, make_world, only_run, overrides
from loralab.base.model import load
from loralab.base.targets import weight_of
from loralab.delta.layers import load_delta_
from loralab.delta.lowrank import Delta, LayerDelta, LowRank
from loralab.delta.store import load_lowrank, save_lowrank
from loralab.errors import DeltaError, FolderError
from loralab.lab.spectra import Spectra, is_spectra, read_spectra, spectra
from loralab.spectral.spectrum import COLUMNS
from tiny import tiny

K, EPSILON = 6, 0.6
LAYERS = {
    "model.layers.0.mlp.up_proj": (48, 32),
    "model.layers.1.self_attn.q_proj": (32, 32),
    "model.embed_tokens": (32, 101),
}


def pair(shape: tuple[int, int], rank: int, scale: float) -> LowRank:
    return LowRank(torch.randn(rank, shape[1]), torch.randn(shape[0], rank), scale)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base, two adapters of different strength, and a tuned checkpoint."""
    transformers.utils.logging.disable_progress_bar()
    made = tmp_path_factory.mktemp("spectra")
    make_base(made / "base")
    torch.manual_seed(5)
    for name, rank, scale in (("weak", 2, 0.02), ("strong", 4, 0.5)):
        layers: dict[str, LayerDelta] = {layer: pair(shape, rank, scale) for layer, shape in LAYERS.items()}
        save_lowrank(made / name, Delta(layers, embeddings=frozenset({"model.embed_tokens"})), "base")
    tuned = tiny("llama")
    for layer in list(LAYERS)[:2]:
        weight = tuned.get_submodule(layer).weight
        weight.data += torch.randn(weight.shape) * 0.3
    tuned.save_pretrained(made / "tuned")
    return made


@pytest.fixture(scope="module")
def found(world: Path) -> Spectra:
    deltas = [world / "weak", world / "strong", world / "tuned"]
    return spectra(world / "base", *deltas, k=K, epsilon=EPSILON, cache=world / "heads", out=world / "out")


def changes(world: Path, name: str) -> dict[str, np.ndarray]:
    """Form every change of a delta in float64, by its files."""
    if name == "tuned":
        base, tuned = tiny("llama"), load(str(world / "tuned"), need_tokenizer=False, device="cpu").model
        linears = {n: m for n, m in base.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
        return {
            n: (tuned.get_submodule(n).weight.double() - m.weight.double()).detach().numpy() for n, m in linears.items()
        }
    return {n: c.scale * (c.B.double() @ c.A.double()).numpy() for n, c in load_lowrank(world / name).layers.items()}


def base_weight(layer: str) -> np.ndarray:
    return weight_of(tiny("llama").get_submodule(layer)).detach().double().numpy()


# What is measured


@pytest.mark.parametrize("name", ["weak", "strong", "tuned"])
def test_matrices_hold_what_dense_matrices_have(name: str, world: Path, found: Spectra) -> None:
    mine = found.matrices[found.matrices["delta"] == name].set_index("layer")
    expected = changes(world, name)
    assert set(mine.index) == set(expected) and (mine["problem"] == "").all()
    for layer, change in expected.items():
        row, weight = mine.loc[layer], base_weight(layer)
        s = np.linalg.svd(change, compute_uv=False)
        energy = s**2
        assert (row["out_features"], row["in_features"]) == change.shape == weight.shape
        assert row["frobenius"] == pytest.approx(np.linalg.norm(change), rel=1e-6)
        assert row["relative_norm"] == pytest.approx(np.linalg.norm(change) / np.linalg.norm(weight), rel=1e-5)
        U, _, Vh = np.linalg.svd(weight)
        k = min(K, *weight.shape)
        if not change.any():
            assert row["note"] == "no change" and row["intruders"] == 0 and math.isnan(row["overlap_left"])
            continue
        rank90 = int(np.searchsorted(np.cumsum(energy), 0.9 * energy.sum())) + 1
        assert row["rank90"] == rank90 and row["rank90_share"] == pytest.approx(rank90 / row["rank"])
        inside = U[:, :k].T @ change, change @ Vh[:k].T, U[:, :k].T @ change @ Vh[:k].T
        for column, part in zip(("overlap_left", "overlap_right", "overlap_both"), inside, strict=True):
            assert row[column] == pytest.approx(np.linalg.norm(part) ** 2 / energy.sum(), rel=1e-3)
        Ut, st, _ = np.linalg.svd(weight + change)
        cosines = np.abs(U[:, : min(weight.shape)].T @ Ut[:, :k]).max(axis=0)
        intrudes = cosines < EPSILON
        assert row["intruders"] == intrudes.sum()
        assert row["intruder_energy"] == pytest.approx((st[:k] ** 2)[intrudes].sum() / (st[:k] ** 2).sum(), abs=1e-5)
        assert row["intruder_values"] == pytest.approx(st[:k][intrudes].sum() / st[0], abs=1e-5)


def test_vectors_hold_what_dense_matrices_have(world: Path, found: Spectra) -> None:
    for name in ("weak", "strong"):
        for layer, change in changes(world, name).items():
            weight = base_weight(layer)
            chosen = (found.vectors["delta"] == name) & (found.vectors["layer"] == layer)
            mine = found.vectors[chosen]
            U, Ut, s = np.linalg.svd(weight)[0], *np.linalg.svd(weight + change)[:2]
            every = np.abs(U[:, : min(weight.shape)].T @ Ut[:, :K])
            assert mine["position"].tolist() == list(range(1, K + 1))
            np.testing.assert_allclose(mine["value"], s[:K], rtol=1e-5)
            np.testing.assert_allclose(mine["relative_value"], s[:K] / s[0], rtol=1e-5)
            assert (mine["cosine_low"] <= every.max(axis=0) + 1e-4).all()
            assert (mine["cosine_high"] >= every.max(axis=0) - 1e-4).all()
            assert mine["intruder"].tolist() == (every.max(axis=0) < EPSILON).tolist()
            gaps = np.abs(s[:K, None] - np.where(np.eye(K, len(s)), np.inf, s)).min(axis=1) / s[0]
            np.testing.assert_allclose(mine["gap"], gaps, atol=1e-5)
            for j, similarity in enumerate(mine["similarity"]):
                np.testing.assert_allclose(similarity, every[: len(similarity), j], atol=1e-3)
    assert found.vectors["intruder"].any() and not found.vectors["intruder"].all()


def test_overlaps_compare_every_pair_of_deltas(world: Path, found: Spectra) -> None:
    everything = {name: changes(world, name) for name in ("weak", "strong", "tuned")}
    ranks = {"weak": 2, "strong": 4, "tuned": K}
    expected = {}
    for a, b in combinations(everything, 2):
        for layer in everything[a].keys() & everything[b].keys():
            (Ua, sa, Va), (Ub, sb, Vb) = (np.linalg.svd(everything[n][layer], full_matrices=False) for n in (a, b))
            ra, rb = min(ranks[a], int((sa > 1e-9).sum())), min(ranks[b], int((sb > 1e-9).sum()))
            left, right = Ua[:, :ra].T @ Ub[:, :rb], Va[:ra] @ Vb[:rb].T
            if min(ra, rb):
                expected[a, b, layer] = [np.linalg.norm(part) ** 2 / min(ra, rb) for part in (left, right)]
    rows = {(r.delta_a, r.delta_b, r.layer): [r.left, r.right] for r in found.overlaps.itertuples()}
    assert set(expected) == {key for key, values in rows.items() if not np.isnan(values).any()}
    for key, values in expected.items():
        assert rows[key] == pytest.approx(values, abs=1e-4), key


def test_columns_and_facts_are_as_promised(world: Path, found: Spectra) -> None:
    assert tuple(found.matrices.columns[1 : 1 + len(COLUMNS)]) == COLUMNS and found.matrices.columns[0] == "delta"
    assert [found.facts[key] for key in ("base", "k", "epsilon", "exact", "version")] == [
        str(world / "base"),
        K,
        EPSILON,
        False,
        1,
    ]
    assert {name: told["kind"] for name, told in found.facts["deltas"].items()} == {
        "weak": "low-rank",
        "strong": "low-rank",
        "tuned": "dense",
    }
    assert found.facts["deltas"]["weak"]["path"] == str(world / "weak")
    assert any("norms" in note for note in found.facts["notes"])
    cost = found.facts["cost"]
    assert cost["matrices"] == len(found.matrices) and sum(cost["routes"].values()) == len(found.vectors)
    assert set(cost["layers"]) == set(found.matrices["layer"]) and sum(cost["layers"].values()) <= cost["seconds"]
    order = list(dict.fromkeys(found.matrices["delta"]))
    assert (
        order == list(found.facts["deltas"]) and (found.matrices["delta"].map(order.index).diff().dropna() >= 0).all()
    )


def test_the_slow_definition_agrees(world: Path, found: Spectra) -> None:
    exact = spectra(world / "base", world / "strong", k=K, epsilon=EPSILON, exact=True, cache=world / "heads")
    mine = found.vectors[found.vectors["delta"] == "strong"].reset_index(drop=True)
    assert set(exact.vectors["route"]) == {"exact"} and set(mine["route"]) != {"exact"}
    assert exact.vectors["intruder"].tolist() == mine["intruder"].tolist()
    np.testing.assert_allclose(exact.vectors["value"], mine["value"], rtol=1e-5)
    assert (exact.vectors["cosine_low"] >= mine["cosine_low"] - 1e-4).all()
    assert (exact.vectors["cosine_high"] <= mine["cosine_high"] + 1e-4).all()


def test_a_base_and_deltas_in_memory_give_the_same(world: Path, found: Spectra) -> None:
    base = load(str(world / "base"), device="cpu")
    same = spectra(
        base, load_lowrank(world / "weak"), str(world / "strong"), k=K, epsilon=EPSILON, cache=world / "heads"
    )
    assert list(same.facts["deltas"]) == ["delta 1", "strong"] and same.facts["deltas"]["delta 1"]["path"] == ""
    renamed = same.matrices.replace({"delta 1": "weak"})
    expected = found.matrices[found.matrices["delta"] != "tuned"].reset_index(drop=True)
    pd.testing.assert_frame_equal(renamed, expected)
    load_delta_(base.model, load_lowrank(world / "strong"))  # pairs on the model change neither names nor weights
    worn = spectra(base, world / "weak", world / "strong", k=K, epsilon=EPSILON, cache=world / "heads")
    pd.testing.assert_frame_equal(worn.matrices, expected)


def test_progress_is_told_layer_by_layer(world: Path) -> None:
    told: list[tuple[int, int, str]] = []
    spectra(
        world / "base",
        world / "weak",
        world / "tuned",
        k=1,
        cache=world / "heads",
        told=lambda *step: told.append(step),
    )
    assert [done for done, _, _ in told] == list(range(1, 16)) and {total for _, total, _ in told} == {15}
    assert {name for _, _, name in told} == {*changes(world, "tuned"), "model.embed_tokens"}


def test_a_model_of_no_language_is_a_base_too(world: Path, tmp_path: Path) -> None:
    """Nothing asks for a head: an encoder alone, as sentence encoders are published, can be looked into."""
    encoder = tiny("bert", task="Model")
    encoder.save_pretrained(tmp_path / "encoder")
    layer = "encoder.layer.1.attention.output.dense"
    mine = Delta({f"bert.{layer}": pair((32, 32), 2, 0.3)})
    row = spectra(tmp_path / "encoder", mine, k=3, cache=world / "heads").matrices.iloc[0]
    assert (row["layer"], row["module"], row["depth"], row["problem"]) == (layer, "dense", 1, "")
    assert row["base_frobenius"] == pytest.approx(float(encoder.get_submodule(layer).weight.detach().norm()), rel=1e-5)


# What is told in a row


def test_notes_say_what_is_unusual_about_a_matrix(world: Path) -> None:
    up, query, embed = LAYERS
    one = pair((48, 32), 2, 1.0)
    deficient = LowRank(one.A.repeat(2, 1), one.B.repeat(1, 2), 1.0)
    layers: dict[str, LayerDelta] = {up: deficient, query: pair((32, 32), 3, 0.0), embed: pair((32, 101), 40, 0.01)}
    found = spectra(world / "base", Delta(layers), k=40, cache=world / "heads")
    notes = found.matrices.set_index("layer")["note"]
    assert notes[up] == "k is 32 here, all there are; of rank 2, not 4"
    assert notes[query] == "k is 32 here, all there are; no change"
    assert notes[embed] == "k is 32 here, all there are; of rank 32, not 40"
    assert (found.matrices["problem"] == "").all() and found.vectors.groupby("layer").size().tolist() == [32] * 3
    quiet = found.matrices.set_index("layer").loc[query]
    assert quiet["intruders"] == 0 and quiet["rank90"] == 0 and math.isnan(quiet["overlap_both"])


def test_a_large_dense_change_is_measured_by_its_leading_values(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.spectral.spectrum.LIMIT", 1000)
    mine = spectra(world / "base", world / "tuned", k=3, cache=world / "heads").matrices
    large = mine[(mine["note"] != "") & (mine["note"] != "no change")]
    assert large["layer"].tolist() == list(LAYERS)[:2]
    assert large["note"].str.contains("leading singular values were computed").all()
    assert large["effective_rank"].isna().all() and large["stable_rank"].notna().all()


# On disk


def test_a_folder_gives_back_what_was_written(world: Path, found: Spectra) -> None:
    folder = world / "out"
    assert is_spectra(folder) and not is_spectra(world)
    assert sorted(path.stem for path in folder.glob("*.parquet")) == ["intruders", "overlaps", "spectra"]
    assert [path.name for path in folder.iterdir() if path.suffix != ".parquet"] == ["spectra.json"]
    back = read_spectra(folder)
    for mine, theirs in zip(back._tables().values(), found._tables().values(), strict=True):
        pd.testing.assert_frame_equal(mine, theirs)
    assert back.facts == json.loads(json.dumps(found.facts))
    assert back.summary() == found.summary()


def test_tables_without_rows_keep_their_types(world: Path, tmp_path: Path) -> None:
    one = spectra(world / "base", world / "weak", k=2, cache=world / "heads", out=tmp_path / "out")
    back = read_spectra(tmp_path / "out")
    assert back.overlaps.empty and list(back.overlaps.columns) == ["delta_a", "delta_b", "layer", "left", "right"]
    pd.testing.assert_frame_equal(back.overlaps, one.overlaps)
    assert back.overlaps["left"].dtype == "float64"


def test_counts_and_summary_add_up(found: Spectra) -> None:
    counted = found.counts([K], [EPSILON]).set_index("delta")
    told = found.summary()
    assert (told["k"], told["epsilon"]) == (K, EPSILON)
    for name in ("weak", "strong", "tuned"):
        mine = found.matrices[found.matrices["delta"] == name]
        number = int(mine["intruders"].sum())
        assert counted.loc[name, "low"] == counted.loc[name, "high"] == number
        totals = told["deltas"][name]
        assert (totals["intruders"], totals["matrices"], totals["problems"]) == (number, len(mine), 0)
        assert totals["frobenius"] == pytest.approx(math.sqrt((mine["frobenius"] ** 2).sum()))
        assert totals["relative_norm"] == pytest.approx(
            totals["frobenius"] / math.sqrt((mine["base_frobenius"] ** 2).sum())
        )
        assert sum(kind["intruders"] for kind in totals["modules"].values()) == number
        assert set(totals["modules"]) == set(mine["module"])
    strong = found.matrices[found.matrices["delta"] == "strong"]
    share = (strong["overlap_left"] * strong["frobenius"] ** 2).sum() / (strong["frobenius"] ** 2).sum()
    assert told["deltas"]["strong"]["overlap_left"] == pytest.approx(share)
    assert len(found.counts()) == 3 * K * 9

    def no_constant(name: str) -> Any:
        raise AssertionError(f"{name} is no JSON")

    json.loads(json.dumps(told), parse_constant=no_constant)


def test_no_torch_is_needed_to_read(world: Path, found: Spectra) -> None:
    script = "import sys; from loralab.lab.spectra import read_spectra as read; "
    script += "print(len(read(sys.argv[1]).matrices), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script, str(world / "out")], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(len(found.matrices)), "False"]


# Runs


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a chain of two links for four steps, a checkpoint after each."""
    folder = make_world(tmp_path_factory.mktemp("run"), train=16, held_out=2)
    chosen = {"method__links": 2, "method__rank": 2, "checkpoints__every": 1, "checkpoints__keep_last": 9}
    assert loralab("train", "sft-cola", *overrides(folder, train__steps=4, **chosen), "--runs", folder / "runs") == 0
    return only_run(folder / "runs")


def test_checkpoints_and_links_of_a_run_are_deltas_too(run: Path, tmp_path: Path) -> None:
    found = spectra(run.parents[1] / "base", run, k=3, cache=tmp_path, checkpoints=True, links=True)
    name = run.name
    parts = {
        key: {k: v for k, v in told.items() if k in ("step", "link")} for key, told in found.facts["deltas"].items()
    }
    assert parts == {
        **{f"{name} step {step}": {"step": step} for step in range(4)},
        f"{name} link 1": {"link": 1},
        f"{name} link 2": {"link": 2},
        name: {"step": 4},
    }
    assert found.facts["deltas"][f"{name} step 3"]["path"] == str(run / "checkpoints" / "step-3")
    assert found.facts["fingerprint"] == load(str(run.parents[1] / "base"), device="cpu").fingerprint
    rows = found.matrices.set_index(["delta", "layer"])
    links = [load_lowrank(path) for path in sorted((run / "links").iterdir())]
    for layer in links[0]:
        first, second = (link[layer].dense(torch.float64).numpy() for link in links)
        assert rows.loc[(f"{name} link 1", layer), "frobenius"] == pytest.approx(np.linalg.norm(first), rel=1e-6)
        assert rows.loc[(name, layer), "frobenius"] == pytest.approx(np.linalg.norm(first + second), rel=1e-6)
        # The first link was frozen after step 2: the checkpoint there holds it alone.
        assert rows.loc[(f"{name} step 2", layer), "frobenius"] == pytest.approx(np.linalg.norm(first), rel=1e-6)
        assert rows.loc[(f"{name} step 0", layer), "note"] == "no change"


def test_a_run_that_has_not_ended_shows_its_checkpoints(run: Path, tmp_path: Path) -> None:
    started = tmp_path / "started"
    started.mkdir()
    for name in ("spec.yaml", "environment.json", "checkpoints", "status.json"):
        (started / name).symlink_to(run / name)
    found = spectra(run.parents[1] / "base", started, k=1, cache=tmp_path / "heads", checkpoints=True)
    assert list(found.facts["deltas"]) == [f"started step {step}" for step in range(5)]
    with pytest.raises(DeltaError, match="holds no delta"):
        spectra(run.parents[1] / "base", started, k=1, cache=tmp_path / "heads")


@pytest.mark.parametrize("way", ["checkpoints", "links"])
def test_parts_of_a_run_that_has_none_are_an_error(way: str, world: Path) -> None:
    with pytest.raises(DeltaError, match=f"none of these deltas has {way}") as error:
        spectra(world / "base", world / "weak", cache=world / "heads", **{way: True})
    assert str(world / "weak") in str(error.value.where)


# Memory

MEASURE = """
import resource, sys, torch
torch.set_num_threads(1)
from loralab.lab.spectra import spectra
*pairs, heads = sys.argv[1:]
spectra(*pairs[:2], k=2, cache=heads)  # code and libraries are in memory now
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = spectra(*pairs[2:], k=2, cache=heads)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, (found.matrices.problem == "").sum())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is counted in other units here")
def test_two_checkpoints_are_never_both_in_memory(tmp_path: Path) -> None:
    """Base and tuned checkpoint have 12 matrices of 4 MB each; a few of them at a time are enough."""
    width, middle, layers = 64, 16384, 4
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": middle, "vocab_size": 8}
    small = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    shapes = {f"self_attn.{kind}": (width, width) for kind in "qkvo"}
    shapes |= {"mlp.gate": (middle, width), "mlp.up": (middle, width), "mlp.down": (width, middle)}
    whole = 0
    for part in ("base", "tuned"):
        generator, tensors = torch.Generator().manual_seed(1), {}
        for layer in range(layers):
            for kind, shape in shapes.items():
                tensor = torch.randn(shape, generator=generator)
                tensor[0] += 1.0 * (part == "tuned")
                tensors[f"model.layers.{layer}.{kind}_proj.weight"] = tensor
        folder, whole = tmp_path / part, sum(tensor.nbytes for tensor in tensors.values())
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        told = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_attention_heads": 8, **sizes}
        (folder / "config.json").write_text(json.dumps(told))
    del tensors
    for seed, part in enumerate(("small-base", "small")):
        tiny("llama", seed=seed, **small).save_pretrained(tmp_path / part)
    words = [str(tmp_path / part) for part in ("small-base", "small", "base", "tuned", "heads")]
    done = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True, check=True)
    more, measured = map(int, done.stdout.split())
    assert measured == layers * len(shapes) and whole > 50e6
    assert more * 1024 < 0.8 * whole, "less than one of the two models"


def test_a_folder_of_something_else_is_refused_before_anything_is_read(world: Path, tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FolderError, match="no spectra"):
        spectra("nowhere/at/all", out=tmp_path)
