"""The policy probe: KL, entropy, rewards and variety against direct computation from the model's own forward pass."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from little_world import make_base
from loralab.base.model import Base, load
from loralab.evals.generate import Prompt, Sampling, Writer
from loralab.evals.policy_probe import PolicyProbe, PolicySamples
from loralab.methods.full import Full
from loralab.methods.lora import Lora
from loralab.training.loss import LanguageHead

ASKED = ("ask a: ", "ask b b: ", "c: ")
TEMPERATURE, SAMPLES = 2.0, 3


@pytest.fixture
def base(tmp_path_factory) -> Base:
    return load(str(make_base(tmp_path_factory.mktemp("probe") / "base")), device="cpu")


def judge(written):
    """Reward the number of tokens, and of letters; the latter is held out."""
    flat = [answer for mine in written for answer in mine]
    return {
        "reward": [float(len(a.tokens)) for a in flat],
        "held_out": [float(sum(map(str.isalpha, a.text))) for a in flat],
    }


def probe_on(base: Base, method, *, samples: int = SAMPLES, packs: bool = True) -> PolicyProbe:
    assert base.tokenizer is not None
    method.attach(base, 0)
    with torch.no_grad():
        for parameter in [p for p in base.model.parameters() if p.requires_grad]:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.add_(noise, alpha=0.5 if isinstance(method, Lora) else 0.05)
    head = LanguageHead(base.model)
    head.packs = packs
    prompts = [Prompt(base.tokenizer(text)["input_ids"], text, 7) for text in ASKED]
    sampling = Sampling(TEMPERATURE, seed=5)
    writer = Writer(base.model, base.tokenizer)
    return PolicyProbe(prompts, judge, head, writer, sampling=sampling, samples=samples, reference=method.without)


def direct(base: Base, method, prompts: list[Prompt], written) -> tuple[list[float], list[float]]:
    """Sum KL and entropy over each answer, one document at a time, with plain forward passes."""
    kls, entropies = [], []
    for prompt, mine in zip(prompts, written, strict=True):
        for answer in mine:
            tokens = torch.tensor([prompt.tokens + answer.tokens])
            rows = slice(len(prompt.tokens) - 1, -1)
            with torch.no_grad():
                log_p = torch.log_softmax(base.model(tokens).logits[0, rows] / TEMPERATURE, -1)
                with method.without():
                    log_q = torch.log_softmax(base.model(tokens).logits[0, rows] / TEMPERATURE, -1)
            kls.append(float((log_p.exp() * (log_p - log_q)).sum()))
            entropies.append(float(-(log_p.exp() * log_p).sum()))
    return kls, entropies


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("make", [lambda: Lora(rank=2, alpha=4.0), Full], ids=["lora", "full"])
def test_kl_is_summed_over_answers_and_entropy_averaged_over_tokens(base, make, packs):
    method = make()
    probe = probe_on(base, method, packs=packs)
    probe.read_base(method.without())
    reading = {score.name: score for score in probe.read(3).scores}
    assert probe._last is not None
    kls, entropies = direct(base, method, probe.prompts, probe._last.answers)
    lengths = [len(answer.tokens) for mine in probe._last.answers for answer in mine]
    assert reading["policy/kl"].value == pytest.approx(np.mean(kls), rel=1e-3) and np.mean(kls) > 0.01
    assert reading["policy/entropy"].value == pytest.approx(sum(entropies) / sum(lengths), rel=1e-3)
    per_prompt = np.array(kls).reshape(3, SAMPLES).mean(1)
    assert reading["policy/kl"].standard_error == pytest.approx(per_prompt.std(ddof=1) / np.sqrt(3), rel=1e-3)
    assert (reading["policy/kl"].n, reading["policy/kl"].unit) == (3, "nats/answer")
    assert reading["policy/length"].value == np.mean(lengths)


def test_rewards_are_paired_with_the_bases_prompt_by_prompt(base):
    method = Lora(rank=2, alpha=4.0)
    probe = probe_on(base, method)
    before = {s.name: s for s in probe.read_base(method.without()).scores}
    reading = probe.read(3)
    after = {s.name: s for s in reading.scores}
    assert probe._base is not None and probe._last is not None
    means = [
        np.array([[sum(map(str.isalpha, a.text)) for a in mine] for mine in found.answers]).mean(1)
        for found in (probe._base, probe._last)
    ]
    change = means[1] - means[0]
    assert before["policy/held_out"].value == means[0].mean() and after["policy/held_out"].value == means[1].mean()
    assert after["policy/held_out_change"].value == pytest.approx(change.mean())
    assert after["policy/held_out_change"].standard_error == pytest.approx(change.std(ddof=1) / np.sqrt(3))
    assert [row["held_out"] for row in reading.items] == means[1].tolist()
    assert [row["prompt"] for row in reading.items] == list(ASKED)
    assert before["policy/kl"].value == 0 and "policy/kl_change" not in after


def test_a_reading_draws_the_same_numbers_each_time_and_leaves_the_model_as_it_was(base):
    method = Lora(rank=2, alpha=4.0, dropout=0.5)
    probe = probe_on(base, method)
    base.model.train()
    random = torch.get_rng_state()
    first, second = (probe.read(step) for step in (1, 2))
    assert first == second
    assert base.model.training and torch.equal(torch.get_rng_state(), random)
    untouched = Lora(rank=2, alpha=4.0)
    other = load(base.path, device="cpu")
    same = probe_on(other, untouched)
    with torch.no_grad():
        for layer in untouched.layers.values():
            layer.pair("link-1").B.zero_()
    same.read_base(nullcontext())
    changes = [s for s in same.read(0).scores if s.name.endswith("_change") or s.name == "policy/kl"]
    assert len(changes) == 3 and all(abs(s.value) < 1e-5 for s in changes), "a policy that is its base"


@pytest.mark.parametrize(
    ("texts", "share"),
    [([["a", "a", "b"], ["a", "c", "d"]], 5 / 6), ([["a"], ["a"], ["b"]], 2 / 3), ([["a", "b"], ["a", "b"]], 1.0)],
)
def test_distinct_answers_are_counted_among_those_to_the_same_prompt(base, texts, share):
    from loralab.evals.generate import Answer
    from loralab.evals.policy_probe import _distinct

    written = [[Answer([5], text, "stop") for text in mine] for mine in texts]
    assert _distinct(written).sum() / sum(map(len, texts)) == pytest.approx(share)


def test_samples_are_those_of_the_last_reading(base):
    method = Lora(rank=2, alpha=4.0)
    probe = probe_on(base, method)
    assert base.tokenizer is not None
    samples = PolicySamples(probe, 2, [], base.model, base.tokenizer)
    assert samples.lines(0, "base") == []
    probe.read_base(method.without())
    probe.read(4)
    assert probe._base is not None and probe._last is not None
    for model, found in (("base", probe._base), ("tuned", probe._last)):
        lines = samples.lines(4, model)
        assert [line["output"] for line in lines] == [mine[0].text for mine in found.answers[:2]]
        assert [line["reward"] for line in lines] == [len(mine[0].tokens) for mine in found.answers[:2]]
        assert {(line["step"], line["model"], line["role"]) for line in lines} == {(4, model, "policy")}
