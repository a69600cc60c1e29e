"""General text under a model of scores: what its backbone still knows of language, seen through its pretrained head."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from loralab.base.corpus import Corpus, tokenise
from loralab.base.model import Base, longest_text, reads_both_ways
from loralab.base.reader import Reader, Report, SourceReport, nothing_left
from loralab.base.sources import read_rows
from loralab.evals.masked import MaskedProbe, MaskedText, masked_texts
from loralab.evals.probe import Probe
from loralab.lab.prepare import sources_of
from loralab.lab.probes import text_probes
from loralab.spec.spec import ProbeSpec, RunSpec
from loralab.training.loss import LanguageHead

PREDICTED, FEWEST_TEXTS = 8, 32
"""Most tokens of each text that an encoder predicts, each in a row of its own; fewer where else there were fewer texts."""


@dataclass(frozen=True, eq=False)
class MaskedCorpus:
    """Texts as an encoder reads them, and what became of every row."""

    texts: list[MaskedText]
    report: Report

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens and boundaries."""
        total = hashlib.sha256()
        for text in self.texts:
            total.update(len(text.tokens).to_bytes(8, "big") + np.ascontiguousarray(text.tokens).tobytes())
        return total.hexdigest()


def read_general(spec: RunSpec, base: Base, language: PreTrainedModel) -> Corpus | MaskedCorpus:
    """Read the general text as the language model does: tokens that follow each other, or texts of which tokens are masked.

    Raises:
        DataError: a source cannot be read, or holds no text.
    """
    data, tokenizer = spec.data, base.tokenizer
    assert tokenizer is not None  # it has read the labelled rows
    sources = sources_of(data.general, "auto", None)
    if not reads_both_ways(language):
        template, longest = data.chat_template, data.max_length
        return tokenise(sources, tokenizer, chat_template=template, max_length=longest, overlong=data.overlong)
    texts: list[MaskedText] = []
    reports: list[SourceReport] = []
    for source in sources:
        rows = read_rows(source)
        reader = Reader(
            source,
            rows.columns,
            tokenizer,
            chat_template=data.chat_template,
            max_length=data.max_length,
            overlong="split",
        )
        written = [document.text for batch in rows.batches() for _, document in reader.write(batch)]
        found = masked_texts(written, tokenizer, min(data.max_length, longest_text(language) or data.max_length))
        reader.report.examples, reader.report.split = len(found), len(found) - len(written)
        reader.report.tokens = sum(len(text.tokens) for text in found)
        reader.report.labelled = sum(int(text.scored.sum()) for text in found)
        if not reader.report.labelled:
            raise nothing_left(reader.report, data.max_length)
        texts, reports = texts + found, [*reports, reader.report]
    return MaskedCorpus(texts, Report(tuple(reports)))


def general_probes(
    probes: ProbeSpec,
    general: Corpus | MaskedCorpus,
    language: PreTrainedModel,
    base: Base,
    without: Callable[[], AbstractContextManager[None]],
) -> list[Probe]:
    """Probe the general text: loss and drift of a decoder, pseudo-loss of an encoder.

    An encoder computes a row for each token that it predicts, and what it computes stays below `probes.tokens`: of long texts
    fewer tokens are predicted, so that there are `FEWEST_TEXTS` if that can be.
    """
    if isinstance(general, Corpus):
        return [*text_probes(probes, None, general, LanguageHead(language), without)]
    assert base.tokenizer is not None
    order = np.random.default_rng(0).permutation(len(general))
    lengths = np.array([len(text.tokens) for text in general.texts])[order]
    scored = np.array([int(text.scored.sum()) for text in general.texts])[order]
    each = int(np.clip(probes.tokens // max(1, lengths[:FEWEST_TEXTS].sum()), 1, PREDICTED))
    fitting = max(1, int((np.cumsum(lengths * np.minimum(scored, each)) <= probes.tokens).sum()))
    chosen = [general.texts[i] for i in order[:fitting]]
    return [MaskedProbe("general", chosen, language, base.tokenizer, positions=each)]
