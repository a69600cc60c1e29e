"""Problems with unit tests: rows, programs, grading, pass@k; HumanEval's own solutions all pass."""

import json
from fractions import Fraction
from itertools import combinations
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from confinement import need_confinement
from loralab.errors import DataError, EvaluationError
from loralab.evals.code import CodeProblem, cut, grade_code, pass_at_k, pass_at_k_curve, program, read_problems

DOUBLE = CodeProblem(
    task_id="own/0",
    prompt='def double(x):\n    """Twice x."""\n',
    test="def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(0) == 0",
    entry_point="double",
    canonical_solution="    return 2 * x\n",
)
HALF = CodeProblem("own/1", "def half(x):\n", "def check(candidate):\n    assert candidate(4) == 2", "half")


@pytest.fixture
def confined() -> None:
    need_confinement()


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_pass_at_k_is_the_share_of_draws_with_a_passing_sample() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = [any(sample < c for sample in draw) for draw in combinations(range(n), k)]
                assert pass_at_k(n, c, k) == float(Fraction(sum(draws), len(draws)))


@given(st.data())
def test_pass_at_k_is_the_products_of_the_paper(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 400))
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    missed = (
        prod((1 - Fraction(k, i) for i in range(n - c + 1, n + 1)), start=Fraction(1)) if n - c >= k else Fraction(0)
    )
    assert pass_at_k(n, c, k) == float(1 - missed)


def test_pass_at_1_is_the_share_that_passed() -> None:
    assert [pass_at_k(10**6, c, 1) for c in (0, 1, 10**6)] == [0.0, 1e-6, 1.0]


@pytest.mark.parametrize(
    ("n", "c", "k", "what"),
    [
        (5, 2, 6, "pass@6 of 5"),
        (5, 2, 0, "pass@0 of 5"),
        (5, 6, 1, "6 of 5"),
        (5, -1, 1, "-1 of 5"),
        (0, 0, 1, "pass@1 of 0"),
    ],
)
def test_impossible_counts_are_refused(n: int, c: int, k: int, what: str) -> None:
    with pytest.raises(EvaluationError, match=what):
        pass_at_k(n, c, k)


def test_the_curve_is_the_mean_over_problems() -> None:
    correct = [0, 1, 4, 4, 2]
    curve = pass_at_k_curve(4, correct)
    assert [score.name for score in curve] == ["pass@1", "pass@2", "pass@3", "pass@4"]
    for k, score in enumerate(curve, 1):
        values = [pass_at_k(4, c, k) for c in correct]
        mean = sum(values) / 5
        assert score.value == pytest.approx(mean, abs=1e-15)
        assert score.standard_error == pytest.approx((sum((v - mean) ** 2 for v in values) / 4 / 5) ** 0.5, abs=1e-15)
        assert score.n == 5
    assert curve[-1].value == 0.8
    assert pass_at_k_curve(2, [1])[0].standard_error is None


@pytest.mark.parametrize(("n", "correct"), [(0, [0]), (3, []), (3, [4])])
def test_a_curve_of_nothing_is_refused(n: int, correct: list[int]) -> None:
    with pytest.raises(EvaluationError):
        pass_at_k_curve(n, correct)


def test_problems_are_read_from_rows(tmp_path: Path) -> None:
    rows = [{**vars(DOUBLE), "more": 1}, {**vars(HALF), "canonical_solution": None, "task_id": 7}]
    found = read_problems(write(tmp_path / "problems.jsonl", rows))
    assert found == [DOUBLE, CodeProblem("7", HALF.prompt, HALF.test, HALF.entry_point)]


def test_a_missing_column_is_named_with_those_that_are_there(tmp_path: Path) -> None:
    row = {"task_id": "a", "prompt": "def f():\n", "tests": "assert f()", "entry_point": "f"}
    with pytest.raises(DataError, match="no column `test`") as caught:
        read_problems(write(tmp_path / "problems.jsonl", [row]))
    assert "task_id, prompt, tests, entry_point" in str(caught.value.fix)


def test_a_row_that_is_no_problem_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`test` is no text") as caught:
        read_problems(write(tmp_path / "problems.jsonl", [vars(DOUBLE), {**vars(HALF), "test": None}]))
    assert str(caught.value.where).endswith("row 2")
    with pytest.raises(DataError, match="two problems are named `own/0`"):
        read_problems(write(tmp_path / "twice.jsonl", [vars(DOUBLE), vars(DOUBLE)]))


@pytest.mark.parametrize(
    ("completion", "kept"),
    [
        ("    return 1\n\ndef g():\n    return 2\nprint(1)", "    return 1\n"),
        ("    return 1\nprint(1)\ndef g(): 0", "    return 1"),
        (
            "    if x:\n        print(x)\n    # so\n    return 1\n",
            "    if x:\n        print(x)\n    # so\n    return 1\n",
        ),
        ("    return 1\n# and", "    return 1"),
        ("    return 1\nif True:", "    return 1"),
        ("    return 1\nclass A:", "    return 1"),
        ("", ""),
    ],
)
def test_a_completion_ends_where_the_function_does(completion: str, kept: str) -> None:
    assert cut(completion) == kept


def test_completions_are_graded_problem_by_problem(confined: None) -> None:
    completions = [["    return 2 * x\n", "    return x\n", "    return 2 * x\n"], ["    return 2 * x\n"], []]
    outcomes = grade_code([DOUBLE, HALF, DOUBLE], completions)
    assert [[outcome.passed for outcome in mine] for mine in outcomes] == [[True, False, True], [False], []]
    assert outcomes[0][1].reason == "failed: AssertionError"


def test_equal_programs_run_once(confined: None) -> None:
    lucky = "    import os; print(os.urandom(8)); return 2 * x\n"
    (outcomes,) = grade_code([DOUBLE], [[lucky, lucky, lucky + "\n"]])
    assert outcomes[0] is outcomes[1]
    assert outcomes[0].passed and outcomes[2].passed and outcomes[0].output != outcomes[2].output


def test_human_eval(assets: Path, confined: None) -> None:
    problems = read_problems(str(assets / "data/humaneval/test.jsonl"))
    evasions = [
        "    pass\n",
        "    import os; os._exit(0)\n",
        "    raise SystemExit(0)\n",
        "    print('passed')\n    return None\n",
    ]
    outcomes = grade_code(problems, [[problem.canonical_solution, *evasions] for problem in problems])
    assert len(problems) == 164
    assert {problem.task_id: mine[0].reason for problem, mine in zip(problems, outcomes, strict=True)} == {
        problem.task_id: "passed" for problem in problems
    }
    assert not any(outcome.passed for mine in outcomes for outcome in mine[1:])
    assert pass_at_k_curve(5, [sum(outcome.passed for outcome in mine) for mine in outcomes])[0].value == pytest.approx(
        0.2
    )
    assert program(problems[0], "x").endswith("\ncheck(has_close_elements)\n")
