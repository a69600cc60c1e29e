"""What a run's delta looks like inside at every evaluation: right, the same after a resume, and without a trace in training."""

import math
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from little_world import make_world, overrides, same_bits, untimed
from loralab.base.targets import weight_of
from loralab.delta.layers import unwrapped
from loralab.errors import FolderError, Interrupted
from loralab.lab import run_spectra
from loralab.lab.experiment import train
from loralab.lab.objectives import prepare
from loralab.lab.result import Result
from loralab.lab.run_spectra import Parts
from loralab.lab.watch import Silent
from loralab.methods import Method
from loralab.run.folder import RunFolder, read_lines
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec
from loralab.training.checkpoint import checkpoints, read_checkpoint

SHORT = {
    **{"train__steps": 6, "probes__every": 2, "probes__tokens": 64, "probes__samples": 0, "probes__drift": False},
    **{"checkpoints__every": 2, "checkpoints__keep_last": 9, "checkpoints__keep_best": False},
}
DROPPED = {"method__rank": 4, "method__dropout": 0.1, "method__targets": '["q_proj", "up_proj", "down_proj"]'}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("sft-lora", DROPPED),
    "cola": ("sft-cola", {**DROPPED, "method__links": 2, "method__ranks": "[4, 2]"}),
    "full": ("sft-full", {"method__targets": '["*layers.1*"]'}),
}
MATRICES = {"lora": 6, "cola": 6, "full": 7}
DORA = "{r: 4, lora_alpha: 8, lora_dropout: 0.1, use_dora: true}"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), train=24, held_out=3)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory) -> Iterator[None]:
    """Keep heads of bases out of the home folder."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("LORALAB_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def spec(world: Path, kind: str, **more: Any) -> RunSpec:
    if kind == "dora":
        own = world / "dora.yaml"
        own.write_text(f"method:\n  name: peft\n  keys: {DORA}\ntrain:\n  epochs: 1\n")
        return read(str(own), overrides(world, **{**SHORT, **more}))
    recipe, keys = RUNS[kind]
    return read(recipe, overrides(world, **{**SHORT, **keys, **more}))


@pytest.fixture(scope="module")
def looked(world, tmp_path_factory) -> dict[str, Result]:
    """Return finished runs of every kind, at a rate that makes intruders, whose checkpoints are all kept."""
    root = tmp_path_factory.mktemp("looked")
    asked = {"probes__spectra": "intruders", "optimizer__learning_rate": 0.1}
    return {kind: train(spec(world, kind, **asked), root) for kind in RUNS}


def at_steps(world: Path, result: Result) -> Iterator[tuple[int, Method, dict[str, np.ndarray]]]:
    """Let a method go on from every checkpoint of a run; give the base's weights in float64 beside it."""
    prepared = prepare(read(result.folder.spec))
    base = {
        name: weight_of(module).detach().double().numpy() for name, module in unwrapped(prepared.base.model).items()
    }
    for path in checkpoints(result.folder.checkpoints):
        state = read_checkpoint(path)
        prepared.method.load_state(state.tensors["method"], state.facts["method"])
        yield state.step, prepared.method, base


@pytest.mark.parametrize("kind", RUNS)
def test_every_evaluation_has_the_spectrum_of_a_dense_decomposition(world, looked, kind):
    found = looked[kind].spectra(every_step=True)
    assert list(dict.fromkeys(found["step"])) == [2, 4, 6]
    for step, method, base in at_steps(world, looked[kind]):
        rows = found[found["step"] == step].set_index("layer")
        delta = method.delta()
        assert list(rows.index) == (list(delta) if step else [])
        for name, row in rows.iterrows():
            expected = np.linalg.svd(delta[name].dense(torch.float64).numpy(), compute_uv=False)
            s = np.asarray(row["singular_values"])
            assert len(s) == row["rank"] <= len(expected)
            np.testing.assert_allclose(s, expected[: len(s)], rtol=1e-9, atol=1e-12 * expected[0])
            assert row["frobenius"] == pytest.approx(math.hypot(*expected), rel=1e-9)
            assert row["base_frobenius"] == pytest.approx(np.linalg.norm(base[name]), rel=1e-6)
            assert row["relative_norm"] == pytest.approx(row["frobenius"] / row["base_frobenius"])
            energy = np.cumsum(expected**2)
            assert row["rank90"] == 1 + np.flatnonzero(energy >= 0.9 * energy[-1])[0]
    last = looked[kind].spectra()
    assert set(last["step"]) == {6} and len(last) == len(rows)


