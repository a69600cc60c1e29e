"""What goes wrong at the end of a long run, or in the middle of one from random weights, costs neither the run nor a bit of it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from little_world import make_base, make_world, overrides, same_bits
from loralab.base.model import load
from loralab.errors import DeltaError, FolderError, Interrupted, ModelError
from loralab.lab import experiment, run_spectra
from loralab.lab.experiment import train
from loralab.lab.watch import Silent
from loralab.methods import METHODS
from loralab.run.folder import RunFolder, read_lines
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec

SHORT = {"train__steps": 4, "checkpoints__every": 2, "probes__every": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), train=30, held_out=6)


def spec(world: Path, recipe: str = "sft-lora", **keys: Any) -> RunSpec:
    rank = {} if recipe == "sft-full" else {"method__rank": 4}
    return read(recipe, overrides(world, **{**SHORT, **rank, **keys}))


class Notes(Silent):
    """A display that keeps what it was told, and may break the run off after a step."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.said: list[str] = []
        self.stop_at = stop_at

    def note(self, message: str) -> None:
        self.said.append(message)

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        if line["step"] == self.stop_at:
            raise KeyboardInterrupt


def falls_over(error: BaseException) -> Any:
    def fall(*_: Any) -> None:
        raise error

    return fall


# Spectra


@pytest.mark.parametrize(
    "error", [DeltaError("another base"), torch.OutOfMemoryError("2 GiB"), MemoryError(), ValueError("no number")]
)
def test_a_run_whose_delta_cannot_be_looked_into_is_done(world, tmp_path, monkeypatch, error):
    monkeypatch.setattr(run_spectra, "row", falls_over(error))
    display = Notes()
    result = train(spec(world), tmp_path, display=display)
    assert result.status["state"] == "done"
    assert (result.folder.delta / "adapter_model.safetensors").is_file()
    assert (result.folder.path / "items.parquet").is_file()
    (warned,) = [line["warning"] for line in read_lines(result.folder.metrics) if "warning" in line]
    assert "spectra" in warned and any(warned in said for said in display.said)
    with pytest.raises(FolderError, match="no spectra"):
        result.spectra()


def test_spectra_that_find_the_disk_full_are_written_by_the_same_command(world, tmp_path, monkeypatch):
    monkeypatch.setattr(run_spectra.Parts, "finish", falls_over(Interrupted("the disk is full")))
    with pytest.raises(Interrupted):
        train(spec(world), tmp_path)
    folder = RunFolder(tmp_path / spec(world).folder_name)
    assert folder.delta.is_dir() and folder.read_status()["state"] == "interrupted"
    monkeypatch.undo()
    monkeypatch.setattr(experiment.Loop, "_one_step", falls_over(AssertionError("nothing is trained anew")))
    assert len(train(spec(world), tmp_path).spectra()) > 0


@pytest.mark.parametrize("recipe", ["sft-full", "peft"])
def test_large_dense_changes_are_not_even_formed(world, tmp_path, monkeypatch, recipe):
    """What is formed is counted where the method hands it over."""
    if recipe == "peft":
        own = tmp_path / "peft.yaml"
        own.write_text("method:\n  name: peft\n  keys: {r: 4}\ntrain:\n  epochs: 1\n")
        wanted = read(str(own), overrides(world, **SHORT))
    else:
        wanted = spec(world, recipe)
    monkeypatch.setattr(run_spectra, "LIMIT", 32 * 32)
    formed: list[int] = []
    sound = experiment.SpectraProbe._row

    def look(self: Any, name: str, change: Any) -> Any:
        formed.append(change.num_parameters)
        return sound(self, name, change)

    monkeypatch.setattr(experiment.SpectraProbe, "_row", look)
    display = Notes()
    found = train(wanted, tmp_path, display=display).spectra(every_step=True)
    assert len(formed) == len(found) > 0 and max(formed) == 32 * 32
    assert set(found.module) == {"q_proj", "k_proj", "v_proj", "o_proj"}
    (said,) = [note for note in display.said if "no spectrum" in note]
    assert "6 large matrices" in said  # three of each block


def test_a_quantised_base_shows_no_change_by_the_peft_library(tmp_path):
    base = load(str(make_base(tmp_path / "base")), device="cpu")
    method = METHODS["peft"](tuner="LORA", keys={"r": 2})
    (name, *_) = method.attach(base, 0).layers
    layer: Any = base.model.get_submodule(name)
    inner = layer.get_base_layer()
    inner.weight = Parameter(inner.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(DeltaError, match="quantised"):
        method.delta()


# Random weights


@pytest.mark.parametrize("step", [1, 3])
def test_a_run_from_random_weights_goes_on_to_the_same_bits(world, tmp_path, step):
    drawn = spec(world, "sft-full", **{"model.random_init": True})
    whole = train(drawn, tmp_path / "whole").folder.path
    with pytest.raises(Interrupted):
        train(drawn, tmp_path, display=Notes(stop_at=step))
    torch.rand(7)  # the weights are drawn from the run's seed, not from what the generator did before
    same_bits(train(drawn, tmp_path).folder.path, whole)


def test_a_shape_that_no_language_model_has_is_said(tmp_path):
    folder = make_base(tmp_path / "base")
    (folder / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(ModelError, match="cannot make this model"):
        load(str(folder), random_init=True)
