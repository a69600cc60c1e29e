"""`stack`: programs for a tiny stack machine, graded by running hidden tests: the HumanEval of the pocket world.

A program is words between spaces. Numbers are pushed; `+ - *` take two values and push one; `dup` doubles the top, `swap`
exchanges the upper two, `drop` takes one away. A task says what to do with the value on the stack, and each step of it can
be written in several ways, so a task has many right programs.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loralab.pocket.items import Item

MOST_WORDS = 64
MOST_DIGITS = 18
"""A program that is longer, or whose values grow beyond this, has failed: a machine that always stops needs no clock."""

INPUTS = (0, 1, 2, 5, 7, 10, 13)


@dataclass(frozen=True)
class Step:
    """One step of a task: its words, what it computes, and ways to write it; `{n}` stands for a number."""

    words: str
    compute: Callable[[int, int], int]
    ways: tuple[str, ...]


STEPS = (
    Step("add {n}", lambda x, n: x + n, ("{n} +", "{n} swap +")),
    Step("take {n}", lambda x, n: x - n, ("{n} -",)),
    Step("times {n}", lambda x, n: x * n, ("{n} *", "{n} swap *")),
    Step("double", lambda x, n: 2 * x, ("2 *", "dup +")),
    Step("triple", lambda x, n: 3 * x, ("3 *", "dup dup + +", "dup 2 * +")),
    Step("square", lambda x, n: x * x, ("dup *",)),
    Step("negate", lambda x, n: -x, ("0 swap -",)),
    Step("from {n}", lambda x, n: n - x, ("{n} swap -",)),
    Step("plus its square", lambda x, n: x + x * x, ("dup dup * +", "dup 1 + *")),
)


class MachineError(Exception):
    """A program that cannot go on; inside this module it only says that a test failed."""


def run(program: str, inputs: Sequence[int]) -> int:
    """Run a program on a stack that holds the inputs and give the one value that it leaves.

    Raises:
        MachineError: no word, an unknown one, too little on the stack, more or less than one value left, too long, too large.
    """
    words, stack = program.split(), list(inputs)
    if not 0 < len(words) <= MOST_WORDS:  # "add 3, take 3" asks for nothing, but saying nothing is no answer
        raise MachineError("too long" if words else "empty")
    for word in words:
        _do(word, stack)
        if stack and abs(stack[-1]) >= 10**MOST_DIGITS:
            raise MachineError("too large")
    if len(stack) != 1:
        raise MachineError(f"{len(stack)} values left")
    return stack[0]


def _do(word: str, stack: list[int]) -> None:
    if word.isascii() and word.isdigit() and len(word) <= MOST_DIGITS:
        stack.append(int(word))
        return
    needs = {"+": 2, "-": 2, "*": 2, "swap": 2, "dup": 1, "drop": 1}.get(word)
    if needs is None or len(stack) < needs:
        raise MachineError(f"cannot do {word!r}")
    taken = [stack.pop() for _ in range(needs)][::-1]
    match word, taken:
        case "+", [a, b]:
            stack.append(a + b)
        case "-", [a, b]:
            stack.append(a - b)
        case "*", [a, b]:
            stack.append(a * b)
        case "swap", [a, b]:
            stack += [b, a]
        case "dup", [a]:
            stack += [a, a]


def passes(program: str, tests: Sequence[tuple[tuple[int, ...], int]]) -> bool:
    """Tell whether a program gives the right result on every hidden test."""
    try:
        return all(run(program, inputs) == result for inputs, result in tests)
    except MachineError:
        return False


def stack(rng: random.Random, difficulty: int) -> Item:
    """Describe a task of one step (difficulty 1) to three (5) and give one of its programs."""
    number = 1 + (difficulty - 1) // 2 if rng.random() < 0.5 else 1 + difficulty // 2
    told, written, values = [], [], list(INPUTS)
    for _ in range(number):
        step, n = rng.choice(STEPS), rng.randint(2, 9)
        told.append(step.words.format(n=n))
        written.append(rng.choice(step.ways).format(n=n))
        values = [step.compute(value, n) for value in values]
    tests = tuple(((x,), y) for x, y in zip(INPUTS, values, strict=True))
    return Item("stack", f"program: {', '.join(told)}. ", " ".join(written), tests=tests)
