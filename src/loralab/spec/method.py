"""How the weights may move: one spec class for each entry of `loralab.methods.METHODS`."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from loralab.spec.strict import Count, NotNegative, Patterns, Positive, Strict, contradiction


class FullSpec(Strict):
    """Full fine-tuning: the chosen weights move freely."""

    name: Literal["full"] = "full"
    targets: Patterns = ["all"]
    """`all`, or names, globs and regular expressions of the parameters that move. P1 moves all of them."""
    freeze: Patterns = []
    """Patterns of parameters that stay, taken out of `targets`."""


class LoraSpec(Strict):
    """LoRA: a low-rank pair on every target. Hu et al. 2021; defaults after P1 section 6 and P6."""

    name: Literal["lora"] = "lora"
    rank: Count = 16
    """P1 finds 16 enough to forget least and 256 to learn most; 16 is the cheap end."""
    alpha: Positive | None = None
    """None is 2·rank, of the first link in a chain (P1: best at every learning rate tried)."""
    scaling: Literal["alpha/r", "alpha/sqrt(r)"] = "alpha/r"
    """`alpha/sqrt(r)` is rank-stabilised LoRA (Kalajdzievski 2023)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """On the input of A. 0: its gain is small, its cost is not (P1 used 0.05)."""
    targets: Patterns = ["all-linear"]
    """`all-linear`, `attention`, `mlp`, or names, globs and regular expressions. P1, P6: all linear layers."""
    exclude: Patterns = []
    """Patterns taken out of `targets`."""
    init: Literal["kaiming", "gaussian", "orthogonal"] = "kaiming"
    """Of A (B starts at 0): uniform(±1/sqrt(in)) as in the reference code, normal(0, 1/rank), or orthonormal rows."""
    train: Literal["both", "B"] = "both"
    """`B` freezes A at its random start (LoRA-FA)."""
    rank_pattern: dict[str, Count] = {}
    """Pattern of layers → their rank."""
    alpha_pattern: dict[str, Positive] = {}
    """Pattern of layers → their alpha; layers of `rank_pattern` without one keep alpha/rank of the rest."""
    also_train: Patterns = []
    """Patterns of modules (norms, heads) that are trained whole and saved with the adapter."""


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
                what = f"method.{key} has {len(value)} entries but the chain has {self.links} links"
                raise contradiction(f"method.{key}", what, "give one entry for each link")
        return self


class PeftSpec(Strict):
    """Any tuner of the peft library, by its own keys: DoRA, PiSSA, OFT and more."""

    name: Literal["peft"] = "peft"
    tuner: str = "LORA"
    """`peft_type` of the library: LORA, OFT, IA3, VERA, …"""
    keys: dict[str, Any] = {}
    """Passed to the tuner's own class as they are, e.g. `{r: 16, lora_alpha: 32, use_dora: true}`."""


MethodSpec = Annotated[FullSpec | LoraSpec | LoraPlusSpec | ColaSpec | PeftSpec, Field(discriminator="name")]
