"""The demo: pretrain a small base on a few text skills, teach it a new one in four ways, and compare.

Everything is real training through the same commands a person would use; it needs a CPU and a few minutes.
"""

import json
from pathlib import Path
from typing import Any

from loralab.console import LiveDisplay, PlainDisplay, console, table
from loralab.lab.experiment import train
from loralab.lab.result import Result
from loralab.pocket.skills import SOURCE, items, shift
from loralab.run.folder import write_atomic
from loralab.spec.spec import RunSpec

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "rank": 8},
    "lora_plus": {"name": "lora_plus", "rank": 8, "ratio": 8.0},
    "cola": {"name": "cola", "rank": 8, "links": 2},
}
LEARNING_RATES = {"full": 3e-4, "lora": 1e-3, "lora_plus": 5e-4, "cola": 1e-3}
"""Chosen so that all four learn the skill about as well, from the rates tried in docs/LOG.md."""


def tell(out: Path, *, display: LiveDisplay | PlainDisplay, base_steps: int = 800, steps: int = 150) -> list[Result]:
    """Run the story in a folder; what is finished there is not run again."""
    import torch

    torch.set_num_threads(1)  # so small a model gains nothing from a second thread, and loses much on shared cores
    say = console().print
    data, base = out / "data", out / "base"
    write_data(data)
    say("[bold]1. A base:[/bold] a small Llama learns to copy, reverse, order and point at letters.")
    if not (base / "config.json").exists():
        make_base(base)
    pretrained = train(base_spec(base, data, base_steps), out / "runs", display=display)
    say("\n[bold]2. A new skill[/bold] is taught in four ways, with the same data and the same number of steps.")
    results = [
        train(spec(name, str(pretrained.folder.delta), data, steps), out / "runs", display=display) for name in METHODS
    ]
    say("\n[bold]3. What was learned, what was forgotten[/bold] (nats per token; ± is a 95 % interval)")
    headers = (
        "method",
        "trained",
        "new skill before",
        "after",
        "old skills before",
        "after",
        "KL(base‖tuned)",
        "seconds",
    )
    say(table(headers, [_row(name, result) for name, result in zip(METHODS, results, strict=True)]))
    say(_verdict(dict(zip(METHODS, results, strict=True))))
    say(
        f"\nRun folders: {out / 'runs'}. Next: loralab train sft-lora model.path=FOLDER data.train=FILE", soft_wrap=True
    )
    return results


def write_data(folder: Path) -> None:
    """Write the story's three files: source skills (train and test) and the new skill (train and test)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, skills, split, count in (
        ("source-train", SOURCE, "train", 20000),
        ("source-test", SOURCE, "test", 400),
        ("target-train", (shift,), "train", 3000),
        ("target-test", (shift,), "test", 300),
    ):
        rows = ({"prompt": prompt, "completion": completion} for prompt, completion in items(skills, split, count))
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def make_base(folder: Path) -> None:
    """Write a Llama of about 0.3M parameters with random weights, and its tokenizer of single characters."""
    import torch
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    characters = sorted(set("abcdefghijklmnopqrstuvwxyz0123456789 =>:"))
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        shape = LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=128,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        LlamaForCausalLM(shape).save_pretrained(folder)


def base_spec(base: Path, data: Path, steps: int) -> RunSpec:
    """Give the spec of the pretraining run."""
    return RunSpec.model_validate(
        {
            "name": "demo-base",
            "model": {"path": str(base), "device": "cpu"},
            "data": {
                "train": str(data / "source-train.jsonl"),
                "validation": str(data / "source-test.jsonl"),
                "max_length": 128,
            },
            "method": {"name": "full"},
            "optimizer": {"name": "adamw", "learning_rate": 3e-3, "weight_decay": 0.01},
            "train": {"steps": steps, "batch_size": 8},
            "probes": {"every": 0.25, "drift": False},
        }
    )


def spec(method: str, base: str, data: Path, steps: int) -> RunSpec:
    """Give the spec that teaches the new skill by one method."""
    return RunSpec.model_validate(
        {
            "name": f"demo-{method.replace('_', '-')}",
            "model": {"path": base, "device": "cpu"},
            "data": {
                "train": str(data / "target-train.jsonl"),
                "validation": str(data / "target-test.jsonl"),
                "general": str(data / "source-test.jsonl"),
                "max_length": 128,
            },
            "method": METHODS[method],
            "optimizer": {"name": "adamw", "learning_rate": LEARNING_RATES[method]},
            "train": {"steps": steps, "batch_size": 8},
            "probes": {"every": 0.5},
        }
    )


def _row(name: str, result: Result) -> tuple[Any, ...]:
    status = result.status
    return (
        name,
        f"{status['trained_parameters'] / status['all_parameters']:.1%}",
        *(_with_error(result, f"{text}/loss", when) for text in ("target", "general") for when in ("base", "after")),
        f"{result.score('drift/kl').value:.3f}",
        f"{status['wall_s']:.0f}",
    )


def _with_error(result: Result, name: str, when: str) -> str:
    score = result.score(name, when)
    error = "" if score.standard_error is None else f" ±{1.96 * score.standard_error:.3f}"
    return f"{score.value:.3f}{error}"


def _verdict(results: dict[str, Result]) -> str:
    learned = {name: -result.score("target/loss_rise").value for name, result in results.items()}
    forgot = {name: result.score("general/loss_rise").value for name, result in results.items()}
    most, least = max(learned, key=learned.__getitem__), min(forgot, key=forgot.__getitem__)
    return (
        f"{most} learned most ({learned[most]:.3f} nats per token off the new skill's loss); "
        f"{least} forgot least ({forgot[least]:+.3f} on the old skills). One seed: differences inside the intervals are ties."
    )
