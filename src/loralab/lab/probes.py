"""What a run measures while it trains: texts and their drift, items, exams; and the prompts whose answers are kept."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any

import numpy as np

from loralab.base.corpus import Corpus
from loralab.base.data import Batch
from loralab.base.model import Base
from loralab.base.text import Example
from loralab.evals.drift import TextProbe, on_prompts
from loralab.evals.exam_probe import ExamProbe
from loralab.evals.probe import side_by_side
from loralab.evals.samples import Samples, samples_of_tasks, samples_of_texts
from loralab.evals.shares import ShareProbe, Together
from loralab.evals.tasks import Task, probes_of
from loralab.spec.spec import ProbeSpec
from loralab.training.loss import LanguageHead


def text_probes(
    probes: ProbeSpec,
    validation: Corpus | None,
    general: Corpus | None,
    head: LanguageHead,
    without: Callable[[], AbstractContextManager[None]],
) -> list[TextProbe]:
    """Probe the target's validation rows and the general text; with drift, the distance from the base too.

    Drift is watched on the general text (on the validation rows if there is none), and on the new task: on what the model
    reads of each validation row before it answers. Of rows without a prompt that is what the probe of the rows reads anyway.

    Args:
        probes: says how much, and how drift is measured.
        validation: held-out rows of the target.
        general: text on which forgetting is watched.
        head: of the model.
        without: gives a context in which the model is the base.
    """
    target, old = (_chosen(corpus, probes.tokens) for corpus in (validation, general))
    drift = bool(probes.drift)
    prompts = [_cut(example) for example in on_prompts(target)] if drift else []
    read_anyway = all(np.array_equal(a.labelled, b.labelled) for a, b in zip(prompts, target, strict=False))
    watched = [
        ("target", target, drift and (read_anyway or not old), "target_" if old else ""),
        ("general", old, drift, ""),
        ("prompts", [] if read_anyway else prompts, drift, "target_"),
    ]
    how: dict[str, Any] = {"top_k": probes.top_k, "exact": without if probes.drift == "exact" else None}
    return [
        TextProbe(name, _laid_out(examples, head), head, drift=measured, prefix=prefix, **how)
        for name, examples, measured, prefix in watched
        if examples
    ]


def _chosen(corpus: Corpus | None, most_tokens: int) -> list[Example]:
    """Choose documents in a fixed random order up to `most_tokens` (at least one)."""
    chosen: list[Example] = []
    total = 0
    for index in np.random.default_rng(0).permutation(0 if corpus is None else len(corpus)).tolist():
        assert corpus is not None
        example = corpus[index]
        if chosen and total + len(example) > most_tokens:
            break
        chosen.append(example)
        total += len(example)
    return chosen


def _cut(example: Example) -> Example:
    """Leave out what stands behind the last labelled token: nothing before it depends on that."""
    end = int(np.flatnonzero(example.labelled).max(initial=0)) + 1
    return Example(example.tokens[:end], example.labelled[:end])


def _laid_out(examples: Sequence[Example], head: LanguageHead) -> list[Batch]:
    device = next(head.model.parameters()).device
    return [batch.to(device) for batch in side_by_side(examples, together=head.packs)]


def task_probes(
    items: Mapping[str, Sequence[Task]], exams: Mapping[str, Sequence[ExamProbe]], head: LanguageHead, base: Base
) -> list[ShareProbe]:
    """Probe items and exams by role, `target` first; what measures the same of one role is one probe."""
    assert base.tokenizer is not None
    made: list[ShareProbe] = []
    for role in dict.fromkeys(chain(("target", "source"), items, exams)):
        made += probes_of(role, items.get(role, ()), head, base.tokenizer)
        made += exams.get(role, ())
    grouped: dict[str, list[ShareProbe]] = {}
    for probe in made:
        grouped.setdefault(probe.name, []).append(probe)
    return [parts[0] if len(parts) == 1 else Together(name, parts) for name, parts in grouped.items()]


def kept_samples(
    count: int, items: Mapping[str, Sequence[Task]], validation: Corpus | None, head: LanguageHead, base: Base
) -> Samples | None:
    """Choose prompts whose answers are kept: of the items, and of the validation rows if the target has no items.

    Args:
        count: most prompts of each role.
        items: by role.
        validation: held-out rows of the target.
        head: of the model.
        base: as loaded.
    """
    assert base.tokenizer is not None
    if not count or not base.model.can_generate():
        return None
    common = base.model, base.tokenizer
    found = [sample for role, tasks in items.items() for sample in samples_of_tasks(role, tasks, *common, count)]
    if "target" not in items and validation is not None:
        texts = [validation[i] for i in range(min(len(validation), 2 * count))]
        found += samples_of_texts("target", texts, *common, count)
    return Samples(found, *common, together=head.packs) if found else None
