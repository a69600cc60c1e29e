"""Runs whose base wears a delta from the start: what is measured, rewarded, saved, resumed and refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from little_world import loralab, make_base, make_world, overrides, same_bits, stop_at, write_rows
from loralab.delta.lowrank import Delta, LowRank
from loralab.delta.store import load_lowrank, save_lowrank
from loralab.errors import CheckpointError, DeltaError, FolderError, Interrupted, SpecError
from loralab.lab.evaluate import evaluate
from loralab.lab.experiment import train
from loralab.lab.merging import merge
from loralab.lab.objectives import prepare
from loralab.lab.result import Result
from loralab.lab.rewards import Answered
from loralab.lab.rollouts import Rollouts
from loralab.lab.trajectory import delta_at
from loralab.methods.base import Method
from loralab.spec.recipes import dump, read
from loralab.spec.spec import RunSpec
from loralab.training.objectives.policy import PolicyObjective

LORA: dict[str, Any] = {"method__name": "lora", "method__rank": 2}
METHODS: dict[str, dict[str, Any]] = {
    "lora": LORA,
    "lora_plus": {"method__name": "lora_plus", "method__rank": 2},
    "cola": {"method__name": "cola", "method__rank": 2, "method__links": 2},
    "full": {"method__name": "full"},
}
POLICY: dict[str, Any] = {
    "objective__name": "policy",
    "objective__algorithm": "reinforce",
    "objective__beta": 0.1,
    "objective__samples": 3,
    "objective__max_tokens": 6,
    "objective__temperature": 2.0,
    "probes__every": 3,
    "probes__tokens": 72,
    "probes__drift": False,
    "checkpoints__every": 3,
}
LETTERS = (
    "def count(prompts, answers, rows):\n    return [sum(map(str.isalpha, answer)) for answer in answers]\n\n"
    "def mute(prompts, answers, rows):\n    return [-n for n in count(prompts, answers, rows)]\n"
)


def spec(world: Path, **keys: Any) -> RunSpec:
    recipe = world / "recipe.yaml"
    recipe.write_text("seed: 0\nschedule: {name: constant}\nprobes: {spectra: false}\n")
    return read(recipe, overrides(world, **keys))


def policy(world: Path, **keys: Any) -> RunSpec:
    return spec(world, **{**POLICY, "objective__reward": f"{world / 'letters.py'}:count", **keys})


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a base that was taught its target: an SFT adapter on some of the layers."""
    folder = make_world(tmp_path_factory.mktemp("started"), train=12, held_out=4)
    (folder / "letters.py").write_text(LETTERS)
    return folder


@pytest.fixture(scope="module")
def taught(world: Path) -> Result:
    keys = {"method__targets": ["q_proj", "down_proj"], "method__rank_pattern": {"q_proj": 5}, "train__steps": 12}
    return train(spec(world, **LORA, **keys), world / "sft")


def reward_on(world: Path, folder: Path) -> str:
    """A reward model on the plain base: pairs on a layer that the SFT adapter changes too, and a head."""
    base = prepare(spec(world, **LORA)).base
    generator = torch.Generator().manual_seed(5)
    pair = LowRank(torch.randn(2, 32, generator=generator), torch.randn(32, 2, generator=generator), 0.3)
    head = {"score.weight": torch.randn(1, 32, generator=generator)}
    save_lowrank(folder, Delta({"model.layers.0.self_attn.q_proj": pair}, head, base.fingerprint), base.path)
    return str(folder)


def move(method: Method) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in method.param_groups(1.0, 0.0):
            for tensor in group.tensors.values():
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator)


# What is measured


