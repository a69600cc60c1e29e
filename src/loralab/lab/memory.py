"""How much memory a step will take, by part, before it is taken.

Estimated are tensors: what the process holds without a model (Python and libraries, some 400 MB) is not among them. Everything is
taken at its largest: the longest prompts of the data, every answer as long as it may be.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loralab.base.hub import weight_files
from loralab.delta.opened import folder_of
from loralab.delta.store import is_adapter
from loralab.evals.generate import CACHED_TOKENS
from loralab.lab.policy import PolicyData
from loralab.lab.prepare import Data, Prepared
from loralab.lab.rewards import is_delta
from loralab.lab.scored import LabelledData
from loralab.spec.objective import PolicySpec, RewardSpec
from loralab.spec.spec import RunSpec
from loralab.training.loss import LanguageHead
from loralab.training.objectives.policy import PolicyObjective

STATE = {"adamw": 16, "lionw": 12, "adafactor": 8}
"""Bytes for each trained number: in float32 the number itself, its gradient, and what the optimizer keeps of it."""
WHOLE, LEAN = 1.8, 1.1
"""What a block keeps without recomputation, and with the selective one, over the lean formula: 1.7 to 1.9, and 1.1, measured."""
CHUNK_COPIES, WRITTEN_COPIES = 2, 4
"""Arrays in float32 as large as a chunk of logits: for a cross-entropy; for log-probability, entropy and KL."""
CHOICE_BYTES = 24
"""For each logit that a next token is chosen by: as it is, in float32, tempered, as a probability, and their sums in float64."""
REWARD_PAIRS = ".pairs.delta_"


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of a step, by part.

    Attributes:
        weights: of the base, as loaded, and of frozen links on it.
        trained: what trains, its gradient and the optimizer's state; of a policy its value model's too.
        reference: copies of the weights that full fine-tuning moves: as they were (in main memory, counted on a CPU), and as they
            are while the base is restored, to be a reference or to be measured.
        rewards: pairs of reward models on the base, and what fully tuned ones have otherwise than it.
        activations: what the update of a micro-batch keeps for backward.
        logits: a chunk of them, and what is computed from it.
        answers: keys and values, and the logits of the next tokens, while a policy writes: at the largest over steps and probes.
    """

    weights: int
    trained: int
    reference: int
    rewards: int
    activations: int
    logits: int
    answers: int

    @property
    def total(self) -> int:
        """Everything that lies there throughout, and the larger of update and writing, which take turns."""
        return self.fixed + max(self.activations + self.logits, self.answers)

    @property
    def fixed(self) -> int:
        """What lies there throughout."""
        return self.weights + self.trained + self.reference + self.rewards

    def parts(self) -> dict[str, int]:
        """Give the bytes of each part that there is, by name."""
        return {name: size for name, size in asdict(self).items() if size}


def estimate(spec: RunSpec, prepared: Prepared) -> Memory:
    """Estimate the bytes of one step.

    Activations: per token of a micro-batch and block a little more than the lean formula 4·hidden + 2·kv + 2·mlp + Σ rank with
    selective recomputation, 1.8 times as much without, hidden with full; of a policy also its hidden states and their gradients
    at the answers' tokens. A policy whose KL is in the reward of a learned value keeps two such passes at a time.
    """
    model: nn.Module = prepared.base.model
    shape = prepared.base.model.config.get_text_config()
    width = torch.empty((), dtype=prepared.base.model.dtype).element_size()
    groups = prepared.method.param_groups(1.0, 0.0)
    trained = {id(tensor): tensor for group in groups for tensor in group.tensors.values()}
    still = {name: p for name, p in model.named_parameters() if id(p) not in trained or p.dtype != torch.float32}
    known = {id(p) for p in model.parameters()}
    beside = [p for p in prepared.language.parameters() if id(p) not in known] if prepared.language is not None else []
    of_rewards = _bytes(p for name, p in still.items() if REWARD_PAIRS in name)
    tokens, written, passes = _update(spec, prepared)
    head = getattr(prepared.objective, "head", None)
    logits = 0
    if isinstance(head, LanguageHead):
        rows = written or tokens
        rows = min(head.chunk, rows) if head.is_plain else rows
        logits = 4 * (WRITTEN_COPIES if written else CHUNK_COPIES) * rows * shape.vocab_size
    heads = shape.num_attention_heads
    kv = (getattr(shape, "head_dim", None) or shape.hidden_size // heads) * (
        getattr(shape, "num_key_value_heads", None) or heads
    )
    return Memory(
        weights=_bytes(still.values()) + _bytes(beside) - of_rewards,
        trained=STATE[spec.optimizer.name] * sum(tensor.numel() for tensor in trained.values()),
        reference=_copies(spec, prepared, trained.values()),
        rewards=of_rewards + _whole_rewards(spec.objective),
        activations=passes * width * (tokens * _kept(spec, prepared, kv) + 3 * written * shape.hidden_size),
        logits=logits,
        answers=_writing(spec, prepared, 2 * kv * shape.num_hidden_layers * width, shape.vocab_size),
    )


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _kept(spec: RunSpec, prepared: Prepared, kv: int) -> int:
    """Count the numbers that all blocks keep for backward of a token, and one block that is computed again."""
    shape = prepared.base.model.config.get_text_config()
    hidden, blocks = shape.hidden_size, shape.num_hidden_layers
    mlp = getattr(shape, "intermediate_size", None) or 4 * hidden
    lean = 4 * hidden + 2 * kv + 2 * mlp + sum(prepared.attachment.ranks.values()) // max(1, blocks)
    kept = {"none": WHOLE * lean, "selective": LEAN * lean, "full": hidden}[spec.train.recompute]
    again = WHOLE * lean - kept
    return int(blocks * kept + again)


