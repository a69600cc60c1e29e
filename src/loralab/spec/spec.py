"""The spec: everything that decides a run, resolved, frozen, validated and hashed.

A recipe is what a person writes; `RunSpec` is the same with every default filled in. Each default names its source:
P1 LoRA Learns Less and Forgets Less (2405.09673), P2 Chain of LoRA (2401.04151), P3 LoRA+ (2402.12354),
P6 LoRA Without Regret (Thinking Machines, 2025). Spec classes never enter other modules: the composition root
(`lab/experiment.py`) hands their fields on as plain arguments.
"""

import hashlib
import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)

from loralab.spec.method import LoraSpec, MethodSpec
from loralab.spec.objective import ObjectiveSpec, TextSpec
from loralab.spec.strict import Count, Grown, Patterns, Positive, Share, Strict, contradiction
from loralab.spec.training import AdamWSpec, CosineSpec, OptimizerSpec, ScheduleSpec, TrainSpec

FULL_LEARNING_RATE = 2e-5
LOW_RANK_LEARNING_RATE_RATIO = 10.0


class ModelSpec(Grown):
    """The base: a folder or hub id with everything needed to load it the same way again."""

    LATER = ("delta",)

    path: str
    """A folder with a Hugging Face model, a hub id, or `pocket`: the small base that comes with the package.

    A folder of your own by that name is `./pocket`.
    """
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 where the accelerator has it, else float32. Never the file's float16: it cannot be trained."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Quantise the frozen base with bitsandbytes (CUDA only)."""
    trust_remote_code: bool = False
    """Run the model's own Python code from its repository. Only if you have read it."""
    random_init: bool = False
    """Draw the weights from `seed` instead of reading them: pretraining from nothing, of every weight."""
    attention_dropout: Share | None = None
    """A regulariser of P1 (0.05 and 0.1 tried there); None keeps the model's own value."""
    delta: str | None = None
    """A low-rank delta of this base that the model wears when training begins, an SFT adapter before reinforcement
    learning say: a run folder, its `delta`, or a PEFT folder. It stays beside the base as frozen pairs (method `full`
    begins from the merged weights). KL, drift and forgetting are then distances from base and delta, spectra are of what
    is learned on top; reward models act on the base alone, and the run's own `delta` is the sum.
    """


class TemplateSpec(Strict):
    """How columns become a prompt and a completion: field names in braces, as in `Question: {question}`."""

    prompt: str
    completion: str


class SourceSpec(Strict):
    """One source of rows; several are mixed by weight."""

    path: str
    """A json, jsonl, parquet, csv, tsv or txt file, a folder of them, or a hub data set id."""
    weight: Positive = 1.0
    """How often each example is seen per epoch on average: 0.25 is a fresh quarter each epoch, 2 is twice."""
    form: Literal["auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt"] | None = None
    """None takes `data.form`."""
    template: TemplateSpec | None = None
    """None takes `data.template`."""
    split: str | None = None
    """Split of a hub data set; None is `train`."""


SourcesAsWritten = str | SourceSpec | list[str | SourceSpec] | None


def _paths_become_sections(value: Any) -> Any:
    """Let a path stand for a section that has nothing but a path, and one of them for a list."""
    if isinstance(value, str | dict):
        value = [value]
    if isinstance(value, list):
        return [{"path": item} if isinstance(item, str) else item for item in value]
    return value


class DataSpec(Strict):
    """What is read, how it becomes tokens with a loss mask, and how tokens become batches."""

    train: list[SourceSpec]
    validation: list[SourceSpec] | None = None
    """Held-out rows of the target; None takes `validation_share` of the training rows."""
    validation_share: Share = 0.02
    """Share of the training rows held out (by hash of the row) if `validation` is not given."""
    general: list[SourceSpec] | None = None
    """Text on which forgetting is watched during training; None watches drift on the validation rows only. A classifier or a
    reward model reads it through the pretrained head of the same files: a decoder's loss, an encoder's pseudo-loss.
    """
    form: Literal["auto", "text", "messages", "prompt_completion", "alpaca", "sharegpt"] = "auto"
    template: TemplateSpec | None = None
    chat_template: str | None = None
    """`chatml`, `plain`, or a Jinja file; None takes the tokenizer's own."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Tokens of one sequence."""
    packing: bool = True
    """Fill sequences with whole examples (best fit); attention and positions stay within each example."""
    overlong: Literal["auto", "split", "drop", "truncate"] = "auto"
    """What to do with examples above `max_length`: `auto` splits plain text and drops prompted examples."""
    streaming: bool = False
    """Read rows as they are needed: for corpora larger than memory. Needs `train.steps` or `train.tokens`."""

    @field_validator("train", "validation", "general", mode="before", json_schema_input_type=SourcesAsWritten)
    @classmethod
    def _paths_become_sources(cls, value: Any) -> Any:
        return _paths_become_sections(value)

    @model_validator(mode="after")
    def _some_training_data(self) -> "DataSpec":
        if not self.train:
            raise contradiction("data.train", "data.train is empty", "name at least one file")
        return self