@pytest.mark.parametrize("how", METHODS)
def test_a_run_begins_where_another_ended_and_its_own_delta_goes_on_alone(world, taught, tmp_path, how):
    """SFT run → run from its delta → runs on what that saved, merged and beside the base: each begins with the loss so far."""
    assert taught.score("target/loss").value < taught.score("target/loss", "base").value - 0.05
    keys = {**METHODS[how], "train__steps": 4, "probes__spectra": how != "full"}
    second = train(spec(world, **keys, model__delta=str(taught.folder.path)), tmp_path)
    for name in ("target/loss", "general/loss"):
        for when in ("base", "before"):
            assert second.score(name, when).value == pytest.approx(taught.score(name).value, abs=1e-5)
    loss = second.score("target/loss").value
    assert abs(loss - taught.score("target/loss").value) > 1e-3, "it has learned on top"
    path = str(second.folder.path)
    if how == "full":
        third = spec(world, **LORA, train__steps=1, model__path=f"{path}/delta")
        assert train(third, tmp_path).score("target/loss", "base").value == pytest.approx(loss, abs=1e-5)
        return
    merge(str(world / "base"), path, str(tmp_path / "merged"))
    for keys in ({"model__path": str(tmp_path / "merged")}, {"model__delta": path}):
        again = train(spec(world, **LORA, train__steps=1, **keys), tmp_path)
        assert again.score("target/loss", "base").value == pytest.approx(loss, abs=1e-5)
    links = [load_lowrank(folder) for folder in sorted(second.folder.links.iterdir())]
    assert len(links) == (3 if how == "cola" else 2), "the start, and what was learned"
    first = load_lowrank(taught.folder.delta)
    assert all(torch.equal(links[0][name].dense(), change.dense()) for name, change in first.items())
    spectra = second.spectra()
    assert set(spectra["layer"]) == set(links[1]) > set(first)
    learned = sum(link["model.layers.0.self_attn.q_proj"].dense() for link in links[1:])
    (norm,) = spectra[spectra["layer"] == "model.layers.0.self_attn.q_proj"]["frobenius"]
    assert norm == pytest.approx(float(learned.norm()), rel=1e-4), "spectra are of what was learned on top"


def test_an_evaluation_of_such_a_run_is_that_of_its_merged_model(world, taught, tmp_path):
    run = train(spec(world, **LORA, train__steps=3, model__delta=str(taught.folder.delta)), tmp_path).folder.path
    merge(str(world / "base"), str(run), str(tmp_path / "merged"))
    rows = [{"prompt": f"reverse {word} = ", "completion": word[::-1]} for word in ("abc", "fed", "cab")]
    items = str(write_rows(tmp_path / "items.jsonl", rows))
    beside = evaluate(str(world / "base"), [items], deltas=[str(run)], device="cpu")
    alone = evaluate(str(tmp_path / "merged"), [items], device="cpu")
    values = [
        [one.score.value for one in beside.measured if one.model == run.name],
        [one.score.value for one in alone.measured],
    ]
    assert values[0] == pytest.approx(values[1], abs=1e-5) and len(values[0]) == 1
    assert evaluate(str(run), [items], device="cpu").models == ["base", run.name]


def test_before_the_first_step_a_policy_is_its_reference(world, taught, tmp_path):
    delta = str(taught.folder.path)
    run = train(policy(world, **LORA, model__delta=delta, train__steps=3), tmp_path)
    assert run.score("policy/kl", "before").value == 0 and run.score("policy/reward_change", "before").value == 0
    assert run.score("policy/kl").value > 0
    plain = train(policy(world, **LORA, train__steps=3), tmp_path)
    assert abs(run.score("general/loss", "base").value - plain.score("general/loss", "base").value) > 0.01


# Rewards and values act on the base alone


