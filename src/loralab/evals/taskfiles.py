"""Where lm-eval's tasks are found: its catalogue, folders in its format, and files given instead of their data sets."""

import contextlib
import io
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from loralab.base.sources import BUILDERS, Source, read_rows
from loralab.errors import DataError, EvaluationError, did_you_mean

EVALUATED = ("test_split", "validation_split")
SPLITS = (*EVALUATED, "training_split", "fewshot_split")
LOADERS = {ending: builder for ending, builder in BUILDERS.items() if builder != "text"}


@dataclass(frozen=True)
class Wanted:
    """A task of the catalogue and what is to be different from there.

    Attributes:
        name: of a task, group or tag.
        limit: most items; None is all.
        fewshot: examples before each item; None is the task's own number.
        data: files instead of the task's own data set: split → file. `test` also stands for the split that is evaluated.
        include: folders with more tasks in lm-eval's format.
        chat: put prompts through the tokenizer's chat template.
    """

    name: str
    limit: int | None = None
    fewshot: int | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    include: tuple[str, ...] = ()
    chat: bool = False


def refuse_unknown(name: str, include: Sequence[str] = ()) -> None:
    """Raise EvaluationError, with the nearest name, if the catalogue has no task, group or tag of this name."""
    for folder in include:
        if not Path(folder).is_dir():
            raise EvaluationError("there is no such folder of tasks", where=folder, fix="correct its name")
    if name not in _manager_for(name, tuple(include)).task_index:
        names = [*_manager(tuple(include)).all_tasks, *_manager(tuple(include)).task_index]
        near = did_you_mean(name, names)
        fix = f"did you mean {near!r}?" if near else "`lm-eval ls tasks` lists the catalogue"
        raise EvaluationError(f"there is no task {name!r}", where="lm-eval's catalogue", fix=fix)


def refuse_file(task: str, file: str) -> None:
    """Raise DataError if a task's file is missing, or of a type that holds no columns."""
    if not Path(file).is_file():
        raise DataError("there is no such file", where=file, fix=f"name the data of {task} anew")
    if Path(file).suffix not in LOADERS:
        fix = f"write it as {', '.join(LOADERS)}"
        raise DataError(f"data of the type {Path(file).suffix!r} cannot be read", where=file, fix=fix)


def read_tasks(wanted: Wanted) -> list[Any]:
    """Make lm-eval's task objects of a name: one of a task, all of a group or tag.

    Raises:
        EvaluationError: an unknown name, or a task that cannot be made.
        DataError: its data cannot be had, or do not fit.
    """
    refuse_unknown(wanted.name, wanted.include)
    manager = _manager_for(wanted.name, wanted.include)
    spec: Any = wanted.name
    if wanted.data:
        spec = _own_data(wanted, manager)
    try:
        with quiet(), seeded():
            tasks = list(manager.load([spec])["tasks"].values())
    except Exception as error:  # of any type: the data set is fetched and a first item made here
        raise _unreadable(wanted, error) from error
    for task in tasks if wanted.data else ():
        _refuse_missing_columns(task, next(iter(wanted.data.values())))
    return tasks


def _refuse_missing_columns(task: Any, file: str) -> None:
    """Refuse rows without a column that a template names by itself: lm-eval would take the name for the text."""
    for part in ("doc_to_text", "doc_to_choice", "doc_to_target"):
        named = getattr(task.config, part, None)
        if isinstance(named, str) and named.isidentifier() and named not in task.features:
            fix = f"rename the column that holds it; there are: {', '.join(task.features)}"
            raise DataError(f"no column {named!r} for the task's {part}", where=file, fix=fix)


