"""The spec: everything that decides a run, resolved, frozen, validated and hashed.

A recipe is what a person writes; `RunSpec` is the same with every default filled in. Each default names its source:
P1 LoRA Learns Less and Forgets Less (2405.09673), P2 Chain of LoRA (2401.04151), P3 LoRA+ (2402.12354),
P6 LoRA Without Regret (Thinking Machines, 2025). Spec classes never enter other modules: the composition root
(`lab/experiment.py`) hands their fields on as plain arguments.
"""

import hashlib
import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

FULL_LEARNING_RATE = 2e-5
LOW_RANK_LEARNING_RATE_RATIO = 10.0

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and silent conversions."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class ModelSpec(Strict):
    """The base: a folder or hub id with everything needed to load it the same way again."""

    path: str
    """A folder with a Hugging Face model, or a hub id."""
    revision: str | None = None
    """Commit, tag or branch of a hub id."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the accelerator has it, else float32. Never the file's float16: it cannot be trained."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1`, `mps`."""
    quantize: Literal["4bit", "8bit"] | None = None
    """Quantise the frozen base with bitsandbytes (CUDA only)."""
    trust_remote_code: bool = False
    """Run the model's own Python code from its repository. Only if you have read it."""
    attention_dropout: Share | None = None
    """A regulariser of P1 (0.05 and 0.1 tried there); None keeps the model's own value."""


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


class DataSpec(Strict):
    """What is read, how it becomes tokens with a loss mask, and how tokens become batches."""

    train: list[SourceSpec]
    validation: list[SourceSpec] | None = None
    """Held-out rows of the target; None takes `validation_share` of the training rows."""
    validation_share: Share = 0.02
    """Share of the training rows held out (by hash of the row) if `validation` is not given."""
    general: list[SourceSpec] | None = None
    """Text on which forgetting is watched during training; None watches drift on the validation rows only."""
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

    @field_validator("train", "validation", "general", mode="before")
    @classmethod
    def _paths_become_sources(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"path": value}]
        if isinstance(value, list):
            return [{"path": item} if isinstance(item, str) else item for item in value]
        if isinstance(value, dict):
            return [value]
        return value

    @model_validator(mode="after")
    def _some_training_data(self) -> "DataSpec":
        if not self.train:
            raise ValueError("data.train is empty: name at least one file")
        return self


