"""By which optimizer and schedule a run trains, and how long."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from loralab.spec.strict import Betas, Count, NotNegative, Positive, Share, Strict, contradiction


class AdamWSpec(Strict):
    """AdamW (Loshchilov & Hutter 2017), decay decoupled and times the learning rate."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Positive | None = None
    """None: 2e-5 for full, 10 times that for low-rank methods (P1 section 6, P6: fitted 9.8). Sweep it."""
    betas: Betas = [0.9, 0.999]
    epsilon: Positive = 1e-8
    weight_decay: NotNegative = 0.0
    """P1: 0 in instruction tuning."""


class LionWSpec(Strict):
    """LionW with decay decoupled from the learning rate: the optimizer of P1. Chen et al. 2023."""

    name: Literal["lionw"] = "lionw"
    learning_rate: Positive | None = None
    """None: 2e-5 for full, 10 times that for low-rank methods (P1 table: 1e-5 to 5e-5 and 1e-4 to 2e-4)."""
    betas: Betas = [0.9, 0.95]
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


ScheduleSpec = Annotated[ConstantSpec | LinearSpec | CosineSpec | InverseSqrtSpec, Field(discriminator="name")]


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
            what = f"the run has {len(given)} lengths: {', '.join(given)}" if given else "the run has no length"
            raise contradiction("train", what, "give exactly one of train.epochs, train.steps, train.tokens")
        return self
