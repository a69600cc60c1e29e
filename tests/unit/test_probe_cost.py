"""What probes cost a run, and drift as a recipe asks for it."""

import json
from pathlib import Path
from typing import Any

import pytest

from little_world import rows, write_rows
from loralab.console.progress import cost_line
from loralab.errors import Interrupted
from loralab.lab.experiment import train
from loralab.lab.objectives import prepare
from loralab.lab.result import Result
from loralab.run.folder import read_lines
from probe_world import StopAt, forgetting, make_probe_world, probed, spec


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_probe_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world) -> Result:
    return train(probed(world), world / "whole")


# Cost


def cost(world: Path, root: Path, **keys: Any) -> dict[str, Any]:
    quiet = {"probes__drift": False, "probes__samples": 0, "checkpoints__keep_best": False}
    return train(spec(world, **{**quiet, **keys}), root).status


def test_the_cost_of_probes_is_counted(world, tmp_path):
    asked = {"probes__source": forgetting(world)}
    few, more = (cost(world, tmp_path, probes__every=every, **asked) for every in (6, 3))
    # The base, the start and the end; then the middle too: each reading costs the same.
    assert few["probe_forwards"] > 0 and few["probe_tokens"] > few["probe_forwards"]
    assert 4 * few["probe_forwards"] == 3 * more["probe_forwards"]
    assert 4 * few["probe_tokens"] == 3 * more["probe_tokens"]
    assert 0 < more["probe_s"] < more["wall_s"]
    plain = cost(world, tmp_path)
    nothing = cost(world, tmp_path, data__general=None, data__validation=None, data__validation_share=0)
    assert (plain["probe_forwards"], nothing["probe_forwards"]) == (4 * 2, 0), "four readings of two texts"


def test_the_best_checkpoint_is_found_with_one_probe(world, tmp_path):
    asked = {"probes__source": forgetting(world), "probes__every": 6, "checkpoints__every": 1}
    last, best = (cost(world, tmp_path, checkpoints__keep_best=keep, **asked) for keep in (False, True))
    assert best["probe_forwards"] == last["probe_forwards"] + 5, "a forward over the validation rows at steps 1 to 5"


def test_a_resumed_run_keeps_what_its_probes_cost(world, tmp_path):
    asked = {"probes__source": forgetting(world), "probes__every": 3, "checkpoints__every": 3}
    whole = cost(world, tmp_path / "whole", **asked)
    with pytest.raises(OSError):
        quiet = {"probes__drift": False, "probes__samples": 0, "checkpoints__keep_best": False}
        train(spec(world, **quiet, **asked), tmp_path, display=StopAt(4, OSError("the machine is gone")))
    again = cost(world, tmp_path, **asked)
    reading = whole["probe_forwards"] // 4
    assert again["probe_forwards"] == whole["probe_forwards"] + reading, "the base is read once more"


def test_an_interrupted_run_has_measured_nothing_that_a_whole_one_has_not(world, whole, tmp_path):
    with pytest.raises(Interrupted) as caught:
        train(probed(world), tmp_path, display=StopAt(4, KeyboardInterrupt()))
    folder = tmp_path / probed(world).folder_name
    lines = read_lines(folder / "scores.jsonl")
    assert lines == [line for line in read_lines(whole.folder.scores) if line["step"] <= 3], str(caught.value)


def test_the_last_line_tells_the_share_of_the_probes():
    facts = {"step": 9, "tokens": 1234, "wall_s": 8.0, "peak_bytes": 2048, "probe_s": 1.0, "probe_tokens": 77_000}
    line = "9 steps, 1,234 tokens in 8.0 s; probes took 12.5% of the time (77,000 tokens); peak memory 2 KiB"
    assert cost_line(facts) == line
    old = {key: value for key, value in facts.items() if not key.startswith("probe")}
    assert cost_line(old) == "9 steps, 1,234 tokens in 8.0 s; peak memory 2 KiB"


# Drift


def names(result: Result) -> set[str]:
    return {name for name in result.after if not name.startswith(("source", "spectrum"))}


def test_drift_is_measured_as_the_recipe_asks(world, tmp_path):
    short = {"train__steps": 3, "probes__every": 3, "probes__top_k": 4}
    bound, exact, none = (train(spec(world, **short, probes__drift=how), tmp_path) for how in (True, "exact", False))
    texts = {f"{text}/{measure}" for text in ("target", "general") for measure in ("loss", "loss_rise")}
    kls = {"drift/kl", "drift/target_kl"}
    assert names(none) == texts
    measured = texts | kls | {"prompts/loss", "prompts/loss_rise", "drift/top1_flips", "drift/target_top1_flips"}
    assert names(bound) == names(exact) == measured
    for kl in kls:
        assert 0 < bound.score(kl).value < exact.score(kl).value
        assert (bound.score(kl).unit, exact.score(kl).unit) == ("nats/token (lower bound)", "nats/token")
    delta = "delta/adapter_model.safetensors"
    assert len({(run.folder.path / delta).read_bytes() for run in (bound, exact, none)}) == 1


def test_rows_without_a_prompt_are_read_once(world, tmp_path):
    texts = [{"text": f"{row['prompt']}{row['completion']}"} for row in rows(8, seed=7)]
    data = {"data__train": write_rows(tmp_path / "t.jsonl", texts), "data__validation": str(tmp_path / "t.jsonl")}
    both, alone = (prepare(spec(world, **data, **more)).probes for more in ({}, {"data__general": None}))
    assert [(probe.name, probe.drift, probe.prefix) for probe in both] == [
        ("target", True, "target_"),
        ("general", True, ""),
    ]
    assert [(probe.name, probe.drift, probe.prefix) for probe in alone] == [("target", True, "")]


def test_prompts_are_read_as_far_as_they_are_labelled(world):
    (_, _, prompts) = prepare(spec(world)).probes
    assert prompts.name == "prompts"
    lengths = sorted(length for batch in prompts.batches for length in batch.lengths)
    assert lengths == sorted(len(row["prompt"]) + 1 for row in rows(8, seed=2))
    json.dumps([batch.num_tokens for batch in prompts.batches])
