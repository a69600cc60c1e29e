"""Repairs of real folders: one edit saved, and sweeps whose points are what `evaluate` finds on what was saved."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from little_world import rows, write_rows
from loralab.base.model import load
from loralab.delta.lowrank import Delta, LowRank
from loralab.delta.store import load_lowrank
from loralab.errors import EvaluationError
from loralab.evals.exam import Card
from loralab.lab.bar import Judge
from loralab.lab.deltas import read_delta
from loralab.lab.evaluate import evaluate
from loralab.lab.measuring import Measuring
from loralab.lab.mending import Subject, open_subject, silent
from loralab.lab.repair import repair, sweep
from loralab.lab.repaired import UNMEASURED, is_repair, read_repair
from loralab.lab.sides import Sides, _of_task
from loralab.lab.tradeoff import Part, Side, read_budget, within
from loralab.spectral.repair import Edit
from repair_world import PLANTED, make_repair_world, oracle

FEW = ["top1 0", "top1 0.5", "all 0.5", "matched top1 0.5", "neighbour 0.5", "taper 0.5"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_repair_world(tmp_path_factory.mktemp("repairs"))


@pytest.fixture(scope="module")
def base(world):
    return load(str(world / "base"), device="cpu")


def swept(world: Path, delta: str, out: Path | None = None, **chosen: Any):
    """Sweep on items of both sides, or on texts where these are named."""
    sides = {"target": [str(world / "target.jsonl")], "source": [str(world / "source.jsonl")]}
    for side in sides:
        if f"{side}_text" in chosen:
            sides[side] = []
    base = chosen.pop("base", str(world / "base"))
    return sweep(base, str(world / delta), out=out, device="cpu", **{**sides, **chosen})


@pytest.fixture(scope="module")
def planted(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("out") / "swept"
    return swept(world, "planted", out, edits=FEW, budget="60%"), out


# One edit


def dense_edit(model, delta, strength: float, only_first: bool = True):
    """Write W₀ + ΔW + (λ − 1) Σ s u vᵀ into a model, by dense decompositions."""
    for name, change in delta.items():
        weight = model.get_submodule(name).weight
        _, found = oracle(weight.detach(), change.dense())
        moved = sum((strength - 1) * one for one in (found[:1] if only_first else found))
        weight.data = (weight.double() + change.dense(torch.float64) + torch.as_tensor(np.asarray(moved))).float()
    return model


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.5])
def test_stock_peft_loads_a_repaired_folder_with_the_logits_of_the_dense_edit(world, tmp_path, strength):
    from peft import PeftModel

    done = repair(str(world / "base"), str(world / "planted"), f"top1 {strength}", out=tmp_path / "out")
    wanted = dense_edit(load(str(world / "base"), device="cpu").model, load_lowrank(world / "planted"), strength)
    stock = PeftModel.from_pretrained(load(str(world / "base"), device="cpu").model, tmp_path / "out" / "delta")
    tokens = torch.arange(4, 44)[None]
    with torch.no_grad():
        ours, theirs = wanted(input_ids=tokens).logits, stock(input_ids=tokens).logits
        plain = load(str(world / "base"), device="cpu").model(input_ids=tokens).logits
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4 * float(ours.abs().max()))
    assert float((ours - plain).abs().max()) > 0.05 * float(ours.abs().max()), "the edit must matter here"
    rows_ = done.matrices.set_index("layer")
    assert rows_["intruders"].to_dict() == {name: int(name in PLANTED) for name in rows_.index}
    saved = load_lowrank(tmp_path / "out" / "delta")
    assert {name: saved[name].rank for name in saved} == {name: 3 if name in PLANTED else 2 for name in saved}


def test_strength_1_changes_nothing_bit_for_bit(world, tmp_path):
    before = load_lowrank(world / "planted")
    for edit in ("top1 1", "all 1", "scale 1", "taper 1", "neighbour 1", "matched all 1"):
        out = tmp_path / edit.replace(" ", "-")
        done = repair(str(world / "base"), str(world / "planted"), edit, out=out)
        after = load_lowrank(out / "delta")
        for name, change in before.items():
            assert torch.equal(after[name].A, change.A) and torch.equal(after[name].B, change.B), (edit, name)
            assert after[name].scale == change.scale
        assert f"{edit} changes nothing here." in done.said()


def test_the_rest_of_an_adapter_stays_as_it_was(world, tmp_path):
    repair(str(world / "base"), str(world / "planted"), "all 0.5", out=tmp_path / "out")
    before, after = (
        json.loads((f / "adapter_config.json").read_text()) for f in (world / "planted", tmp_path / "out" / "delta")
    )
    changed = {key for key in before | after if before.get(key) != after.get(key)}
    assert changed <= {"r", "lora_alpha", "rank_pattern", "alpha_pattern"} and "rank_pattern" in changed
    assert load_lowrank(tmp_path / "out" / "delta").base_fingerprint == load_lowrank(world / "planted").base_fingerprint


def test_only_the_files_of_the_base_are_read_for_an_adapter(world):
    assert open_subject(str(world / "base"), str(world / "planted"), light=True).base is None
    assert open_subject(str(world / "base"), str(world / "full"), light=True).base is not None


def test_what_compression_discards_is_measured_and_said(world, tmp_path):
    exact = repair(str(world / "base"), str(world / "planted"), "top1 0.3", out=tmp_path / "exact")
    small = repair(str(world / "base"), str(world / "planted"), "top1 0.3", out=tmp_path / "small", rank=2)
    whole, cut = (load_lowrank(tmp_path / name / "delta") for name in ("exact", "small"))
    assert all(change.rank == 2 for change in cut.values())
    found = small.matrices.set_index("layer")
    for name in whole:
        lost = float((whole[name].dense(torch.float64) - cut[name].dense(torch.float64)).norm())
        assert found.at[name, "discarded_norm"] == pytest.approx(lost, rel=1e-4, abs=1e-5)
        values = torch.linalg.svdvals(whole[name].dense(torch.float64))
        assert lost == pytest.approx(float(values[2:].norm()), rel=1e-3, abs=1e-5), "no rank-2 matrix is nearer"
    total = float(np.sqrt((found["discarded_norm"] ** 2).sum()))
    (line,) = [line for line in small.said() if "discarded" in line]
    assert f"{total:.3g}" in line and f"{found['discarded'].max():.2%}" in line
    assert not [line for line in exact.said() if "discarded" in line]


def test_a_repair_that_was_not_measured_claims_no_recovery(world, tmp_path):
    done = repair(str(world / "base"), str(world / "planted"), "top1 0.5", out=tmp_path / "out")
    assert done.said()[0] == "4 intruders in 4 of 6 matrices, at k = 10 and ε = 0.5."
    assert done.said()[-1] == UNMEASURED and done.summary()["measured"] is False
    assert not any(word in line for line in done.said()[:-1] for word in ("recover", "forget"))
    again = read_repair(tmp_path / "out")
    assert is_repair(tmp_path / "out") and again.said() == done.said() and again.summary() == done.summary()


def test_a_checkpoint_is_edited_whole(world, base, tmp_path):
    repair(str(world / "base"), str(world / "full"), "scale 0.25", out=tmp_path / "out")
    before, tuned, found = (
        dict(load(str(path), device="cpu").model.named_parameters())
        for path in (world / "base", world / "full", tmp_path / "out" / "delta")
    )
    assert set(found) == set(tuned)
    for name, value in found.items():
        wanted = torch.lerp(before[name].double(), tuned[name].double(), 0.25)
        assert torch.allclose(value.double(), wanted, atol=2e-6), name
    assert (tmp_path / "out" / "delta" / "tokenizer.json").is_file()


def test_an_intruder_is_taken_out_of_a_checkpoint(world, base, tmp_path):
    done = repair(str(world / "base"), str(world / "full"), "top1 0", out=tmp_path / "out")
    tuned = dict(load(str(world / "full"), device="cpu").model.named_parameters())
    found = dict(load(str(tmp_path / "out" / "delta"), device="cpu").model.named_parameters())
    counts = done.matrices.set_index("layer")["intruders"]
    assert all(counts[name] >= 1 for name in PLANTED)
    for name in counts.index:
        key = f"{name}.weight"
        weight = base.model.get_submodule(name).weight.detach()
        places, triplets = oracle(weight, tuned[key].detach() - weight)
        assert len(places) == counts[name]
        moved = sum(triplets[:1]) if places else 0
        assert np.allclose(
            found[key].detach().double(), tuned[key].detach().double() - torch.as_tensor(np.asarray(moved)), atol=2e-5
        )
    assert torch.equal(found["model.embed_tokens.weight"], tuned["model.embed_tokens.weight"])


@pytest.mark.parametrize(("k", "epsilon"), [(1, 0.5), (3, 0.9), (10, 0.15), (99, 0.7)])
def test_intruders_are_counted_at_the_k_and_epsilon_that_are_said(world, base, tmp_path, k, epsilon):
    done = repair(str(world / "base"), str(world / "planted"), "all 0.5", out=tmp_path / "out", k=k, epsilon=epsilon)
    counts = done.matrices.set_index("layer")[["intruders", "touched"]]
    for name, change in load_lowrank(world / "planted").items():
        places, _ = oracle(base.model.get_submodule(name).weight.detach(), change.dense(), k, epsilon)
        assert counts.loc[name].tolist() == [len(places)] * 2, name
    assert f"at k = {k} and ε = {epsilon:g}" in done.said()[0]


# Sweeps


def test_points_are_what_evaluate_finds_on_the_saved_edits(world, planted, tmp_path):
    found, _ = planted
    edits = ["scale 0.5", "scale 1", "top1 0", "all 0.5", "matched top1 0.5", "taper 0.5"]
    for number, edit in enumerate(edits):
        repair(str(world / "base"), str(world / "planted"), edit, out=tmp_path / str(number))
    paths = [str(tmp_path / str(number)) for number in range(len(edits))]
    tasks = [str(world / f"{side}.jsonl") for side in ("target", "source")]
    evaluated = evaluate(str(world / "base"), tasks, deltas=paths, device="cpu")
    for number, edit in enumerate(edits):
        row = found.at(edit)
        for side, name, sign in (("target", "learning", 1), ("source", "forgetting", -1)):
            one = evaluated.find(str(number), f"{side}/choice")
            assert row[name] == pytest.approx(sign * one.change["value"], abs=1e-9), edit
            ends = sorted(sign * end for end in one.change["interval"])
            assert [row[f"{name}_low"], row[f"{name}_high"]] == pytest.approx(ends), edit
    assert found.points["learning"].nunique() > 3 and found.points["forgetting"].nunique() > 3
    assert (found.at("scale 0")["learning"], found.at("scale 0")["forgetting"]) == (0, 0)


def test_a_sweep_walks_over_the_data_once_for_all_edits(world, planted):
    tasks = [str(world / f"{side}.jsonl") for side in ("target", "source")]
    alone = evaluate(str(world / "base"), tasks, device="cpu").facts["cost"]
    found = swept(world, "planted", edits=FEW)
    different = int((found.points["same_as"] == "").sum())
    # A file's exam by exact answer is not taken here, as every item has choices.
    once = swept(world, "planted", edits=["scale 1"]).facts["cost"]
    scales = int((found.points["family"] == "scale").sum()) - len(found.facts["refined"])
    assert once["forwards"] % scales == 0 and once["forwards"] / scales < alone["forwards"]
    assert found.facts["cost"]["forwards"] == different * once["forwards"] / scales
    assert found.facts["cost"]["passes"] == 1 + bool(found.facts["refined"])


def test_the_base_is_left_bit_for_bit_as_it_was(world):
    for delta in ("planted", "full"):
        held = load(str(world / "base"), device="cpu")
        sweep(
            held,
            str(world / delta),
            target=[str(world / "target.jsonl")],
            source=[str(world / "source.jsonl")],
            edits=["top1 0"],
        )
        fresh = load(str(world / "base"), device="cpu").model.state_dict()
        after = held.model.state_dict()
        assert set(after) == set(fresh)
        assert all(torch.equal(after[name], value) for name, value in fresh.items())


def test_the_norms_ranks_and_intruders_of_every_point_are_told(world, base, planted):
    found, _ = planted
    delta = load_lowrank(world / "planted")
    total = dict.fromkeys(("scale 1", "top1 0", "matched top1 0.5", "top1 0.5"), 0.0)
    for name, change in delta.items():
        dense, weight = change.dense(torch.float64), base.model.get_submodule(name).weight.detach()
        _, triplets = oracle(weight, change.dense())
        moved = torch.as_tensor(np.asarray(sum(triplets[:1]))) if triplets else torch.zeros_like(dense)
        total["scale 1"] += float(dense.norm() ** 2)
        total["top1 0"] += float((dense - moved).norm() ** 2)
        for edit in ("matched top1 0.5", "top1 0.5"):
            total[edit] += float((dense - 0.5 * moved).norm() ** 2)
    for edit, squared in total.items():
        assert found.at(edit)["norm_share"] == pytest.approx((squared / total["scale 1"]) ** 0.5, rel=1e-4), edit
    extra = {"scale 0.5": 0, "top1 0.5": len(PLANTED), "matched top1 0.5": 0, "neighbour 0.5": len(PLANTED)}
    assert {edit: found.at(edit)["rank_extra"] for edit in extra} == extra
    touched = {"scale 0.5": 0, "top1 0.5": len(PLANTED), "matched top1 0.5": len(PLANTED)}
    assert {edit: found.at(edit)["intruders"] for edit in touched} == touched


def test_equal_edits_are_measured_once_and_said_to_be_equal(world, planted):
    found, _ = planted
    # One intruder in each planted layer, so shrinking the first is shrinking all.
    top1, both = found.at("top1 0.5"), found.at("all 0.5")
    assert both["same_as"] == "top1 0.5" and top1["same_as"] == ""
    assert all(both[key] == top1[key] for key in ("learning", "forgetting_low", "norm_share", "rank_extra"))
    assert "all 0.5" not in {one["edit"] for one in found.verdicts}
    assert {"top1 0", "top1 0.5", "taper 0.5"} <= {one["edit"] for one in found.verdicts}


def test_a_delta_without_intruders_is_said_to_have_none(world, tmp_path):
    found = swept(world, "quiet", edits=["top1 0", "all 0.5", "neighbour 0.5", "matched all 0.3", "taper 0"])
    unchanged = found.points[found.points["same_as"] == "scale 1"]["edit"].tolist()
    assert unchanged == ["top1 0", "all 0.5", "neighbour 0.5", "matched all 0.3"]
    assert [one["edit"] for one in found.verdicts] == ["taper 0"] and found.controls == []
    said = found.said()
    assert said[0] == "The delta has no intruder in any of its 2 matrices, at k = 10 and ε = 0.5."
    assert any("no intruder repair changes it" in line for line in said)


class Drawn(Sides):
    """Sides whose curve of uniform scaling bends: learning saturates, forgetting grows faster and faster."""

    def __init__(self, places: list[tuple[float, float]]) -> None:
        self.places = places

    def of(self, views):
        found = []
        for side in range(2):
            right = [self.places[view][side] for view in (0, *views)]
            items = np.array([(np.arange(200) < 200 * share).astype(float) for share in right])
            found.append(Side([Part(str(side), items[0], items[1:], np.ones(200))]))
        return found


class Planned(Measuring):
    """Measures edits by a formula: each lies on the true curve, at the scale that its strength names."""

    def measure(self, edits):
        for edit in edits:
            c = edit.strength
            self.sides.places.append((0.8 * math.sin(c * math.pi / 2), 0.9 - 0.8 * c**2))
            self._add(edit, None, None, len(self.sides.places) - 1)
            self.rows[-1]["problem"] = ""


def planned(edits: list[str]) -> Planned:
    subject = object.__new__(Subject)
    object.__setattr__(subject, "delta", Delta({}))
    made = Planned(subject, Drawn([]), None, silent)
    made.measure([Edit.parse(edit) for edit in edits])
    return made


def test_a_gain_over_a_straight_line_is_checked_at_that_scale():
    coarse = ["scale 0", "scale 1", "top1 0.5"]
    measuring = planned(coarse)
    rows = measuring._finite()
    (straight,) = Judge(rows, *measuring.sides.of(range(3))).verdicts()
    assert straight["verdict"] == "better", "the line from 0 to 1 lies far above the curve that bends below it"
    (verdict,), _ = measuring.judged(seed=0)
    assert verdict["verdict"] == "tie"
    assert measuring.refined[0] == pytest.approx(straight["scale_strength"], abs=1e-3) and len(measuring.refined) > 1
    assert measuring.refined == sorted(measuring.refined, reverse=True) and measuring.refined[-1] > 0.5


def test_the_scale_that_reaches_the_budget_is_measured():
    measuring = planned(["scale 0", "scale 0.5", "scale 1", "top1 0.9"])
    measuring.measure_at(read_budget("0.4"))
    (strength,) = measuring.refined
    assert strength == pytest.approx(0.5 + 0.5 * (0.4 - 0.2) / 0.6, abs=0.01)
    best = within(measuring.placed(), read_budget("0.4"))["best"]
    assert best["edit"] == f"scale {strength:g}"
    measuring.measure_at(read_budget("25%"))
    assert len(measuring.refined) == 1, "scale 0.5 lies there already"


# Texts


def by_hand(folder: Path, subject, edit: Edit, texts: Path) -> list[float]:
    """Give the summed loss of every text, read alone by Transformers' own model with the edit written into its weights."""
    made = load(str(folder / "base"), device="cpu")
    for name, change in subject.edit(edit, {})[0].items():
        made.model.get_submodule(name).weight.data += change.dense()
    sums = []
    for line in texts.read_text().splitlines():
        ids = made.tokenizer(json.loads(line)["text"])["input_ids"]
        ids = torch.tensor([[*ids, made.tokenizer.eos_token_id]])
        with torch.no_grad():
            loss = made.model(input_ids=ids, labels=ids).loss
        sums.append(float(loss) * (ids.shape[1] - 1))
    return sums


