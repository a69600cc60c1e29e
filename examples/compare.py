"""Compare ways to teach one model the same thing. Read it from top to bottom, copy it, change it.

    python examples/compare.py                      # three ways, two seeds each, on the pocket model, on a CPU
    python examples/compare.py train.steps=400      # any key of the recipe; it changes all runs alike

All runs read the same rows in the same order, so they are compared at the same number of tokens.
"""

import sys
from math import comb

import pandas as pd

import loralab

RUNS = "runs/compare"

# The ways to compare, as changes of the recipe. Learning rates decide more than methods do: for a claim, search the best one
# for each way, as benchmarks/rates.py does. Here all take the recipe's.
WAYS = {
    "full": ["method.name=full"],
    "lora-r1": ["method.rank=1"],
    "lora-r16": ["method.rank=16"],
}
SEEDS = [0, 1]  # one seed ranks nothing; for a claim take five or more

# `train_all` begins processes, and each of them reads this file: what is to run once stands below this line.
if __name__ == "__main__":
    # 1. One spec per way and seed.
    specs = {
        (way, seed): loralab.recipe("pocket-lora", [f"name={way}", f"seed={seed}", *changes, *sys.argv[1:]])
        for way, changes in WAYS.items()
        for seed in SEEDS
    }

    # 2. Run them side by side, a process per core. The same call again goes on where it was stopped; what is finished is not run
    #    again, so a way that is added later costs only its own runs.
    loralab.train_all(
        list(specs.values()),
        RUNS,
        look=lambda folders: print(
            f"\r{sum(each.delta.exists() for each in folders)} of {len(folders)} runs done", end="", flush=True
        ),
    )

    # 3. What came of each. `train` gives the result of a finished run; nothing is trained here.
    #    Learned: rise of the share of new items that are right; forgot: fall of that share over the base's old skills.
    results = {key: loralab.train(spec, RUNS) for key, spec in specs.items()}
    table = pd.DataFrame(
        {
            "way": way,
            "seed": seed,
            "learned": result.score("target/accuracy_change").value,
            "forgot": 0 - result.score("source/accuracy_change").value,
            "target loss": result.score("target/loss").value,
            "tokens": result.status["tokens"],
            "seconds": result.status["wall_s"],
        }
        for (way, seed), result in results.items()
    )
    print(f"\n\n{table.to_string(index=False, float_format='{:.3f}'.format)}")

    # 4. By way: mean over seeds, and from the lowest to the highest seed. Two ways whose ranges overlap are not told apart.
    print("\nmean over seeds (lowest to highest)")
    means = table.groupby("way", sort=False)[["learned", "forgot"]].mean()
    for way, runs in table.groupby("way", sort=False):
        shown = [
            f"{name} {runs[name].mean():+.3f} ({runs[name].min():+.3f} to {runs[name].max():+.3f})" for name in means
        ]
        print(f"  {way:<10} {'   '.join(shown)}")

    # 5. The frontier: the ways that no other way matches on one side and beats on the other.
    print("\nthe frontier of learning and forgetting")
    for way, (learned, forgot) in means.iterrows():
        no_worse = means[(means["learned"] >= learned) & (means["forgot"] <= forgot)]
        better = no_worse.index[(no_worse != means.loc[way]).any(axis=1)]
        print(f"  {way:<10} " + (f"beaten by {', '.join(better)}" if len(better) else "on the frontier"))

    # 6. Item by item: all runs answered the same questions. Those that both got right, or both wrong, say nothing about which is
    #    better; the sign test asks how often a coin would split the others as unevenly as this.
    first, second = means["learned"].nlargest(2).index
    items = {way: pd.read_parquet(results[way, SEEDS[0]].folder.path / "items.parquet") for way in (first, second)}
    right = {
        way: rows.loc[rows["probe"] == "target/accuracy", "tuned_right"].to_numpy() > 0 for way, rows in items.items()
    }
    only_first = int((right[first] & ~right[second]).sum())
    only_second = int((right[second] & ~right[first]).sum())
    n = only_first + only_second
    chance = min(1.0, 2 * sum(comb(n, k) for k in range(min(only_first, only_second) + 1)) / 2**n)
    print(f"\nof {len(right[first])} new items, with seed {SEEDS[0]}:")
    print(f"  {only_first} only {first} got right, {only_second} only {second}; sign test p = {chance:.3g}")

    # 7. One page: learning against forgetting with intervals, curves, spectra, samples, cost, and how to repeat every run.
    print(f"\npage: {loralab.write_report(RUNS)}")
