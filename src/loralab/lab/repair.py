"""Repairs a delta: one edit saved, or a sweep of edits measured in the plane of learning and forgetting."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralab.base.device import choose_device, choose_dtype
from loralab.base.model import Base, reads_both_ways
from loralab.delta.lowrank import Delta, LowRank
from loralab.errors import DeltaError, EvaluationError, ModelError
from loralab.evals.probe import Cost, counting
from loralab.lab.dissect import Question
from loralab.lab.measuring import UNTOUCHED, WHOLE, Measuring
from loralab.lab.mending import Subject, Told, open_subject, silent
from loralab.lab.repaired import DELTA, Repaired, Sweep, claim_folder
from loralab.lab.sides import TEXT_TOKENS, Plan, Sides, Wanted
from loralab.lab.tradeoff import SCALE, Budget, read_budget, within
from loralab.run.folder import environment
from loralab.spectral.intruders import EPSILON, VECTORS, Intruders
from loralab.spectral.repair import Edit, default_sweep


def repair(
    base: str | Base,
    delta: str | Delta,
    edit: str | Edit,
    *,
    out: str | Path,
    rank: int | None = None,
    k: int = VECTORS,
    epsilon: float = EPSILON,
    exact: bool = False,
    cache: str | Path | None = None,
    told: Told = silent,
    **how: Any,
) -> Repaired:
    """Save one edit of a delta, without measuring it: it is never said to recover anything.

    Of an adapter only the base's files are read, a matrix at a time. The edited adapter is a stock PEFT folder; a matrix of which
    |I| triplets were scaled has rank r + |I|, by `rank_pattern`.

    Args:
        base: folder or hub id, or as loaded.
        delta: PEFT folder, run folder, or fully fine-tuned checkpoint; or in memory.
        edit: as `Edit.parse` reads it: `top1 0.75`, `scale 0.5`, `taper 0.5`, `matched top1 0.75`, …
        out: new folder: `delta/` is the edited delta, `repair.json` says what was done.
        rank: compress pairs above it; what is lost is said. None is exact.
        k: leading vectors of each tuned weight that are looked at.
        epsilon: cosine below which such a vector is like no vector of the base.
        exact: look for intruders by two dense SVDs in float64.
        cache: folder of the base's heads.
        told: takes how far it is.
        how: of `load`: revision, dtype, device, trust_remote_code.

    Raises:
        LoralabError: no such edit, a delta for another base, a folder that holds something, a matrix that is not finite, …
    """
    wanted, question = _edit(edit), Question(k, epsilon, exact)
    choose_dtype(
        how.get("dtype", "auto"), choose_device(how.get("device", "auto"))
    )  # an adapter is edited without them
    subject = open_subject(base, delta, light=True, **how)
    path = claim_folder(out)
    found = subject.search(question, _path(cache), told) if wanted.needs_intruders else {}
    result, matrices = subject.edit(wanted, found, rank)
    subject.save(path / DELTA, result)
    facts = _facts(subject, delta, question, found) | {"edit": str(wanted), "family": wanted.family}
    facts |= {"strength": wanted.strength, "rank": rank}
    repaired = Repaired(matrices, facts)
    repaired.write(path)
    return repaired


def sweep(
    base: str | Base,
    delta: str | Delta,
    *,
    target: Sequence[str] = (),
    source: Sequence[str] = (),
    target_text: str | None = None,
    source_text: str | None = None,
    edits: Sequence[str | Edit] | None = None,
    budget: str | float | None = None,
    out: str | Path | None = None,
    rank: int | None = None,
    k: int = VECTORS,
    epsilon: float = EPSILON,
    exact: bool = False,
    cache: str | Path | None = None,
    tokens: int = TEXT_TOKENS,
    seed: int = 0,
    told: Told = silent,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    **asked: Any,
) -> Sweep:
    """Measure many edits of a delta, and compare each with uniform scaling at equal learning.

    Every edit is what would be saved: with `rank`, compressed before it is measured. The scales of the default sweep are always
    measured, as they are the bar. Where a repair seems better than the line between two measured scales, the scale between
    them is measured too, before the repair is called better.

    Args:
        base: folder or hub id, or as loaded; it is left as it was.
        delta: PEFT folder, run folder, or fully fine-tuned checkpoint; or in memory.
        target: tasks to be learned: names as `evaluate` takes them.
        source: tasks to be kept.
        target_text: in place of `target`: a file of rows or plain text on which the fall of the loss is measured.
        source_text: in place of `source`: one on which the rise of the loss is measured.
        edits: None is `default_sweep`.
        budget: largest forgetting allowed: `0.02` in the source's unit, or `50%` of the unedited delta's. The best within is saved.
        out: new folder for points.parquet, repair.json and `delta/`; None writes nothing.
        rank: compress pairs above it, which must hold the delta as it is; None is exact.
        k: leading vectors of each tuned weight that are looked at.
        epsilon: cosine below which such a vector is like no vector of the base.
        exact: look for intruders by two dense SVDs in float64.
        cache: folder of the base's heads.
        tokens: most of each text.
        seed: of the resampling, and of samples where tasks are sampled.
        told: takes how far it is.
        revision: of a hub base.
        dtype: `auto`, `float32` or `bfloat16`.
        device: `auto`, `cpu`, `cuda`, `mps`.
        trust_remote_code: run the base's own code.
        asked: further fields of `Questions`: limit, fewshot, data, include, chat, samples, temperature, top_p, unsafe.

    Raises:
        LoralabError: nothing to measure on, an unknown task or edit, a delta for another base, a folder that holds something, …
    """
    begin = time.perf_counter()
    question = Question(k, epsilon, exact)
    plan = Plan(Wanted(target, target_text), Wanted(source, source_text), tokens, {**asked, "seed": seed})
    plan.refuse_before_loading()
    allowed = None if budget is None else _budget(budget, plan)
    given = None if edits is None else [_edit(edit) for edit in edits]
    if given == []:
        raise EvaluationError("no edit is named", where="--edits", fix="name some, or leave it out for a sensible grid")
    place: dict[str, Any] = {"revision": revision, "dtype": dtype, "device": device}
    subject = open_subject(base, delta, **place, trust_remote_code=trust_remote_code)
    assert subject.base is not None
    _refuse_small_rank(subject, rank)
    if reads_both_ways(subject.base.model):
        fix = "take a causal language model"
        raise ModelError("a model that reads both ways cannot answer tasks", where=subject.base_path, fix=fix)
    path = None if out is None else claim_folder(out)
    chosen = _with_bar(given if given is not None else default_sweep(subject.kind), subject)
    measuring = Measuring(subject, Sides(subject.base, plan), rank, told)
    if any(edit.needs_intruders for edit in chosen):
        measuring.found = subject.search(question, _path(cache), told)
    cost = Cost()
    with counting(subject.base.model, cost):
        measuring.measure(chosen)
        if allowed is not None:
            measuring.measure_at(allowed)
        verdicts, controls = measuring.judged(seed)
    placed = measuring.placed()
    choice = None if allowed is None else within(placed, allowed)
    sides = dict(zip(("target", "source"), (side.facts() for side in measuring.sides.of([0])), strict=True))
    facts = _facts(subject, delta, question, measuring.found) | sides
    facts |= {"rank": rank, "seed": seed, "asked": plan.facts(), "refined": measuring.refined}
    spent = {"forwards": cost.forwards, "tokens": cost.tokens, "passes": measuring.passes}
    facts["cost"] = spent | {"seconds": round(time.perf_counter() - begin, 3)}
    swept = Sweep(placed, verdicts, controls, facts, choice)
    if path is not None:
        swept.write_points(path)
        if swept.best is not None:
            subject.save(path / DELTA, measuring.edited(_edit(str(swept.best["edit"])))[0])
        swept.write(path)
    return swept


def _path(cache: str | Path | None) -> Path | None:
    return None if cache is None else Path(cache)


def _edit(edit: str | Edit) -> Edit:
    return edit if isinstance(edit, Edit) else Edit.parse(edit)


def _budget(text: str | float, plan: Plan) -> Budget:
    found = read_budget(text)
    if plan.source.tasks and not found.is_share and found.amount > 1:
        fix = "write 0.02 for two of a hundred items, or 50% of what the unedited delta forgets"
        raise EvaluationError(
            "what is forgotten of tasks is a share of items, at most 1", where=f"--budget {text}", fix=fix
        )
    return found


def _refuse_small_rank(subject: Subject, rank: int | None) -> None:
    """Refuse a rank that would change the delta as it was trained, which every edit is compared with."""
    own = max((change.rank for change in subject.delta.values() if isinstance(change, LowRank)), default=0)
    if rank is not None and rank < own:
        fix = f"sweep with rank {own} or more, and compress what you choose by `repair`"
        raise DeltaError(f"the delta itself has rank {own}, which rank {rank} cannot hold", where="--rank", fix=fix)


def _with_bar(edits: Sequence[Edit], subject: Subject) -> list[Edit]:
    """Put base, delta and the scales of the default sweep before the edits, each once; drop what cannot act on this delta."""
    scales = [edit for edit in default_sweep(subject.kind) if edit.family == SCALE]
    able = [edit for edit in edits if subject.delta.layers or edit.family in (SCALE, "taper")]
    return list(dict.fromkeys([UNTOUCHED, WHOLE, *scales, *able]))


def _facts(subject: Subject, delta: str | Delta, question: Question, found: dict[str, Intruders]) -> dict[str, Any]:
    facts: dict[str, Any] = {"base": subject.base_path, "delta": delta if isinstance(delta, str) else "in memory"}
    facts |= {"kind": subject.kind, "base_fingerprint": subject.weights.fingerprint(), "matrices": len(subject.delta)}
    facts |= asdict(question) | {"notes": list(subject.weights.notes), "environment": environment()}
    if not found:
        return facts | {"intruders": None}
    counts = {name: len(mine.indices) for name, mine in found.items()}
    touched = sum(count > 0 for count in counts.values())
    each = {name: count for name, count in counts.items() if count}
    return facts | {"intruders": {"count": sum(counts.values()), "matrices": touched, "of": len(counts), "each": each}}