class TaskSpec(Strict):
    """Items with right answers: their share says what was learned or forgotten."""

    path: str
    """`pocket:NAME` (`calc`, `source`, a skill …), a file of rows {prompt, completion[, choices, right, skill]}, a suite
    (`forgetting`, `math`, `code`, `superglue`), or a task of lm-eval's catalogue (`hellaswag`).

    The prompt as the model is to read it: no form, template or chat template is put around it.
    """
    items: Count | None = None
    """Most items of each skill or task; None takes 40 of the pocket world, 200 of the catalogue, all of a file."""
    data: dict[str, str] = {}
    """Of suites and tasks of the catalogue, files instead of their own data sets: `task: FILE` or `task:split: FILE`."""
    include: Patterns = []
    """Folders with more tasks in lm-eval's format."""
    fewshot: Annotated[int, Field(ge=0)] | None = None
    """Of suites and tasks of the catalogue, examples before each item; None is their own number."""


TasksAsWritten = str | TaskSpec | list[str | TaskSpec] | None


def _a_number_is_no_answer(choices: Any) -> BeforeValidator:
    """Refuse 1 where `true` is a choice: Python takes one for the other."""
    return BeforeValidator(lambda value: value if isinstance(value, bool | str) else str(value), choices)


Drift = Literal[True, False, "exact"]
Spectra = Literal[True, False, "intruders"]


class ProbeSpec(Strict):
    """What is measured during training. A task, or a list of them, in its place stands for `source`."""

    every: Annotated[float, Field(gt=0)] = 0.1
    """Below 1: share of the run; from 1 on: steps. The base and the end are always measured."""
    tokens: Count = 16384
    """Most tokens of each text that a probe reads."""
    drift: Annotated[Drift, _a_number_is_no_answer(Drift)] = True
    """Watch KL(base‖tuned), paired loss rise and top-1 flips on the general text (or the validation rows), and the KL on the
    prompts of the validation rows. `exact` forwards the base again each time instead of keeping its likeliest tokens.
    """
    top_k: Count = 64
    """Base log-probabilities kept per position; the KL is then a lower bound."""
    spectra: Annotated[Spectra, _a_number_is_no_answer(Spectra)] = True
    """Take the singular values of every matrix of the delta at each evaluation: low-rank pairs always (milliseconds a matrix),
    dense changes then only if all are small, else at the end. `intruders` looks for intruder dimensions too (k = 10, ε = 0.5),
    and takes dense changes of up to 2²² elements each time. `false` takes none, not even at the end.
    """
    target: list[TaskSpec] = []
    """Tasks that the training should teach: learning is the rise of their accuracy."""
    source: list[TaskSpec] = []
    """Tasks that the base knows: forgetting is the fall of their accuracy."""
    samples: Annotated[int, Field(ge=0)] = 6
    """Prompts of each role (without tasks: validation rows) whose answers are kept before and after training."""

    @field_validator("target", "source", mode="before", json_schema_input_type=TasksAsWritten)
    @classmethod
    def _paths_become_tasks(cls, value: Any) -> Any:
        return _paths_become_sections([] if value is None else value)


ProbesAsWritten = str | list[str | TaskSpec] | ProbeSpec


class CheckpointSpec(Strict):
    """When the state is saved and how many copies are kept."""

    every: Annotated[float, Field(gt=0)] = 0.1
    """Below 1: share of the run; from 1 on: steps."""
    keep_last: Count = 2
    keep_best: bool = True
    """Keep the checkpoint with the lowest validation loss too."""


