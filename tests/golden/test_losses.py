"""Thirty losses of every method, committed: a change of the numbers is a decision, never an accident.

On the machine that wrote them they come back to the last bit; other CPUs add in another order and round differently, so
they are compared with a relative tolerance of 1e-4. After a deliberate change, write them anew and look at the diff:

    PYTHONPATH=tests:tests/contract OMP_NUM_THREADS=1 .venv/bin/python tests/golden/test_losses.py
"""

import json
from pathlib import Path

import pytest
from battery import CASES, FixedFeed, NoWatch, loop_on, world

from loralab.methods import METHODS

STEPS, TOLERANCE = 30, 1e-4
FILE = Path(__file__).with_name("losses.json")
ONE_OF_EACH = {kind: next(case for case, (named, _) in CASES.items() if named == kind) for kind in METHODS}


class Cycle(FixedFeed):
    """Six random batches, over and over, so that there is something to learn."""

    def next_step(self):
        self.step %= 6
        return super().next_step()


def losses_of(case: str) -> list[float]:
    """Train on the tiny llama with the battery's loop and seeds."""
    watch = NoWatch()
    loop_on(world(case), steps=STEPS, feed=Cycle()).run(watch)
    return watch.losses


@pytest.mark.parametrize("kind", METHODS)
def test_thirty_losses_are_those_that_were_committed(kind: str) -> None:
    committed = json.loads(FILE.read_text(encoding="utf-8"))[kind]
    found = losses_of(ONE_OF_EACH[kind])
    assert found == pytest.approx(committed, rel=TOLERANCE)


def test_every_method_learns_and_no_two_alike() -> None:
    """What the committed numbers must show, whoever wrote them."""
    committed = json.loads(FILE.read_text(encoding="utf-8"))
    assert committed.keys() == METHODS.keys()
    for kind, losses in committed.items():
        assert len(losses) == STEPS
        assert losses[-6] < losses[0] - 0.1, kind
        # The same batch before any step: all methods begin at the base. PEFT's own layers round in another order.
        assert losses[0] == pytest.approx(committed["full"][0], rel=1e-5), kind
    curves = list(committed.values())
    apart = [max(abs(a - b) for a, b in zip(x, y, strict=True)) for i, x in enumerate(curves) for y in curves[:i]]
    assert min(apart) > 100 * TOLERANCE


if __name__ == "__main__":
    written = {kind: losses_of(case) for kind, case in ONE_OF_EACH.items()}
    FILE.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FILE}")
