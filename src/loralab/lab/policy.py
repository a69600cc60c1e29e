"""From the spec of a policy to the objects of a run: prompts, rewards, value, and what writes, trains and watches it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import numpy as np

from loralab.base.corpus import Corpus, tokenise
from loralab.base.model import Base
from loralab.base.sources import content_sha256
from loralab.delta.opened import folder_of
from loralab.errors import LoralabError, ModelError, SpecError
from loralab.evals.exam_probe import ExamProbe
from loralab.evals.generate import Answer, Sampling, Writer
from loralab.evals.policy_probe import HELD_OUT, REWARD, PolicyProbe, PolicySamples
from loralab.evals.probe import Probe
from loralab.evals.served import ServedWriter, Server
from loralab.evals.stats import Score
from loralab.evals.tasks import Task
from loralab.lab.prepare import (
    Prepared,
    exam_probes_of,
    fingerprints_of,
    items_of,
    load_base,
    method_of,
    refuse_missing_files,
    refuse_short,
    sources_of,
    start_of,
)
from loralab.lab.probes import kept_samples, task_probes, text_probes
from loralab.lab.prompts import Asked, Batches, Prompts, read_prompts
from loralab.lab.reward_function import REWARD_FUNCTION
from loralab.lab.reward_models import RewardModels, read_reward
from loralab.lab.rewards import Rewards, is_delta, look_for_rewards, refuse_ungradable, rewards_of
from loralab.lab.rollouts import Rollouts, answered, seed_of
from loralab.methods import Method
from loralab.methods.base import Attachment
from loralab.methods.value import Value, WithValue
from loralab.spec.method import LoraSpec
from loralab.spec.objective import PolicySpec
from loralab.spec.spec import RunSpec, SourceSpec
from loralab.training.loss import LanguageHead
from loralab.training.objectives.policy import PolicyObjective
from loralab.training.recompute import recompute_

FULL_VALUE_RANK = 16
FEWEST, MOST = 4, 16
"""Answers to each held-out prompt, where prompts are many and where they are few."""

FEWEST_PROMPTS = 16
"""Held-out prompts below which each gets one answer, so that there are more of them."""
HELD_OUT_BATCH = -1
"""Number of the batch whose random numbers held-out answers are drawn with."""


@dataclass(frozen=True)
class PolicyData:
    """Prompts of a run, and the general text on which forgetting is watched."""

    train: Prompts
    validation: Prompts | None
    general: Corpus | None
    tasks: dict[str, list[Task]]
    exams: dict[str, list[ExamProbe]] = field(default_factory=dict)
    deltas: dict[str, str] = field(default_factory=dict)
    """SHA-256 of what the run reads of deltas: of rewards by their paths, and of what the base wears from the start."""

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Name what the run reads by content."""
        found: dict[str, Any] = {name: one.fingerprint for name, one in self._parts() if len(one)}
        return found | self.deltas | fingerprints_of(self.tasks, self.exams)

    @property
    def report(self) -> dict[str, Any]:
        """Count what became of every row."""
        return {name: one.report.as_dict() for name, one in self._parts()}

    def _parts(self) -> Iterator[tuple[str, Prompts | Corpus]]:
        for name in ("train", "validation", "general"):
            if (one := getattr(self, name)) is not None:
                yield name, one


