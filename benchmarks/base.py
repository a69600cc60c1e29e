"""Grade the shipped base on its ten skills and on the targets: shares of test items with 95 % intervals.

python benchmarks/base.py [--items 500]
"""

import argparse

from loralab.base.model import load
from loralab.console.screen import console, table
from loralab.evals.tasks import probes_of
from loralab.lab.tasks import read_tasks
from loralab.spec.spec import TaskSpec
from loralab.training.loss import LanguageHead

PATHS = ("pocket:source", "pocket:calc?difficulty=2", "pocket:stack", "pocket:cipher?difficulty=5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=500)
    asked = parser.parse_args()
    base = load("pocket", device="cpu", dtype="float32")
    assert base.tokenizer is not None
    head = LanguageHead(base.model)
    rows = []
    for path in PATHS:
        tasks = read_tasks([TaskSpec(path=path, items=asked.items)])
        for probe in probes_of("of", tasks, head, base.tokenizer):
            for score in probe.read().scores:
                name = score.name.removeprefix("of/")
                low, high = score.interval() or (score.value, score.value)
                rows.append((path, name, score.value, f"[{max(0, low):.3f}, {min(1, high):.3f}]", score.n))
    console().print(table(("items", "score", "share right", "95 % interval", "n"), rows))


if __name__ == "__main__":
    main()
