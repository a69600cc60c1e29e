"""From the spec of a run on text to its objects: base, data, method, probes; and what other objectives share of that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from loralab.base.corpus import Corpus, tokenise
from loralab.base.data import Feed
from loralab.base.hub import find
from loralab.base.model import Base, load, longest_text, reads_both_ways
from loralab.base.packing import pack
from loralab.base.repeated import repeated, with_repeated
from loralab.base.sources import Source, Template, content_sha256, local_files
from loralab.base.stream import StreamingFeed, tokenise_head
from loralab.delta.opened import folder_of
from loralab.delta.store import ADAPTER, WEIGHTS, is_adapter
from loralab.errors import DataError, DeltaError, LoralabError, ModelError, SpecError
from loralab.evals.exam_probe import ExamProbe
from loralab.evals.probe import Probe
from loralab.evals.samples import Samples
from loralab.evals.tasks import Task
from loralab.evals.texts import TextEngine
from loralab.lab.deltas import read_delta
from loralab.lab.exam_probes import exam_probes, look_for_exams
from loralab.lab.probes import kept_samples, task_probes, text_probes
from loralab.lab.tasks import fingerprint, has_items, look_for, read_tasks
from loralab.lab.watch import Limits
from loralab.methods import METHODS, Method
from loralab.methods.base import Attachment
from loralab.methods.full import Full
from loralab.methods.lora import Lora
from loralab.methods.start import FromDelta
from loralab.pocket import world
from loralab.spec.objective import TextSpec
from loralab.spec.spec import RunSpec, SourceSpec, TaskSpec, TemplateSpec
from loralab.spec.training import InverseSqrtSpec
from loralab.training.loss import LanguageHead
from loralab.training.objectives import Objective
from loralab.training.objectives.text import TextObjective
from loralab.training.optim import steps_of
from loralab.training.recompute import recompute_

STREAM_HEAD_ROWS = 4096
"""First rows of a stream: of these the validation rows are held out, and `check` shows examples."""


class Inputs(Protocol):
    """What a run reads."""

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Name it by content."""
        ...

    @property
    def report(self) -> dict[str, Any]:
        """Count what became of every row."""
        ...


@dataclass(frozen=True)
class Data:
    """Tokenised data of a run on text; of a stream, `train` is what stands at its head."""

    feed: Feed | StreamingFeed
    train: Corpus
    validation: Corpus | None
    general: Corpus | None
    tasks: dict[str, list[Task]]
    """Items of each role that has some, `target` and `source`."""
    exams: dict[str, list[ExamProbe]] = field(default_factory=dict)
    """Suites and tasks of the catalogue of each role that has some."""
    deltas: dict[str, str] = field(default_factory=dict)
    """Deltas that the run reads, by what they are to it, as `start_of` gives them."""

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Name what the run reads by content."""
        corpora = {"train": self.train, "validation": self.validation, "general": self.general}
        found: dict[str, Any] = {
            name: corpus.fingerprint for name, corpus in corpora.items() if corpus is not None and len(corpus)
        }
        return found | self.deltas | fingerprints_of(self.tasks, self.exams)

    @property
    def report(self) -> dict[str, Any]:
        """Count what became of every row."""
        corpora = {"train": self.train, "validation": self.validation, "general": self.general}
        found = {name: corpus.report.as_dict() for name, corpus in corpora.items() if corpus is not None}
        # A stream leaves held-out rows out by itself.
        if self.validation is None or isinstance(self.feed, StreamingFeed):
            return found
        return with_repeated(found, repeated(self.train, self.validation))


@dataclass(frozen=True)
class Prepared:
    """Everything a loop and its watch need."""

    base: Base
    data: Inputs
    method: Method
    attachment: Attachment
    objective: Objective
    probes: list[Probe]
    samples: Samples | None
    total_steps: int
    best: tuple[str, bool] | None = None
    """Score that chooses the best checkpoint, and whether higher is better; None takes the lowest validation loss."""
    limits: Limits | None = None
    """Tells after an evaluation why the run should end, if it should."""
    language: nn.Module | None = None
    """What reads general text where the base itself gives scores; it shares the base's backbone."""


def prepare_text(spec: RunSpec, objective: TextSpec) -> Prepared:
    """Load, tokenise and attach for training on text.

    Raises:
        LoralabError: whatever is wrong with model, data or method.
    """
    refuse_missing_files(spec)
    base = load_base(spec)
    data = read_data(spec, base)
    method, attachment = attach(spec, base)
    head = LanguageHead(base.model, objective.chunk)
    _refuse_unpackable(spec, head)
    total = _total_steps(spec, data)
    refuse_short(spec, total)
    data = replace(data, exams=exam_probes_of(spec, head, base), deltas=start_of(spec))
    texts = text_probes(spec.probes, data.validation, data.general, head, method.without)
    probes: list[Probe] = [*texts, *task_probes(data.tasks, data.exams, head, base)]
    samples = kept_samples(spec.probes.samples, data.tasks, data.validation, head, base)
    return Prepared(base, data, method, attachment, TextObjective(data.feed, head), probes, samples, total)