@pytest.mark.parametrize("how", ["lora", "cola", "full"])
def test_rewards_are_those_of_the_plain_base_whatever_the_policy_began_from(world, taught, tmp_path, how):
    reward = reward_on(world, tmp_path / "reward")

    def judged(**keys: Any) -> tuple[list[float], list[float], Method]:
        """Reward the same answers by the model, and value them; the policy has moved."""
        prepared = prepare(policy(world, **METHODS[how], objective__reward=reward, **keys))
        method, objective = prepared.method, prepared.objective
        assert isinstance(objective, PolicyObjective) and isinstance(objective.sample, Rollouts) and objective.value
        move(method)
        asked = objective.sample.batches.batch(0)
        answers = [Answered(one, [7 + i, 9, 8 + k], "") for i, one in enumerate(asked) for k in range(2)]
        row = prepared.base.model.dummy_inputs["input_ids"][:1]
        with torch.no_grad(), objective.reference(), objective.value.acting():
            hidden = prepared.base.model.model(row, use_cache=False).last_hidden_state[0]
            values = objective.value.values(hidden).tolist()
        return objective.sample.rewards(answers).total, values, method

    rewards, values, _ = judged()
    of_started, other_values, method = judged(model__delta=str(taught.folder.path))
    assert of_started == rewards and len(set(rewards)) == len(rewards) > 2
    assert (other_values == values) == (how != "full"), (
        "full fine-tuning has merged the delta, and values stand on that"
    )
    with method.plain():
        pass  # comes back
    assert judged(model__delta=str(taught.folder.path))[0] == rewards


# How it goes on


@pytest.mark.parametrize(
    ("how", "keys"),
    [
        ("lora", {**POLICY, "objective__reward": "{letters}:count", "train__steps": 6}),
        ("cola", {"train__steps": 6, "checkpoints__every": 2}),
        ("full", {"train__steps": 6, "checkpoints__every": 2}),
    ],
)
def test_a_run_that_was_stopped_ends_in_the_same_bits(world, taught, tmp_path, how, keys):
    filled = {k: v.format(letters=world / "letters.py") if isinstance(v, str) else v for k, v in keys.items()}
    chosen = spec(world, **METHODS[how], **filled, model__delta=str(taught.folder.path))
    whole = train(chosen, tmp_path / "whole")
    with pytest.raises(Interrupted, match="after step 4"):
        train(chosen, tmp_path / "stopped", display=stop_at(4))
    again = train(chosen, tmp_path / "stopped")
    same_bits(again.folder.path, whole.folder.path)


