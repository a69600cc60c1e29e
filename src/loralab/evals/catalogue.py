"""Tasks of lm-eval's catalogue, and of folders in its format, on our engines.

Prompts, targets, filters, metrics and versions are lm-eval's: its task objects build the requests and judge the answers. The
answers come from our engines, for a base and its deltas at once; requests are built and tokenised once.
"""

import contextlib
import hashlib
import inspect
import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import lm_eval.tasks
from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks import TaskManager
from lm_eval.tasks._index import Kind
from lm_eval.tasks._yaml_loader import load_yaml

from loralab.delta.several import View
from loralab.errors import DataError, EvaluationError, did_you_mean
from loralab.evals.chat import chat_template
from loralab.evals.exam import Card, Outcome
from loralab.evals.texts import TextEngine

EVALUATED = ("test_split", "validation_split")
SPLITS = (*EVALUATED, "training_split", "fewshot_split")
LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


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


class CatalogueTask:
    """One task with its requests built: an `Exam`."""

    def __init__(self, task: Any, wanted: Wanted, engine: TextEngine) -> None:
        self.task, self.engine = task, engine
        self.name: str = task.config.task
        self._build(wanted)
        self.instances: list[Instance] = task.instances
        if not self.instances:
            raise DataError("the task has no items", where=self.name, fix="give it data with rows")
        kinds = {instance.request_type for instance in self.instances}
        if len(kinds) > 1:
            raise EvaluationError(f"the task mixes kinds of requests: {sorted(kinds)}", where=self.name)
        self.kind: str = kinds.pop()
        # As lm-eval does, a request with repeats is asked as often in a row.
        self._asked = [instance for instance in self.instances for _ in range(instance.repeats or 1)]
        self._of_item: dict[int, list[Instance]] = {}
        for instance in self.instances:
            self._of_item.setdefault(int(instance.doc_id or 0), []).append(instance)
        self._refuse_items_without_answer(wanted)
        self.card = self._card()
        self._prepared = engine.prepared([i.args[:2] for i in self._asked]) if self.kind == "loglikelihood" else None

    def _card(self) -> Card:
        version = getattr(self.task, "VERSION", None)
        better = self.task.higher_is_better()
        return Card(
            name=self.name,
            version=None if version is None else str(version),
            fewshot=int(self.task.config.num_fewshot or 0),
            prompt_hash=_hash([instance.args for instance in self.instances]),
            template_hash=_hash(_templates(self.task)),
            chances=self._chances(),
            worse_if_more=frozenset(metric for metric, more in better.items() if not more),
        )

    def _build(self, wanted: Wanted) -> None:
        """Build the requests; whatever goes wrong there is the data's or the template's fault."""
        chat = chat_template(self.engine.tokenizer) if wanted.chat else None
        try:
            with quiet():
                self.task.build_all_requests(
                    limit=wanted.limit,
                    apply_chat_template=wanted.chat,
                    fewshot_as_multiturn=wanted.chat,
                    chat_template=chat,
                    tokenizer_name="",
                )
        except Exception as error:  # of any type: templates and functions of the task run here
            raise _misfit(self.name, self.task, error) from error

    def _refuse_items_without_answer(self, wanted: Wanted) -> None:
        """Refuse items that no answer can get right; in rows of lm-eval's own sets only where none has one, as it counts them."""
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return
        odd = [number + 1 for number, item in self._of_item.items() if not self._right(item[0].doc)]
        if odd and (wanted.data or len(odd) == len(self)):
            what = f"of {len(odd)} of {len(self)} items the right choice is none of their choices, of item {odd[0]} for one"
            raise DataError(what, where=wanted.data.get("test", self.name), fix="correct the column that names it")

    def _right(self, doc: dict[str, Any]) -> list[int]:
        """Number the choices of an item that are right."""
        choices = self.task.doc_to_choice(doc)
        found = self.task.doc_to_text(doc) if getattr(self.task, "multiple_input", 0) else self.task.doc_to_target(doc)
        rights = found if isinstance(found, list) else [found]
        numbers = [choices.index(one) if isinstance(one, str) and one in choices else one for one in rights]
        return [int(one) for one in numbers if isinstance(one, int) and 0 <= one < len(choices)]

    def _chances(self) -> tuple[float, ...] | None:
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return None
        return tuple(1 / len(self.task.doc_to_choice(item[0].doc)) for item in self._of_item.values())

    def __len__(self) -> int:
        return len(self._of_item)

    def items(self) -> Iterator[tuple[str, str]]:
        for item in self._of_item.values():
            prompt = item[0].args[0] if self.kind != "loglikelihood_rolling" else ""
            yield str(prompt), self._reference(item[0].doc)

    def _reference(self, doc: dict[str, Any]) -> str:
        if self.task.OUTPUT_TYPE == "multiple_choice" and (right := self._right(doc)):
            return str(self.task.doc_to_choice(doc)[right[0]])
        return str(self.task.doc_to_target(doc))

    def outcomes(self, views: Sequence[View]) -> list[list[Outcome]]:
        return [self.judged(responses) for responses in self._responses(views)]

    def _responses(self, views: Sequence[View]) -> Sequence[Sequence[Any]]:
        """Answer every request in every view, as often as it is asked: views × answers."""
        arguments = [instance.args for instance in self._asked]
        if self._prepared is not None:
            return self._prepared.score(views)
        if self.kind == "loglikelihood_rolling":
            return self.engine.rolling([text for (text, *_) in arguments], views)
        if self.kind == "generate_until":
            return self.engine.written([(prompt, settings) for prompt, settings, *_ in arguments], views)
        raise EvaluationError(f"no engine answers requests of the kind {self.kind!r}", where=self.name)

    def judged(self, responses: Sequence[Any]) -> list[Outcome]:
        """Judge answers to all requests, in order: pairs (log p, greedy), log p of texts, or texts."""
        for instance in self.instances:
            instance.resps, instance.filtered_resps = [], {}
        for instance, response in zip(self._asked, responses, strict=True):
            instance.resps.append(tuple(response) if self.kind == "loglikelihood" else response)
        with quiet():
            self.task.apply_filters()
            return [self._judge(item) for item in self._of_item.values()]

    def _judge(self, item: list[Instance]) -> Outcome:
        values: dict[str, Any] = {}
        for key in item[0].filtered_resps:
            judged = self.task.process_results(item[0].doc, [one.filtered_resps[key] for one in item])
            several = len(item[0].filtered_resps) > 1
            values |= {f"{metric}:{key}" if several else metric: value for metric, value in judged.items()}
        return Outcome(values, self._output(item))

    def _output(self, item: list[Instance]) -> str | None:
        """Give what the model wrote, or the choice that it finds likeliest."""
        if self.kind == "generate_until":
            return str(item[0].resps[0])
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return None
        choices = self.task.doc_to_choice(item[0].doc)
        found = [one.resps[0][0] for one in item[: len(choices)]]
        return str(choices[max(range(len(found)), key=found.__getitem__)])

    def aggregate(self, metric: str, values: Sequence[Any]) -> float:
        try:
            return float(self.task.aggregation()[metric.partition(":")[0]](list(values)))
        except OverflowError:  # exp of the loss of a word that is a whole text
            return float("inf")


