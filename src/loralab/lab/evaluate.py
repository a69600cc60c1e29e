"""Evaluates a base and its deltas on tasks, in one pass over the data: the composition of an evaluation."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loralab.base.model import Base, load, reads_both_ways
from loralab.delta.several import Wardrobe
from loralab.errors import DataError, EvaluationError, ModelError
from loralab.evals.catalogue import load_tasks
from loralab.evals.code import read_problems
from loralab.evals.exam import Exam
from loralab.evals.exams import ItemExam, code_exam, written_exam
from loralab.evals.probe import Cost, counting
from loralab.evals.suites import PROGRAMS, SUITES, Suite
from loralab.evals.taskfiles import Wanted
from loralab.evals.tasks import Task
from loralab.evals.texts import TextEngine
from loralab.lab.deltas import names_of, read_delta
from loralab.lab.evaluation import BASE, Evaluation, refuse_folder
from loralab.lab.index import is_run, read_spec
from loralab.lab.judge import Judged, curves_of, diversity_of, is_finite, suite_mean
from loralab.lab.measured import Measured
from loralab.lab.questions import Questions, refuse_before_loading, unheeded
from loralab.lab.tasks import is_file_of_items, read_tasks
from loralab.pocket import world
from loralab.run.folder import environment
from loralab.spec.spec import TaskSpec
from loralab.training.loss import LanguageHead


def evaluate(
    model: str,
    tasks: Sequence[str],
    *,
    deltas: Sequence[str] = (),
    out: str | Path | None = None,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    **asked: Any,
) -> Evaluation:
    """Evaluate a base, and each delta paired against it, on tasks and suites.

    Args:
        model: folder or hub id of the base; or a run folder, which stands for its base and its delta.
        tasks: names of lm-eval's catalogue, suites (`forgetting`, `math`, `code`, `superglue`), `pocket:NAME`, or files of
            rows {prompt, completion[, choices, right, skill]}.
        deltas: PEFT folders, run folders, or fully fine-tuned checkpoints.
        out: folder for the results; None writes none.
        revision: of a hub base.
        dtype: `auto`, `float32` or `bfloat16`.
        device: `auto`, `cpu`, `cuda`, `mps`.
        trust_remote_code: run the base's own code.
        asked: further fields of `Questions`: limit, fewshot, data, include, chat, samples, temperature, top_p, seed, unsafe.

    Raises:
        LoralabError: an unknown task, a delta for another base, data that cannot be had or lack columns, …
    """
    begin = time.perf_counter()
    questions = Questions(list(tasks), **asked)
    refuse_before_loading(questions)
    paths = list(deltas)
    wanted: dict[str, Any] = {"revision": revision, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if is_run(Path(model)):
        paths.insert(0, model)
        model, wanted = _base_of(Path(model), wanted)
    if out is not None:
        refuse_folder(out)
    base = load(model, device=device, **wanted)
    if reads_both_ways(base.model):
        fix = "its pseudo-log-likelihood is a probe; take a causal language model here"
        raise ModelError("a model that reads both ways cannot answer these tasks", where=model, fix=fix)
    assert base.tokenizer is not None
    engine = TextEngine(LanguageHead(base.model), base.tokenizer)
    exams = exams_of(questions, engine)
    names = names_of(paths)
    wardrobe = Wardrobe(base.model, {n: read_delta(p, base) for n, p in zip(names, paths, strict=True)})
    cost = Cost()
    with counting(base.model, cost):
        found = _taken(exams, wardrobe)
    facts = _facts(base, names, paths, questions) | dict(found.facts)
    facts["cost"] = _cost(cost, engine, time.perf_counter() - begin)
    evaluation = Evaluation(found.models, found.measured, found.items, facts, found.curves, found.diversity)
    if out is not None:
        evaluation.write(out)
    return evaluation


def _base_of(run: Path, asked: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Give the base of a run, loaded as the run loaded it where nothing else is asked."""
    spec = read_spec(run / "spec.yaml")[1]["model"]
    silent = {"revision": None, "dtype": "auto", "trust_remote_code": False}
    kept = {key: spec.get(key, value) if asked[key] == value else asked[key] for key, value in silent.items()}
    return str(spec["path"]), kept | {"quantize": spec.get("quantize")}


def exams_of(questions: Questions, engine: TextEngine) -> dict[str, list[Exam]]:
    """Build the exams of every name that was asked for; one that comes again, by itself or in a suite, is the same object.

    Raises:
        LoralabError: data that cannot be had, do not fit, or hold no items; two tasks of one name.
    """
    known: dict[tuple[str, str], Exam] = {}
    found: dict[str, list[Exam]] = {}
    for name in dict.fromkeys(questions.tasks):
        suite = SUITES.get(name)
        built = [e for part in (suite.parts if suite else (name,)) for e in _exams(part, suite, questions, engine)]
        if not built:
            raise DataError("there are no items", where=name, fix="give it rows")
        found[name] = [known.setdefault((exam.card.name, getattr(exam, "metric", "")), exam) for exam in built]
        for mine, first in zip(built, found[name], strict=True):
            if mine.card.prompt_hash != first.card.prompt_hash:
                fix = "evaluate them one after the other, or give the rows another `skill`"
                raise EvaluationError(
                    f"two tasks are named {mine.card.name!r}, and are not the same", where=name, fix=fix
                )
    return found


