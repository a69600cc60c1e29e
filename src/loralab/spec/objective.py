"""What is optimised: one spec class for each objective.

P2 Chain of LoRA (2401.04151), P5 PERL (2403.10704).
"""

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from loralab.spec.strict import Count, Grown, NotNegative, Positive, Share, Strict, contradiction


class TextSpec(Strict):
    """Next-token loss on the labelled positions: continued pretraining and instruction tuning."""

    name: Literal["text"] = "text"
    chunk: Count = 1024
    """Labelled positions that go through the head at a time."""


class ClassifySpec(Strict):
    """One of several classes, or a number, for each text: a head of one output per class on the model (GLUE-type tasks)."""

    name: Literal["classify"] = "classify"
    labels: list[str] | None = None
    """Names of the classes, in order; None takes those of the training rows, sorted."""
    regression: bool = False
    """Labels are numbers, the loss is the mean squared error."""
    words: list[str] | None = None
    """Words that stand for the classes, in their order: then no head is added, and the word that the model itself finds likeliest
    behind the prompt decides (MeZO, P2).
    """

    @model_validator(mode="after")
    def _words_stand_for_classes(self) -> "ClassifySpec":
        if self.regression and (self.labels or self.words):
            key = "objective.words" if self.words else "objective.labels"
            raise contradiction(key, "a regression has no classes", "drop it, or objective.regression")
        if self.labels and self.words and len(self.labels) != len(self.words):
            what = f"{len(self.words)} words cannot stand for {len(self.labels)} classes"
            raise contradiction("objective.words", what, "give one word for each of objective.labels")
        for key in ("labels", "words"):
            given = getattr(self, key)
            if given is not None and len(set(given)) != max(len(given), 2):
                raise contradiction(f"objective.{key}", "classes must be two or more, and differ", "name each once")
        return self


class RewardSpec(Strict):
    """A number for each answer, learned from human judgement: pairs (Bradley-Terry) or thumbs. P5 section 2."""

    name: Literal["reward"] = "reward"
    kind: Literal["auto", "pairs", "thumbs"] = "auto"
    """Rows of a chosen and a rejected answer, or of an answer and a thumb; `auto` takes what the columns say."""
    centre: NotNegative = 0.0
    """Weight of (r₁ + r₂)² in the loss of a pair, which keeps rewards around 0 (Eisenstein et al. 2023: 0.01)."""
    share_prompts: bool = True
    """Compute the prompt of a pair once for both answers. Changes cost, not the result."""


class RewardSourceSpec(Strict):
    """Where the reward of an answer comes from; several are added with their weights."""

    path: str
    """A reward delta on the same base (a folder), `FILE.py:FUNCTION` or `MODULE:FUNCTION` of your own, `pocket:true` (the pocket
    world's true reward), or `grade`: whether the answer is right (the rows' own answer; tests of programs are executed).
    """
    weight: float = 1.0
    timeout: Positive = 60.0
    """Seconds that a function of yours may take for one batch."""


class PolicySpec(Grown):
    """Reinforcement learning: J = E[(1 − beta) r − beta KL(policy ‖ base)] over answers that the policy writes. P5 section 3."""

    LATER = ("server",)

    name: Literal["policy"] = "policy"
    algorithm: Literal["reinforce", "rloo", "grpo"] = "reinforce"
    """What an answer's reward is compared with: a learned value (P5), the mean of the other answers to its prompt (Ahmadian et
    al. 2024), or mean and spread of all answers to its prompt (Shao et al. 2024).
    """
    reward: list[RewardSourceSpec]
    held_out: list[RewardSourceSpec] = []
    """Rewards that are watched and never trained on: where they fall while the reward rises, it is being gamed."""
    samples: Count = 4
    """Answers to each prompt; `train.batch_size` counts prompts."""
    max_tokens: Count = 128
    """Most tokens of an answer."""
    temperature: Positive = 0.7
    """P5: 0.7."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    beta: Share = 0.05
    """P5: 0.05 for summaries. At 0 the base is not asked for log-probabilities."""
    kl: Literal["low_variance", "unbiased", "exact"] = "low_variance"
    """From the written token alone, or summed over the vocabulary. From the written token, what is trained on is log π/π₀ in
    the reward (reinforce, rloo) or k₃ in the loss (grpo; Schulman 2020), and what is reported is k₃, which is never negative.
    `unbiased` is for grpo, whose k₃ has the mean gradient of another divergence: k₃ times the ratio of new to old probability
    has that of the KL (DeepSeek-V3.2, 2512.02556; TRL's `use_bias_correction_kl`).
    """
    server: Annotated[str, Field(pattern=r"^https?://.")] | None = None
    """URL of a vLLM server that writes the answers which are trained on; None writes them here. Before each batch it is
    handed the adapter as files, so it must see, and may read, this machine's temporary folder (TMPDIR). Start it on the run's
    base with
    `VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora --max-lora-rank RANK --logprobs-mode processed_logprobs`.
    Each answer's loss is weighed by what policy and server say of it. Resumed runs are then not the same bit by bit.
    """
    epochs: Count = 1
    """Passes over each batch of answers; above 1 the ratio of new to old probabilities is clipped."""
    minibatches: Count = 1
    """Optimizer steps of one pass; above 1 the ratio is clipped too."""
    clip: Positive = 0.2
    value_rank: Count | None = None
    """Of the value's own delta (`reinforce`); None is the policy's rank, 16 for full fine-tuning."""
    value_learning_rate: Positive | None = None
    """None is the policy's."""
    max_kl: Positive | None = None
    """Stop when KL(policy ‖ base) of an answer exceeds this (nats)."""
    max_forgetting: Positive | None = None
    """Stop when the loss on the general text has risen by more than this (nats per token)."""
    patience: Count | None = None
    """Stop when the held-out reward has not risen for so many evaluations."""

    @field_validator("reward", "held_out", mode="before", json_schema_input_type=str | RewardSourceSpec | list[Any])
    @classmethod
    def _paths_become_sources(cls, value: Any) -> Any:
        value = [value] if isinstance(value, str | dict) else value
        return (
            [{"path": item} if isinstance(item, str) else item for item in value] if isinstance(value, list) else value
        )

    @model_validator(mode="after")
    def _comparisons_need_company(self) -> "PolicySpec":
        if not self.reward:
            raise contradiction("objective.reward", "there is no reward", "name a reward delta, a function or `grade`")
        if self.algorithm != "reinforce" and self.samples < 2:
            what = f"{self.algorithm} compares answers to the same prompt, but there is one"
            raise contradiction("objective.samples", what, "set objective.samples=2 or more")
        if self.kl == "unbiased" and self.algorithm != "grpo":
            what = f"{self.algorithm} has the KL in its reward, where it is unbiased already"
            raise contradiction("objective.kl", what, "drop objective.kl, or set objective.algorithm=grpo")
        if self.kl == "unbiased" and self.top_p < 1:
            what = "answers cut to the likeliest tokens are not drawn from the policy whose KL is estimated"
            raise contradiction("objective.kl", what, "set objective.top_p=1, or drop objective.kl")
        if self.server is not None and self.top_p < 1:
            what = "answers cut to the likeliest tokens cannot be weighed as if the policy had written them"
            raise contradiction("objective.server", what, "set objective.top_p=1, or drop objective.server")
        if self.patience is not None and not self.held_out:
            what = "nothing is held out that could fail to rise"
            raise contradiction("objective.patience", what, "name objective.held_out, or drop objective.patience")
        return self


ObjectiveSpec = Annotated[TextSpec | ClassifySpec | RewardSpec | PolicySpec, Field(discriminator="name")]