@pytest.mark.parametrize("kind", RUNS)
def test_every_evaluation_has_the_verdicts_of_two_dense_decompositions(world, looked, kind):
    found, seen = looked[kind].intruders(every_step=True), set[bool]()
    assert list(dict.fromkeys(found["step"])) == [2, 4, 6]
    assert set(found["delta"]) == {looked[kind].folder.path.name}
    for step, method, base in at_steps(world, looked[kind]):
        delta = method.delta() if step else {}
        rows = found[found["step"] == step]
        assert list(dict.fromkeys(rows["layer"])) == list(delta)
        for name, change in delta.items():
            U0 = np.linalg.svd(base[name], full_matrices=False)[0]
            U, s, _ = np.linalg.svd(base[name] + change.dense(torch.float64).numpy(), full_matrices=False)
            highest = np.abs(U0.T @ U).max(axis=0)[:10]
            mine = rows[rows["layer"] == name]
            assert list(mine["position"]) == list(range(1, 11))
            np.testing.assert_allclose(mine["value"], s[:10], rtol=1e-4)
            np.testing.assert_allclose(mine["relative_value"], s[:10] / s[0], rtol=1e-4)
            sure = np.abs(highest - 0.5) > 1e-3
            assert list(mine["intruder"][sure]) == list(highest[sure] < 0.5)
            assert (mine["cosine_low"] <= highest + 1e-3).all() and (mine["cosine_high"] >= highest - 1e-3).all()
            seen |= set(mine["intruder"])
    assert seen == {True, False}, "there is something to tell apart"


@pytest.mark.parametrize("kind", RUNS)
def test_scores_sum_up_what_stands_in_the_tables(looked, kind):
    result, matrices = looked[kind], looked[kind].spectra(every_step=True)
    lines = [line for line in read_lines(result.folder.scores) if line["name"].startswith(("spectrum/", "intruders/"))]
    assert [line["step"] for line in lines] == [step for step in (2, 4, 6) for _ in range(5)]
    vectors = result.intruders(every_step=True)
    for line in lines:
        here, judged = (table[table["step"] == line["step"]] for table in (matrices, vectors))
        shares = [
            (one["value"][one["intruder"]] ** 2).sum() / (one["value"] ** 2).sum() for _, one in judged.groupby("layer")
        ]
        expected = {
            "spectrum/rank90": here["rank90"].median(),
            "spectrum/effective_rank": here["effective_rank"].median(),
            "spectrum/relative_norm": here["relative_norm"].median(),
            "intruders/count": judged["intruder"].sum(),
            "intruders/energy": np.mean(shares),
        }
        assert line["value"] == pytest.approx(expected[line["name"]], rel=1e-12)
        assert (line["model"], line["n"], line["standard_error"]) == ("tuned", MATRICES[kind], None)
        assert line["name"].startswith("spectrum") or "k = 10, ε = 0.5" in line["unit"]
    assert result.score("intruders/count").value == vectors[vectors["step"] == 6]["intruder"].sum() > 0
    assert "spectrum/rank90" not in result.before, "there is nothing inside before the first step"


# No trace in training


