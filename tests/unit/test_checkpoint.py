"""Checkpoints: what goes in comes out, damage is noticed, and only finished ones count."""

import json

import pytest
import torch

from loralab.errors import CheckpointError, FolderError, Interrupted
from loralab.training import checkpoint as module
from loralab.training.checkpoint import (
    State,
    checkpoints,
    prune,
    random_state,
    read_checkpoint,
    set_random_state,
    write_checkpoint,
)


def state(step: int = 3) -> State:
    shared = torch.randn(4, 6)
    tensors = {
        "method": {"half": torch.randn(3, 5).bfloat16(), "whole": shared, "tied": shared, "turned": shared.t()},
        "optimizer": {"count": torch.tensor(7.0), "part": shared[1:3]},
        "random": random_state(),
    }
    return State(step, tensors, {"loss": 0.1 + 0.2, "large": 2**70, "none": None, "list": [1, 2.5], "text": "Grüße"})


def names(root) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_what_goes_in_comes_out(tmp_path):
    written = state()
    found = read_checkpoint(write_checkpoint(tmp_path, written))
    assert found.step == 3
    assert found.facts == written.facts
    assert found.tensors.keys() == written.tensors.keys()
    for group, tensors in written.tensors.items():
        assert found.tensors[group].keys() == tensors.keys()
        for name, value in tensors.items():
            other = found.tensors[group][name]
            assert other.dtype == value.dtype and torch.equal(other, value), name


def test_nothing_is_pickled(tmp_path):
    folder = write_checkpoint(tmp_path, state())
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert set(json.loads((folder / "manifest.json").read_text())["sha256"]) == names(folder) - {"manifest.json"}


@pytest.mark.parametrize("name", ["method.safetensors", "optimizer.safetensors", "random.safetensors", "facts.json"])
def test_one_changed_bit_or_a_missing_file_is_noticed(tmp_path, name):
    write_checkpoint(tmp_path, state(2))
    file = write_checkpoint(tmp_path, state(3)) / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="checksum") as caught:
        read_checkpoint(tmp_path / "step-3")
    assert caught.value.where == str(file)
    assert "step-3" in str(caught.value.fix)
    file.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        read_checkpoint(tmp_path / "step-3")
    assert read_checkpoint(tmp_path / "step-2").step == 2


def test_a_manifest_that_cannot_be_read_is_named(tmp_path):
    file = write_checkpoint(tmp_path, state()) / "manifest.json"
    file.write_text(file.read_text()[:-20])
    with pytest.raises(CheckpointError, match="not JSON") as caught:
        read_checkpoint(file.parent)
    assert caught.value.where == str(file)


def test_only_finished_checkpoints_count_in_the_order_of_their_steps(tmp_path):
    for step in (10, 9, 100):
        write_checkpoint(tmp_path, state(step))
    unfinished = write_checkpoint(tmp_path, state(200))
    (unfinished / "manifest.json").unlink()
    (tmp_path / "step-300").mkdir()
    (tmp_path / "step-7-kept-by-hand").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["step-9", "step-10", "step-100"]
    assert checkpoints(tmp_path / "none") == []


def test_pruning_keeps_the_last_the_best_and_what_is_not_ours(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write_checkpoint(tmp_path, state(step))
    (tmp_path / "step-5/manifest.json").unlink()
    (tmp_path / "step-1-kept-by-hand").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    prune(tmp_path, 2, best=1)
    assert names(tmp_path) == {"step-1", "step-3", "step-4", "step-1-kept-by-hand", "notes.txt"}
    prune(tmp_path, 1, best=4)
    assert names(tmp_path) == {"step-4", "step-1-kept-by-hand", "notes.txt"}
    assert read_checkpoint(tmp_path / "step-4").step == 4


def test_an_unfinished_folder_is_written_anew(tmp_path):
    folder = write_checkpoint(tmp_path, state(3))
    (folder / "manifest.json").unlink()
    (folder / "leftover.safetensors").write_bytes(b"half")
    write_checkpoint(tmp_path, state(3))
    assert "leftover.safetensors" not in names(folder)
    assert read_checkpoint(folder).step == 3


@pytest.mark.parametrize("failing", [1, 2, 4, 5])
def test_a_failed_write_leaves_the_older_ones_and_nothing_else(tmp_path, monkeypatch, failing):
    write_checkpoint(tmp_path, state(1))
    calls = 0

    def full(path, content):
        nonlocal calls
        calls += 1
        if calls == failing:
            raise Interrupted("the disk is full", where=str(path))
        return whole(path, content)

    whole = module.write_atomic
    monkeypatch.setattr(module, "write_atomic", full)
    monkeypatch.setattr(module, "write_json", lambda path, value: full(path, json.dumps(value)))
    with pytest.raises(Interrupted):
        write_checkpoint(tmp_path, state(2))
    assert names(tmp_path) == {"step-1"}
    assert read_checkpoint(tmp_path / "step-1").step == 1


def test_a_folder_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match="cannot write") as caught:
        write_checkpoint(tmp_path / "file", state(2))
    assert caught.value.exit_code == 2


def test_the_random_state_goes_on(tmp_path):
    torch.manual_seed(5)
    torch.rand(3)
    folder = write_checkpoint(tmp_path, State(1, {"random": random_state()}))
    expected = torch.rand(4), torch.randn(3), torch.bernoulli(torch.full((9,), 0.5))
    torch.manual_seed(6)
    set_random_state(read_checkpoint(folder).tensors["random"])
    found = torch.rand(4), torch.randn(3), torch.bernoulli(torch.full((9,), 0.5))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