def prepare_policy(spec: RunSpec, objective: PolicySpec) -> Prepared:
    """Load, read and attach for training a policy.

    Policy, reference, value and reward models share one base: each is a delta on it, put on while it is needed. A delta that the
    base wears from the start belongs to the reference; rewards act on the base alone.

    Raises:
        LoralabError: whatever is wrong with model, data, method or rewards.
    """
    _refuse_what_means_nothing(spec, objective)
    refuse_missing_files(spec)
    sources = [*objective.reward, *objective.held_out]
    functions = look_for_rewards(sources)
    base = load_base(spec)
    if base.tokenizer is None or not base.model.can_generate():
        raise ModelError(
            f"{type(base.model).__name__} cannot write answers", where="model.path", fix="take a causal one"
        )
    data = _read(spec, objective, base)
    every = [*data.train.asked, *(data.validation.asked if data.validation is not None else ())]
    for source in sources:
        refuse_ungradable(every, source.path)
    found = {source.path: read_reward(source.path, base) for source in sources if is_delta(source.path)}
    method, value, attachment = _attach(spec, objective, base)
    head = LanguageHead(base.model)
    models = RewardModels(found, base, head, method.plain)
    rewards, held_out = (rewards_of(s, functions, models.reward) for s in (objective.reward, objective.held_out))
    writer = Writer(base.model, base.tokenizer, together=head.packs)
    stand_in = None
    if objective.server is not None:
        stand_in = ServedWriter(Server(objective.server), method.save, base.model, base.tokenizer)
        stand_in.check(data.train.asked[0].prompt, objective.temperature)
    batches = Batches(data.train, batch_size=spec.train.batch_size, seed=spec.seed)
    rollouts = Rollouts(
        stand_in or writer,
        batches,
        rewards,
        samples=objective.samples,
        temperature=objective.temperature,
        top_p=objective.top_p,
        seed=spec.seed,
    )
    policy = PolicyObjective(
        rollouts,
        head,
        algorithm=objective.algorithm,
        beta=objective.beta,
        kl=objective.kl,
        reference=method.without,
        value=value,
        epochs=objective.epochs,
        minibatches=objective.minibatches,
        clip=objective.clip,
        micro_batch=spec.train.micro_batch,
        temperature=objective.temperature,
        seed=spec.seed,
    )
    total = spec.train.steps or _steps(spec, objective, batches)
    refuse_short(spec, total)
    exams = exam_probes_of(spec, head, base)
    marks = {f"reward {path}": content_sha256(sorted(folder_of(path).glob("*.safetensors"))) for path in found}
    marks |= {f"{REWARD_FUNCTION} {path}": function.source for path, function in functions.items()}
    data = replace(data, exams=exams, deltas=marks | start_of(spec))
    probes: list[Probe] = []
    samples = kept_samples(spec.probes.samples, data.tasks, None, head, base)
    if data.validation is not None:
        asked, each = _probed(data.validation, max(1, spec.probes.tokens // objective.max_tokens), objective.samples)
        sampling = Sampling(objective.temperature, objective.top_p, seed=seed_of(spec.seed, HELD_OUT_BATCH))
        judge = _Judge(asked, rewards, held_out)
        prompts = [one.prompt for one in asked]
        probe = PolicyProbe(prompts, judge, head, writer, sampling=sampling, samples=each, reference=method.without)
        probes.append(probe)
        known = [] if samples is None else samples.samples
        samples = PolicySamples(probe, spec.probes.samples, known, base.model, base.tokenizer, together=head.packs)
    probes += text_probes(spec.probes, None, data.general, head, method.without)
    probes += task_probes(data.tasks, exams, head, base)
    limits = Limits(objective)
    best = ("policy/held_out", True) if objective.patience is not None else None
    return Prepared(base, data, method, attachment, policy, probes, samples, total, best, limits)


def _refuse_what_means_nothing(spec: RunSpec, objective: PolicySpec) -> None:
    """Refuse keys that say nothing to a policy, all of them at once."""
    problems = []

    def refuse(key: str, what: str, fix: str) -> None:
        problems.append(LoralabError(what, where=key, fix=fix))

    if spec.train.tokens is not None:
        refuse("train.tokens", "how many tokens a policy will write is not known", "give train.steps or train.epochs")
    if spec.data.streaming:
        refuse("data.streaming", "prompts are held in memory", "drop data.streaming")
    if objective.max_tokens >= spec.data.max_length:
        what = f"answers of {objective.max_tokens} tokens leave no room for a prompt in {spec.data.max_length}"
        refuse("objective.max_tokens", what, "raise data.max_length, or lower objective.max_tokens")
    if objective.max_forgetting is not None and not spec.data.general:
        what = "there is no general text on which forgetting could be seen"
        refuse("objective.max_forgetting", what, "name data.general, or drop objective.max_forgetting")
    held_out = spec.data.validation or spec.data.validation_share > 0
    if (objective.max_kl is not None or objective.patience is not None) and not held_out:
        what = "there are no held-out prompts on which a limit could be seen"
        refuse("data.validation", what, "name data.validation, or set data.validation_share")
    if objective.server is not None and spec.method.name == "full":
        what = "full fine-tuning has no adapter that a server could be handed"
        refuse("objective.server", what, "take a low-rank method, or drop objective.server")
    models = [source.path for source in (*objective.reward, *objective.held_out) if is_delta(source.path)]
    if spec.method.name == "peft" and models:
        what = f"the reward model {models[0]} cannot lie beside layers of the peft library"
        refuse("method.name", what, "set method.name=lora, or another method of our own")
    if problems:
        raise SpecError(problems)


def _read(spec: RunSpec, objective: PolicySpec, base: Base) -> PolicyData:
    data, tokenizer = spec.data, base.tokenizer
    assert tokenizer is not None

    def prompts(sources: Sequence[SourceSpec]) -> Prompts:
        return read_prompts(
            sources_of(sources, data.form, data.template),
            tokenizer,
            chat_template=data.chat_template,
            max_length=data.max_length,
            max_tokens=objective.max_tokens,
        )

    train = prompts(data.train)
    validation = prompts(data.validation) if data.validation else None
    if validation is None and data.validation_share > 0:
        train, validation = train.hold_out(data.validation_share)
    rules: dict[str, Any] = {
        "chat_template": data.chat_template,
        "max_length": data.max_length,
        "overlong": data.overlong,
    }
    general = tokenise(sources_of(data.general, "auto", None), tokenizer, **rules) if data.general else None
    return PolicyData(train, validation, general, items_of(spec))


def _attach(spec: RunSpec, objective: PolicySpec, base: Base) -> tuple[Method, Value | None, Attachment]:
    """Attach the method, and for `reinforce` a value model of its rank beside it."""
    chosen, method = spec.method, method_of(spec, base)
    value = None
    if objective.algorithm == "reinforce":
        rank, alike = objective.value_rank or FULL_VALUE_RANK, {}
        if isinstance(chosen, LoraSpec):
            rank = objective.value_rank or chosen.rank
            alike = {"targets": chosen.targets, "exclude": chosen.exclude}
        value = Value(rank=rank, alpha=2.0 * rank, **alike)
        method = WithValue(method, value, objective.value_learning_rate)
    attachment = method.attach(base, spec.seed)
    recompute_(base.model, spec.train.recompute)
    return method, value, attachment


def _steps(spec: RunSpec, objective: PolicySpec, batches: Batches) -> int:
    """Count the optimizer steps in which every prompt is answered in so many epochs."""
    assert spec.train.epochs is not None
    answered_batches = batches.feed.num_steps(spec.train.epochs)
    return ceil(answered_batches * objective.epochs * objective.minibatches)


def _probed(validation: Prompts, answers: int, samples: int) -> tuple[list[Asked], int]:
    """Choose held-out prompts in a fixed random order, and how often each is answered, so that there are at most so many answers.

    More prompts come before more answers to each; where there is room for a few answers only, each prompt has one.
    """
    fewest = min(samples, FEWEST) if answers >= FEWEST * FEWEST_PROMPTS else 1
    every = validation.different()
    order = np.random.default_rng(0).permutation(len(every))[: answers // fewest]
    asked = [every[i] for i in order]
    return asked, min(max(answers // len(asked), fewest), MOST)


class _Judge:
    """Rewards held-out answers: the reward that is trained on, the one that is not, and the parts of either."""

    def __init__(self, asked: Sequence[Asked], rewards: Rewards, held_out: Rewards) -> None:
        self.asked = asked
        self.roles = {REWARD: rewards, HELD_OUT: held_out}

    def __call__(self, written: list[list[Answer]]) -> dict[str, list[float]]:
        answers = answered(self.asked, written)
        found: dict[str, list[float]] = {}
        for role, rewards in self.roles.items():
            if not rewards.sources:
                continue
            rewarded = rewards(answers)
            found[role] = rewarded.total
            if len(rewarded.parts) > 1:
                found |= {f"{name}/{role}": values for name, values in rewarded.parts.items()}
        return found


class Limits:
    """Tells after an evaluation why the run should end: too far from the base, too much forgotten, nothing gained any more."""

    def __init__(self, objective: PolicySpec) -> None:
        self.max_kl, self.max_forgetting, self.patience = objective.max_kl, objective.max_forgetting, objective.patience
        self.best: float | None = None
        self.waited = 0

    def state(self) -> dict[str, Any]:
        """Give what was seen, so that a resumed run ends where an uninterrupted one does."""
        return {"best": self.best, "waited": self.waited}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what was seen."""
        self.best, self.waited = state["best"], state["waited"]

    def __call__(self, scores: Sequence[Score]) -> str | None:
        found = {score.name: score.value for score in scores}
        kl, forgotten, held_out = (found.get(f"{n}") for n in ("policy/kl", "general/loss_rise", "policy/held_out"))
        if held_out is not None:
            if self.best is None and (risen_by := found.get("policy/held_out_change")) is not None:
                self.best = held_out - risen_by  # what training began from: a reward that only falls has not risen
            risen = self.best is None or held_out > self.best
            self.best, self.waited = (held_out, 0) if risen else (self.best, self.waited + 1)
        if self.max_kl is not None and kl is not None and kl > self.max_kl:
            return f"the KL budget is spent: {kl:.3g} nats per answer, objective.max_kl is {self.max_kl:g}"
        if self.max_forgetting is not None and forgotten is not None and forgotten > self.max_forgetting:
            limit = f"objective.max_forgetting is {self.max_forgetting:g}"
            return f"the forgetting budget is spent: the general loss rose by {forgotten:.3g} nats per token, {limit}"
        if self.patience is not None and self.waited >= self.patience:
            return f"the held-out reward has not risen for {self.waited} evaluations (its best is {self.best:.4g})"
        return None
