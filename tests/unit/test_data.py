import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loralab.base.corpus import Corpus
from loralab.base.data import Feed, collate
from loralab.base.reader import Report, SourceReport
from loralab.base.text import Example
from loralab.errors import DataError


def corpus(lengths, *, max_length=16, weights=(1.0,)):
    """Examples whose every token is their number plus 1; sources in turn."""
    triples = [(i % len(weights), i, Example([i + 1] * length, [True] * length)) for i, length in enumerate(lengths)]
    reports = [SourceReport(f"source {i}", "text", weight) for i, weight in enumerate(weights)]
    return Corpus.of(triples, max_length=max_length, report=Report(tuple(reports)))


def mixed(count=37, seed=0, **options):
    return corpus(np.random.default_rng(seed).integers(1, 17, count).tolist(), **options)


def documents(batch):
    """Numbers of the documents of a batch, in order."""
    starts = np.cumsum((0, *batch.lengths[:-1]))
    return [int(batch.tokens[0, start]) - 1 for start in starts]


def seen(feed, steps):
    return [[documents(batch) for batch in feed.next_step()] for _ in range(steps)]


def same(left, right):
    return all(
        a.lengths == b.lengths and torch.equal(a.tokens, b.tokens) and torch.equal(a.targets, b.targets)
        for a, b in zip(left, right, strict=True)
    )


examples = st.lists(st.tuples(st.integers(0, 99), st.booleans()), min_size=1, max_size=9)


@given(st.lists(examples, min_size=1, max_size=5))
def test_a_batch_predicts_the_next_labelled_token_of_the_same_document(rows):
    batch = collate([Example([t for t, _ in row], [mark for _, mark in row]) for row in rows])
    tokens, positions, targets = [], [], []
    for row in rows:
        tokens += [token for token, _ in row]
        positions += list(range(len(row)))
        targets += [token if mark else -100 for token, mark in row[1:]] + [-100]
    assert batch.tokens.tolist() == [tokens]
    assert batch.positions.tolist() == [positions]
    assert batch.targets.tolist() == [targets]
    assert batch.lengths == tuple(len(row) for row in rows)
    assert batch.weight == sum(target != -100 for target in targets)
    assert batch.num_tokens == len(tokens)
    assert {tensor.dtype for tensor in (batch.tokens, batch.positions, batch.targets)} == {torch.int64}


def test_a_batch_moves_to_a_device():
    batch = collate([Example([1, 2], [False, True])]).to("meta")
    assert {tensor.device.type for tensor in (batch.tokens, batch.positions, batch.targets)} == {"meta"}
    assert batch.lengths == (2,)


def test_a_batch_of_nothing_is_refused():
    for nothing in ([], [Example([], [])]):
        with pytest.raises(ValueError, match="needs examples"):
            collate(nothing)


@pytest.mark.parametrize("packing", [True, False])
def test_an_epoch_sees_every_example_once(packing):
    feed = Feed(mixed(), batch_size=3, packing=packing)
    for epoch in range(3):
        sequences = feed.sequences(epoch)
        assert Counter(i for sequence in sequences for i in sequence) == Counter(range(37))
        assert packing or all(len(sequence) == 1 for sequence in sequences)


def test_packed_sequences_fit_and_documents_stay_whole():
    data = mixed(200)
    for batch in (batch for _ in range(5) for batch in Feed(data, batch_size=4, micro_batch=1).next_step()):
        assert batch.num_tokens <= 16
        assert list(batch.lengths) == data.lengths[documents(batch)].tolist()


def test_the_order_changes_with_epoch_and_seed_only():
    data = mixed(100)
    first = Feed(data, batch_size=4, seed=1)
    assert first.sequences(0) == Feed(data, batch_size=9, micro_batch=2, seed=1).sequences(0)
    assert first.sequences(0) != first.sequences(1)
    assert first.sequences(0) != Feed(data, batch_size=4, seed=2).sequences(0)
    assert [len(x) for x in first.sequences(0)] != sorted((len(x) for x in first.sequences(0)), reverse=True)


def test_a_step_has_its_number_of_sequences_across_epochs():
    feed = Feed(corpus([9] * 10), batch_size=4, micro_batch=3)
    steps = seen(feed, 5)
    assert [[len(batch) for batch in step] for step in steps] == [[3, 1]] * 5
    assert Counter(i for step in steps for batch in step for i in batch) == Counter(list(range(10)) * 2)
    assert feed.state()["epoch"] == 2


