"""The probe of reward models and classifiers: its numbers against the model's own forward pass and written-out definitions."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from loralab.base.attention import NAME
from loralab.base.labelled import Labelled, collate_labelled
from loralab.evals.scored import ScoreProbe
from loralab.training.loss import LanguageHead
from loralab.training.objectives.reward import pair_losses
from loralab.training.scores import ScoreHead
from loralab.training.words import WordHead, collate_words
from tiny import tiny

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the peer")


def pair(shared, chosen, rejected, margin=0.0, seed=0):
    tokens = np.random.default_rng(seed).integers(3, 100, shared + chosen + rejected).astype(np.uint32)
    return Labelled(tokens, (shared, chosen, rejected), margin, (chosen, rejected), shared + chosen, "pairs")


def text(length, label, kind="thumbs", answer=None, seed=0):
    tokens = np.random.default_rng(seed).integers(3, 100, length).astype(np.uint32)
    return Labelled(tokens, (length,), float(label), (answer or length,), length, kind)


class Told(nn.Module):
    """A scorer that says what it was told, batch after batch; `says` may be changed between readings."""

    def __init__(self, *says):
        super().__init__()
        self.says, self.was_training = says, []

    @property
    def model(self):
        return self

    def scores(self, batch):
        self.was_training.append((self.training, torch.is_grad_enabled()))
        return torch.tensor(self.says[(len(self.was_training) - 1) % len(self.says)], dtype=torch.float32)


def values(reading):
    return {score.name.removeprefix("target/"): score.value for score in reading.scores}


def scores(reading):
    return {score.name.removeprefix("target/"): score for score in reading.scores}


def pairs_probe(chosen, rejected, lengths, margins=None, **more):
    """A probe of pairs in two batches, with given rewards."""
    margins = margins or [0.0] * len(chosen)
    rows = [pair(2, a, b, m) for (a, b), m in zip(lengths, margins, strict=True)]
    told = [[[c], [r]] for c, r in zip(chosen, rejected, strict=True)]
    said = [[one for both in part for one in both] for part in (told[:2], told[2:])]
    batches = [collate_labelled(part) for part in (rows[:2], rows[2:])]
    return ScoreProbe(batches, Told(*said), kind="pairs", **more)


CHOSEN, REJECTED = [2.0, -1.0, 0.5, 0.25, 1.0], [0.0, 0.5, 0.5, -1.0, -0.75]
LENGTHS = [(5, 3), (2, 6), (4, 4), (3, 7), (6, 2)]


def test_pairs_are_judged_by_definition():
    reading = pairs_probe(CHOSEN, REJECTED, LENGTHS).read(4)
    found = values(reading)
    delta = np.array(CHOSEN) - np.array(REJECTED)
    loss = np.log1p(np.exp(-delta))
    assert reading.scores[0].name == "target/loss" and reading.scores[0].unit == "nats/pair"
    assert found["loss"] == pytest.approx(loss.mean()) and reading.scores[0].n == 5
    assert found["accuracy"] == pytest.approx((3 + 0.5) / 5), "a tie is half right"
    assert found["majority"] == 0.5 and found["majority_change"] == pytest.approx(0.2)
    claimed, right = 1 / (1 + np.exp(-np.abs(delta))), np.array([1, 0, 0.5, 1, 1])
    order = np.argsort(claimed)
    assert found["calibration_error"] == pytest.approx(np.abs(claimed - right)[order].mean()), "a bin for each pair"
    assert found["brier"] == pytest.approx(np.mean((1 - 1 / (1 + np.exp(-delta))) ** 2))
    assert found["reward_mean"] == pytest.approx(np.mean(CHOSEN + REJECTED))
    assert found["reward_sd"] == pytest.approx(np.std(CHOSEN + REJECTED, ddof=1))
    assert found["margin_mean"] == pytest.approx(delta.mean())
    assert found["margin_sd"] == pytest.approx(delta.std(ddof=1))
    rewards, lengths = np.ravel(list(zip(CHOSEN, REJECTED, strict=True))), np.ravel(LENGTHS)
    assert found["length_correlation"] == pytest.approx(stats.spearmanr(rewards, lengths).statistic)
    assert found["longer_wins"] == pytest.approx(3 / 4), "first, second and last; the third pair is as long"
    assert found["longer_chosen"] == pytest.approx(2 / 4)
    assert "margin_correlation" not in found, "no margins were given"
    assert [row["reward"] for row in reading.items] == pytest.approx(CHOSEN)
    assert [row["rejected_reward"] for row in reading.items] == pytest.approx(REJECTED)
    assert [(row["length"], row["rejected_length"]) for row in reading.items] == LENGTHS
    assert [row["right"] for row in reading.items] == [1, 0, 0.5, 1, 1]
    assert [row["loss_sum"] for row in reading.items] == pytest.approx(loss.tolist())


def test_margins_and_centring_enter_the_loss_as_in_training():
    margins = [1.0, 0.0, 0.5, 2.0, 0.25]
    found = values(pairs_probe(CHOSEN, REJECTED, LENGTHS, margins, centre=0.1).read(0))
    chosen, rejected = np.array(CHOSEN), np.array(REJECTED)
    loss = np.log1p(np.exp(-(chosen - rejected - margins))) + 0.1 * (chosen + rejected) ** 2
    assert found["loss"] == pytest.approx(loss.mean())
    trained = pair_losses(*(torch.tensor(x, dtype=torch.float64) for x in (chosen, rejected, margins)), 0.1)
    assert found["loss"] == pytest.approx(float(trained.mean()))
    assert found["margin_correlation"] == pytest.approx(stats.spearmanr(chosen - rejected, margins).statistic)


def test_thumbs_are_judged_beside_the_majority():
    labels = [1, 1, 1, 1, 0, 1, 0, 1]
    rewards = [0.5, 1.0, -0.2, 2.0, 0.3, 0.0, -1.0, 0.3]
    lengths = [4, 6, 2, 9, 3, 5, 3, 4]
    batch = collate_labelled(
        [text(n + 2, up, answer=n, seed=i) for i, (n, up) in enumerate(zip(lengths, labels, strict=True))]
    )
    reading = ScoreProbe([batch], Told([[r] for r in rewards]), kind="thumbs").read(2)
    found, y, r = values(reading), np.array(labels), np.array(rewards)
    p = 1 / (1 + np.exp(-r))
    assert reading.scores[0].unit == "nats/text"
    assert found["loss"] == pytest.approx(metrics.log_loss(y, p))
    right = np.where(r == 0, 0.5, (r > 0) == (y == 1))
    assert found["accuracy"] == pytest.approx(right.mean()) == 5.5 / 8
    assert found["up/accuracy"] == pytest.approx(4.5 / 6) and found["down/accuracy"] == pytest.approx(1 / 2)
    assert found["balanced_accuracy"] == pytest.approx((4.5 / 6 + 1 / 2) / 2)
    assert found["majority"] == 6 / 8 and found["majority_change"] == pytest.approx(-0.5 / 8)
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(y, r))
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(y, p))
    assert found["reward_mean"] == pytest.approx(r.mean()) and found["reward_sd"] == pytest.approx(r.std(ddof=1))
    assert found["length_correlation"] == pytest.approx(stats.spearmanr(r, lengths).statistic)
    welch = stats.ttest_ind(r[y == 1], r[y == 0], equal_var=False)
    margin = scores(reading)["margin_mean"]
    assert margin.value / margin.standard_error == pytest.approx(welch.statistic)
    assert [row["claimed"] for row in reading.items] == pytest.approx(p.tolist())
    assert [row["label"] for row in reading.items] == labels


def test_the_change_against_the_majority_is_paired():
    labels, rewards = [1] * 6 + [0] * 4, [1.0] * 6 + [-1.0] * 3 + [1.0]
    batch = collate_labelled([text(4, up, seed=i) for i, up in enumerate(labels)])
    found = scores(ScoreProbe([batch], Told([[r] for r in rewards]), kind="thumbs").read(1))["majority_change"]
    differences = np.array([0.0] * 6 + [1.0] * 3 + [0.0])
    assert found.value == pytest.approx(0.3)
    assert found.standard_error == pytest.approx(differences.std(ddof=1) / math.sqrt(10))


def test_classes_are_judged_by_definition():
    rng = np.random.default_rng(0)
    labels, outputs = [0, 2, 1, 2, 2, 0, 1], rng.normal(size=(7, 3))
    names = ("no", "may/be", "yes")
    batch = collate_labelled([text(5, label, "classify", seed=i) for i, label in enumerate(labels)])
    reading = ScoreProbe([batch], Told(outputs.tolist()), kind="classify", classes=names).read(1)
    found = values(reading)
    shares, said = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True), outputs.argmax(1)
    assert found["loss"] == pytest.approx(metrics.log_loss(labels, shares), rel=1e-6)
    assert found["accuracy"] == metrics.accuracy_score(labels, said)
    assert found["balanced_accuracy"] == pytest.approx(metrics.balanced_accuracy_score(labels, said))
    recalls = metrics.recall_score(labels, said, average=None)
    assert [found[f"{name}/accuracy"] for name in ("no", "1", "yes")] == pytest.approx(recalls.tolist())
    assert found["majority"] == 3 / 7 and "auc" not in found
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(labels, shares, scale_by_half=True), rel=1e-6)
    assert [row["claimed"] for row in reading.items] == pytest.approx(shares.max(1).tolist())
    assert [row["said"] for row in reading.items] == said.tolist()


def test_two_classes_have_an_area():
    outputs = np.random.default_rng(1).normal(size=(9, 2))
    labels = [0, 1, 1, 0, 1, 0, 1, 1, 0]
    batch = collate_labelled([text(5, label, "classify", seed=i) for i, label in enumerate(labels)])
    found = values(ScoreProbe([batch], Told(outputs.tolist()), kind="classify", classes=("a", "b")).read(1))
    assert found["auc"] == pytest.approx(metrics.roc_auc_score(labels, outputs[:, 1] - outputs[:, 0]))


def test_numbers_are_judged_by_definition():
    labels, said = [0.0, 1.5, 3.0, 4.5, 2.0], [0.5, 1.0, 3.5, 3.0, 2.0]
    batch = collate_labelled([text(5, label, "regression", seed=i) for i, label in enumerate(labels)])
    reading = ScoreProbe([batch], Told([[v] for v in said]), kind="regression").read(1)
    found = values(reading)
    squared = metrics.mean_squared_error(labels, said)
    assert found["loss"] == pytest.approx(squared) and found["rmse"] == pytest.approx(math.sqrt(squared))
    assert found["pearson"] == pytest.approx(stats.pearsonr(labels, said).statistic)
    assert found["spearman"] == pytest.approx(stats.spearmanr(labels, said).statistic)
    assert found["label_sd"] == pytest.approx(np.std(labels))
    assert "accuracy" not in found and "right" not in reading.items[0]


def test_words_that_stand_for_classes_are_read_too():
    model = tiny("llama")
    model.set_attn_implementation(NAME)
    rows = [text(6, label, "classify", seed=label) for label in (0, 1, 0)]
    batch = collate_words(rows, words=[[7], [8, 9]], stop=None)
    reading = ScoreProbe([batch], WordHead(LanguageHead(model)), kind="classify", classes=("no", "yes")).read(0)
    said = []
    for row in rows:
        with torch.no_grad():
            logs = model(torch.tensor([[*row.tokens.tolist(), 8]])).logits[0].log_softmax(-1)
        said.append(int(logs[5, 8] + logs[6, 9] > logs[5, 7]))
    assert [row["said"] for row in reading.items] == said
    assert values(reading)["accuracy"] == pytest.approx(np.mean(np.array(said) == [0, 1, 0]))


@pytest.mark.parametrize("share", [True, False])
def test_a_real_model_is_read_as_it_reads_itself(share):
    model = tiny("llama", task="ForSequenceClassification", num_labels=1)
    model.set_attn_implementation(NAME)
    rows = [pair(3, 4, 2, seed=1), pair(5, 2, 3, seed=2), pair(1, 3, 6, seed=3)]
    batches = [collate_labelled(rows[:2], share=share), collate_labelled(rows[2:], share=share)]
    reading = ScoreProbe(batches, ScoreHead(model), kind="pairs").read(0)
    expected = []
    for row in rows:
        prompt, chosen, rejected = np.split(row.tokens.astype(int), np.cumsum(row.segments)[:-1])
        with torch.no_grad():
            both = [model(input_ids=torch.tensor([[*prompt, *answer]])).logits.item() for answer in (chosen, rejected)]
        expected.append(both)
    assert [[row["reward"], row["rejected_reward"]] for row in reading.items] == [
        pytest.approx(both, rel=1e-4, abs=1e-5) for both in expected
    ]


def test_readings_are_paired_with_the_base_and_the_base_is_read_inside():
    probe = pairs_probe(CHOSEN, REJECTED, LENGTHS)
    entered = []

    @contextmanager
    def without():
        entered.append("in")
        yield
        entered.append("out")

    first = probe.read_base(without())
    assert entered == ["in", "out"] and "accuracy_change" not in values(first)
    probe.head.says = [[[3.0], [0.0], [1.0], [0.5]], [[1.0], [0.5], [0.0], [-1.0], [1.0], [-0.75]]]
    after = probe.read(9)
    found = scores(after)
    assert found["accuracy_change"].value == pytest.approx(1 - 0.7)
    assert found["accuracy_change"].standard_error == pytest.approx(np.std([0, 1, 0.5, 0, 0], ddof=1) / math.sqrt(5))
    apart = np.array([r["loss_sum"] for r in after.items]) - np.array([r["loss_sum"] for r in first.items])
    assert found["loss_rise"].value == pytest.approx(apart.mean())
    assert found["loss_rise"].value == pytest.approx(found["loss"].value - values(first)["loss"])


def test_measuring_leaves_no_trace():
    probe = pairs_probe(CHOSEN, REJECTED, LENGTHS)
    probe.head.train()
    before = torch.get_rng_state()
    probe.read(1)
    assert probe.head.was_training == [(False, False)] * 2, "evaluation mode, no gradients"
    assert probe.head.training and torch.equal(torch.get_rng_state(), before)


def test_a_model_that_diverged_gives_a_loss_that_says_so():
    probe = pairs_probe([math.nan, *CHOSEN[1:]], REJECTED, LENGTHS)
    assert [score.name for score in probe.read(3).scores] == ["target/loss"]
    assert math.isnan(probe.read(3).scores[0].value)


def test_a_head_that_says_nothing_has_no_correlation_and_is_half_right():
    found = values(pairs_probe([0.0] * 5, [0.0] * 5, LENGTHS).read_base())
    assert found["accuracy"] == 0.5 and found["loss"] == pytest.approx(math.log(2))
    assert found["longer_wins"] == 0.5 and "length_correlation" not in found
    assert all(math.isfinite(value) for value in found.values())


def test_large_rewards_do_not_overflow():
    found = values(pairs_probe([1e4, -1e4, 0.0, 0.0, 0.0], [-1e4, 1e4, 0.0, 0.0, 0.0], LENGTHS).read(1))
    assert found["loss"] == pytest.approx((0 + 2e4 + 3 * math.log(2)) / 5)
