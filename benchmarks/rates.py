"""Find the learning rate at which each arm of the demo learns most: the sweep that P1 asks for before any comparison.

    python benchmarks/rates.py [--steps 400] [--tasks calc cipher]

Every arm runs at every rate of the grid on the demo's data for the demo's steps, a process per core; the best rate is the one
with the lowest validation loss of the target. Prints a table and writes a line per run to benchmarks/results/rates-DATE.jsonl.
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path

from loralab.console.screen import console, table
from loralab.demo import ARMS, STEPS, TASKS, spec
from loralab.errors import Diverged
from loralab.lab.engines import train_all
from loralab.lab.index import index
from loralab.run.folder import environment, write_atomic
from loralab.spec.spec import RunSpec

GRID = (1e-3, 3e-3, 1e-2)
RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--runs", default="runs/rates")
    asked = parser.parse_args()

    specs: list[tuple[str, str, float, RunSpec]] = []
    for task in asked.tasks:
        for arm in asked.arms:
            for rate in GRID:
                plain = spec(task, arm, steps=asked.steps).model_dump(mode="json")
                plain["optimizer"]["learning_rate"] = rate
                plain["probes"] |= {"every": asked.steps, "target": [], "samples": 0}
                specs.append((task, arm, rate, RunSpec.model_validate(plain)))
    # Too high a rate diverges, which is an answer too: the other runs go on.
    try:
        train_all([s for *_, s in specs], asked.runs)
    except Diverged as error:
        print(error)
    found = index(asked.runs).set_index("folder")
    lines = []
    for task, arm, rate, made in specs:
        row = found.loc[made.folder_name]
        measured = {key: float(row[key]) for key in ("target_loss_base", "target_loss_end", "forgetting", "wall_s")}
        lines.append({"task": task, "arm": arm, "learning_rate": rate, "state": row["state"], **measured})

    for task in asked.tasks:
        rows = []
        for arm in asked.arms:
            mine = [line for line in lines if (line["task"], line["arm"]) == (task, arm)]
            done = [line for line in mine if line["state"] == "done"]
            best = min(done, key=lambda line: line["target_loss_end"], default=None)
            edge = " (edge of the grid)" if best and best["learning_rate"] in (GRID[0], GRID[-1]) else ""
            cells = [f"{x['target_loss_end']:.3f} / {x['forgetting']:+.3f}" if x in done else x["state"] for x in mine]
            rows.append((arm, *cells, f"{best['learning_rate']:g}{edge}" if best else "none"))
        heads = (task, *(f"{rate:g}" for rate in GRID), "learns most at")
        console().print(table(heads, rows, title="target loss / rise of the general loss, nats per token"))
    facts = environment()
    kept = {key: facts[key] for key in ("date", "python", "platform", "cores", "packages")}
    RESULTS.mkdir(exist_ok=True)
    out = RESULTS / f"rates-{datetime.now(UTC):%Y-%m-%d}.jsonl"
    head = {**kept, "steps": asked.steps}
    write_atomic(out, "".join(json.dumps(line) + "\n" for line in (head, *lines)))
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