def test_learning_and_forgetting_of_texts_are_losses_by_hand(world):
    texts = {f"{side}_text": str(world / f"{side}_text.jsonl") for side in ("target", "source")}
    found = swept(world, "planted", edits=["scale 0.5"], **texts)
    subject = open_subject(str(world / "base"), str(world / "planted"), light=True)
    assert found.facts["source"]["unit"] == "nats/token"
    for side, name, sign in (("target", "learning", -1), ("source", "forgetting", 1)):
        path = world / f"{side}_text.jsonl"
        before, after = (by_hand(world, subject, Edit("scale", c), path) for c in (0.0, 0.5))
        assert found.facts[side]["parts"][0]["n"] == len(before) == 40
        lengths = [len(json.loads(line)["text"]) for line in path.read_text().splitlines()]
        row = found.at("scale 0.5")
        assert row[name] == pytest.approx(sign * (sum(after) - sum(before)) / sum(lengths), rel=1e-4)
        assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]


def test_tasks_and_texts_may_be_mixed_and_a_text_may_be_plain(world, tmp_path):
    (tmp_path / "plain.txt").write_text("abc def. " * 60, encoding="utf-8")
    found = swept(world, "planted", edits=["top1 0.5"], source_text=str(tmp_path / "plain.txt"), tokens=200)
    assert (found.facts["target"]["unit"], found.facts["source"]["unit"]) == ("share of items", "nats/token")
    (part,) = found.facts["source"]["parts"]
    assert 1 < part["n"] == part["clusters"] <= 4, "pieces of at most 64 tokens, 200 in all"


