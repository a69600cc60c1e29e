"""From the spec of a classifier or a reward model to its objects: labelled rows, a head, and what trains it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel

from loralab.base.corpus import Corpus
from loralab.base.data import Feed
from loralab.base.labelled import Labelled, LabelledCorpus, collate_labelled, read_labelled
from loralab.base.model import POOLER, Base, longest_text, read_tokenizer, with_words
from loralab.base.repeated import repeated, with_repeated
from loralab.base.targets import linears
from loralab.errors import DataError, LoralabError, ModelError, SpecError
from loralab.evals.probe import PACKED_TOKENS, Probe
from loralab.evals.scored import ScoreProbe
from loralab.lab.general import MaskedCorpus, general_probes, read_general
from loralab.lab.prepare import (
    Prepared,
    attach,
    load_base,
    refuse_missing_files,
    refuse_short,
    sources_of,
    start_of,
    steps_over,
)
from loralab.spec.method import FullSpec, MethodSpec, PeftSpec
from loralab.spec.objective import ClassifySpec, RewardSpec
from loralab.spec.spec import RunSpec
from loralab.training.loss import LanguageHead
from loralab.training.objectives import Objective
from loralab.training.objectives.classify import ClassifyObjective
from loralab.training.objectives.reward import RewardObjective
from loralab.training.scores import ScoreHead
from loralab.training.words import WordHead, collate_words, tokens_of_words

BEST = {
    "classify": ("target/accuracy", True),
    "pairs": ("target/accuracy", True),
    "thumbs": ("target/auc", True),
    "regression": ("target/loss", False),
}
"""Score that chooses the best checkpoint, and whether higher is better. P5 takes the validation accuracy."""
PEFT_HEADS = ("score", "classifier")
"""Heads that the peft library trains whole of its own accord."""


@dataclass(frozen=True)
class LabelledData:
    """Labelled rows of a run, and the general text on which forgetting is watched."""

    feed: Feed
    train: LabelledCorpus
    validation: LabelledCorpus | None
    general: Corpus | MaskedCorpus | None = None
    deltas: dict[str, str] = field(default_factory=dict)
    """Deltas that the run reads, by what they are to it."""

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Name what the run reads by content."""
        corpora = {"train": self.train, "validation": self.validation, "general": self.general}
        found = {name: corpus.fingerprint for name, corpus in corpora.items() if corpus is not None and len(corpus)}
        return found | self.deltas

    @property
    def report(self) -> dict[str, Any]:
        """Count what became of every row."""
        corpora = {"train": self.train, "validation": self.validation, "general": self.general}
        found = {name: corpus.report.as_dict() for name, corpus in corpora.items() if corpus is not None}
        return found if self.validation is None else with_repeated(found, repeated(self.train, self.validation))


@dataclass(frozen=True)
class _Scoring:
    """A base, what scores its texts, and how texts are laid out for it."""

    base: Base
    head: Any
    collate: Callable[[Sequence[Labelled]], Any]
    whole: tuple[str, ...] = ()
    """Modules that are trained whole, whatever the method."""


def prepare_scored(spec: RunSpec, objective: ClassifySpec | RewardSpec) -> Prepared:
    """Load, tokenise and attach for training a classifier or a reward model.

    Raises:
        LoralabError: whatever is wrong with model, data, method or objective.
    """
    _refuse_what_means_nothing(spec)
    refuse_missing_files(spec)
    train, validation = _read(spec, objective)
    words = objective.words if isinstance(objective, ClassifySpec) else None
    scoring = _with_head(spec, objective, train) if words is None else _with_words(spec, words, train)
    feed = Feed(
        train,
        batch_size=spec.train.batch_size,
        micro_batch=spec.train.micro_batch,
        packing=spec.data.packing,
        seed=spec.seed,
        collate=scoring.collate,
    )
    total = steps_over(spec, feed)
    refuse_short(spec, total)
    language = _language(spec, scoring) if spec.data.general else None
    method, attachment = attach(spec.model_copy(update={"method": _with_whole(spec.method, scoring)}), scoring.base)
    centre = objective.centre if isinstance(objective, RewardSpec) else 0.0
    data = LabelledData(feed, train, validation, deltas=start_of(spec))
    probes, best = _watched(spec, data, scoring, centre)
    if language is not None:
        general = read_general(spec, scoring.base, language)
        data = replace(data, general=general)
        probes += general_probes(spec.probes, general, language, scoring.base, method.without)
    trained = _objective(train, feed, scoring.head, centre)
    return Prepared(scoring.base, data, method, attachment, trained, probes, None, total, best, language=language)


