"""Rewards: the losses against NumPy, and pairs whose prompt is computed once against pairs that are computed apart."""

import numpy as np
import pytest
import torch

from loralab.base.data import Feed
from loralab.base.labelled import collate_labelled, read_labelled
from loralab.base.model import load
from loralab.base.sources import Source
from loralab.methods.lora import Lora
from loralab.training.objectives.reward import RewardObjective, pair_losses, thumb_losses
from loralab.training.scores import ScoreHead

RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_pairs_follow_bradley_and_terry():
    chosen, rejected, margins = RNG.normal(size=(3, 20)) * 3
    for centre in (0.0, 0.01, 2.0):
        expected = -np.log(sigmoid(chosen - rejected - margins)) + centre * (chosen + rejected) ** 2
        ours = pair_losses(*(torch.tensor(x).float() for x in (chosen, rejected, margins)), centre)
        np.testing.assert_allclose(ours, expected, rtol=1e-4)


def test_centring_draws_rewards_to_zero_and_a_pair_alone_does_not():
    for centre, moves in ((0.0, False), (0.1, True)):
        rewards = torch.tensor([5.0, 3.0], requires_grad=True)
        pair_losses(rewards[:1], rewards[1:], torch.zeros(1), centre).sum().backward()
        assert rewards.grad is not None
        assert (float(rewards.grad.sum()) > 0.1) is moves


def test_thumbs_are_a_coin_with_the_logit_r():
    rewards, thumbs = RNG.normal(size=20) * 3, RNG.integers(0, 2, 20)
    p = sigmoid(rewards)
    expected = -np.log(np.where(thumbs == 1, p, 1 - p))
    ours = thumb_losses(torch.tensor(rewards).float(), torch.tensor(thumbs).float())
    np.testing.assert_allclose(ours, expected, rtol=1e-4)
    assert thumb_losses(torch.tensor([80.0, -80.0]), torch.tensor([0.0, 1.0])).tolist() == [80, 80], "no overflow"


@pytest.fixture(scope="module")
def pairs():
    base = load("pocket", device="cpu")
    return read_labelled([Source("pocket:preferences?items=12")], base.tokenizer, max_length=512)


def learner(pairs, *, share: bool, micro_batch: int | None = None, method: bool = True):
    """Put a method on the pocket base, and an objective over the pairs."""
    torch.manual_seed(0)
    base = load("pocket", device="cpu", outputs=1)
    lora = Lora(rank=4, alpha=8.0, also_train=["score"])
    lora.attach(base, 0)
    with torch.no_grad():
        for number, layer in enumerate(lora.layers.values()):
            layer.pair("link-1").B.normal_(std=0.05, generator=torch.Generator().manual_seed(number))
    head = ScoreHead(base.model)
    assert head.shares

    def laid(examples):
        return collate_labelled(examples, share=share)

    feed = Feed(pairs, batch_size=4, micro_batch=micro_batch, packing=False, collate=laid)
    return base.model, lora, RewardObjective(feed, head, kind="pairs", centre=0.01)


def step(model, objective) -> tuple[float, int, float]:
    """Add up one optimizer step: loss, tokens, weight; gradients stay on the model."""
    batches = next(objective.batches(model))
    micro = [objective.loss(model, batch) for batch in batches]
    sum(loss.total for loss in micro).backward()
    tokens = sum(batch.tokens.numel() for batch in batches)
    return sum(float(loss.total.detach()) for loss in micro), tokens, sum(loss.weight for loss in micro)


def gradients(lora) -> dict[str, torch.Tensor]:
    return {
        name: tensor.grad.clone()
        for group in lora.param_groups(1.0, 0.0)
        for name, tensor in group.tensors.items()
        if tensor.grad is not None
    }


def test_a_shared_prompt_changes_the_cost_and_not_the_result(pairs):
    found = {}
    for share in (True, False):
        model, lora, objective = learner(pairs, share=share)
        chosen = [pairs[i] for [i] in objective.feed.sequences(0)[:4]]
        (loss, tokens, weight), grads = step(model, objective), gradients(lora)
        parts = np.array([example.segments for example in chosen])
        assert parts[:, 0].min() > 20, "the pocket's prompts are worth sharing"
        once, twice = parts.sum(), parts.sum() + parts[:, 0].sum()
        assert tokens == (once if share else twice) and weight == 4
        found[share] = loss, grads
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-5)
    assert found[True][1].keys() == found[False][1].keys() and "score.weight" in found[True][1]
    for name, grad in found[True][1].items():
        other = found[False][1][name]
        assert float((grad - other).abs().max()) <= 1e-5 * max(1.0, float(other.abs().max())), name
        assert other.abs().max() > 1e-3, name


def test_a_step_may_be_cut_into_micro_batches(pairs):
    (model, lora, objective), (cut, cut_lora, in_parts) = (
        learner(pairs, share=True),
        learner(pairs, share=True, micro_batch=3),
    )
    whole, parts = step(model, objective), step(cut, in_parts)
    assert whole[1:] == parts[1:] and whole[0] == pytest.approx(parts[0], rel=1e-5)
    for name, grad in gradients(lora).items():
        torch.testing.assert_close(grad, gradients(cut_lora)[name], rtol=1e-4, atol=1e-5)


def test_the_better_answer_is_the_first_of_each_pair(pairs):
    model, _, objective = learner(pairs, share=True)
    batch = next(objective.batches(model))[0]
    rewards = objective.head.scores(batch)[:, 0].detach().numpy()
    expected = -np.log(sigmoid(rewards[0::2] - rewards[1::2])) + 0.01 * (rewards[0::2] + rewards[1::2]) ** 2
    loss = objective.loss(model, batch)
    assert float(loss.total.detach()) == pytest.approx(expected.sum(), rel=1e-4)
    assert loss.metrics["accuracy"] == pytest.approx(np.mean(rewards[0::2] > rewards[1::2]))
    # Chosen answers gain where the loss falls.
    chosen, rejected = torch.zeros(2, 1, requires_grad=True).unbind()
    up, down = torch.autograd.grad(pair_losses(chosen, rejected, torch.zeros(1)).sum(), (chosen, rejected))
    assert up < 0 < down
