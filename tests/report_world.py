"""Run folders for tests of the report, made in a second: every file a run leaves, its numbers drawn from a seed.

Scores follow from the items, as in a real run: items are drawn first, and means, changes and errors computed from them.
"""

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.random import Generator, default_rng

from loralab.evals.stats import Score, mean_score, skill_scores
from loralab.run.folder import RunFolder, append_line
from loralab.spec.recipes import dump
from loralab.spec.spec import RunSpec

SKILLS = ("copy", "reverse", "order", "count", "add", "facts", "stories", "spell")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
DEPTH, WIDTH, STEPS, ITEMS = 4, 48, 60, 40
TARGET_ITEMS = 160
ALL_PARAMETERS = 1_100_000


@dataclass(frozen=True)
class Plan:
    """What a run is to show: the share of the new task learned and of the old skills lost, and its size."""

    method: dict[str, Any]
    learned: float
    lost: float
    trained: int
    seconds: float
    learning_rate: float = 2e-3


PLANS = {
    "full": Plan({"name": "full"}, 0.78, 0.30, ALL_PARAMETERS, 61.0, 3e-4),
    "lora-r1": Plan({"name": "lora", "rank": 1}, 0.31, 0.03, 7_000, 41.0),
    "lora-r4": Plan({"name": "lora", "rank": 4}, 0.55, 0.08, 28_000, 42.0),
    "lora-r16": Plan({"name": "lora", "rank": 16}, 0.74, 0.16, 112_000, 44.0),
    "lora-plus": Plan({"name": "lora_plus", "rank": 8, "ratio": 8.0}, 0.70, 0.14, 56_000, 43.0, 1e-3),
    "cola": Plan({"name": "cola", "rank": 4, "links": 3}, 0.66, 0.10, 28_000, 47.0),
}


def make_sweep(root: Path, *, targets: tuple[str, ...] = ("calc", "cipher"), seed: int = 0) -> Path:
    """Write one run per plan and target below `root/TARGET`."""
    for target in targets:
        for name in PLANS:
            make_run(root / target, name, target=target, seed=seed)
    return root


def make_seeds(root: Path, *, plans: tuple[str, ...] = ("lora-r4", "full"), seeds: int = 3) -> Path:
    """Write runs that differ by nothing but their seed, of several plans."""
    for plan_name in plans:
        for seed in range(seeds):
            make_run(root, plan_name, seed=seed)
    return root