def _refuse_what_means_nothing(spec: RunSpec) -> None:
    """Refuse what only training on text can do."""
    given = {
        "data.streaming": spec.data.streaming,
        "probes.target": bool(spec.probes.target),
        "probes.source": bool(spec.probes.source),
    }
    why = f"objective {spec.objective.name} gives scores, it writes no text"
    fix = "drop it, or train on text"
    found = [key for key, is_given in given.items() if is_given]
    problems = [LoralabError(f"{key} means nothing here: {why}", where=key, fix=fix) for key in found]
    if spec.data.general and (spec.model.quantize or spec.model.random_init):
        key = "model.quantize" if spec.model.quantize else "model.random_init"
        what = f"with {key} there is no pretrained head at hand through which general text could be read"
        problems.append(LoralabError(what, where="data.general", fix=f"drop data.general or {key}"))
    if problems:
        raise SpecError(problems)


def _read(spec: RunSpec, objective: ClassifySpec | RewardSpec) -> tuple[LabelledCorpus, LabelledCorpus | None]:
    """Tokenise training and validation rows, and refuse kinds that the objective cannot learn from."""
    data, model = spec.data, spec.model
    tokenizer = read_tokenizer(
        model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        weights=not model.random_init,
    )
    rules: dict[str, Any] = {
        "max_length": data.max_length,
        "overlong": data.overlong,
        "chat_template": data.chat_template,
    }
    kind: Any = "regression" if isinstance(objective, ClassifySpec) and objective.regression else "classify"
    kind = objective.kind if isinstance(objective, RewardSpec) else kind
    classes = objective.labels if isinstance(objective, ClassifySpec) else None
    sources = sources_of(data.train, data.form, data.template)
    train = read_labelled(sources, tokenizer, kind=kind, classes=classes, **rules)
    if isinstance(objective, RewardSpec) and train.kind not in ("pairs", "thumbs"):
        what = "rewards are learned from pairs or thumbs, but these rows have a text and a label"
        fix = "name the columns prompt, chosen, rejected, or prompt, completion, label; or set objective.name=classify"
        raise DataError(what, where=data.train[0].path, fix=fix)
    if data.validation is not None:
        held = sources_of(data.validation, data.form, data.template)
        rules |= {"kind": train.kind, "classes": train.classes or None, "need_both": False}
        return train, read_labelled(held, tokenizer, **rules)
    return train.hold_out(data.validation_share) if data.validation_share > 0 else (train, None)


def _with_head(spec: RunSpec, objective: ClassifySpec | RewardSpec, train: LabelledCorpus) -> _Scoring:
    """Load a base with an output for each class, or one."""
    base = load_base(spec, outputs=len(train.classes) or 1)
    if train.classes:
        base.model.config.id2label = dict(enumerate(train.classes))
        base.model.config.label2id = {name: number for number, name in enumerate(train.classes)}
    head = ScoreHead(base.model)
    share = isinstance(objective, RewardSpec) and objective.share_prompts and head.shares
    # A head is trained whole however much of it the files hold; a pooler from the files is a layer like others.
    new = [name for name in head.names if any(drawn.startswith(f"{name}.") for drawn in base.drawn)]
    whole = tuple(name for name in head.names if name in new or not name.endswith(f".{POOLER}"))
    return _Scoring(base, head, partial(collate_labelled, share=share), whole)