def test_micro_batches_change_nothing_but_their_size():
    data = mixed(60)
    whole, parts = Feed(data, batch_size=5), Feed(data, batch_size=5, micro_batch=2)
    for _ in range(8):
        (batch,) = whole.next_step()
        pieces = parts.next_step()
        assert len(pieces) == 3
        assert torch.equal(batch.targets, torch.cat([piece.targets for piece in pieces], dim=1))
        assert batch.weight == sum(piece.weight for piece in pieces)


@settings(max_examples=30)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    before=st.integers(0, 25),
    packing=st.booleans(),
    weights=st.sampled_from([(1.0,), (0.25, 2.0), (1.5,), (0.1, 0.3, 1.0)]),
)
def test_a_resumed_feed_goes_on_as_if_nothing_had_happened(count, batch_size, before, packing, weights):
    data = mixed(count, weights=weights)

    def feed():
        return Feed(data, batch_size=batch_size, micro_batch=2, packing=packing, seed=3)

    uninterrupted, stopped = feed(), feed()
    for _ in range(before):
        uninterrupted.next_step()
        stopped.next_step()
    resumed = feed()
    resumed.load_state(json.loads(json.dumps(stopped.state())))
    for _ in range(6):
        assert same(uninterrupted.next_step(), resumed.next_step())


@pytest.mark.parametrize("weight", [0.25, 0.1, 0.3, 1.0, 1.5, 2.0, 2.7])
@pytest.mark.parametrize("count", [1, 7, 20])
def test_a_weight_is_how_often_an_example_is_seen(weight, count):
    feed = Feed(mixed(count, weights=(weight,)), batch_size=1, packing=False)
    epochs = [Counter(i for sequence in feed.sequences(epoch) for i in sequence) for epoch in range(20)]
    total = sum(epochs, Counter())
    assert all(abs(total[i] - 20 * weight) < 1 for i in range(count))
    assert all(int(weight) <= epoch[i] <= int(weight) + 2 for epoch in epochs for i in range(count))
    assert all(abs(epoch.total() - weight * count) < 1 for epoch in epochs)


def test_a_quarter_is_fresh_each_epoch_and_everything_comes_within_four():
    feed = Feed(mixed(40, weights=(0.25,)), batch_size=1, packing=False)
    quarters = [{i for sequence in feed.sequences(epoch) for i in sequence} for epoch in range(4)]
    assert [len(quarter) for quarter in quarters] == [10] * 4
    assert set().union(*quarters) == set(range(40))


@pytest.mark.parametrize(("epochs", "weights"), [(1, (1.0,)), (3, (2.0,)), (0.5, (1.0,)), (2.5, (0.3, 1.0))])
def test_the_number_of_steps_covers_the_epochs(epochs, weights):
    feed = Feed(mixed(50, weights=weights), batch_size=3)
    steps = feed.num_steps(epochs)
    for _ in range(steps):
        feed.next_step()
    done = feed.epoch + feed.position / len(feed.sequences(feed.epoch))
    assert epochs <= done < epochs + 3 / len(feed.sequences(0)) + 0.1


def test_every_epoch_of_whole_weights_has_the_same_number_of_sequences():
    feed = Feed(mixed(90, weights=(1.0, 2.0)), batch_size=4)
    assert {len(feed.sequences(epoch)) for epoch in range(6)} == {feed.num_sequences(1)}
    assert feed.steps_per_epoch == feed.num_sequences(1) / 4


def test_tokens_of_an_epoch_count_by_weight():
    feed = Feed(corpus([4, 6, 10, 2], weights=(0.5, 3.0)), batch_size=1)
    assert feed.tokens_per_epoch == 0.5 * (4 + 10) + 3 * (6 + 2)


@pytest.mark.parametrize(
    ("other", "what"),
    [
        (lambda: Feed(mixed(20, seed=1), batch_size=2), "corpus"),
        (lambda: Feed(mixed(20), batch_size=2, seed=1), "seed"),
        (lambda: Feed(mixed(20), batch_size=2, packing=False), "packing"),
        (lambda: Feed(mixed(20, weights=(2.0,)), batch_size=2), "weights"),
    ],
)
def test_a_cursor_into_other_data_is_refused(other, what):
    with pytest.raises(DataError, match=f"another {what}"):
        other().load_state(Feed(mixed(20), batch_size=2).state())


def test_a_feed_of_nothing_is_refused():
    with pytest.raises(DataError, match="no examples"):
        Feed(corpus([]), batch_size=1)
