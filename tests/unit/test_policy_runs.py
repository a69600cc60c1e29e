"""Reinforcement learning as runs: what is learned, how a run goes on and ends, and what of it lies in memory."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from little_world import make_base, overrides, rows, same_bits, stop_at, write_rows
from loralab.base.model import load
from loralab.delta.lowrank import Delta, LowRank
from loralab.delta.store import load_lowrank, save_lowrank
from loralab.errors import DataError, DeltaError, EvaluationError, Interrupted, SpecError
from loralab.evals.stats import Score
from loralab.lab.experiment import Result, train
from loralab.lab.objectives import prepare
from loralab.lab.policy import Limits
from loralab.run.folder import read_lines
from loralab.spec.objective import PolicySpec
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec

LETTERS = (
    "def count(prompts, answers, rows):\n    return [sum(c in 'abcdefghijklm' for c in answer) for answer in answers]\n"
)
ALIKE = "def count(prompts, answers, rows):\n    return [0.7] * len(answers)\n"
FAST: dict[str, Any] = {
    "objective__samples": 3,
    "objective__max_tokens": 6,
    "objective__temperature": 3.0,
    "method__rank": 2,
    "method__name": "lora",
    "probes__every": 3,
    "probes__tokens": 72,
    "probes__spectra": False,
    "probes__drift": False,
    "checkpoints__every": 3,
    "schedule__name": "constant",
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder: Path = tmp_path_factory.mktemp("policy")
    make_base(folder / "base")
    write_rows(folder / "train.jsonl", rows(12, seed=1))
    write_rows(folder / "validation.jsonl", rows(4, seed=2))
    write_rows(folder / "general.jsonl", [{"text": f"{row['completion']} is {i}."} for i, row in enumerate(rows(4))])
    (folder / "letters.py").write_text(LETTERS)
    return folder


def spec(world: Path, algorithm: str = "rloo", **keys: Any) -> RunSpec:
    chosen = {"objective__name": "policy", "objective__algorithm": algorithm, **FAST, **keys}
    chosen.setdefault("objective__reward", f"{world / 'letters.py'}:count")
    recipe = world / "recipe.yaml"
    recipe.write_text("seed: 0\n")
    given = {key: value for key, value in chosen.items() if value is not None or not key.startswith("method__")}
    return read(recipe, overrides(world, **given))


def metrics(result: Result, name: str) -> list[float]:
    return [line[name] for line in read_lines(result.folder.metrics) if name in line]


# What is learned


LEARNS: dict[str, dict[str, Any]] = {
    "lora": {"method__rank": 4, "method__targets": ["all-linear", "lm_head"], "optimizer__learning_rate": 0.05},
    "full": {"method__rank": None, "optimizer__learning_rate": 0.06},
}
LONGER: dict[str, Any] = {"train__steps": 20, "train__batch_size": 4, "probes__every": 20, "probes__tokens": 384}


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_policy_learns_what_a_function_rewards(world, tmp_path, method):
    result = train(spec(world, **LONGER, method__name=method, **LEARNS[method], objective__beta=0.0), tmp_path)
    change = result.score("policy/reward_change")
    assert change.interval()[0] > 1.0, change
    rise = result.score("policy/reward").value - result.score("policy/reward", "base").value
    assert rise == pytest.approx(change.value)
    assert result.score("policy/kl").value > 0.1
    kept = [(line["model"], line["role"]) for line in result.samples()]
    assert kept == [("base", "policy")] * 4 + [("tuned", "policy")] * 4, "of all four prompts, before and after"
    assert result.score("general/loss_rise").n == 4


@pytest.mark.parametrize("algorithm", ["reinforce", "grpo"])
def test_every_algorithm_runs_and_tells_what_it_did(world, tmp_path, algorithm):
    held_out = {"objective__held_out": f"{world / 'letters.py'}:count"}
    result = train(spec(world, algorithm, objective__beta=0.1, **held_out, train__steps=3), tmp_path)
    assert result.status["state"] == "done"
    for name in ("reward", "reward/count", "kl", "entropy", "length", "truncated"):
        assert len(metrics(result, name)) == 3, name
    assert ("value_loss" in read_lines(result.folder.metrics)[0]) == (algorithm == "reinforce")
    names = {"reward", "held_out", "kl", "entropy", "length", "distinct", "reward_change", "held_out_change"}
    assert {f"policy/{name}" for name in names} <= result.after.keys()
    assert result.score("policy/held_out") == Score(
        "policy/held_out",
        *[getattr(result.score("policy/reward"), k) for k in ("value", "unit", "n", "standard_error")],
    )
    assert set(load_lowrank(result.folder.delta).layers) == set(prepare(spec(world)).attachment.layers)


# How it goes on


@pytest.mark.parametrize(
    ("algorithm", "keys", "step"),
    [
        ("rloo", {}, 4),
        ("rloo", {"objective__epochs": 2, "objective__minibatches": 2, "train__steps": 6}, 3),
        ("reinforce", {"objective__beta": 0.1, "objective__epochs": 2}, 3),
    ],
    ids=["rloo", "rloo in the middle of a batch", "reinforce in the middle of a batch"],
)
def test_a_run_that_was_stopped_ends_in_the_same_bits(world, tmp_path, algorithm, keys, step):
    chosen = spec(world, algorithm, **keys, objective__patience=9, objective__held_out=f"{world / 'letters.py'}:count")
    whole = train(chosen, tmp_path / "whole")
    with pytest.raises(Interrupted, match=f"after step {step}"):
        train(chosen, tmp_path / "stopped", display=stop_at(step))
    again = train(chosen, tmp_path / "stopped")
    same_bits(again.folder.path, whole.folder.path)


# How it ends


def test_rewards_that_are_all_equal_are_counted_and_move_nothing(world, tmp_path):
    (tmp_path / "alike.py").write_text(ALIKE)
    result = train(
        spec(world, objective__reward=f"{tmp_path / 'alike.py'}:count", objective__beta=0.0, train__steps=4), tmp_path
    )
    assert metrics(result, "equal_rewards") == [2.0] * 4, "both prompts of each batch"
    (warning,) = metrics(result, "warning")
    assert "nothing to learn from in 3 steps" in warning
    assert all(not pair.B.any() for pair in load_lowrank(result.folder.delta).values())
    assert result.status["step"] == 4 and result.score("policy/reward_change").value == 0


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo"])
def test_a_run_whose_answers_earn_nothing_at_first_goes_on(world, tmp_path, algorithm):
    """With values and rewards of 0 no tensor has a gradient: rest, and not a pattern that matches nothing."""
    (tmp_path / "late.py").write_text(
        "calls = 0\n\ndef late(prompts, answers, rows):\n    global calls\n    calls += 1\n"
        "    return [sum(map(str.isalpha, a)) if calls > 6 else 0.0 for a in answers]\n"
    )
    keys = {"objective__beta": 0.0, "train__steps": 6, "objective__reward": f"{tmp_path / 'late.py'}:late"}
    result = train(spec(world, algorithm, **keys, **LEARNS["lora"]), tmp_path)
    assert result.status["step"] == 6
    assert any(pair.B.any() for pair in load_lowrank(result.folder.delta).values())
    assert not [text for text in metrics(result, "warning") if "gradient" in text]


@pytest.mark.parametrize(
    ("keys", "step", "why"),
    [
        ({"objective__max_kl": 1e-6}, 3, "the KL budget is spent: "),
        ({"objective__max_forgetting": 1e-3, **LEARNS["lora"]}, 3, "the forgetting budget is spent: "),
        ({"objective__patience": 2}, 6, "the held-out reward has not risen for 2 evaluations (its best is 0.7"),
    ],
)
def test_limits_end_a_run_and_the_status_says_why(world, tmp_path, keys, step, why):
    (tmp_path / "alike.py").write_text(ALIKE)
    held_out = {"objective__held_out": f"{tmp_path / 'alike.py'}:count"}
    (tmp_path / "mute.py").write_text(
        "def letters(p, answers, r):\n    return [-sum(map(str.isalpha, a)) for a in answers]\n"
    )
    reward = {"objective__reward": f"{tmp_path / 'mute.py'}:letters"}  # all that the general text is made of
    result = train(spec(world, train__steps=12, **keys, **held_out, **reward), tmp_path)
    assert result.status["state"] == "done" and result.status["step"] == step
    assert result.status["end"].startswith(why)


def test_limits_say_which_number_went_too_far():
    def told(limits: Limits, **values: float) -> str | None:
        names = {"kl": "policy/kl", "rise": "general/loss_rise", "held_out": "policy/held_out"}
        names |= {"change": "policy/held_out_change"}
        return limits([Score(names[k], v, "", 1, None) for k, v in values.items()])

    common: dict[str, Any] = {"reward": ["grade"], "held_out": ["grade"]}
    kl = Limits(PolicySpec(**common, max_kl=2.0))
    assert told(kl, kl=2.0) is None and "2.5 nats per answer" in str(told(kl, kl=2.5))
    rise = Limits(PolicySpec(**common, max_forgetting=0.1))
    assert told(rise, rise=0.1, kl=99.0) is None and "rose by 0.2 nats" in str(told(rise, rise=0.2))
    patient = Limits(PolicySpec(**common, patience=2))
    assert [told(patient, held_out=v) is None for v in (1.0, 0.9, 1.1, 1.1, 1.0)] == [True, True, True, True, False]
    falling = Limits(PolicySpec(**common, patience=2))
    assert told(falling, held_out=0.9, change=-0.1) is None, "the first reading behind the start"
    assert "has not risen for 2 evaluations (its best is 1)" in str(told(falling, held_out=0.8, change=-0.2))
    rising = Limits(PolicySpec(**common, patience=1))
    assert [told(rising, held_out=1 + c, change=c) for c in (0.1, 0.2)] == [None, None] and told(
        rising, held_out=1.2, change=0.2
    )


def test_epochs_count_prompts(world):
    keys: dict[str, Any] = {
        "train__steps": None,
        "train__epochs": 2,
        "objective__epochs": 3,
        "objective__minibatches": 2,
    }
    assert prepare(spec(world, **keys)).total_steps == 2 * (12 // 2) * 3 * 2


# What is refused


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"train__tokens": 100, "train__steps": None}, "not known"),
        ({"objective__max_tokens": 64}, "no room for a prompt"),
        (
            {"method__name": "peft", "method__rank": None, "objective__reward": "runs/reward"},
            "layers of the peft library",
        ),
        ({"objective__max_forgetting": 0.1, "data__general": None}, "no general text"),
        ({"objective__max_kl": 1.0, "data__validation": None, "data__validation_share": 0}, "no held-out prompts"),
    ],
)
def test_keys_that_mean_nothing_are_refused(world, keys, what):
    with pytest.raises(SpecError) as caught:
        prepare(spec(world, **keys))
    assert [what in problem.what for problem in caught.value.problems] == [True]


def test_prompts_that_a_reward_says_nothing_about_are_refused(world):
    with pytest.raises(DataError, match="rewards stories"):
        prepare(spec(world, objective__reward="pocket:true"))


# What lies in memory


def storages() -> dict[int, int]:
    """Give the bytes of every tensor's memory, each once."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.device.type == "cpu"]
    return {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}