def _exams(name: str, suite: Suite | None, questions: Questions, engine: TextEngine) -> list[Exam]:
    if name in PROGRAMS:
        path = questions.data_of(name).get("test")
        problems = read_problems(path) if path else read_problems(PROGRAMS[name], "test")
        problems = problems[: questions.limit]
        if not problems:
            return []
        sampled: dict[str, Any] = {"samples": questions.samples, "sampling": questions.sampling}
        return [code_exam(name, problems, engine, **sampled, unsafe=questions.unsafe)]
    if world.is_address(name) or is_file_of_items(name):
        return _item_exams(name, questions, engine)
    fewshot = questions.fewshot if questions.fewshot is not None or suite is None else suite.fewshot
    include = (*questions.include, *(suite.include if suite else ()))
    wanted = Wanted(name, questions.limit, fewshot, questions.data_of(name), include, questions.chat)
    return list(load_tasks([wanted], engine, unsafe=questions.unsafe))


def _item_exams(name: str, questions: Questions, engine: TextEngine) -> list[Exam]:
    """Split the items of an address or file by skill, and ask what each can be asked."""
    exams: list[Exam] = []
    for task in read_tasks([TaskSpec(path=name, items=questions.limit)]):
        for skill in dict.fromkeys(item.skill for item in task.items):
            mine = Task([item for item in task.items if item.skill == skill], task.grade, task.ends)
            if task.grade is not None and (questions.samples > 1 or not questions.sampling.greedy):
                sampled: dict[str, Any] = {"samples": questions.samples, "sampling": questions.sampling}
                exams.append(written_exam(skill, mine.items, task.grade, engine, **sampled))
                continue
            if task.ends:
                exams.append(ItemExam(mine, engine, "accuracy"))
            if any(item.choices for item in mine.items):
                exams.append(ItemExam(mine, engine, "choice"))
    return exams


def _taken(exams: Mapping[str, Sequence[Exam]], wardrobe: Wardrobe) -> Evaluation:
    """Take every exam on all models and judge it."""
    models = [BASE, *wardrobe.names]
    measured: list[Measured] = []
    items, curves, diversity = (list[dict[str, Any]]() for _ in range(3))
    left_out: list[str] = []
    suites: dict[str, list[str]] = {}
    taken: dict[int, list[Judged]] = {}
    for name, mine in exams.items():
        counted: list[Judged] = []
        for exam in mine:
            if id(exam) not in taken:
                outcomes = exam.outcomes(wardrobe.views())
                metrics = {metric: is_finite(exam, metric, outcomes) for metric in outcomes[0][0].values}
                left_out += [f"{exam.card.name}/{metric}" for metric, finite in metrics.items() if not finite]
                taken[id(exam)] = [Judged(exam, m, models, outcomes) for m, finite in metrics.items() if finite]
                for judged in taken[id(exam)]:
                    measured += judged.measured()
                    items += judged.rows(outcomes)
                curves += curves_of(exam.card.name, models, outcomes)
                diversity += diversity_of(exam.card.name, models, outcomes)
            wanted = SUITES[name].parts.get(exam.card.name) if name in SUITES else None
            counted += [judged for judged in taken[id(exam)] if wanted in (None, judged.metric)]
        if name in SUITES:
            suites[name] = [one.name for one in counted]
            measured += suite_mean(name, counted)
        elif world.is_address(name) or is_file_of_items(name):
            for metric in dict.fromkeys(one.metric for one in counted):
                parts = [one for one in counted if one.metric == metric]
                if len(parts) > 1:
                    title = f"{name} by {metric}"
                    suites[title] = [one.name for one in parts]
                    measured += suite_mean(title, parts)
    return Evaluation(models, measured, items, {"suites": suites, "left_out": left_out}, curves, diversity)


def _facts(base: Base, names: Sequence[str], paths: Sequence[str], questions: Questions) -> dict[str, Any]:
    return {
        "model": base.path,
        "fingerprint": base.fingerprint,
        "revision": base.revision,
        "dtype": str(base.model.dtype).removeprefix("torch."),
        "deltas": {name: {"path": path} for name, path in zip(names, paths, strict=True)},
        **asdict(questions),
        "sampling": asdict(questions.sampling),
        "unheeded": unheeded(questions),
        "environment": environment(),
    }


def _cost(cost: Cost, engine: TextEngine, seconds: float) -> dict[str, Any]:
    scoring = engine.likelihood.tally
    found = {
        "forwards": cost.forwards,
        "tokens": cost.tokens,
        "truncated": scoring.truncated,
        "seconds": round(seconds, 3),
    }
    # Beside a plain scorer stands what was scored, and only where nothing was written.
    alone = cost.tokens == scoring.tokens and scoring.tokens
    return found | ({"plain_tokens": scoring.plain_tokens} if alone else {})