def test_pieces_of_one_row_are_one_document(world, tmp_path):
    texts = [{"text": "abc def. " * 20}, {"text": "bad cab. " * 20}]
    found = swept(world, "planted", edits=["scale 1"], source_text=str(write_rows(tmp_path / "long.jsonl", texts)))
    (part,) = found.facts["source"]["parts"]
    assert part["n"] > 2 == part["clusters"]


# Dense deltas


def test_a_checkpoint_is_swept_an_edit_at_a_time(world, tmp_path):
    found = swept(world, "full", tmp_path / "out", edits=["top1 0", "taper 0.5", "threshold 1"], budget="1000%")
    different = int((found.points["same_as"] == "").sum())
    assert found.facts["kind"] == "dense" and found.facts["cost"]["passes"] == different - 1
    tasks = [str(world / f"{side}.jsonl") for side in ("target", "source")]
    for edit in ("scale 0.5", "taper 0.5"):
        repair(str(world / "base"), str(world / "full"), edit, out=tmp_path / edit)
    paths = [world / "full", *(tmp_path / name for name in ("out", "scale 0.5", "taper 0.5"))]
    evaluated = evaluate(str(world / "base"), tasks, deltas=list(map(str, paths)), device="cpu")
    rows_ = {"full": found.at("scale 1"), "out": found.best} | {
        name: found.at(name) for name in ("scale 0.5", "taper 0.5")
    }
    assert rows_["scale 0.5"]["learning"] != 0
    for model, row in rows_.items():
        for side, name, sign in (("target", "learning", 1), ("source", "forgetting", -1)):
            assert row[name] == pytest.approx(sign * evaluated.find(model, f"{side}/choice").change["value"], abs=1e-9)


