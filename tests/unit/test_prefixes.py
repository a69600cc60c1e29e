"""Sequences that begin alike as one tree: every path is found again, and what is shared is there once."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from loralab.evals.prefixes import SHORTEST, Tree, trees

LETTERS = st.integers(0, 1)  # few, so that beginnings are often alike
RUNS = st.lists(LETTERS, min_size=1, max_size=45).map(tuple)


@st.composite
def contexts_and_paths(draw):
    """Draw paths that continue a few beginnings, some of them beginnings of others, and where each context ends."""
    stems = draw(st.lists(RUNS, min_size=1, max_size=4))
    stems += [stems[draw(st.integers(0, len(stems) - 1))] + draw(RUNS) for _ in range(draw(st.integers(0, 3)))]
    paths, joints = [], []
    for _ in range(draw(st.integers(1, 14))):
        stem = draw(st.sampled_from(stems))
        paths.append(stem + draw(st.lists(LETTERS, max_size=30).map(tuple)))
        joints.append(len(stem))
    return paths, joints


def check_layout(tree: Tree, paths: list[tuple[int, ...]]) -> None:
    """Check that the row, read along each path's places, is that path, at its own positions, and that parents are right."""
    batch, places = tree.batch(), tree.rows()
    tokens, positions = batch.tokens[0].numpy(), batch.positions[0].numpy()
    assert sum(batch.lengths) == len(tokens) == tree.num_tokens and min(batch.lengths) >= 1
    assert len(batch.parents) == len(batch.lengths)
    assert all(parent < number for number, parent in enumerate(batch.parents))
    owner = np.repeat(np.arange(len(batch.lengths)), batch.lengths)
    for path, rows in zip(paths, places, strict=True):
        assert tuple(tokens[rows]) == path
        assert positions[rows].tolist() == list(range(len(path)))
        chain = list(dict.fromkeys(owner[rows].tolist()))
        assert [batch.parents[segment] for segment in chain] == [-1, *chain[:-1]]
        assert len(rows) == sum(batch.lengths[segment] for segment in chain), "a path ends where a segment ends"
    assert set(np.concatenate(places)) == set(range(len(tokens))), "no token that no path reads"


@given(contexts_and_paths(), st.integers(1, 300))
@example(([(0,) * 40, (0,) * 40, (0,) * 20, (0,) * 20 + (1,) * 20], [20, 39, 20, 20]), 300)
def test_every_path_is_recovered_from_rows_that_keep_their_budget(drawn, budget):
    paths, joints = drawn
    first, last = min(paths), max(paths)
    alike = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    most, seen = max(budget, 8 * alike), []
    for numbers, tree in trees(paths, joints, budget):
        mine = [paths[number] for number in numbers]
        check_layout(tree, mine)
        assert tree.num_tokens <= sum(map(len, mine))
        assert tree.num_tokens <= most or len(numbers) == 1
        seen += numbers
    assert sorted(seen) == list(range(len(paths)))


def only_tree(paths: list[tuple[int, ...]], joints: list[int]) -> Tree:
    ((numbers, tree),) = trees(paths, joints, 10**6)
    check_layout(tree, [paths[number] for number in numbers])
    return tree


@pytest.mark.parametrize("context", [SHORTEST, SHORTEST + 1, 200])
@pytest.mark.parametrize("alike", [0, 1, SHORTEST - 1])
def test_a_context_is_there_once_for_all_its_continuations(context, alike):
    """Continuations that begin with a few equal tokens do not move the joint: there, all of them can share."""
    begin = tuple(range(context))
    rests = [(900,) * (alike if i < 3 else 0) + (1000 + i, 5, 6) for i in range(7)]
    tree = only_tree([begin + rest for rest in rests], [context] * 7)
    assert tree.num_tokens == context + sum(map(len, rests))
    assert sorted(map(len, tree.segments)) == sorted([context, *map(len, rests)])


def test_continuations_that_go_on_alike_share_that_too():
    begin, going_on = tuple(range(30)), (7,) * SHORTEST
    tree = only_tree([begin + going_on + (i,) for i in range(3)] + [(*begin, 8, 8)], [30] * 4)
    assert tree.num_tokens == 30 + SHORTEST + 3 + 2


def test_examples_before_all_questions_are_there_once_in_a_row():
    examples = tuple(range(100))
    questions = [examples + (200 + i,) * 20 for i in range(6)]
    paths = [(*question, 300 + j, 9, 9, 9, 9) for question in questions for j in range(4)]
    joints = [120] * len(paths)
    assert only_tree(paths, joints).num_tokens == 100 + 6 * (20 + 4 * 5)


def test_rows_are_so_long_that_a_beginning_of_all_is_an_eighth_of_them():
    paths = [tuple(range(100)) + (200 + i,) * 25 for i in range(84)]
    found = [tree.num_tokens for _, tree in trees(paths, [100] * 84, 200)]
    assert found == [800, 800, 800]
    assert [tree.num_tokens for _, tree in trees(paths, [100] * 84, 1150)] == [1150, 1150], "or as long as they may be"


def test_equal_paths_are_there_once_however_short():
    """One-token continuations of a context read the same tokens."""
    assert only_tree([(1, 2, 3)] * 4, [3] * 4).num_tokens == 3
    assert only_tree([(1, 2, 3)] * 4 + [(1, 2, 3, 4)], [3] * 5).num_tokens == 7


def test_a_short_common_beginning_is_not_worth_a_segment():
    few = tuple(range(SHORTEST - 1))
    assert only_tree([(*few, 50), (*few, 60)], [SHORTEST] * 2).parents == [-1, -1]


def test_a_path_too_long_for_the_budget_stands_alone():
    paths = [tuple(range(50)), (99,) * 3]
    assert [numbers for numbers, _ in trees(paths, [1, 1], 10)] == [[0], [1]]


def test_no_paths_make_no_rows():
    assert list(trees([], [], 10)) == []


def test_more_cannot_be_shared_than_the_path_before_has():
    tree = Tree()
    tree.add((1, 2, 3), 0)
    with pytest.raises(ValueError, match="1 tokens too short"):
        tree.add((1, 2, 3, 4, 5), 4)