def load_tasks(wanted: Sequence[Wanted], engine: TextEngine, *, unsafe: bool = False) -> list[CatalogueTask]:
    """Load tasks and build their requests. Groups and tags give all of their tasks; a task that comes again counts once.

    Args:
        wanted: tasks by name.
        engine: that will answer.
        unsafe: allow tasks that run code of the model without protection.

    Raises:
        EvaluationError: an unknown name; a task that runs code of the model, or needs pictures or sounds.
        DataError: its data cannot be had, or lack columns.
    """
    found: dict[str, CatalogueTask] = {}
    for one in wanted:
        for task in _read(one):
            if task.config.task in found:
                continue
            if getattr(task, "UNSAFE_CODE", False) and not unsafe:
                fix = "evaluate the suite `code`, which runs programs in a sandbox, or say --unsafe"
                raise EvaluationError("this task runs the model's code without protection", where=one.name, fix=fix)
            if getattr(task, "MULTIMODAL", False):
                raise EvaluationError("this task needs pictures or sounds", where=one.name)
            if one.fewshot is not None:
                task.set_config(key="num_fewshot", value=one.fewshot)
            elif task.config.num_fewshot is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=1234)  # lm-eval's own
            found[task.config.task] = CatalogueTask(task, one, engine)
    return list(found.values())


