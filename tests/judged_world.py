"""Folders of reward, classifier and policy runs for tests of the report, made in a second without a model.

Rewards are drawn, and read by the real probe; of policies, prompts' rewards are drawn and scores computed from them.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from loralab.base.labelled import Labelled, collate_labelled
from loralab.evals.scored import ScoreProbe
from loralab.evals.stats import Score, mean_score
from loralab.run.folder import RunFolder, append_line
from report_world import PLANS, STEPS, open_run, write_environment, write_status

EVERY = STEPS // 6
READS = (0, *range(EVERY, STEPS + 1, EVERY))
PAIRS, TEXTS, PROMPTS = 80, 120, 60
UP = 0.8
"""Share of thumbs up."""


class Drawn(nn.Module):
    """A scorer whose rewards are drawn: at `skill` 0 noise, above it what people said shows through."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.outputs, self.skill = outputs, 0.0

    @property
    def model(self) -> nn.Module:
        return self

    def scores(self, batch: Any) -> torch.Tensor:
        rng = np.random.default_rng(3)
        noise = rng.normal(size=(len(batch.answers), self.outputs))
        noise[:, 0] += 0.03 * batch.answers.numpy()
        if batch.kind == "pairs":
            noise[0::2, 0] += 2.5 * self.skill
        elif batch.kind == "thumbs":
            noise[:, 0] += 2.5 * self.skill * (2 * batch.labels.numpy() - 1)
        elif batch.kind == "regression":
            noise[:, 0] = (1 - self.skill) * noise[:, 0] + self.skill * batch.labels.numpy()
        else:
            noise[np.arange(len(noise)), batch.labels.numpy().astype(int)] += 2.5 * self.skill
        return torch.tensor(noise, dtype=torch.float32)


def rows(kind: str) -> list[Labelled]:
    """Draw judged rows of a kind: the same for every run."""
    rng = np.random.default_rng(5)
    found = []
    for _ in range(PAIRS if kind == "pairs" else TEXTS):
        lengths = rng.integers(3, 30, 2)
        if kind == "pairs":
            segments, label, answers = (4, *lengths.tolist()), 0.0, tuple(lengths.tolist())
        else:
            label = {"thumbs": float(rng.random() < UP), "regression": float(rng.normal())}.get(
                kind, float(rng.integers(0, 2))
            )
            segments, answers = (int(lengths[0]) + 4,), (int(lengths[0]),)
        tokens = rng.integers(3, 90, sum(segments)).astype(np.uint32)
        found.append(Labelled(tokens, segments, label, answers, len(tokens), kind))
    return found


def make_judged(
    root: Path,
    plan: str = "lora-r4",
    *,
    kind: str = "pairs",
    skill: float = 1.0,
    delta_step: int | None = None,
    **spec: Any,
) -> Path:
    """Write a finished run of a reward model or classifier that rises to `skill`, read by the real probe."""
    name = "reward" if kind in ("pairs", "thumbs") else "classify"
    given = {"objective": {"name": name}, "data": {"train": "pocket:judged"}, "probes": {}} | spec
    run = open_run(root, plan, "judged", **given)
    write_environment(run, "judged")
    head = Drawn(2 if kind == "classify" else 1)
    names = ("bad", "good") if kind == "classify" else ()
    probe = ScoreProbe([collate_labelled(rows(kind))], head, kind=kind, classes=names)
    first = probe.read_base()
    for score in first.scores:
        append_line(run.scores, score.as_line(0, "base"))
    last = first
    for step in READS:
        head.skill = skill * step / STEPS
        reading = probe.read(step)
        for score in reading.scores:
            append_line(run.scores, score.as_line(step, "tuned"))
        if step <= (delta_step or STEPS):
            last = reading
    for step in range(1, STEPS + 1):
        append_line(run.metrics, {"step": step, "loss": 0.7 - 0.5 * step / STEPS, "accuracy": 0.8, "tokens": 900})
    table = pd.DataFrame(last.items).rename(columns={"loss_sum": "tuned_loss_sum", "right": "tuned_right"})
    base = pd.DataFrame(first.items)
    table = table.assign(probe="target", item=range(len(table)), num_tokens=None, skill=None, prompt=None)
    table["base_loss_sum"] = base["loss_sum"]
    table["base_right"] = base.get("right")
    table.to_parquet(run.path / "items.parquet", index=False)
    write_status(run, PLANS[plan], **({} if delta_step is None else {"delta_step": delta_step}))
    return run.path