def attach(spec: RunSpec, base: Base) -> tuple[Method, Attachment]:
    """Attach the method of a spec."""
    method = method_of(spec, base)
    attachment = method.attach(base, spec.seed)
    recompute_(base.model, spec.train.recompute)
    return method, attachment


def method_of(spec: RunSpec, base: Base) -> Method:
    """Make the method of a spec; where the base wears a delta from the start, one that goes on from it.

    Raises:
        DeltaError: the delta cannot be read, or belongs to another base.
    """
    method: Method = METHODS[spec.method.name](**spec.method.model_dump(exclude={"name"}))
    if spec.model.delta is None:
        return method
    assert isinstance(method, Lora | Full)  # the spec refuses others
    try:
        return FromDelta(method, read_delta(spec.model.delta, base))
    except DeltaError as error:
        raise DeltaError(error.what, where=f"model.delta={spec.model.delta}: {error.where}", fix=error.fix) from None


START = "model.delta"
"""What the delta that a base wears from the start is called among the inputs of a run."""


def start_of(spec: RunSpec) -> dict[str, str]:
    """Name the delta that the base wears from the start by content, if there is one."""
    if spec.model.delta is None:
        return {}
    folder = folder_of(spec.model.delta)
    return {START: content_sha256([folder / ADAPTER, folder / WEIGHTS])}


def refuse_missing_files(spec: RunSpec) -> None:
    """Look for the base and every local file before anything is loaded, and report all that are missing.

    Of the pocket world, test items are no training data, and training rows no validation.
    """
    problems: list[LoralabError] = []
    try:
        if not Path(spec.model.path).exists():
            find(
                spec.model.path,
                spec.model.revision,
                weights=not spec.model.random_init,
                code=spec.model.trust_remote_code,
            )
    except LoralabError as error:
        problems.append(error)
    if (delta := spec.model.delta) is not None and not is_adapter(folder_of(delta)):
        fix = "name a run of a low-rank method, its delta, or a PEFT folder; a whole checkpoint is a model.path of its own"
        problems.append(DeltaError(f"there is no low-rank delta in {delta}", where="model.delta", fix=fix))
    for sources in (spec.data.train, spec.data.validation, spec.data.general):
        for source in sources_of(sources, "auto", None):
            try:
                local_files(source)
                if sources is not spec.data.general:
                    _refuse_split(source.path, is_training=sources is spec.data.train)
            except LoralabError as error:
                problems.append(error)
    for role, task in [(role, task) for role, tasks in _roles(spec).items() for task in tasks]:
        try:
            look_for(task) if has_items(task) else look_for_exams(role, task)
        except LoralabError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise SpecError(problems)


def _refuse_split(path: str, *, is_training: bool) -> None:
    if not world.is_address(path):
        return
    split = world.parse(path).split or "train"
    if is_training and split == "test":
        fix = f"write {path.replace('/test', '', 1)}: without a split, rows are of `train`"
        raise DataError("test items are no training data", where=path, fix=fix)
    if not is_training and split == "train":
        fix = f"write {world.SCHEME}:{world.parse(path).name}/validation"
        raise DataError("training rows are no validation: without a split, rows are of `train`", where=path, fix=fix)


