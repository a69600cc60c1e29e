"""Fine-tune one model with LoRA and look at all that came of it: a flat script to copy and change.

    python examples/finetune.py                                   # the pocket model learns worked arithmetic, on a CPU
    python examples/finetune.py model.path=FOLDER data.train=FILE probes.target=TASKS.jsonl train.epochs=3

Every `key=value` changes the recipe, as on the command line: `loralab recipes show sft-lora --resolved` lists the keys.
"""

import sys

import loralab

RECIPE = "sft-lora"

# What this script teaches if nothing else is asked: the small base that comes with loralab learns arithmetic in words.
# `probes.target` is what should be learned, `probes.source` what the base knows and should keep.
DEFAULTS = [
    "model.path=pocket",
    "model.device=cpu",
    "data.train=pocket:calc?items=4000",
    "data.validation=pocket:calc/validation?items=200",
    "data.general=pocket:source/validation?items=200",
    "data.max_length=256",
    "probes.target=pocket:calc",
    "probes.source=pocket:source",
    "probes.every=0.25",
    "method.rank=8",
    "optimizer.learning_rate=3e-3",
    "train.epochs=null",
    "train.steps=150",
    "train.batch_size=4",
]


def main(overrides: list[str], runs: str = "runs") -> None:
    # 1. The recipe, resolved: strict, frozen, hashed. A wrong key or value is an error that says what to do.
    changed = {override.partition("=")[0] for override in overrides}
    defaults = [default for default in DEFAULTS if default.partition("=")[0] not in changed]
    spec = loralab.recipe(RECIPE, [*defaults, *overrides])
    print(
        f"run {spec.folder_name}: {spec.method.name} on {spec.model.path}, learning rate {spec.optimizer.learning_rate:g}"
    )

    # 2. Before anything is trained: which layers move, what the model will see, where its loss is taken, what it costs.
    found = loralab.check(spec, num_examples=1)
    share = found.attachment
    print(
        f"{len(share.layers)} layers get a pair: {share.trained_parameters:,} numbers train, {share.share:.2%} of all"
    )
    print(f"{found.total_steps} steps; about {found.memory.total / 2**20:,.0f} MiB")
    print("one example, the loss is taken between « and »:")
    for text, labelled in found.examples[0]:
        print(f"«{text}»" if labelled else text, end="")
    print("\n")

    # 3. Train. The same call again resumes an interrupted run, bit for bit on a CPU, or returns a finished one.
    result = loralab.train(spec, runs)

    # 4. What was learned, what was forgotten: each number with n and a 95 % interval of its change, paired by item.
    print(f"{'':<22}{'base':>9}{'after':>9}{'change':>9}  95 % interval")
    for name, base, _before, after, change, interval, n in result.rows():
        if name.count("/") == 1:  # single skills have two slashes
            cells = [f"{value:9.4f}" if value is not None else f"{'–':>9}" for value in (base, after, change)]
            print(f"{name:<22}{''.join(cells)}  {interval}  (n={n})")

    # 5. Answers before and after, as they stand in the run's folder.
    print("\nthe same prompts, before and after:")
    answers: dict[str, dict[str, str]] = {}
    for line in result.samples():
        answers.setdefault(line["prompt"], {})[line["model"]] = line["output"]
    for prompt, answer in list(answers.items())[:3]:
        print(f"  {prompt!r}\n    base:  {answer.get('base')!r}\n    tuned: {answer.get('tuned')!r}")

    # 6. Inside the delta: over how many directions is the change of each layer spread?
    spectra = result.spectra()
    print("\ndirections that hold 90 % of the change (median over layers), by kind of layer:")
    print(spectra.groupby("module")["rank90"].median().to_string())

    # 7. The delta is a stock PEFT folder; merged, it is a plain Hugging Face model. The merge is proved, not assumed.
    print(f"\ndelta:  {result.folder.delta}")
    if spec.method.name != "full":
        merged = result.folder.path / "merged"
        if not merged.exists():
            proof = loralab.merge(spec.model.path, result.folder.path, merged)
            print(f"merged: {merged} (KL to the unmerged model {proof.kl_nats:.2g} nats)")

    # 8. One page with all of it.
    print(f"page:   {loralab.write_report(result.folder.path)}")


if __name__ == "__main__":
    main(sys.argv[1:])