@pytest.fixture(scope="module")
def wide(tmp_path_factory, world) -> Path:
    """Make a world whose base is much larger than the pairs on it."""
    folder: Path = tmp_path_factory.mktemp("wide")
    make_base(folder / "base", hidden_size=128, intermediate_size=256, num_hidden_layers=4)
    for name in ("train", "validation", "general"):
        (folder / f"{name}.jsonl").write_bytes((world / f"{name}.jsonl").read_bytes())
    (folder / "letters.py").write_text(LETTERS)
    return folder


def delta_on(world: Path, folder: Path, *, scores: bool = True) -> str:
    """Save a delta of the wide base: of a reward model, or of a language model."""
    base = prepare(spec(world)).base
    layers = {}
    for number in range(4):
        shapes = {"self_attn.q_proj": (128, 128), "mlp.down_proj": (128, 256)}
        for name, (out, into) in shapes.items():
            layers[f"model.layers.{number}.{name}"] = LowRank(torch.randn(2, into), torch.randn(out, 2), 1.0)
    whole = {"score.weight": torch.randn(1, 128)} if scores else {}
    save_lowrank(folder, Delta(layers, whole, base.fingerprint), base.path)
    return str(folder)


@pytest.mark.parametrize("started", [False, True])
def test_policy_reference_reward_and_value_hold_one_base(wide, tmp_path, started):
    reward = delta_on(wide, tmp_path / "reward")
    more = {"model__delta": delta_on(wide, tmp_path / "sft", scores=False)} if started else {}
    before = storages()
    prepared = prepare(spec(wide, "reinforce", objective__reward=reward, objective__beta=0.1, **more))
    made = {place: size for place, size in storages().items() if place not in before}
    weights = {p.untyped_storage().data_ptr(): p for p in prepared.base.model.parameters()}
    pairs = sum(p.nbytes for n, p in prepared.base.model.named_parameters() if ".pairs." in n)
    base = sum(p.nbytes for p in weights.values()) - pairs
    assert base > 10 * pairs > 0
    names = [name for name, _ in prepared.base.model.named_parameters() if ".pairs." in name]
    kinds = {name.rpartition(".pairs.")[2].partition(".")[0] for name in names}
    assert kinds == {"link-1", "value", "delta_0", *(["start"] if started else [])}, (
        "policy, value and reward are there; the reference is the base itself, with the delta that it wears from the start"
    )
    assert base + pairs <= sum(made.values()) < 1.1 * base + pairs