# Budgets and folders


def test_the_best_within_the_budget_is_saved_as_it_was_measured(world, planted, tmp_path):
    found, out = planted
    best = found.best
    limit = 0.6 * found.at("scale 1")["forgetting"]
    allowed = found.points[(found.points["forgetting"] <= limit) & (found.points["edit"] != "scale 0")]
    assert best["learning"] == allowed["learning"].max() > 0 and best["forgetting"] <= limit
    assert any(best["edit"] in line and "Best within a budget" in line for line in found.said())
    tasks = [str(world / f"{side}.jsonl") for side in ("target", "source")]
    evaluated = evaluate(str(world / "base"), tasks, deltas=[str(out)], device="cpu")
    changes = [evaluated.find(out.name, f"{side}/choice").change["value"] for side in ("target", "source")]
    assert [best["learning"], -best["forgetting"]] == pytest.approx(changes, abs=1e-9)


def test_where_nothing_is_within_the_budget_nothing_is_chosen(world, tmp_path):
    text = str(world / "source_text.jsonl")
    found = swept(world, "planted", tmp_path / "out", edits=["top1 0.5"], source_text=text, budget=1e-7)
    placed = found.points[found.points["edit"] != "scale 0"]
    assert (placed["forgetting"] > 1e-7).all() and found.best is None
    assert any("forgets no more than 1e-07 nats/token: nothing is chosen" in line for line in found.said())
    none = swept(world, "planted", tmp_path / "none", edits=["scale 1"])
    assert none.choice is None
    for out in ("out", "none"):
        assert is_repair(tmp_path / out) and not (tmp_path / out / "delta").exists()