@pytest.mark.parametrize("kind", [*RUNS, "dora"])
def test_looking_inside_leaves_no_trace_in_training(world, tmp_path, kind):
    looking, closed = (train(spec(world, kind, probes__spectra=how), tmp_path) for how in ("intruders", False))
    assert len(looking.intruders(every_step=True)) == 3 * len(looking.intruders()) > 0
    assert untimed(looking.folder.metrics) == untimed(closed.folder.metrics)
    assert not any("warning" in line for line in read_lines(looking.folder.metrics))
    for path in closed.folder.delta.glob("*.safetensors"):
        assert (looking.folder.delta / path.name).read_bytes() == path.read_bytes()
    seen = [line for line in untimed(looking.folder.scores) if not line["name"].startswith(("spectrum/", "intruders/"))]
    assert seen == untimed(closed.folder.scores)
    assert not (closed.folder.spectra.exists() or (closed.folder.path / "intruders.parquet").exists())
    for read_table in (closed.spectra, closed.intruders):
        with pytest.raises(FolderError, match="has no"):
            read_table()
    assert looking.status["probe_forwards"] == closed.status["probe_forwards"]


def test_its_time_counts_as_the_probes_time(world, tmp_path):
    silent = {"data__general": None, "data__validation": None, "data__validation_share": 0, "probes__samples": 0}
    open_, closed = (train(spec(world, "lora", **silent, probes__spectra=how), tmp_path) for how in (True, False))
    assert closed.status["probe_s"] == 0 < open_.status["probe_s"] < open_.status["wall_s"]
    assert open_.status["probe_forwards"] == open_.status["probe_tokens"] == 0
    assert {line["name"].partition("/")[0] for line in read_lines(open_.folder.scores)} == {"spectrum"}


# Going on


class StopAt(Silent):
    def __init__(self, step: int) -> None:
        self.at = step

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        if line["step"] == self.at:
            raise OSError("the machine is gone")


@pytest.mark.parametrize(("kind", "steps"), [("cola", (1, 4)), ("full", (6,))])
def test_a_broken_off_run_goes_on_to_the_same_tables(world, tmp_path, kind, steps):
    """Checkpoints lie two steps apart, evaluations one: what was measured behind the last checkpoint is measured anew."""
    chosen = spec(world, kind, probes__spectra="intruders", probes__every=1)
    whole = train(chosen, tmp_path / "whole")
    assert len(set(whole.spectra(every_step=True)["step"])) == 6
    for step in steps:
        root = tmp_path / str(step)
        with pytest.raises(OSError):
            train(chosen, root, display=StopAt(step))
        run = root / chosen.folder_name
        assert {int(path.stem[5:]) for path in run.glob("spectra/*")} == set(range(1, step))
        train(chosen, root)
        same_bits(run, whole.folder.path)
        assert (run / "intruders.parquet").is_file()


class AskedToStop(StopAt):
    def step(self, line: dict[str, Any], total_steps: int) -> None:
        if line["step"] == self.at:
            signal.raise_signal(signal.SIGINT)