def load_base(spec: RunSpec, outputs: int | None = None) -> Base:
    """Load the base and refuse sequences longer than it can read, and full fine-tuning of a quantised one.

    Args:
        spec: of the run.
        outputs: scores that the model gives for a text; None is a language model, which must look back alone.
    """
    if spec.model.quantize and spec.method.name == "full":
        fix = "drop model.quantize, or choose a low-rank method"
        raise SpecError([LoralabError("a quantised base cannot move", where="model.quantize", fix=fix)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec.seed)  # of model.random_init, and of a new head
        base = load(**spec.model.model_dump(exclude={"delta"}), outputs=outputs)
    if outputs is None and reads_both_ways(base.model):
        raise ModelError(
            f"{type(base.model).__name__} reads both ways: predicting the next token means nothing to it",
            where="model.path",
            fix="take a causal language model",
        )
    longest = longest_text(base.model)
    if longest and spec.data.max_length > longest:
        raise ModelError(
            f"sequences of {spec.data.max_length} tokens exceed the {longest} positions of this model",
            where="data.max_length",
            fix=f"set data.max_length={longest} or less",
        )
    return base


def read_data(spec: RunSpec, base: Base) -> Data:
    """Tokenise training, validation and general text, and make the feed of optimizer steps."""
    data, tokenizer = spec.data, base.tokenizer
    if tokenizer is None:
        raise ModelError("this base has no tokenizer, so text cannot be read", where=spec.model.path)

    def corpus(sources: list[Source]) -> Corpus | None:
        return tokenise(sources, tokenizer, **rules) if sources else None

    rules: dict[str, Any] = {
        "chat_template": data.chat_template,
        "max_length": data.max_length,
        "overlong": data.overlong,
    }
    portions: dict[str, Any] = {
        "batch_size": spec.train.batch_size,
        "micro_batch": spec.train.micro_batch,
        "packing": data.packing,
        "seed": spec.seed,
    }
    # Form and template describe the target's rows; general text is of another kind and says its own, if any.
    validation = corpus(sources_of(data.validation, data.form, data.template))
    general = corpus(sources_of(data.general, "auto", None))
    tasks = items_of(spec)
    training = sources_of(data.train, data.form, data.template)
    if data.streaming:
        head = tokenise_head(training, tokenizer, rows=STREAM_HEAD_ROWS, **rules)
        if validation is None and data.validation_share > 0:
            head, validation = head.hold_out(data.validation_share)
        held_out = validation.keys.tolist() if validation is not None else ()
        feed = StreamingFeed(training, tokenizer, **rules, **portions, excluded=held_out)
        return Data(feed, head, validation, general, tasks)
    train = corpus(training)
    assert train is not None
    if validation is None and data.validation_share > 0:
        train, validation = train.hold_out(data.validation_share)
    return Data(Feed(train, **portions), train, validation, general, tasks)


def items_of(spec: RunSpec) -> dict[str, list[Task]]:
    """Read the items of each role that names some."""
    named = {role: [task for task in written if has_items(task)] for role, written in _roles(spec).items()}
    return {role: read_tasks(written) for role, written in named.items() if written}


def fingerprints_of(tasks: Mapping[str, list[Task]], exams: Mapping[str, list[ExamProbe]]) -> dict[str, Any]:
    """Name items and exams by content."""
    found: dict[str, Any] = {f"{role} tasks": fingerprint(mine) for role, mine in tasks.items()}
    return found | {f"{role} {one.skill}": one.facts for role, mine in exams.items() for one in mine}


def _roles(spec: RunSpec) -> dict[str, list[TaskSpec]]:
    return {"target": spec.probes.target, "source": spec.probes.source}


def exam_probes_of(spec: RunSpec, head: LanguageHead, base: Base) -> dict[str, list[ExamProbe]]:
    """Build the requests of suites and tasks of the catalogue, by role."""
    named = {role: [task for task in written if not has_items(task)] for role, written in _roles(spec).items()}
    if not any(named.values()):
        return {}
    assert base.tokenizer is not None  # `read_data` has seen to it
    engine = TextEngine(head, base.tokenizer)
    return {role: exam_probes(role, tasks, engine) for role, tasks in named.items() if tasks}


def sources_of(sources: Sequence[SourceSpec] | None, form: str, template: TemplateSpec | None) -> list[Source]:
    """Turn specs of sources into sources; `form` and `template` hold where a source says nothing itself."""
    made = []
    for source in sources or ():
        words = source.template or (template if source.form is None else None)
        made.append(
            Source(
                path=source.path,
                weight=source.weight,
                form=source.form or form,
                template=None if words is None else Template(words.prompt, words.completion),
                split=source.split,
            )
        )
    return made


def _total_steps(spec: RunSpec, data: Data) -> int:
    feed = data.feed
    if isinstance(feed, StreamingFeed) and spec.train.steps is None:
        assert spec.train.tokens is not None
        # How full the sequences of a stream will be is seen at its head.
        lengths = data.train.lengths
        filled = float(lengths.sum()) / len(pack(lengths.tolist(), spec.data.max_length))
        return max(1, ceil(spec.train.tokens / (spec.train.batch_size * filled)))
    return steps_over(spec, feed)


def steps_over(spec: RunSpec, feed: Feed | StreamingFeed) -> int:
    """Count the optimizer steps of a run; of a stream only where they are given."""
    if spec.train.steps is not None:
        return spec.train.steps
    assert isinstance(feed, Feed)
    if spec.train.epochs is not None:
        return feed.num_steps(spec.train.epochs)
    assert spec.train.tokens is not None
    return max(1, ceil(spec.train.tokens / (feed.tokens_per_epoch / feed.steps_per_epoch)))


def _refuse_unpackable(spec: RunSpec, head: LanguageHead) -> None:
    """Refuse a spec that lays documents side by side in a model that cannot keep them apart, before any step."""
    if not head.packs and (spec.data.packing or spec.train.micro_batch != 1):
        raise head.unpackable()


def refuse_short(spec: RunSpec, total_steps: int) -> None:
    """Refuse a run that ends before its schedule has risen and fallen."""
    warmup, cooldown = steps_of(spec.schedule.warmup, total_steps), 0
    if isinstance(spec.schedule, InverseSqrtSpec):
        cooldown = steps_of(spec.schedule.cooldown, total_steps)
    if warmup + cooldown > total_steps:
        what = f"{total_steps} steps are fewer than the warm-up ({warmup}) and cooldown ({cooldown}) together"
        fix = "give shares (below 1) instead of steps, or train longer"
        raise SpecError([LoralabError(what, where="schedule.warmup", fix=fix)])