def make_policy(
    root: Path, plan: str = "lora-r4", *, games: bool = False, held_out: bool = True, scale: float = 1.0, **spec: Any
) -> Path:
    """Write a finished reinforced run: its reward rises; the held-out one rises too, or falls back where it games."""
    sources = {"held_out": ["pocket:true"]} if held_out else {}
    objective = {"name": "policy", "reward": ["pocket:true"], **sources}
    data = {"train": "pocket:words", "general": "pocket:source"}
    run = open_run(root, plan, "words", **{"objective": objective, "data": data, "probes": {}} | spec)
    write_environment(run, "words")
    rng = np.random.default_rng(1)
    base = {"reward": rng.normal(0, 1, PROMPTS) * scale, "held_out": rng.normal(0.4, 0.1, PROMPTS)}
    luck = {name: rng.normal(0, 0.1, PROMPTS) * values.std() for name, values in base.items()}
    for step in (-1, *READS):
        model, part = ("base", 0.0) if step < 0 else ("tuned", step / STEPS)
        true = 0.5 * part if not games else 1.2 * part * (0.75 - part)
        now = {
            "reward": base["reward"] + scale * 2 * part + (step > 0) * luck["reward"],
            "held_out": base["held_out"] + true + (step > 0) * luck["held_out"],
        }
        found = [_mean(f"policy/{name}", values) for name, values in now.items() if held_out or name == "reward"]
        if model == "tuned":
            found += [
                _mean(f"policy/{name}_change", now[name] - base[name]) for name in now if held_out or name == "reward"
            ]
        found += [
            Score("policy/kl", 8 * part**2, "nats/answer", PROMPTS, 0.2 * part),
            Score("policy/entropy", 1.2 - 0.6 * part, "nats/token", PROMPTS, 0.02),
            Score("policy/length", 12 + 6 * part, "tokens/answer", PROMPTS, 0.4),
            Score("policy/distinct", 1 - 0.5 * part, "share of answers", PROMPTS, 0.02),
            Score("general/loss", 1.5 + 0.1 * part, "nats/token", 40, 0.05),
        ]
        if model == "tuned":
            found.append(Score("general/loss_rise", 0.1 * part, "nats/token", 40, 0.01))
        for score in found:
            append_line(run.scores, score.as_line(max(step, 0), model))
        _samples(run, max(step, 0), model, now, held_out)
    for step in range(1, STEPS + 1):
        facts = {"reward": 2 * step / STEPS, "kl": 8 * (step / STEPS) ** 2, "entropy": 1.2, "length": 12.0}
        facts |= {"equal_rewards": 4.0 * (step % 2)}
        append_line(run.metrics, {"step": step, "loss": -0.3, "tokens": 900, **facts})
    table = pd.DataFrame(now).assign(probe="policy", item=range(PROMPTS), skill="policy", prompt="p", num_tokens=None)
    table.assign(base_loss_sum=None, tuned_loss_sum=None).to_parquet(run.path / "items.parquet", index=False)
    write_status(run, PLANS[plan])
    return run.path


def _mean(name: str, values: np.ndarray) -> Score:
    return mean_score(name, "reward", values, np.ones(len(values)))


def _samples(run: RunFolder, step: int, model: str, now: dict[str, np.ndarray], held_out: bool) -> None:
    if model == "tuned" and not step:
        return
    for i in range(2):
        line = {"step": step, "model": model, "role": "policy", "skill": "policy", "prompt": f"Say <b>word</b> {i}:"}
        rewards = {name: float(values[i]) for name, values in now.items() if held_out or name == "reward"}
        output = f"written by {model} at {step} <script>alert(1)</script>"
        append_line(run.samples, {**line, "reference": "", "output": output, "right": None, **rewards})