def test_a_run_that_ends_early_shows_what_it_measured(world, tmp_path):
    chosen = spec(world, "lora", probes__every=1)
    whole = train(chosen, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(chosen, tmp_path, display=AskedToStop(3))
    run = tmp_path / chosen.folder_name
    assert set(pd.read_parquet(run / "spectra.parquet")["step"]) == {1, 2, 3} and not (run / "spectra").exists()
    train(chosen, tmp_path)
    same_bits(run, whole.folder.path)


def test_a_branch_measures_its_own_steps(world, tmp_path):
    long = train(spec(world, "lora", schedule__warmup=1), tmp_path)
    again = {"train__steps": 8, "schedule__warmup": 1, "branch_from": f"{long.folder.path}@4"}
    branch = train(spec(world, "lora", **again), tmp_path)
    assert set(branch.spectra(every_step=True)["step"]) == {6, 8}


def part(step: int, *values: float) -> pd.DataFrame:
    return pd.DataFrame({"step": [step] * len(values), "value": list(values), "list": [[v, 2 * v] for v in values]})


def test_parts_become_one_table_and_parts_again(tmp_path):
    parts = Parts(tmp_path / "spectra.parquet")
    parts.finish()
    assert list(tmp_path.iterdir()) == [], "no part, no table"
    for step in (10, 4, 2):
        parts.write(step, part(step, step / 3, math.nan))
    (parts.folder / ".step-12.parquet.0.tmp").write_bytes(b"half")
    (parts.folder / "step-12.parquet.bak").write_bytes(b"other")
    assert list(parts.steps()) == [2, 4, 10]
    parts.finish()
    first = parts.path.read_bytes()
    assert not parts.folder.exists() and list(parts.steps()) == []
    assert pd.read_parquet(parts.path)["value"].dropna().tolist() == [2 / 3, 4 / 3, 10 / 3]
    parts.keep(10)  # the run was killed before it was done
    assert not parts.path.exists()
    parts.finish()
    assert parts.path.read_bytes() == first
    parts.keep(4)
    assert list(parts.steps()) == [2, 4]
    parts.write(4, part(4, 7.0))
    parts.finish()
    assert pd.read_parquet(parts.path)["value"].dropna().tolist() == [2 / 3, 7.0]
    parts.keep(0)
    assert list(parts.steps()) == [] and not parts.path.exists()


def test_a_part_stands_above_the_table_that_was_made_of_it(tmp_path):
    """A kill between the table and the removal of its parts leaves both."""
    parts = Parts(tmp_path / "spectra.parquet")
    parts.write(2, part(2, 1.0))
    kept = Path(shutil.copytree(parts.folder, tmp_path / "kept"))
    parts.finish()
    kept.rename(parts.folder)
    parts.write(2, part(2, 5.0))
    parts.keep(2)
    parts.finish()
    assert pd.read_parquet(parts.path)["value"].tolist() == [5.0]


def test_a_delta_without_matrices_has_an_empty_table(world, tmp_path):
    result = train(spec(world, "full", method__targets='["norm"]', probes__spectra="intruders"), tmp_path)
    assert len(result.spectra(every_step=True)) == len(result.intruders()) == 0
    assert {"step", "layer", "rank90"} <= set(result.spectra())
    assert not any(name.startswith(("spectrum", "intruders")) for name in result.after)


# Dense changes


def test_expensive_dense_changes_wait_for_the_end(world, tmp_path, monkeypatch):
    monkeypatch.setattr(run_spectra, "SMALL", 1000)
    full, lora = (train(spec(world, kind), tmp_path) for kind in ("full", "lora"))
    assert set(full.spectra(every_step=True)["step"]) == {6} and len(full.spectra()) == 7
    assert set(lora.spectra(every_step=True)["step"]) == {2, 4, 6}
    assert not any(line["name"].startswith("spectrum") for line in read_lines(full.folder.scores))
    asked = train(spec(world, "full", probes__spectra="intruders"), tmp_path)
    assert set(asked.spectra(every_step=True)["step"]) == {2, 4, 6}, "who looks for intruders looks each time"


# What fails


def test_a_full_disk_ends_the_run_and_the_same_command_goes_on(world, tmp_path, monkeypatch):
    chosen = spec(world, "lora", probes__every=1)
    whole = train(chosen, tmp_path / "whole")

    def full(self: Parts, step: int, rows: pd.DataFrame) -> None:
        if step == 3:
            raise Interrupted("the disk is full")
        sound(self, step, rows)

    sound = Parts.write
    monkeypatch.setattr(Parts, "write", full)
    with pytest.raises(Interrupted):
        train(chosen, tmp_path)
    folder = RunFolder(tmp_path / chosen.folder_name)
    assert folder.read_status()["state"] == "interrupted"
    monkeypatch.undo()
    train(chosen, tmp_path)
    same_bits(folder.path, whole.folder.path)


def test_intruders_that_cannot_be_found_leave_the_spectra(world, tmp_path, monkeypatch):
    def fall(*_: Any, **__: Any) -> Any:
        raise MemoryError("2 GiB")

    monkeypatch.setattr(run_spectra, "intruders", fall)
    result = train(spec(world, "lora", probes__spectra="intruders"), tmp_path)
    assert result.status["state"] == "done" and set(result.spectra(every_step=True)["step"]) == {2, 4, 6}
    (warned,) = [line for line in read_lines(result.folder.metrics) if "warning" in line]
    assert warned["step"] == 2 and "MemoryError: 2 GiB" in warned["warning"]