class RunSpec(Strict):
    """One run, completely described."""

    name: str = "run"
    """First part of the folder's name."""
    seed: Annotated[int, Field(ge=0)] = 0
    model: ModelSpec
    data: DataSpec
    method: MethodSpec
    objective: ObjectiveSpec = TextSpec()
    optimizer: OptimizerSpec = AdamWSpec()
    schedule: ScheduleSpec = CosineSpec()
    train: TrainSpec
    probes: ProbeSpec = ProbeSpec()
    checkpoints: CheckpointSpec = CheckpointSpec()
    branch_from: str | None = None
    """`RUN@STEP`: begin from this checkpoint, as a cooldown branch of a long run does (P1 section 3)."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Mirrors of the metrics; not part of the run's identity."""

    @field_validator("probes", mode="before", json_schema_input_type=ProbesAsWritten)
    @classmethod
    def _tasks_become_the_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str | list) else value

    @model_validator(mode="before")
    @classmethod
    def _fill_what_depends_on_another_key(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = {key: value.model_dump() if isinstance(value, Strict) else value for key, value in data.items()}
        for key in ("objective", "optimizer", "schedule"):
            if isinstance(data.setdefault(key, {}), dict):
                data[key] = {"name": cls.model_fields[key].default.name, **data[key]}
        method, optimizer = data.get("method"), data["optimizer"]
        if not isinstance(method, dict):
            return data
        name = str(method.get("name"))
        if name in ("lora", "lora_plus", "cola") and method.get("alpha") is None:
            rank = cls._first_rank(method)
            if isinstance(rank, int) and rank > 0:
                data["method"] = {**method, "alpha": 2.0 * rank}
        if isinstance(optimizer, dict) and optimizer.get("learning_rate") is None:
            low_rank = LOW_RANK_LEARNING_RATE_RATIO
            ratio = {"full": 1.0, "lora_plus": low_rank / 2.0}.get(name, low_rank)
            data["optimizer"] = {**optimizer, "learning_rate": FULL_LEARNING_RATE * ratio}
        return data

    @staticmethod
    def _first_rank(method: dict[str, Any]) -> Any:
        ranks = method.get("ranks")
        if isinstance(ranks, list) and ranks:
            return ranks[0]
        return method.get("rank", LoraSpec.model_fields["rank"].default)

    @model_validator(mode="after")
    def _random_weights_all_move(self) -> "RunSpec":
        if self.model.random_init and self.method.name != "full":
            fix = "set method.name=full, or drop model.random_init"
            raise contradiction(
                "model.random_init", f"method {self.method.name} keeps its base, and random weights know nothing", fix
            )
        return self

    @model_validator(mode="after")
    def _a_start_belongs_to_a_base_that_can_wear_it(self) -> "RunSpec":
        if self.model.delta is None:
            return self
        key, fix = "model.delta", "merge it (`loralab merge`) and set model.path to what was merged"
        if self.model.random_init:
            raise contradiction(key, "no delta belongs to random weights", "drop model.delta, or model.random_init")
        if self.method.name == "peft":
            raise contradiction(
                key, "layers of the peft library cannot lie beside it", f"take a method of ours, or {fix}"
            )
        if getattr(self.method, "dropout", 0):
            what = "dropout would blur the delta that training begins from too"
            raise contradiction(key, what, "set method.dropout=0")
        if self.probes.spectra == "intruders" and self.method.name != "full":
            what = "intruders would be judged against the base alone, not against base and delta"
            raise contradiction(key, what, f"drop probes.spectra=intruders, or {fix}")
        return self

    @model_validator(mode="after")
    def _branches_warm_up_in_steps(self) -> "RunSpec":
        if self.branch_from and 0 < self.schedule.warmup < 1:
            # A share of the branch's own length is not the trunk's warm-up: the learning rate would jump.
            fix = "give the trunk's warm-up in steps"
            raise contradiction("schedule.warmup", "a share of a branch is not the warm-up of its trunk", fix)
        return self

    @model_validator(mode="after")
    def _streams_count_steps_or_full_bins(self) -> "RunSpec":
        if self.data.streaming and self.train.tokens is not None and not self.data.packing:
            raise contradiction("train.tokens", "a stream without packing cannot count tokens", "give train.steps")
        return self

    @model_validator(mode="after")
    def _streams_have_no_epochs(self) -> "RunSpec":
        if self.data.streaming and self.train.epochs is not None:
            raise contradiction("train.epochs", "a stream has no epochs", "give train.steps or train.tokens")
        return self

    def identity(self) -> dict[str, Any]:
        """Everything that decides the result: the spec without name and trackers, as plain values."""
        return self.model_dump(mode="json", exclude={"name", "trackers"})

    @property
    def hash8(self) -> str:
        """First eight hexadecimal digits of the SHA-256 of the canonical JSON of `identity`."""
        text = json.dumps(self.identity(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    @property
    def folder_name(self) -> str:
        """Name of the run's folder: recipe (letters, digits, points and dashes of it) and hash."""
        plain = re.sub(r"[^\w.-]+", "-", self.name).strip(".-") or "run"
        return f"{plain}-{self.hash8}"
