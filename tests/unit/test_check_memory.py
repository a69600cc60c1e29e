"""What `check` says of memory: parts against tensors that lie there, and what a step of a policy really keeps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from little_world import loralab, make_base, overrides, rows, write_rows
from loralab.base.model import load
from loralab.delta.lowrank import Delta, LowRank
from loralab.delta.store import save_lowrank
from loralab.lab.check import check
from loralab.lab.memory import Memory, estimate
from loralab.lab.objectives import prepare
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec

HIDDEN, MLP, BLOCKS, RANK = 128, 256, 4, 2
REWARD = "def wide(prompts, answers, rows):\n    return [float(len(set(answer))) for answer in answers]\n"
FAST: dict[str, Any] = {
    "objective__name": "policy",
    "objective__algorithm": "rloo",
    "objective__samples": 3,
    "objective__max_tokens": 16,
    "objective__temperature": 3.0,
    "method__name": "lora",
    "method__rank": RANK,
    "method__targets": ["q_proj", "down_proj"],
    "probes__tokens": 48,
    "schedule__name": "constant",
    "train__batch_size": 4,
}
FULL: dict[str, Any] = {"method__name": "full", "method__rank": None, "method__targets": None}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("memory")
    make_base(folder / "base", hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=BLOCKS)
    write_rows(folder / "train.jsonl", rows(12, seed=1))
    write_rows(folder / "validation.jsonl", rows(4, seed=2))
    write_rows(folder / "general.jsonl", [{"text": "a text"}])
    (folder / "wide.py").write_text(REWARD)
    layers = {
        f"model.layers.{number}.{name}": LowRank(torch.randn(RANK, into), torch.randn(HIDDEN, RANK), 1.0)
        for number in range(BLOCKS)
        for name, into in (("self_attn.q_proj", HIDDEN), ("mlp.down_proj", MLP))
    }
    mark = load(str(folder / "base"), device="cpu").fingerprint
    save_lowrank(folder / "reward", Delta(layers, {"score.weight": torch.randn(1, HIDDEN)}, mark), "base")
    return folder


def spec(world: Path, **keys: Any) -> RunSpec:
    chosen = {**FAST, "objective__reward": f"{world / 'wide.py'}:wide", **keys}
    recipe = world / "recipe.yaml"
    recipe.write_text("seed: 0\n")
    left = {key for key, value in chosen.items() if value is None and key.startswith("method__")}
    return read(recipe, overrides(world, **{key: value for key, value in chosen.items() if key not in left}))


def memory_of(world: Path, **keys: Any) -> Memory:
    chosen = spec(world, **keys)
    return estimate(chosen, prepare(chosen))


def base_bytes(world: Path) -> int:
    return sum(p.nbytes for p in load(str(world / "base"), device="cpu").model.parameters())


PAIRS = BLOCKS * RANK * ((HIDDEN + HIDDEN) + (MLP + HIDDEN))
"""Numbers of pairs of rank 2 on q_proj and down_proj."""


def test_what_lies_there_throughout_is_counted_part_by_part(world):
    found = memory_of(world, objective__algorithm="reinforce", objective__reward=str(world / "reward"))
    assert found.weights == base_bytes(world) and found.reference == 0
    assert found.rewards == 4 * PAIRS, "float32 pairs; the head is a row"
    value = PAIRS + HIDDEN + 1
    assert found.trained == 16 * (PAIRS + value), "policy and value, with gradient and two moments"
    alone = memory_of(world)
    assert alone.trained == 16 * PAIRS and alone.rewards == 0 and alone.weights == found.weights


def test_a_fully_tuned_policy_has_its_base_beside_itself(world, tmp_path):
    whole = load(str(world / "base"), device="cpu").model
    whole.save_pretrained(tmp_path / "whole")
    found = memory_of(world, **FULL)
    numbers = sum(p.numel() for p in whole.parameters())
    assert found.trained == 16 * numbers and found.weights == 0, "what trains in float32 is counted once"
    assert found.reference == 2 * base_bytes(world), "as it was, and as it is while the base is restored"
    assert memory_of(world, **FULL, objective__algorithm="reinforce").reference == found.reference, "no pairs"


def test_a_fully_tuned_reward_model_is_counted_by_its_files(world, tmp_path):
    from transformers import AutoModelForSequenceClassification

    base = str(world / "base")
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1
    model.save_pretrained(tmp_path / "full")
    size = sum(p.nbytes for p in model.parameters())
    found = memory_of(world, objective__reward=str(tmp_path / "full"))
    assert size <= found.rewards < 1.05 * size


def kept(world: Path, **keys: Any) -> tuple[int, int, Memory]:
    """Bytes that the update of one micro-batch keeps for backward, its answers' tokens, and what was estimated."""
    chosen = spec(world, objective__beta=0.0, train__batch_size=4, **keys)
    prepared = prepare(chosen)
    (batch,) = next(prepared.objective.batches(prepared.base.model))
    lasting = {p.untyped_storage().data_ptr() for p in prepared.base.model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in lasting:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = prepared.objective.loss(prepared.base.model, batch)
    assert loss.weight and loss.total.requires_grad
    return sum(found.values()), sum(batch.tails), estimate(chosen, prepared)


def test_rows_of_answers_are_counted_in_the_update(world):
    real, written, memory = kept(world)
    most = 4 * 3 * 16
    assert 0.8 * most < written <= most, "at this temperature most answers are as long as they may be"
    assert 0.8 <= memory.activations / (real * most / written) <= 1.4, (memory.activations, real, written)
    twice = memory_of(world, objective__beta=0.0, objective__samples=6)
    assert 1.6 < twice.activations / memory.activations < 2, "prompts are read once for all answers"
    assert memory_of(world, objective__beta=0.0, train__micro_batch=1).activations < 0.3 * memory.activations
    assert memory_of(world, objective__beta=0.0, objective__minibatches=4).activations < 0.3 * memory.activations


def test_a_policy_whose_value_learns_meanwhile_keeps_two_passes(world):
    """With a KL in the reward the policy is read before the value learns, and both are kept: never with β = 0."""
    one = memory_of(world, objective__algorithm="reinforce", objective__beta=0.0)
    two = memory_of(world, objective__algorithm="reinforce", objective__beta=0.1)
    assert two.activations == 2 * one.activations
    assert memory_of(world, objective__algorithm="reinforce", objective__epochs=2).activations == one.activations
    full = memory_of(world, **FULL, objective__algorithm="reinforce", objective__beta=0.1)
    assert full.activations < 1.1 * one.activations, "the reference is in place of the policy: its pass is begun anew"


def test_keys_and_values_of_answers_are_counted(world):
    chosen = spec(world, objective__samples=8, data__validation=None, data__validation_share=0)
    prepared = prepare(chosen)
    found = estimate(chosen, prepared)
    rollouts = prepared.objective.sample(0)  # type: ignore[attr-defined]
    tally = prepared.objective.sample.writer.tally  # type: ignore[attr-defined]
    shape = prepared.base.model.config
    token = 2 * BLOCKS * shape.num_key_value_heads * (HIDDEN // shape.num_attention_heads) * 4
    assert sum(len(rollout.answers) for rollout in rollouts) == 32
    logits = 32 * 24 * shape.vocab_size
    assert 1 <= (found.answers - logits) / (tally.largest * token) < 1.3
    held_out = memory_of(world, objective__algorithm="reinforce", objective__samples=1, probes__tokens=64 * 16)
    assert 1.5 < held_out.answers / found.answers < 2.5, "64 answers to held-out prompts are written at a time, not 4"


def test_update_and_writing_take_turns():
    parts = {"weights": 100, "trained": 20, "reference": 0, "rewards": 3, "activations": 40, "logits": 5}
    assert Memory(**parts, answers=44).total == 123 + 45
    assert Memory(**parts, answers=46).total == 123 + 46
    assert Memory(**parts, answers=0).parts() == {key: size for key, size in parts.items() if size}


def test_the_command_says_what_is_counted(world, capsys):
    reward = str(world / "reward")
    recipe = world / "recipe.yaml"
    spec(world)
    keys = {**FAST, "objective__reward": reward}
    assert loralab("check", recipe, *overrides(world, **keys)) == 0
    said = " ".join(capsys.readouterr().out.split())
    for part in (
        "weights ",
        "trained ",
        "reward models ",
        "the larger of an update (activations ",
        "answers as they are",
    ):
        assert part in said, part
    assert "copies of the weights" not in said
    summary = check(spec(world)).summary()
    assert summary["estimated_bytes"] == memory_of(world).total
    assert {"weights", "trained", "activations", "logits", "answers"} == summary["estimated_parts"].keys()