def refuse_unknown(name: str, include: Sequence[str] = ()) -> None:
    """Raise EvaluationError, with the nearest name, if the catalogue has no task, group or tag of this name."""
    for folder in include:
        if not Path(folder).is_dir():
            raise EvaluationError("there is no such folder of tasks", where=folder, fix="correct --include")
    if not _knows(_manager_for(name, tuple(include)), name):
        names = [*_manager(tuple(include)).all_tasks, *_manager(tuple(include)).task_index]
        near = did_you_mean(name, names)
        fix = f"did you mean {near!r}?" if near else "`lm-eval ls tasks` lists the catalogue"
        raise EvaluationError(f"there is no task {name!r}", where="--tasks", fix=fix)


def _read(wanted: Wanted) -> list[Any]:
    refuse_unknown(wanted.name, wanted.include)
    manager = _manager_for(wanted.name, wanted.include)
    spec: Any = wanted.name
    if wanted.data:
        spec = _own_data(wanted, manager)
    try:
        with quiet():
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
        if not Path(file).is_file():
            raise DataError("there is no such file", where=file, fix=f"name the data of {wanted.name} anew")
        if Path(file).suffix not in LOADERS:
            fix = f"write it as {', '.join(LOADERS)}"
            raise DataError(f"data of the type {Path(file).suffix!r} cannot be read", where=file, fix=fix)
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


def _knows(manager: TaskManager, name: str) -> bool:
    return name in manager.task_index


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
            if _knows(near, name):
                return near
    for file in (file for folder in include for file in Path(folder).rglob(f"{name}.yaml")):
        fix = "see that it is YAML, and that it says `task: " + name + "`"
        raise EvaluationError("lm-eval cannot read this file as a task", where=str(file), fix=fix)
    return _manager(include)


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


def _templates(task: Any) -> Any:
    """Give what shapes prompts and judgements, wherever the rows come from, as plain values; functions by their code."""
    shaping = task.dump_config() if isinstance(task, ConfigurableTask) else {"task": type(task).__name__}
    return _plain(
        {key: value for key, value in shaping.items() if key != "num_fewshot" and not key.startswith("dataset")}
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        places = ("config_source", "split", *SPLITS)
        return {str(key): _plain(part) for key, part in value.items() if key not in places}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if callable(value):
        try:
            return inspect.getsource(value)
        except (OSError, TypeError):  # built in, or an object that can be called
            return getattr(value, "__qualname__", type(value).__qualname__)
    return value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _unreadable(wanted: Wanted, error: Exception) -> Exception:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    where = next(iter(wanted.data.values()), wanted.name)
    if wanted.data:
        return DataError(f"the data do not fit the task {wanted.name!r}: {said}", where=where, fix=_columns(where))
    if isinstance(error, TypeError | KeyError | AttributeError | ImportError):
        return EvaluationError(f"the task {wanted.name!r} cannot be made: {said}", where=where, fix="correct its file")
    fix = f"fetch it while online, or name a file: --data {wanted.name}=FILE"
    return DataError(f"the data of {wanted.name!r} cannot be had: {said}", where=where, fix=fix)


def _misfit(name: str, task: Any, error: Exception) -> Exception:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    features = getattr(task, "features", None)
    fix = f"the data have the columns {', '.join(features)}" if features else None
    return DataError(f"items of {name!r} cannot be made of these data: {said}", where=name, fix=fix)


def _columns(file: str) -> str:
    from loralab.base.sources import Source, read_rows

    try:
        first = next(iter(read_rows(Source(file)).batches()))[0]
    except Exception:  # the file was unreadable, which has been said
        return "the file must have the columns that the task's templates name"
    return f"the file has the columns {', '.join(first)}; the task's templates name others"