def _own_data(wanted: Wanted, manager: TaskManager) -> dict[str, Any]:
    """Give the settings of a task whose data are files."""
    for file in wanted.data.values():
        refuse_file(wanted.name, file)
    kinds = {LOADERS[Path(file).suffix] for file in wanted.data.values()}
    if len(kinds) > 1:
        raise DataError("files of one task are of one type", where=", ".join(wanted.data.values()))
    entry = manager.task_index[wanted.name]
    if entry.yaml_path is None or entry.kind is not Kind.TASK:
        fix = "name the tasks of the group one by one"
        raise EvaluationError("only a single task can be given files", where=wanted.name, fix=fix)
    own = load_yaml(entry.yaml_path)
    evaluated = next((own[key] for key in EVALUATED if own.get(key)), "test")
    splits = sorted({"test", *(own[key] for key in SPLITS if own.get(key))})
    for split in wanted.data:
        if split not in splits:
            fix = f"splits: {', '.join(splits)}"
            raise EvaluationError(f"the task {wanted.name!r} has no split {split!r}", where="--data", fix=fix)
    files = {evaluated if split == "test" else split: str(Path(file).resolve()) for split, file in wanted.data.items()}
    tabs = {"sep": "\t"} if any(Path(file).suffix == ".tsv" for file in files.values()) else {}
    absent = {key: None for key in SPLITS if own.get(key) not in (None, *files)}
    found = own | {"dataset_path": kinds.pop(), "dataset_name": None, "dataset_kwargs": {"data_files": files, **tabs}}
    return found | absent


@lru_cache(maxsize=4)
def _manager(include: tuple[str, ...]) -> TaskManager:
    """Index the whole catalogue: seconds."""
    with quiet():
        return TaskManager(include_path=list(include) or None)


@lru_cache(maxsize=16)
def _manager_for(name: str, include: tuple[str, ...]) -> TaskManager:
    """Index only the folder of the catalogue in which a task most likely stands; all of it if it is not there."""
    catalogue = Path(lm_eval.tasks.__file__).parent
    parts = name.split("_")
    for end in range(len(parts), 0, -1):
        folder = catalogue / "_".join(parts[:end])
        if folder.is_dir() or include:
            with quiet():
                near = TaskManager(
                    include_path=[*include, *([str(folder)] if folder.is_dir() else [])], include_defaults=False
                )
            if name in near.task_index:
                # A tag or group may have members elsewhere.
                alone = near.task_index[name].kind in (Kind.TASK, Kind.PY_TASK)
                return near if alone else _manager(include)
    for file in (file for folder in include for file in Path(folder).rglob(f"{name}.yaml")):
        fix = "see that it is YAML, and that it says `task: " + name + "`"
        raise EvaluationError("lm-eval cannot read this file as a task", where=str(file), fix=fix)
    return _manager(include)


def refuse_own_examples(task: Any) -> None:
    """Refuse examples in the prompt that would come from the evaluated file, the item's own answer among them."""
    shots = int(task.config.num_fewshot or 0)
    own = task.config.training_split or task.config.fewshot_split or getattr(task.fewshot_cfg, "samples", None)
    if shots and not own:
        name = task.config.task
        what = f"{shots} examples before each item would come from the evaluated file, with their answers"
        fix = f"give them a file: --data {name}:train=FILE, or say --fewshot 0"
        raise DataError(what, where=name, fix=fix)


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Let tasks that shuffle do it as in lm-eval, whose seeds these are, and leave the generators as they were."""
    states = random.getstate(), np.random.get_state()
    random.seed(0)
    np.random.seed(1234)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval and datasets from writing progress between our lines."""
    loggers = [logging.getLogger("lm_eval"), logging.getLogger("datasets")]
    levels = [logger.level for logger in loggers]
    shown = is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # tqdm writes there
            yield
    finally:
        if shown:
            enable_progress_bar()
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _unreadable(wanted: Wanted, error: Exception) -> Exception:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    where = next(iter(wanted.data.values()), wanted.name)
    if wanted.data:
        return DataError(f"the data do not fit the task {wanted.name!r}: {said}", where=where, fix=_columns(where))
    if isinstance(error, TypeError | KeyError | AttributeError | ImportError):
        return EvaluationError(f"the task {wanted.name!r} cannot be made: {said}", where=where, fix="correct its file")
    fix = f"fetch it while online, or name a file: --data {wanted.name}=FILE"
    return DataError(f"the data of {wanted.name!r} cannot be had: {said}", where=where, fix=fix)


def _columns(file: str) -> str:
    try:
        first = next(iter(read_rows(Source(file)).batches()))[0]
    except Exception:  # the file was unreadable, which has been said
        return "the file must have the columns that the task's templates name"
    return f"the file has the columns {', '.join(first)}; the task's templates name others"