def test_a_folder_is_read_as_it_was_written(planted):
    found, out = planted
    again = read_repair(out)
    assert again.summary() == found.summary()
    pd.testing.assert_frame_equal(again.points, found.points)
    whole = json.loads((out / "repair.json").read_text())
    assert (whole["facts"]["k"], whole["facts"]["epsilon"], whole["best"]["edit"]) == (10, 0.5, found.best["edit"])
    assert {"edit", "scale_forgetting", "difference", "low", "high", "verdict"} <= set(whole["verdicts"][0])
    assert whole["said"] == found.said()


def test_with_a_rank_compressed_edits_are_measured_and_saved(world, tmp_path):
    found = swept(world, "planted", tmp_path / "out", edits=["top1 0.5"], rank=2, budget="1000%")
    assert found.at("top1 0.5")["rank_extra"] == 0 and found.at("top1 0.5")["discarded"] > 0
    repair(str(world / "base"), str(world / "planted"), "top1 0.5", out=tmp_path / "one", rank=2)
    evaluated = evaluate(
        str(world / "base"), [str(world / "source.jsonl")], deltas=[str(tmp_path / "one")], device="cpu"
    )
    assert found.at("top1 0.5")["forgetting"] == pytest.approx(-evaluated.find("one", "source/choice").change["value"])


