"""Answers that a server writes in the policy's name: what it is handed, what comes back, and what is refused."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from enumerated_policy import ANSWERS, PROMPT, REWARDS, World, opposite, same, two_prompts

from little_world import loralab, make_base, overrides, rows, same_bits, stop_at, write_rows
from loralab.base.model import Base, load
from loralab.errors import EvaluationError, Interrupted
from loralab.evals.generate import Prompt, Sampling, Writer
from loralab.evals.served import ServedWriter, Server
from loralab.lab.experiment import train
from loralab.methods.lora import Lora
from loralab.run.folder import read_lines
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec
from loralab.training import estimators
from loralab.training.objectives.policy import Rollout

pytest.importorskip("peft", reason="the server of these tests wears adapters as stock PEFT does")
from served_world import Stand, serving

WARM = Sampling(temperature=0.7, seed=3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("served") / "base")


@pytest.fixture
def served(base: Path) -> Iterator[tuple[str, Stand]]:
    with serving(base) as found:
        yield found


@pytest.fixture(scope="module")
def policy(base: Path) -> tuple[Base, Lora]:
    """A policy that has moved away from its base."""
    found = load(str(base), device="cpu", dtype="float32")
    method = Lora(rank=2, alpha=4.0)
    method.attach(found, 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for group in method.param_groups(1.0, 0.0):
            for parameter in group.tensors.values():
                parameter += 0.4 * torch.randn(parameter.shape, generator=generator)
    return found, method


def writer_of(policy: tuple[Base, Lora], url: str) -> ServedWriter:
    found, method = policy
    assert found.tokenizer is not None
    return ServedWriter(Server(url), method.save, found.model, found.tokenizer)


def prompts(found: Base, limit: int = 6) -> list[Prompt]:
    assert found.tokenizer is not None
    texts = [row["prompt"] for row in rows(3)]
    return [Prompt(found.tokenizer(text)["input_ids"], text, limit + i) for i, text in enumerate(texts)]


def test_greedy_answers_are_those_that_the_policy_itself_writes(policy, served):
    url, stand = served
    found, method = policy
    mine = Writer(found.model, found.tokenizer).write(prompts(found, 20), sampling=Sampling(), log_probs=True)
    theirs = writer_of(policy, f"{url}/v1/").write(prompts(found, 20), sampling=Sampling())
    assert [[(a.tokens, a.text, a.ended) for a in group] for group in theirs[0]] == [
        [(a.tokens, a.text, a.ended) for a in group] for group in mine[0]
    ]
    with method.without():
        plain = Writer(found.model, found.tokenizer).write(prompts(found, 20), sampling=Sampling())
    assert [[a.tokens for a in group] for group in plain[0]] != [[a.tokens for a in group] for group in mine[0]]
    assert {"repetition_penalty", "presence_penalty", "frequency_penalty", "min_p"} <= stand.asked[0].keys()


def test_samples_come_with_what_they_were_drawn_with(policy, served):
    url, _ = served
    found, _ = policy
    (written,) = writer_of(policy, url).write(prompts(found), sampling=WARM, samples=3)
    assert [len(group) for group in written] == [3, 3, 3]
    assert len({tuple(answer.tokens) for group in written for answer in group}) > 3
    for prompt, group in zip(prompts(found), written, strict=True):
        for answer in group:
            with torch.no_grad():
                logits = found.model(torch.tensor([prompt.tokens + answer.tokens])).logits[
                    0, len(prompt.tokens) - 1 : -1
                ]
            log_p = torch.log_softmax(logits / WARM.temperature, -1)
            expected = log_p[torch.arange(len(answer.tokens)), torch.tensor(answer.tokens)]
            torch.testing.assert_close(torch.tensor(answer.log_probs), expected, rtol=1e-4, atol=1e-4)


def test_every_batch_has_an_adapter_of_its_own_that_leaves_nothing_behind(policy, served):
    url, stand = served
    writer = writer_of(policy, url)
    for _ in range(2):
        writer.write(prompts(policy[0])[:1], sampling=WARM)
    assert len(set(stand.names)) == len(set(stand.folders)) == 2 and not stand.served
    assert not any(folder.exists() for folder in stand.folders)


def test_log_probabilities_from_before_temperature_are_refused_where_they_would_mislead(policy, served):
    url, stand = served
    writer, (first, *_) = writer_of(policy, url), prompts(policy[0])
    writer.check(first, 0.7)
    stand.raw = True
    writer.check(first, 1.0)
    with pytest.raises(EvaluationError, match="before temperature") as refused:
        writer.check(first, 0.7)
    assert "--logprobs-mode processed_logprobs" in str(refused.value)


def test_what_a_server_refuses_is_said_with_what_to_do(policy, served):
    url, stand = served
    stand.loads = False
    with pytest.raises(EvaluationError, match="404") as refused:
        writer_of(policy, url).check(prompts(policy[0])[0], 0.7)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in str(refused.value)
    with pytest.raises(EvaluationError, match="does not exist"):
        Server(url).complete(model="nobody", prompt=[1], max_tokens=1, temperature=1.0)


def test_a_stop_text_ends_an_answer_and_is_cut_off(policy, served):
    url, _ = served
    found, _ = policy
    (written,) = writer_of(policy, url).write(prompts(found, 20))
    plain, whole = max(
        zip(prompts(found, 20), (group[0].text for group in written), strict=True), key=lambda pair: len(pair[1])
    )
    stop = whole[-1]
    asked = Prompt(plain.tokens, plain.text, plain.limit, (stop,))
    mine = Writer(found.model, found.tokenizer).write([asked], sampling=Sampling())[0]
    theirs = writer_of(policy, url).write([asked])[0]
    assert [(a.tokens, a.text, a.ended) for a in theirs[0]] == [(a.tokens, a.text, a.ended) for a in mine[0]]
    assert theirs[0][0].ended == "text" and stop not in theirs[0][0].text


ANSWERED = {"index": 0, "finish_reason": "stop", "token_ids": [5], "logprobs": {"token_logprobs": [-1.0]}}


@pytest.mark.parametrize(
    "reply",
    [
        {},
        [],
        "busy",
        {"choices": [{}]},
        {"choices": [ANSWERED | {"finish_reason": "abort"}]},
        {"choices": [ANSWERED | {"logprobs": None}]},
        {"choices": [ANSWERED | {"token_ids": [5, 6]}]},
        {"choices": [ANSWERED | {"token_ids": None}]},
        {"choices": [ANSWERED, ANSWERED]},
    ],
)
def test_replies_of_another_shape_are_clear_errors(policy, served, reply):
    url, stand = served
    stand.instead["/v1/completions"] = reply
    with pytest.raises(EvaluationError) as refused:
        writer_of(policy, url).write(prompts(policy[0])[:1])
    assert refused.value.where and refused.value.fix and not stand.served
    stand.instead = {"/v1/completions": {"choices": [ANSWERED]}}
    assert writer_of(policy, url).write(prompts(policy[0])[:1])[0][0][0].tokens == [5]


def test_a_server_that_falls_silent_is_waited_for_once(policy, served, monkeypatch):
    url, stand = served
    monkeypatch.setattr("loralab.evals.served.AT_ONCE", 2)
    found, method = policy
    writer = ServedWriter(Server(url, timeout=0.5), method.save, found.model, found.tokenizer)
    stand.instead["/v1/completions"] = None
    begin = time.monotonic()
    with pytest.raises(EvaluationError, match="no answer"):
        writer.write(prompts(found)[:1] * 40)
    assert time.monotonic() - begin < 8, "forty prompts, two at a time, would take ten seconds"
    with pytest.raises(EvaluationError, match="no answer"):
        Server("http://[").base()


def test_a_folder_that_the_server_cannot_see_is_no_missing_route(policy, served):
    url, stand = served
    stand.refuses = (404, {"error": {"message": "Loading lora x failed: No adapter found for /tmp/x"}})
    with pytest.raises(EvaluationError, match="No adapter found") as refused:
        writer_of(policy, url).check(prompts(policy[0])[0], 0.7)
    assert "TMPDIR" in str(refused.value)


def test_a_server_with_a_key_is_asked_with_it(policy, served, monkeypatch):
    url, stand = served
    stand.key = "sesame"
    with pytest.raises(EvaluationError, match="401 Unauthorized"):
        Server(url).base()
    monkeypatch.setenv("VLLM_API_KEY", "sesame")
    assert Server(url).base() == "base"


# As a run


def spec_of(folder: Path, base: Path, url: str, **keys: object) -> RunSpec:
    write_rows(folder / "train.jsonl", rows(8, seed=1))
    write_rows(folder / "validation.jsonl", rows(4, seed=2))
    (folder / "letters.py").write_text(
        "def count(prompts, answers, rows):\n    return [sum(c in 'abcdefghijklm' for c in answer) for answer in answers]\n"
    )
    (folder / "recipe.yaml").write_text("seed: 0\n")
    chosen = {
        "model__path": base,
        "data__train": folder / "train.jsonl",
        "data__validation": folder / "validation.jsonl",
        "data__general": None,
        "objective__name": "policy",
        "objective__algorithm": "rloo",
        "objective__reward": f"{folder / 'letters.py'}:count",
        "objective__server": url,
        "objective__samples": 2,
        "objective__max_tokens": 5,
        "objective__temperature": 2.0,
        "method__name": "lora",
        "method__rank": 2,
        "train__steps": 4,
        "probes__every": 4,
        "probes__tokens": 40,
        "probes__spectra": False,
        "probes__drift": False,
        "checkpoints__every": 2,
        "schedule__name": "constant",
    }
    return read(folder / "recipe.yaml", overrides(folder, **(chosen | keys)))


def test_a_run_hands_the_adapter_over_before_each_batch(tmp_path, base, served):
    url, stand = served
    result = train(spec_of(tmp_path, base, url), tmp_path / "runs")
    lines = read_lines(result.folder.metrics)
    assert len(stand.handed) == 5, "one to prove that it can, and one for each batch"
    moved = [sum(float(t.abs().sum()) for name, t in each.items() if "lora_B" in name) for each in stand.handed]
    assert moved[0] == moved[1] == 0 and len(set(moved)) == 4, "each batch is written by the policy as it is then"
    apart = [line["stand_in_kl_per_token"] for line in lines if "stand_in_kl_per_token" in line]
    assert len(apart) == 4 and max(apart) < 1e-6
    assert [line["stand_in_weight"] for line in lines if "stand_in_weight" in line] == pytest.approx(
        [1.0] * 4, abs=1e-3
    )


def test_a_run_that_was_stopped_in_the_middle_of_a_batch_goes_on_with_it(tmp_path, base, served):
    chosen = spec_of(tmp_path, base, served[0], objective__epochs=2, objective__minibatches=2, train__steps=6)
    whole = train(chosen, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(chosen, tmp_path / "stopped", display=stop_at(3))
    again = train(chosen, tmp_path / "stopped")
    same_bits(again.folder.path, whole.folder.path)


def test_a_server_with_another_base_is_found_out(tmp_path, base):
    other = make_base(tmp_path / "other", seed=5)
    for parameter in (model := load(str(other), device="cpu", dtype="float32").model).parameters():
        parameter.data *= 3
    model.save_pretrained(other)
    with serving(other) as (url, _), pytest.raises(EvaluationError, match="not written by the policy"):
        train(spec_of(tmp_path, base, url, objective__temperature=1.0), tmp_path / "runs")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"objective.server": "http://127.0.0.1:9"}, "no answer"),
        ({"objective.server": "localhost:8000"}, "objective.server"),
        ({"method": "{name: full}"}, "no adapter that a server could be handed"),
        ({"objective.top_p": 0.9}, "cannot be weighed as if the policy had written them"),
    ],
)
def test_bad_servers_are_clear_errors(tmp_path, base, served, capsys, keys, said):
    spec_of(tmp_path, base, served[0])
    given = {
        "model.path": base,
        "data.train": tmp_path / "train.jsonl",
        "data.validation_share": 0.5,
        "objective.reward": f"{tmp_path / 'letters.py'}:count",
        "objective.server": served[0],
        "objective.max_tokens": 5,
        "data.max_length": 40,
        "train.steps": 1,
        **keys,
    }
    (tmp_path / "policy.yaml").write_text("objective: {name: policy, reward: grade}\nmethod: {name: lora}\n")
    words = [f"{key}={value}" for key, value in given.items()]
    assert loralab("train", tmp_path / "policy.yaml", *words, "--runs", tmp_path / "runs") == 2
    assert said in " ".join(capsys.readouterr().err.split())


def test_a_spec_without_a_server_is_what_it_was_before_there_was_the_key(tmp_path, base):
    given, without = (
        spec_of(tmp_path, base, "http://localhost:8000", **keys) for keys in ({}, {"objective__server": None})
    )
    assert "server" not in without.identity()["objective"] and given.hash8 != without.hash8
    assert given.identity()["objective"]["server"] == "http://localhost:8000"
    assert all(RunSpec.model_validate(each.model_dump()) == each for each in (given, without))


# What is learned from a stand-in's answers


@pytest.mark.parametrize(
    ("algorithm", "samples", "beta", "kl"),
    [
        ("reinforce", 1, 0.3, "low_variance"),
        ("reinforce", 1, 0.3, "exact"),
        ("rloo", 2, 0.0, "exact"),
        ("rloo", 2, 0.3, "low_variance"),
    ],
)
def test_answers_of_a_stand_in_climb_j_without_bias(algorithm, samples, beta, kl):
    """The stand-in draws at another temperature; its answers, weighed, have the gradient of the policy's own J."""
    world = World()
    given = {"algorithm": algorithm, "beta": beta, "kl": kl}
    found = world.mean_gradient(samples, drawn_at=1.3, **given)
    same(found, opposite(world.exact(beta, 1.0)))