def _with_words(spec: RunSpec, words: Sequence[str], train: LabelledCorpus) -> _Scoring:
    """Load a language model that answers with a word for each class."""
    if len(words) != len(train.classes):
        what = f"{len(words)} words cannot stand for the {len(train.classes)} classes {', '.join(train.classes[:8])}"
        fix = "give one word for each class, in their order, or name the classes in objective.labels"
        raise SpecError([LoralabError(what, where="objective.words", fix=fix)])
    base = load_base(spec)
    assert base.tokenizer is not None  # it has read the rows
    tokens, head = tokens_of_words(words, base.tokenizer), LanguageHead(base.model)
    longest, room = longest_text(base.model), max(map(len, tokens)) - 1  # a word takes the place of the end
    if longest and spec.data.max_length + room > longest:
        what = f"behind texts of {spec.data.max_length} tokens no room is left for a word"
        raise ModelError(what, where="data.max_length", fix=f"set data.max_length={longest - room} or less")
    if not head.packs:
        what = f"{type(base.model).__name__} cannot read several words behind one text"
        fix = "drop objective.words: a head of its own reads texts one by one"
        raise ModelError(what, where="objective.words", fix=fix)
    return _Scoring(base, WordHead(head), partial(collate_words, words=tokens, stop=base.tokenizer.eos_token_id))


def _language(spec: RunSpec, scoring: _Scoring) -> PreTrainedModel:
    """Give the language model that shows what the backbone knows of text; one that answers with words is that itself."""
    if isinstance(scoring.head, WordHead):
        return scoring.base.model
    return with_words(scoring.base, spec.model.trust_remote_code)


def _with_whole(method: MethodSpec, scoring: _Scoring) -> MethodSpec:
    """Let a method train the head whole, and put no pair on what it trains whole."""
    whole = scoring.whole
    if not whole:
        return method
    if isinstance(method, FullSpec):
        targets = method.targets if "all" in method.targets else [*method.targets, *whole]
        return method.model_copy(update={"targets": targets})
    if isinstance(method, PeftSpec):
        saved = dict.fromkeys([*(method.keys.get("modules_to_save") or ()), *whole])
        keys = {**method.keys, "modules_to_save": [name for name in saved if name not in PEFT_HEADS]}
        return method.model_copy(update={"keys": keys if keys["modules_to_save"] else method.keys})
    layers = [name for name in linears(scoring.base.model) if any(name.startswith(f"{top}.") for top in whole)]
    more = {"also_train": [*method.also_train, *whole], "exclude": [*method.exclude, *layers]}
    return method.model_copy(update=more)


def _objective(train: LabelledCorpus, feed: Feed, head: Any, centre: float) -> Objective:
    if train.kind == "pairs" or train.kind == "thumbs":
        return RewardObjective(feed, head, kind=train.kind, centre=centre)
    return ClassifyObjective(feed, head, regression=train.kind == "regression")


def _watched(
    spec: RunSpec, data: LabelledData, scoring: _Scoring, centre: float
) -> tuple[list[Probe], tuple[str, bool] | None]:
    """Probe validation rows, and name the score that chooses the best checkpoint."""
    held, kind = data.validation, data.train.kind
    if held is None or not len(held):
        return [], None
    chosen = _chosen(held.lengths, spec.probes.tokens)
    device = scoring.base.model.device
    batches = [scoring.collate([held[i] for i in group]).to(device) for group in _side_by_side(chosen, held.lengths)]
    probe = ScoreProbe(batches, scoring.head, kind=kind, classes=data.train.classes, centre=centre)
    no_area = kind == "thumbs" and len(np.unique(held.labels[chosen])) < 2
    return [probe], ("target/loss", False) if no_area else BEST[kind]


def _chosen(lengths: NDArray[np.int64], most_tokens: int) -> list[int]:
    """Choose examples in a fixed random order up to `most_tokens` (at least one)."""
    order = np.random.default_rng(0).permutation(len(lengths))
    fitting = int((np.cumsum(lengths[order]) <= most_tokens).sum())
    return [int(index) for index in order[: max(fitting, 1)]]


def _side_by_side(chosen: Sequence[int], lengths: NDArray[np.int64]) -> list[list[int]]:
    """Group examples, in order, up to `PACKED_TOKENS` in each group."""
    groups: list[list[int]] = []
    size = PACKED_TOKENS
    for index in chosen:
        if size + int(lengths[index]) > PACKED_TOKENS:
            groups.append([])
            size = 0
        groups[-1].append(index)
        size += int(lengths[index])
    return groups