def _copies(spec: RunSpec, prepared: Prepared, trained: Iterable[torch.Tensor]) -> int:
    """Count the copies of what full fine-tuning moves; pairs, those of a value model, are not copied."""
    if spec.method.name != "full":
        return 0
    moving = {id(tensor) for tensor in trained}
    own = _bytes(p for name, p in prepared.base.model.named_parameters() if id(p) in moving and ".pairs." not in name)
    return own * (2 if prepared.base.model.device.type == "cpu" else 1)


def _whole_rewards(objective: Any) -> int:
    """Count what fully tuned reward models have of their own, by the size of their files."""
    if not isinstance(objective, PolicySpec):
        return 0
    paths = {source.path for source in (*objective.reward, *objective.held_out) if is_delta(source.path)}
    folders = [folder_of(path) for path in paths]
    return sum(file.stat().st_size for f in folders if not is_adapter(f) for file in weight_files(f))


def _update(spec: RunSpec, prepared: Prepared) -> tuple[int, int, int]:
    """Count the tokens that the update of one micro-batch reads, those of answers among them, and passes kept at a time."""
    objective, data = spec.objective, prepared.data
    count = spec.train.micro_batch or spec.train.batch_size
    if isinstance(objective, PolicySpec) and isinstance(data, PolicyData):
        assert isinstance(prepared.objective, PolicyObjective)
        if spec.train.micro_batch is None:
            count = -(-count // objective.minibatches)
        written = count * objective.samples * objective.max_tokens
        copies = 1 if prepared.objective.head.packs else objective.samples  # of a prompt
        # The policy's own pass waits while the value's goes forward and backward.
        at_once = objective.beta > 0 and objective.epochs * objective.minibatches == 1 and spec.method.name != "full"
        return (
            copies * _longest(data.train.lengths, count) + written,
            written,
            1 + (at_once and prepared.objective.value is not None),
        )
    if isinstance(data, LabelledData):
        lengths = data.train.lengths
        if isinstance(objective, RewardSpec) and data.train.kind == "pairs" and not objective.share_prompts:
            lengths = lengths + data.train.segments[:, 0]
        return count * data.train.max_length if spec.data.packing else _longest(lengths, count), 0, 1
    if isinstance(data, Data) and not spec.data.packing:
        return _longest(data.train.lengths, count), 0, 1
    return count * spec.data.max_length, 0, 1


def _longest(lengths: NDArray[np.int64], count: int) -> int:
    """Sum the lengths of the longest examples, so many of them; where there are fewer they come again."""
    largest = np.sort(lengths)[::-1][:count]
    return int(largest.sum()) * -(-count // max(1, len(largest))) if len(largest) else 0


def _writing(spec: RunSpec, prepared: Prepared, token_bytes: int, vocabulary: int) -> int:
    """Count keys and values of the answers that are written at a time, and the logits of their next tokens."""
    objective, data = spec.objective, prepared.data
    if not isinstance(objective, PolicySpec) or not isinstance(data, PolicyData):
        return 0
    most = 0
    asked = [(data.train, spec.train.batch_size * objective.samples)]
    if data.validation is not None:
        asked.append((data.validation, max(1, spec.probes.tokens // objective.max_tokens)))
    for prompts, answers in asked:
        longest = int(prompts.lengths.max()) + objective.max_tokens
        rows = max(1, min(answers, CACHED_TOKENS // longest))
        most = max(most, rows * (longest * token_bytes + CHOICE_BYTES * vocabulary))
    return most