def test_a_branch_begins_from_what_its_trunk_began_from_wherever_that_lies(world, taught, tmp_path):
    adapter, moved = tmp_path / "adapter", tmp_path / "moved"
    shutil.copytree(taught.folder.delta, adapter)
    keys = {**LORA, "checkpoints__every": 2, "checkpoints__keep_last": 9}
    trunk = train(spec(world, **keys, model__delta=str(adapter), train__steps=4), tmp_path / "runs")
    adapter.rename(moved)
    again = {**keys, "train__steps": 6, "branch_from": f"{trunk.folder.path}@2", "model__delta": str(moved)}
    assert train(spec(world, **again, seed=0), tmp_path / "branches").status["step"] == 6
    tensors = load_file(moved / "adapter_model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, moved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="began from another delta"):
        train(spec(world, **again, seed=0), tmp_path / "others")
    with pytest.raises(DeltaError, match="on top of it"):
        delta_at(trunk.folder.path, 2, weights=None)


@pytest.mark.parametrize(("objective", "changed"), [("text", "weights"), ("policy", "scale")])
def test_a_run_does_not_go_on_from_another_delta(world, taught, tmp_path, objective, changed):
    adapter = tmp_path / "adapter"
    shutil.copytree(taught.folder.delta, adapter)
    make = policy if objective == "policy" else spec
    chosen = make(world, **LORA, model__delta=str(adapter), train__steps=6)
    with pytest.raises(Interrupted):
        train(chosen, tmp_path / "runs", display=stop_at(2))
    if changed == "weights":
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file({name: 2 * tensor for name, tensor in tensors.items()}, adapter / "adapter_model.safetensors")
    else:
        facts = (adapter / "adapter_config.json").read_text()
        assert '"lora_alpha": 10.0' in facts
        (adapter / "adapter_config.json").write_text(facts.replace('"lora_alpha": 10.0', '"lora_alpha": 20.0'))
    with pytest.raises(FolderError, match=r"changed \(model.delta\)"):
        train(chosen, tmp_path / "runs")


def test_the_best_of_a_policy_that_only_loses_is_what_it_began_from(world, taught, tmp_path):
    """The held-out reward falls from the first step on: patience counts from the start, whose weights are put back."""
    losing = {"objective__held_out": f"{world / 'letters.py'}:mute", "objective__patience": 1, "objective__beta": 0.0}
    keys = {**LORA, "method__targets": ["all-linear", "lm_head"], "optimizer__learning_rate": 0.05, "train__steps": 30}
    run = train(policy(world, **keys, **losing, probes__tokens=384, model__delta=str(taught.folder.path)), tmp_path)
    assert (run.status["step"], run.status["delta_step"]) == (3, 0), run.status
    assert run.status["end"].startswith("the held-out reward has not risen for 1 evaluations")
    saved, first = load_lowrank(run.folder.delta), load_lowrank(taught.folder.delta)
    for name, change in saved.items():
        expected = first[name].dense() if name in first else torch.zeros(change.shape)
        torch.testing.assert_close(change.dense(), expected, rtol=1e-6, atol=1e-7)


def test_a_reward_model_begins_from_a_delta_too(world, taught, tmp_path):
    pairs = [{"prompt": f"say {i}: ", "chosen": "a" * (2 + i % 4), "rejected": "b" * (2 + i % 4)} for i in range(16)]
    rows = str(write_rows(tmp_path / "pairs.jsonl", pairs))
    keys = {"objective__name": "reward", "data__train": rows, "data__validation": rows, "data__general": None}
    run = train(spec(world, **LORA, **keys, train__steps=3, model__delta=str(taught.folder.path)), tmp_path)
    saved, first = load_lowrank(run.folder.delta), load_lowrank(taught.folder.delta)
    assert set(saved) >= set(first) and set(saved.whole) == {"score.weight"}
    name = "model.layers.0.self_attn.q_proj"
    assert isinstance(saved[name], LowRank) and saved[name].rank == 5 + 2
    assert run.score("target/accuracy", "before") == run.score("target/accuracy", "base")


# What it is called, and what is refused


def test_a_spec_without_the_key_is_what_it_was_before_there_was_one(world):
    without, given = spec(world, **LORA), spec(world, **LORA, model__delta="runs/sft")
    assert "delta" not in without.identity()["model"] and "delta" not in dump(without)
    assert given.identity()["model"]["delta"] == "runs/sft" and given.hash8 != without.hash8
    assert RunSpec.model_validate(given.model_dump()) == given


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"method__name": "peft"}, "layers of the peft library"),
        ({"method__name": "full", "model__random_init": True}, "random weights"),
        ({**LORA, "probes__spectra": "intruders"}, "base alone"),
        ({**LORA, "method__dropout": 0.1}, "blur the delta"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(world, keys, what):
    with pytest.raises(SpecError) as caught:
        spec(world, **keys, model__delta="runs/sft")
    (problem,) = caught.value.problems
    assert what in problem.what and "model.delta" in str(problem.where)


def test_what_is_no_delta_of_this_base_is_refused(world, taught, tmp_path, capfd):
    for path in (tmp_path / "nowhere", world / "base"):
        with pytest.raises(DeltaError, match="no low-rank delta"):
            prepare(spec(world, **LORA, model__delta=str(path)))
    with pytest.raises(DeltaError, match="scores texts"):
        prepare(spec(world, **LORA, model__delta=reward_on(world, tmp_path / "reward")))
    make_base(tmp_path / "other", seed=7)
    more = [f"model.delta={taught.folder.delta}", f"model.path={tmp_path / 'other'}", f"--runs={tmp_path / 'runs'}"]
    assert loralab("train", "sft-lora", *overrides(world), *more) == 2
    assert "other base weights" in (said := capfd.readouterr().err) and "model.delta" in said
    assert not list((tmp_path / "runs").iterdir())


def test_a_check_says_what_would_be_trained(world, taught, capfd):
    assert loralab("check", "sft-lora", *overrides(world), f"model.delta={taught.folder.path}", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert found["spec"]["model"]["delta"] == str(taught.folder.path)
    plain = prepare(spec(world, method__name="lora")).attachment
    assert found["trained_parameters"] == plain.trained_parameters