def test_a_fully_tuned_policy_holds_its_base_beside_itself_and_no_more(wide, tmp_path):
    reward = delta_on(wide, tmp_path / "reward")
    before = storages()
    prepared = prepare(spec(wide, method__name="full", method__rank=None, objective__reward=reward))
    made = {place: size for place, size in storages().items() if place not in before}
    base = sum(p.nbytes for n, p in prepared.base.model.named_parameters() if ".pairs." not in n)
    assert 2 * base <= sum(made.values()) < 2.3 * base


def test_a_reward_model_that_was_trained_here_serves_a_policy_on_the_same_base_only(world, tmp_path):
    pairs = [{"prompt": f"say {i}: ", "chosen": "a" * (2 + i % 4), "rejected": "b" * (2 + i % 4)} for i in range(24)]
    write_rows(tmp_path / "pairs.jsonl", pairs)
    recipe = tmp_path / "reward.yaml"
    recipe.write_text("objective: {name: reward}\nmethod: {name: lora, rank: 2}\nschedule: {name: constant}\n")
    judged = overrides(world, data__train=str(tmp_path / "pairs.jsonl"), data__validation=None, data__general=None)
    reward = train(read(recipe, [*judged, "train.steps=20", "data.validation_share=0.2"]), tmp_path / "rewards")
    assert reward.score("target/accuracy").value > 0.9
    path = str(reward.folder.path)
    result = train(
        spec(world, **LONGER, **LEARNS["lora"], objective__reward=path, objective__beta=0.0), tmp_path / "runs"
    )
    assert result.score("policy/reward_change").interval()[0] > 0
    assert result.after.keys() >= {"policy/reward"} and metrics(result, "reward") == metrics(
        result, f"reward/{Path(path).name}"
    )
    whole = {"method__name": "full", "method__rank": None, "probes__spectra": "intruders", "train__steps": 2}
    full = train(spec(world, **whole, objective__reward=path), tmp_path / "full")
    plain = load(str(full.folder.delta), device="cpu").model.state_dict()
    assert plain.keys() == load(str(world / "base"), device="cpu").model.state_dict().keys()
    assert set(full.spectra()["layer"]) == {name.removesuffix(".weight") for name in plain if "_proj" in name}
    make_base(tmp_path / "other", seed=7)
    with pytest.raises(DeltaError, match="another base"):
        prepare(spec(world, objective__reward=path, model__path=str(tmp_path / "other")))


def test_a_reward_that_fails_in_the_middle_leaves_a_run_that_goes_on(world, tmp_path):
    body = "import pathlib\n\ndef count(prompts, answers, rows):\n    if {fails} and len(prompts) == 6: raise ValueError('no')\n"
    file = tmp_path / "mine.py"
    file.write_text(body.format(fails=True) + LETTERS.partition("\n")[2])
    chosen = spec(world, objective__reward=f"{file}:count", checkpoints__every=1)
    with pytest.raises(EvaluationError, match="raised ValueError: no"):
        train(chosen, tmp_path / "runs")
    file.write_text(body.format(fails=False) + LETTERS.partition("\n")[2])
    result = train(chosen, tmp_path / "runs")
    assert result.status["state"] == "done" and json.loads(json.dumps(result.status["step"])) == 6