@pytest.mark.parametrize("algorithm", ["reinforce", "rloo", "grpo"])
def test_micro_batches_of_a_stand_ins_answers_are_one_batch(algorithm):
    world = World()
    with torch.no_grad():
        told = [[(world.of(answer, 1.3)).tolist() for answer in r.answers] for r in two_prompts()]
    rollouts = [
        Rollout(r.prompt, r.answers, r.rewards, log_probs=each) for r, each in zip(two_prompts(), told, strict=True)
    ]
    given = {"algorithm": algorithm, "beta": 0.2}
    whole = world.gradient(world.objective(rollouts, **given))
    same(world.gradient(world.objective(rollouts, micro_batch=1, **given)), whole)
    plain = world.gradient(world.objective(two_prompts(), **given))
    assert max(float((a - b).abs().max()) for a, b in zip(whole, plain, strict=True)) > 1e-3, "weights count"


def test_the_weight_of_an_answer_is_its_ratio_up_to_a_limit():
    policy, stand_in = torch.tensor([-1.0, -2.0, -0.5, -0.1]), torch.tensor([-1.5, -1.75, -0.5, -9.0])
    weights = estimators.answer_weights(policy, stand_in, [2, 1, 1])
    torch.testing.assert_close(weights, torch.tensor([0.25, 0.0, 0.0]).exp() * torch.tensor([1.0, 1.0, 3.0]))


def test_a_log_probability_too_few_is_refused():
    with pytest.raises(ValueError, match="missing"):
        Rollout(PROMPT, [ANSWERS[1]], [REWARDS[1]], log_probs=[[-0.5]])
