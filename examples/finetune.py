"""Fine-tune a model with LoRA and look at all that came of it. Read it from top to bottom, copy it, change it.

    python examples/finetune.py                          # the pocket model learns worked arithmetic, on a CPU
    python examples/finetune.py method.rank=2 seed=1     # any key of the recipe, as on the command line

The recipe `pocket-lora` needs nothing but this package: a small base and endless rows come with it. For a model and rows of your
own, take another recipe in step 1 and name them:

    spec = loralab.recipe("sft-lora", ["model.path=FOLDER", "data.train=train.jsonl", "data.general=general.txt"])
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer

import loralab

# 1. A recipe, resolved into a spec: every value is checked, and a wrong one is an error that says what to do.
#    `loralab recipes show pocket-lora --resolved` lists all keys with their values and meanings.
spec = loralab.recipe("pocket-lora", sys.argv[1:])
print(
    f"{spec.method.name} on {spec.model.path}, learning rate {spec.optimizer.learning_rate:g}: runs/{spec.folder_name}"
)

# 2. Before anything is trained: which layers move, how long it takes, what it costs, and what exactly the model will read.
#    A loss is taken on the answer alone, and on the end token behind it, or the model would not learn to stop.
found = loralab.check(spec, num_examples=1)
print(f"{len(found.attachment.layers)} layers train, {found.attachment.share:.2%} of all numbers")
print(f"{found.total_steps} steps, about {found.memory.total / 2**20:,.0f} MiB")
print("one example; a loss is taken between « and »:")
print("  " + "".join(f"«{text}»" if labelled else text for text, labelled in found.examples[0]))

# 3. Train. The base stays as it is; what moves is the delta. The same call again resumes a run that was interrupted, and gives
#    the result of a finished one.
result = loralab.train(spec)
print(f"\ntrained in {result.status['wall_s']:.0f} s")

# 4. What was learned, what was forgotten. `target` is the new task, `source` the skills that the base had, `general` their text:
#    accuracy is a share of graded items, loss is in nats per token. The interval is that of the change, paired by item.
print(f"\n{'':<18}{'base':>8}{'after':>8}{'change':>8}   95 % interval               n")
for name, base, _before, after, change, interval, n in result.rows():
    if name.count("/") == 1:  # the scores of single skills have two slashes: see step 5
        numbers = "".join(f"{'–' if value is None else format(value, '.3f'):>8}" for value in (base, after, change))
        print(f"{name:<18}{numbers}   {interval:<28}{n}")

# 5. Forgetting is seldom even: the skills that lost most.
changes = {
    name.split("/")[1]: score.value
    for name, score in result.after.items()
    if name.startswith("source/") and name.endswith("/accuracy_change") and name.count("/") == 2
}
print("\nold skills, the worst first:")
for skill in sorted(changes, key=changes.__getitem__)[:3]:
    print(f"  {skill:<10} {changes[skill]:+.2f}")

# 6. The same prompts before and after, as they stand in samples.jsonl.
answers: dict[str, dict[str, str]] = {}
for line in result.samples():
    if line["role"] == "target":
        answers.setdefault(line["prompt"], {"right": line["reference"]})[line["model"]] = line["output"]
print("\nthe new task, before and after:")
for prompt, answer in list(answers.items())[:2]:
    print(f"  {prompt}\n    base:  {answer['base']}\n    tuned: {answer['tuned']}\n    right: {answer['right']}")

# 7. Inside the delta. Its singular values say over how many directions the change of a layer is spread: if nine tenths of its
#    energy lie in fewer directions than the rank offers, a lower rank might do.
spectra = result.spectra()
print("\ndirections that hold 90 % of the change, median over layers, and the rank on offer:")
print(spectra.groupby("module")[["rank90", "rank"]].median().astype(int).to_string())

# 8. The delta is a stock PEFT folder (a whole checkpoint if method.name=full). Merged it is a plain model; how much the merge
#    changed is measured, and one that changes too much is refused.
merged = result.folder.delta
if spec.method.name != "full":
    merged = result.folder.path / "merged"
    if not merged.exists():
        proof = loralab.merge(spec.model.path, result.folder.path, merged)
        print(f"\nmerged: {proof.kl_nats:.1e} nats between the predictions before and after")

# 9. From here on no loralab is needed: Transformers, vLLM and others load it.
model, tokenizer = AutoModelForCausalLM.from_pretrained(merged), AutoTokenizer.from_pretrained(merged)
prompt = next(iter(answers))
asked = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
written = model.generate(**asked, max_new_tokens=96, do_sample=False)[0, asked["input_ids"].shape[1] :]
print(f"\nthe merged model, by Transformers alone:\n  {prompt}{tokenizer.decode(written, skip_special_tokens=True)}")

# 10. One page with all of it: curves with intervals, spectra, samples, cost, and how to repeat the run.
print(f"\ndelta: {result.folder.delta}\nmodel: {merged}\npage:  {loralab.write_report(result.folder.path)}")
