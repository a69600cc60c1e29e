"""A base, deltas of four kinds and small tasks on disk, for tests of whole evaluations."""

from pathlib import Path
from typing import Any

from little_world import make_base, rows, write_rows

CHOICE = """
task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pick.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "pick {{{{asked}}}}:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
metadata: {{version: 1.5}}
"""
WRITTEN = """
task: say
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pick.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "say {{{{asked}}}}:"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["zz"], max_gen_toks: 6}}
metric_list: [{{metric: exact_match}}]
"""
ROLLING = """
task: read
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/pick.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{asked}}}} is {{{{choices | join(' or ')}}}}. and so it goes on and on and on beyond the window of 64"
metric_list: [{{metric: bits_per_byte}}]
"""
WORDS = ["dog", "cat", "sun", "day", "red", "hat", "box", "pig", "log", "net"]
DELTAS = ("lora", "wide", "biased", "full")


def pick_rows(count: int = 12) -> list[dict[str, Any]]:
    return [
        {"asked": f"{WORDS[i % 10]} {i}", "choices": [WORDS[(i + k) % 10] for k in range(2 + i % 3)], "right": i % 2}
        for i in range(count)
    ]


def make_adapter(folder: Path, seed: int, **chosen: Any) -> Path:
    """Save an adapter for `make_base`'s model with random weights, by peft."""
    import torch
    from peft import LoraConfig, get_peft_model

    from tiny import tiny

    model = get_peft_model(tiny("llama"), LoraConfig(task_type="CAUSAL_LM", **chosen))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 4)
    model.save_pretrained(folder)
    return folder


def make_exam_world(folder: Path) -> Path:
    """Write `base/`, the deltas, `tasks/` in lm-eval's format and `items.jsonl`."""
    make_base(folder / "base")
    make_adapter(folder / "lora", 1, r=2, target_modules=["q_proj", "v_proj"])
    make_adapter(folder / "wide", 2, r=5, target_modules=["down_proj", "o_proj"], modules_to_save=["lm_head"])
    make_adapter(folder / "biased", 3, r=1, target_modules=["k_proj"], modules_to_save=["norm"])
    make_base(folder / "full", seed=1)
    (folder / "tasks").mkdir()
    for name, text in {"pick": CHOICE, "say": WRITTEN, "read": ROLLING}.items():
        (folder / "tasks" / f"{name}.yaml").write_text(text.format(folder=folder), encoding="utf-8")
    write_rows(folder / "pick.jsonl", pick_rows())
    plain = [{**row, "skill": "reverse"} for row in rows(6, seed=3)]
    chosen = [
        {"prompt": f"last {r['completion']} = ", "choices": [*"abcd"], "right": i % 4} for i, r in enumerate(rows(8, 4))
    ]
    write_rows(folder / "items.jsonl", [*plain, *chosen])
    return folder