def probe_choices(path: Path) -> None:
    """Add what a run leaves that probed multiple choice over training: two tasks of the source, and its cost."""
    run = RunFolder(path)
    share, n = "share of items", 40
    for model, step in [("base", 0), *(("tuned", step) for step in range(0, STEPS + 1, STEPS // 6))]:
        lost = 0.1 * _progress(step) / _progress(STEPS) if model == "tuned" else 0.0
        for name, level in (
            ("source/choice", 0.6),
            ("source/hellaswag/choice", 0.5),
            ("source/winogrande/choice", 0.7),
        ):
            append_line(run.scores, Score(name, level - lost, share, n, 0.07).as_line(step, model))
            if model == "tuned":
                append_line(run.scores, Score(f"{name}_change", -lost, share, n, 0.03).as_line(step, model))
    run.write_status(probe_s=1.5, probe_tokens=12_000)


def make_run(root: Path, plan_name: str, *, target: str = "calc", seed: int = 0, **spec: Any) -> Path:
    """Write one finished run: all files of the run folder; `spec` overrides sections of its spec."""
    plan = PLANS[plan_name]
    run = open_run(root, plan_name, target, seed=seed, **spec)
    rng = default_rng([seed, *f"{target}/{plan_name}".encode()])
    if seed:  # the luck of training moves both
        plan = replace(plan, learned=plan.learned * rng.uniform(0.9, 1.1), lost=plan.lost * rng.uniform(0.7, 1.3))
    write_status(run, plan)
    write_environment(run, target)
    write_metrics(run, plan, rng)
    items = draw_items(plan, target, rng)
    write_scores(run, items, plan)
    items.to_parquet(run.path / "items.parquet", index=False)
    spectra(plan, rng).to_parquet(run.path / "spectra.parquet", index=False)
    write_samples(run, plan, target, rng)
    return run.path


def open_run(root: Path, plan_name: str, target: str = "calc", *, seed: int = 0, **spec: Any) -> RunFolder:
    """Make a run's folder with its spec and nothing else: a run that has not begun."""
    plan = PLANS[plan_name]
    graded = [f"pocket:{target}"] if target == "calc" else []
    given = {
        "name": plan_name,
        "seed": seed,
        "model": {"path": "pocket", "device": "cpu"},
        "data": {"train": f"pocket:{target}", "general": "pocket:source"},
        "method": plan.method,
        "optimizer": {"learning_rate": plan.learning_rate},
        "train": {"steps": STEPS, "batch_size": 8},
        "probes": {"target": graded, "source": ["pocket:source"]},
    }
    made = RunSpec.model_validate(given | spec)
    return RunFolder.create_or_open(root, made.folder_name, dump(made))


def write_status(run: RunFolder, plan: Plan, **changes: Any) -> None:
    facts = {"state": "done", "step": STEPS, "total_steps": STEPS, "tokens": STEPS * 1024, "end": "all steps done"}
    facts |= {"trained_parameters": plan.trained, "all_parameters": ALL_PARAMETERS, "wall_s": plan.seconds}
    facts |= {"peak_bytes": 320_000_000 + 40 * plan.trained, "started": "2026-01-02T03:04:05+00:00"}
    run.write_status(**facts | changes)


def mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def write_environment(run: RunFolder, target: str) -> None:
    inputs = {"base": mark("base"), "data": {name: mark(f"{target}/{name}") for name in ("train", "validation")}}
    facts = {
        "date": "2026-01-02T03:04:05+00:00",
        "command": ["loralab", "train", "sft-lora", f"data.train=pocket:{target}", "name=two words"],
        "python": "3.11.7",
        "platform": "Linux-x86_64",
        "host": "a-secret-host",
        "cores": 2,
        "memory_bytes": 8 * 2**30,
        "git_commit": None,
        "git_dirty": None,
        "packages": {"loralab": "0.1.0", "torch": "2.13.0"},
        "inputs": inputs,
    }
    run.environment.write_text(json.dumps(facts), encoding="utf-8")


def _progress(step: int) -> float:
    return 1 - 0.04 ** (step / STEPS)


def write_metrics(run: RunFolder, plan: Plan, rng: Generator) -> None:
    for step in range(1, STEPS + 1):
        loss = 2.4 - 1.9 * plan.learned * _progress(step) + rng.normal(0, 0.05)
        append_line(run.metrics, {"step": step, "loss": loss, "tokens": 1024, "wall_s": plan.seconds * step / STEPS})
    append_line(run.metrics, {"step": 20, "knot": 1, "gain": 0.3, "ends": False})


def draw_items(plan: Plan, target: str, rng: Generator) -> pd.DataFrame:
    """Draw the outcome of every item: what the base gets right is the same for every run."""
    parts = [_answers("source", skill, i, 0.95, plan.lost) for i, skill in enumerate(SKILLS)]
    if target == "calc":
        parts.append(_answers("target", "calc", len(SKILLS), 0.05, -plan.learned))
    for i, (probe, rise) in enumerate((("target", -1.9 * plan.learned), ("general", 1.2 * plan.lost))):
        same = default_rng([7, i])
        num_tokens = same.integers(8, 40, 64)
        base = same.normal(2.4 - 1.3 * i, 0.15, 64)
        tuned = base + rise + rng.normal(0, 0.12, 64)
        losses = {"base_loss_sum": base * num_tokens, "tuned_loss_sum": tuned * num_tokens}
        parts.append(pd.DataFrame({"probe": probe, "item": range(64), "num_tokens": num_tokens, **losses}))
    return pd.concat(parts, ignore_index=True)


def _answers(role: str, skill: str, number: int, base_share: float, lost: float) -> pd.DataFrame:
    same, n = default_rng([11, number]), ITEMS if role == "source" else TARGET_ITEMS
    base = (same.random(n) < base_share - 0.03 * (number % 4)).astype(float)
    hurt = min(0.97, lost * (0.2 + 1.6 * number / len(SKILLS))) if lost > 0 else lost
    luck = same.random(n)  # the same hard items for every run, as in life
    tuned = np.where(luck < hurt, 0.0, base) if lost > 0 else np.where(luck < -hurt, 1.0, base)
    prompts = [f"{skill} {i} = " for i in range(n)]
    right = {"base_right": base, "tuned_right": tuned, "prompt": prompts}
    return pd.DataFrame(
        {"probe": f"{role}/accuracy", "item": range(n), "num_tokens": 1, "skill": skill, **right}
    ).assign(base_loss_sum=np.nan, tuned_loss_sum=np.nan)


def write_scores(run: RunFolder, items: pd.DataFrame, plan: Plan) -> None:
    """Write scores at step 0, a few steps on the way (scaled by progress) and the end, where the answers are graded too."""
    texts = [items[items["probe"] == name] for name in ("target", "general")]
    for model, step in [("base", 0), *(("tuned", step) for step in range(0, STEPS + 1, STEPS // 6))]:
        part = _progress(step) / _progress(STEPS) if model == "tuned" and step else 0.0
        found = [score for rows in texts for score in _losses(rows, part, model)]
        if model == "tuned":
            found.append(Score("drift/kl", 0.9 * part * plan.lost, "nats/token", 64, 0.07 * part * plan.lost))
            found.append(Score("drift/top1_flips", part * plan.lost, "share of tokens", 64, 0.1 * part * plan.lost))
        if model == "base" or step == STEPS:
            found += [score for role in ("target", "source") for score in _accuracies(items, role, model)]
        for score in found:
            append_line(run.scores, score.as_line(step, model))


def _losses(rows: pd.DataFrame, part: float, model: str) -> list[Score]:
    name = rows["probe"].iloc[0]
    base, tuned, weights = (rows[c].to_numpy(float) for c in ("base_loss_sum", "tuned_loss_sum", "num_tokens"))
    loss = mean_score(f"{name}/loss", "nats/token", base + part * (tuned - base), weights)
    return [loss, mean_score(f"{name}/loss_rise", "nats/token", part * (tuned - base), weights)][
        : 1 + (model == "tuned")
    ]


def _accuracies(items: pd.DataFrame, role: str, model: str) -> list[Score]:
    rows = items[items["probe"] == f"{role}/accuracy"]
    if rows.empty:
        return []
    base, right, skills = (
        rows["base_right"].to_numpy(float),
        rows[f"{model}_right"].to_numpy(float),
        rows["skill"].tolist(),
    )
    found = skill_scores(f"{role}/accuracy", "share of items", right, skills)
    return found + (
        skill_scores(f"{role}/accuracy_change", "share of items", right - base, skills) if model == "tuned" else []
    )


def spectra(plan: Plan, rng: Generator) -> pd.DataFrame:
    rows = []
    rank = plan.method.get("rank", WIDTH) * plan.method.get("links", 1)
    for depth in range(DEPTH):
        for number, module in enumerate(MODULES):
            decay = 0.55 if rank < WIDTH else 0.35 + 0.03 * number
            values = np.sort(np.exp(-decay * np.arange(rank) ** 0.7) * rng.uniform(0.7, 1.3, rank))[::-1] * (
                1 + 0.1 * depth
            )
            energy = np.cumsum(values**2) / np.sum(values**2)
            share = values / values.sum()
            rows.append(
                {
                    **{"step": STEPS, "layer": f"model.layers.{depth}.{module}", "module": module, "depth": depth},
                    **{"out_features": WIDTH, "in_features": WIDTH, "rank": rank},
                    "rank90": int(np.searchsorted(energy, 0.9) + 1),
                    "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
                    "stable_rank": float((values**2).sum() / values[0] ** 2),
                    "frobenius": float(np.sqrt((values**2).sum())),
                    "spectral": float(values[0]),
                    "base_frobenius": 20.0,
                    "relative_norm": float(np.sqrt((values**2).sum())) / 20.0,
                    "singular_values": values.tolist(),
                }
            )
    return pd.DataFrame(rows)


def write_samples(run: RunFolder, plan: Plan, target: str, rng: Generator) -> None:
    """Write answers before and after; one holds markup, as a model's output may."""
    asked = [("source", skill, f"{skill} apple = ", f"{skill}d <b>apple</b>") for skill in SKILLS[:4]]
    if target == "calc":
        asked += [
            ("target", "calc", f"{a} + {a + 3} * 2 = ", f"{a + 3} * 2 = {2 * a + 6}; {3 * a + 6}") for a in (4, 7, 9)
        ]
    for step, model in ((0, "base"), (STEPS, "tuned")):
        for role, skill, prompt, reference in asked:
            share = (
                {"base": 1.0, "tuned": 1 - plan.lost}[model]
                if role == "source"
                else {"base": 0, "tuned": plan.learned}[model]
            )
            right = bool(rng.random() < share)
            output = reference if right else "<script>alert(1)</script> 12" if role == "target" else "apple apple"
            line = {
                "step": step,
                "model": model,
                "role": role,
                "skill": skill,
                "prompt": prompt,
                "reference": reference,
            }
            append_line(run.samples, {**line, "output": output, "right": right})
