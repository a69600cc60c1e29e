"""Held-out examples that are trained on too: counted by content, wherever either comes from.

What is compared is what a model reads: the tokens. Of a judged text the judgement does not count, of a pair neither does which of
its sides was chosen: whoever has seen the texts in training has seen them.
"""

from collections import Counter
from collections.abc import Hashable, Iterable
from typing import Any

import numpy as np

from loralab.base.corpus import Corpus
from loralab.base.labelled import LabelledCorpus

KEY = "in_training"
"""Of the counts of held-out data: how many of its examples are among those trained on."""


def repeated(train: Corpus | LabelledCorpus, held: Corpus | LabelledCorpus) -> int:
    """Count the held-out examples whose content is trained on."""
    alike = np.flatnonzero(np.isin(train.lengths, held.lengths)).tolist()  # others cannot be the same
    return count_repeated((_content(train, i) for i in alike), (_content(held, i) for i in range(len(held))))


def count_repeated(train: Iterable[Hashable], held: Iterable[Hashable]) -> int:
    """Count the elements of `held`, each as often as it stands there, that are in `train`."""
    waiting = Counter(held)
    return sum(waiting.pop(one, 0) for one in train)


def with_repeated(report: dict[str, Any], count: int) -> dict[str, Any]:
    """Put the count into a data report beside the other counts of the validation rows, where there are some of both."""
    if not count:
        return report
    part = report["validation"]
    return {**report, "validation": {**part, "total": {**part["total"], KEY: count}}}


def _content(corpus: Corpus | LabelledCorpus, index: int) -> Hashable:
    tokens = corpus.tokens[corpus.offsets[index] : corpus.offsets[index + 1]]
    if isinstance(corpus, LabelledCorpus) and corpus.kind == "pairs":
        shared, *sides = np.split(tokens, np.cumsum(corpus.segments[index])[:-1])
        return shared.tobytes(), *sorted(side.tobytes() for side in sides)
    return tokens.tobytes()