def test_a_delta_in_memory_is_swept_like_its_folder(world, base, planted):
    delta = read_delta(str(world / "planted"), base)
    assert all(isinstance(change, LowRank) for change in delta.values())
    found = sweep(base, delta, target=[str(world / "target.jsonl")], source=[str(world / "source.jsonl")], edits=FEW)
    known = planted[0].points
    both = found.points.merge(known, on="edit", suffixes=("", "_known"))
    assert len(both) >= len(FEW) + 7
    assert (both["learning"] == both["learning_known"]).all() and (both["forgetting"] == both["forgetting_known"]).all()


def test_how_far_it_is_is_told(world):
    told = []
    swept(world, "planted", edits=["top1 0.5"], told=lambda *words: told.append(words))
    assert [words[:2] for words in told[:6]] == [(done, 6) for done in range(1, 7)]
    assert {words[2] for words in told[:6]} == {f"intruders of {name}" for name in load_lowrank(world / "planted")}
    assert told[6][0] == told[6][1] and "edits measured" in told[6][2]


def test_edits_that_blow_up_are_marked_and_the_others_still_judged(world):
    texts = {f"{side}_text": str(world / f"{side}_text.jsonl") for side in ("target", "source")}
    found = swept(world, "planted", edits=["scale 1e300", "top1 0.5"], **texts)
    row = found.at("scale 1e+300")
    assert row["problem"] and np.isnan(row["learning"])
    assert np.isfinite(found.at("top1 0.5")["learning"]) and [one["edit"] for one in found.verdicts] == ["top1 0.5"]


def test_items_with_choices_are_asked_once(world, tmp_path):
    mixed = [*rows(4, seed=9), *[{"prompt": f"pick {i} ", "choices": ["a", "b"], "right": 0} for i in range(4)]]
    found = swept(world, "planted", edits=["scale 1"], source=[str(write_rows(tmp_path / "mixed.jsonl", mixed))])
    assert [(part["name"], part["n"]) for part in found.facts["source"]["parts"]] == [("mixed/accuracy", 8)]
    assert [part["name"] for part in found.facts["target"]["parts"]] == ["target/choice"]


def test_a_task_that_does_not_say_what_is_right_is_refused_in_the_words_of_a_sweep():
    class Sums:
        card = Card("lengths")

        def aggregate(self, metric, values):
            return sum(values)

    with pytest.raises(EvaluationError, match="does not say how many items are right") as caught:
        _of_task("lengths", [Sums()])
    assert "--source-text FILE" in str(caught.value) and "data.general" not in str(caught.value)