class FullSpec(Strict):
    """Full fine-tuning: the chosen weights move freely."""

    name: Literal["full"] = "full"
    targets: list[str] = ["all"]
    """`all`, or names, globs and regular expressions of the parameters that move. P1 moves all of them."""
    freeze: list[str] = []
    """Patterns of parameters that stay, taken out of `targets`."""

    @field_validator("targets", "freeze", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class LoraSpec(Strict):
    """LoRA: a low-rank pair on every target. Hu et al. 2021; defaults after P1 section 6 and P6."""

    name: Literal["lora"] = "lora"
    rank: Count = 16
    """P1 finds 16 enough to forget least and 256 to learn most; 16 is the cheap end."""
    alpha: Positive | None = None
    """None is 2·rank (P1: best at every learning rate tried)."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """`alpha/sqrt(r)` is rank-stabilised LoRA (Kalajdzievski 2023)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the input of A. 0: its gain is small, its cost is not (P1 used 0.05)."""
    targets: list[str] = ["all-linear"]
    """`all-linear`, `attention`, `mlp`, or names, globs and regular expressions. P1, P6: all linear layers."""
    exclude: list[str] = []
    """Patterns taken out of `targets`."""
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    """Of A (B starts at zero): uniform(±1/sqrt(in)) as in the reference code, normal(0, 1/rank), or orthonormal rows."""
    train: Literal["both", "B"] = "both"
    """`B` freezes A at its random start (LoRA-FA)."""
    rank_pattern: dict[str, Count] = {}
    """Pattern of layers → their rank."""
    alpha_pattern: dict[str, Positive] = {}
    """Pattern of layers → their alpha; layers of `rank_pattern` without one keep alpha/rank of the rest."""
    also_train: list[str] = []
    """Patterns of modules (norms, heads) that are trained whole and saved with the adapter."""

    @field_validator("targets", "exclude", "also_train", mode="before")
    @classmethod
    def _one_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


class LoraPlusSpec(LoraSpec):
    """LoRA+: B learns `ratio` times faster than A. P3."""

    name: Literal["lora_plus"] = "lora_plus"  # type: ignore[assignment]
    ratio: Annotated[float, Field(ge=1)] = 16.0
    """Learning rate of B over that of A (P3 recommends 2^4; the learning rate itself is then about halved)."""
    embedding_learning_rate: Positive = 1e-6
    """Of pairs on embedding layers (P3's reference code)."""


class ColaSpec(LoraSpec):
    """Chain of LoRA: train a pair, tie a knot, begin the next. P2."""

    name: Literal["cola"] = "cola"  # type: ignore[assignment]
    links: Count = 3
    """Links of the chain (P2 tried up to 3); with `stop_gain` the most that will be trained."""
    budgets: list[Positive] | None = None
    """Share of the run given to each link, in any unit; None divides evenly. P2: 3 + 2 epochs for two links."""
    ranks: list[Count] | None = None
    """Rank of each link; None is `rank` for all. P2: 8, then a step down to 2, 4 or 6."""
    schedule: Literal["restart", "global"] = "restart"
    """Learning-rate schedule: anew for each link, or once over the whole chain (P2 leaves it open)."""
    stop_gain: NotNegative | None = None
    """End the chain when a link lowers the validation loss by less than this (nats per token)."""

    @model_validator(mode="after")
    def _lists_fit_links(self) -> "ColaSpec":
        for key in ("budgets", "ranks"):
            value = getattr(self, key)
            if value is not None and len(value) != self.links:
                raise ValueError(f"{key} has {len(value)} entries but the chain has {self.links} links")
        return self


class PeftSpec(Strict):
    """Any tuner of the peft library, by its own keys: DoRA, PiSSA, OFT, …"""

    name: Literal["peft"] = "peft"
    tuner: str = "LORA"
    """`peft_type` of the library: LORA, OFT, IA3, VERA, …"""
    keys: dict[str, Any] = {}
    """Passed to the tuner's own class as they are, e.g. `{r: 16, lora_alpha: 32, use_dora: true}`."""


MethodSpec = Annotated[
    FullSpec | LoraSpec | LoraPlusSpec | ColaSpec | PeftSpec, Field(discriminator="name")
]


class TextSpec(Strict):
    """Next-token loss on the labelled positions: continued pretraining and instruction tuning."""

    name: Literal["text"] = "text"
    chunk: Count = 1024
    """Labelled positions that go through the head at a time."""


class AdamWSpec(Strict):
    """AdamW (Loshchilov & Hutter 2017), decay decoupled and times the learning rate."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Positive | None = None
    """None: 2e-5 for full, 10 times that for low-rank methods (P1 section 6, P6: fitted 9.8). Sweep it."""
    betas: list[Share] = [0.9, 0.999]
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    """P1: 0 in instruction tuning."""


class LionWSpec(Strict):
    """LionW with decay decoupled from the learning rate: the optimizer of P1. Chen et al. 2023."""

    name: Literal["lionw"] = "lionw"
    learning_rate: Positive | None = None
    """None: 2e-5 for full, 10 times that for low-rank methods (P1 table: 1e-5 to 5e-5 and 1e-4 to 2e-4)."""
    betas: list[Share] = [0.9, 0.95]
    weight_decay: NotNegative = 0.0
    """Not multiplied by the learning rate, only by its schedule: small values (P1: 1e-6 in code pretraining)."""


class AdafactorSpec(Strict):
    """Adafactor (Shazeer & Stern 2018) with a given learning rate and factored second moments."""

    name: Literal["adafactor"] = "adafactor"
    learning_rate: Positive | None = None
    weight_decay: NotNegative = 0.0
    decay_exponent: Annotated[float, Field(lt=0)] = -0.8
    clip_threshold: Positive = 1.0


OptimizerSpec = Annotated[AdamWSpec | LionWSpec | AdafactorSpec, Field(discriminator="name")]


class ConstantSpec(Strict):
    """The learning rate stays (P6)."""

    name: Literal["constant"] = "constant"
    warmup: NotNegative = 0.0
    """Below 1: share of the run; from 1 on: steps."""


class LinearSpec(Strict):
    """Straight down to `final` times the peak (P2, P3)."""

    name: Literal["linear"] = "linear"
    warmup: NotNegative = 0.0
    final: Share = 0.0


class CosineSpec(Strict):
    """Half a cosine down to `final` times the peak: instruction tuning in P1."""

    name: Literal["cosine"] = "cosine"
    warmup: NotNegative = 0.1
    """Below 1: share of the run; from 1 on: steps. P1: 10 %."""
    final: Share = 0.01


class InverseSqrtSpec(Strict):
    """1/sqrt decay, then straight to zero in the cooldown: continued pretraining in P1."""

    name: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup: NotNegative = 1000.0
    """Below 1: share of the run; from 1 on: steps."""
    scale: Positive = 1000.0
    """Steps of the 1/sqrt time scale (P1: t_scale 1000)."""
    cooldown: NotNegative = 0.2
    """Below 1: share of the run; from 1 on: steps (P1: the last 20 %)."""


ScheduleSpec = Annotated[
    ConstantSpec | LinearSpec | CosineSpec | InverseSqrtSpec, Field(discriminator="name")
]


class TrainSpec(Strict):
    """How long and in what portions. Exactly one of `epochs`, `steps`, `tokens`."""

    epochs: Positive | None = None
    steps: Count | None = None
    tokens: Count | None = None
    """Tokens read, prompts included, padding none."""
    batch_size: Count = 16
    """Sequences per optimizer step. P6: LoRA pays for large batches; keep it below 32."""
    micro_batch: Count | None = None
    """Sequences computed at a time; None is all of `batch_size`. Changes memory, not the result."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient (P1: 1); null clips nothing."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again: nothing, cheap operations, or whole blocks."""
    spike: Annotated[float, Field(gt=1)] | None = 10.0
    """Watchdog: stop when the loss is this many times its running median; null watches for NaN only."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainSpec":
        given = [k for k in ("epochs", "steps", "tokens") if getattr(self, k) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of epochs, steps, tokens (given: {', '.join(given) or 'none'})")
        return self


class ProbeSpec(Strict):
    """What is measured during training."""

    every: Annotated[float, Field(gt=0)] = 0.1
    """Below 1: share of the run; from 1 on: steps. The base and the end are always measured."""
    tokens: Count = 16384
    """Most tokens of each text that a probe reads."""
    drift: bool = True
    """Watch KL(base‖tuned), paired loss rise and top-1 flips on the general text (or the validation rows)."""
    top_k: Count = 64
    """Base log-probabilities kept per position; the KL is then a lower bound."""


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
    objective: TextSpec = TextSpec()
    optimizer: OptimizerSpec = AdamWSpec()
    schedule: ScheduleSpec = CosineSpec()
    train: TrainSpec
    probes: ProbeSpec = ProbeSpec()
    checkpoints: CheckpointSpec = CheckpointSpec()
    branch_from: str | None = None
    """`RUN@STEP`: begin from this checkpoint, as a cooldown branch of a long run does (P1 section 3)."""
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    """Mirrors of the metrics; not part of the run's identity."""

    @model_validator(mode="before")
    @classmethod
    def _fill_what_depends_on_the_method(cls, data: Any) -> Any:
        if not isinstance(data, dict) or not isinstance(data.get("method"), dict):
            return data
        data = dict(data)
        method = dict(data["method"])
        if method.get("name") in ("lora", "lora_plus", "cola") and method.get("alpha") is None:
            rank = method.get("rank", LoraSpec.model_fields["rank"].default)
            if isinstance(rank, int):
                method["alpha"] = 2.0 * rank
        optimizer = data.get("optimizer", {"name": "adamw"})
        if isinstance(optimizer, dict) and optimizer.get("learning_rate") is None:
            ratio = 1.0 if method.get("name") == "full" else LOW_RANK_LEARNING_RATE_RATIO
            if method.get("name") == "lora_plus":
                ratio /= 2.0
            optimizer = {**optimizer, "learning_rate": FULL_LEARNING_RATE * ratio}
        return {**data, "method": method, "optimizer": optimizer}

    @model_validator(mode="after")
    def _streams_have_no_epochs(self) -> "RunSpec":
        if self.data.streaming and self.train.epochs is not None:
            raise ValueError("data.streaming has no epochs: give train.steps or train.tokens")
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
        """Name of the run's folder: recipe and hash."""
        return f"{self.name}-{self.hash8}"
