"""Tasks of lm-eval's catalogue, and of folders in its format, on our engines.

Prompts, targets, filters, metrics and versions are lm-eval's: its task objects build the requests and judge the answers. The
answers come from our engines, for a base and its deltas at once; requests are built and tokenised once.
"""

import hashlib
import inspect
import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from loralab.delta.several import View
from loralab.errors import DataError, EvaluationError
from loralab.evals.chat import chat_template
from loralab.evals.exam import Card, Outcome
from loralab.evals.taskfiles import SPLITS, Wanted, quiet, read_tasks, refuse_own_examples, seeded
from loralab.evals.texts import TextEngine


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
        if self.kind == "generate_until":
            return Outcome(values, str(item[0].resps[0]))
        chosen = self._chosen(item) if self.task.OUTPUT_TYPE == "multiple_choice" else {}
        return Outcome(values, chosen=chosen)

    def _chosen(self, item: list[Instance]) -> dict[str, str]:
        """Give the choice that is taken by each metric: the likeliest, or the likeliest for its length."""
        choices = [str(choice) for choice in self.task.doc_to_choice(item[0].doc)]
        likelihoods = np.array([one.resps[0][0] for one in item[: len(choices)]])
        lengths = {"acc": [1] * len(choices), "acc_norm": [len(c) for c in choices]}
        lengths["acc_bytes"] = [len(c.encode()) for c in choices]
        found = {metric: int(np.argmax(likelihoods / np.maximum(n, 1))) for metric, n in lengths.items()}
        return {metric: choices[number] for metric, number in found.items()}

    def aggregate(self, metric: str, values: Sequence[Any]) -> float:
        together = self.task.aggregation().get(metric.partition(":")[0], mean)  # as lm-eval does with unnamed ones
        try:
            return float(together(list(values)))
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
        for task in read_tasks(one):
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
            if one.data:
                refuse_own_examples(task)
            task.set_fewshot_seed(seed=1234)  # lm-eval's own
            with seeded():
                found[task.config.task] = CatalogueTask(task, one, engine)
    return list(found.values())


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


def _misfit(name: str, task: Any, error: Exception) -> Exception:
    said = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    features = getattr(task, "features", None)
    fix = f"the data have the columns {', '.join(features)}" if features else None
    return DataError(f"items of {name!r} cannot be made of these data: {said}", where=name, fix=fix)
