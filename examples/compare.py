"""Compare ways to teach one model the same thing: a flat script to copy and change.

    python examples/compare.py                                    # six runs on the pocket model, on a CPU
    python examples/compare.py model.path=FOLDER data.train=FILE data.general=FILE train.steps=500

Every `key=value` changes all runs alike. One seed ranks nothing: give several below, and read the intervals.
"""

import sys

import loralab

# The ways to compare. Learning rates decide more than methods do, so each method gets its own.
WAYS = {
    "full": ["method.name=full", "optimizer.learning_rate=5e-4"],
    "lora-r2": ["method.name=lora", "method.rank=2", "optimizer.learning_rate=3e-3"],
    "lora-r16": ["method.name=lora", "method.rank=16", "optimizer.learning_rate=3e-3"],
}
SEEDS = [0, 1]

COMMON = [
    "model.path=pocket",
    "model.device=cpu",
    "data.train=pocket:calc?items=4000",
    "data.validation=pocket:calc/validation?items=200",
    "data.general=pocket:source/validation?items=200",
    "data.max_length=256",
    "probes.target=pocket:calc",
    "probes.source=pocket:source",
    "probes.every=0.5",
    "train.epochs=null",
    "train.steps=150",
    "train.batch_size=4",
]


def main(overrides: list[str], runs: str = "runs/compare") -> None:
    # 1. One spec per way and seed. All read the same rows, so the comparison is at equal tokens.
    changed = {override.partition("=")[0] for override in overrides}
    common = [default for default in COMMON if default.partition("=")[0] not in changed]
    specs = [
        loralab.recipe("sft-lora", [*common, f"name={way}", f"seed={seed}", *keys, *overrides])
        for way, keys in WAYS.items()
        for seed in SEEDS
    ]

    # 2. Run them side by side, a process per core; what is finished already is not run again.
    print(f"{len(specs)} runs in {runs}")
    loralab.train_all(specs, runs)

    # 3. The run folders are the truth; the table is read from them.
    table = loralab.runs(runs)
    print(
        table[["folder", "method", "rank", "learning_rate", "learning", "forgetting", "wall_s"]].to_string(index=False)
    )

    # 4. Learning and forgetting by way, over seeds. Nats per token: how much the target's loss fell, the general loss rose.
    table["way"] = [folder.rpartition("-")[0] for folder in table["folder"]]
    means = table.groupby("way")[["learning", "forgetting"]].agg(["mean", "std"])
    print(f"\nmean and spread over {len(SEEDS)} seeds:\n{means.to_string(float_format='{:.3f}'.format)}")

    # 5. The frontier: ways that no other way beats on both sides at once.
    points = means.xs("mean", axis=1, level=1)
    for way, point in points.iterrows():
        better = (points["learning"] >= point["learning"]) & (points["forgetting"] <= point["forgetting"])
        beaten = [other for other in points.index[better] if other != way]
        print(f"{way}: " + (f"beaten by {', '.join(beaten)} on both sides" if beaten else "on the frontier"))

    # 6. One page: the plane with intervals, curves, spectra, samples, cost, and how to repeat every run.
    print(f"\npage: {loralab.write_report(runs)}")


if __name__ == "__main__":
    main(sys.argv[1:])
