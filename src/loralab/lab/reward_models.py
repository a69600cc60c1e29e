"""Reward models on the policy's own base: deltas, put on once, that act only while they read.

Their pairs lie beside the policy's on the same layers; what they hold whole changes places with the base's while they act. The head
reads the last token of prompt and answer, as in its training.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from loralab.base.hub import weight_files
from loralab.base.model import Base
from loralab.base.trees import Forest, forest
from loralab.base.weights import same_name
from loralab.delta.layers import low_rank_layers, own_parameters
from loralab.delta.lowrank import Delta
from loralab.delta.opened import base_of_run, folder_of
from loralab.delta.several import View, Wardrobe
from loralab.delta.store import check_base, is_adapter, load_lowrank
from loralab.errors import DeltaError
from loralab.evals.probe import PACKED_TOKENS, measuring
from loralab.lab.rewards import Answered
from loralab.training.loss import LanguageHead

HEAD = "score.weight"


@dataclass(frozen=True, eq=False)
class ByModel:
    """Rewards by a reward model on the policy's base.

    Attributes:
        head: of the policy's model; tells whether documents can lie side by side.
        wearing: context in which the model is its base with the reward's delta.
        score: the reward's head.
        end: ends every text that it was trained on, but those that a chat template ends itself.
        special: the tokenizer's special tokens.
    """

    head: LanguageHead
    wearing: View
    score: Float[Tensor, "1 hidden"]
    end: int
    special: frozenset[int]

    def __call__(self, answers: Sequence[Answered]) -> list[float]:
        rewards: list[float] = []
        with measuring(self.head.model), self.wearing():
            for row in self._laid_out(answers):
                hidden = self.head.hidden(row.row)[row.ends]
                rewards += F.linear(hidden.float(), self.score.float()).squeeze(-1).tolist()
        return rewards

    def _ended(self, tokens: list[int]) -> list[int]:
        """End an answer as its training rows did: with the special token that it ends with, or that of a sequence."""
        return tokens if tokens and tokens[-1] in self.special else [*tokens, self.end]

    def _laid_out(self, answers: Sequence[Answered]) -> list[Forest]:
        """Lay answers side by side, those to the same prompt behind one copy of it."""
        groups: list[tuple[list[int], list[list[int]]]] = []
        for _, same in groupby(answers, key=lambda answer: id(answer.asked)):
            mine = list(same)
            tails = [self._ended(answer.tokens) for answer in mine]
            prompt = mine[0].asked.prompt.tokens
            groups += [(prompt, tails)] if self.head.packs else [(prompt, [tail]) for tail in tails]
        rows: list[list[tuple[list[int], list[list[int]]]]] = []
        room = 0
        for prompt, tails in groups:
            size = len(prompt) + sum(map(len, tails))
            if size > room or not self.head.packs:
                rows.append([])
                room = PACKED_TOKENS
            rows[-1].append((prompt, tails))
            room -= size
        device = self.score.device
        return [forest(group).to(device) for group in rows]


@torch.no_grad()
def read_reward(path: str, base: Base) -> tuple[Delta, Float[Tensor, "1 hidden"]]:
    """Read a reward model's delta and its head, and check that both are of this base.

    Args:
        path: PEFT folder, run folder, or folder of a fully fine-tuned checkpoint.
        base: the policy's.

    Raises:
        DeltaError: there is no delta, it has no head that gives one number, or it is of another base.
    """
    folder = folder_of(path)
    trained_on = base_of_run(Path(path)) or base_of_run(folder.parent)
    if is_adapter(folder):
        delta = load_lowrank(folder)
    elif (folder / "config.json").is_file():
        delta = _moved(folder, base)
    else:
        fix = "name a run folder of objective.name=reward, its delta, FILE.py:FUNCTION, pocket:true or grade"
        raise DeltaError("there is no reward here", where=path, fix=fix)
    fix = "use a reward trained on the policy's base: the same model.path in both recipes"
    mark = trained_on or delta.base_fingerprint
    if mark and mark != base.fingerprint:
        where = f"{path}: trained on {mark[:12]}, the policy's base is {base.fingerprint[:12]}"
        raise DeltaError("this reward was trained on another base", where=where, fix=fix)
    whole = dict(delta.whole)
    score = whole.pop(HEAD, None)
    width = base.model.config.get_text_config().hidden_size
    if score is None or tuple(score.shape) != (1, width):
        found = "no head" if score is None else f"a head of shape {tuple(score.shape)}"
        fix = "train one with objective.name=reward on this base"
        raise DeltaError(f"this delta has {found}: it gives no reward", where=path, fix=fix)
    delta = replace(delta, whole=whole)
    check_base(delta, base.model, base.fingerprint)
    return delta, score.to(base.model.device)


def _moved(folder: Path, base: Base) -> Delta:
    """Give what a fully fine-tuned reward model has otherwise than the base, its head included."""
    own = own_parameters(base.model)
    whole: dict[str, Tensor] = {}
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                value = opened.get_tensor(key)
                name = HEAD if key.endswith(HEAD) else same_name(key, own)
                if name is not None and (name == HEAD or not torch.equal(value.to(own[name]), own[name])):
                    whole[name] = value
    return Delta({}, whole, keeps_ties=True)


class RewardModels:
    """Reward models on the policy's base, each put on once; outside of their own contexts nothing of them acts.

    Args:
        found: delta and head of each, by path, as `read_reward` gives them.
        base: of the policy, its method attached.
        head: of the policy's model.
        plain: context in which the policy is its base.
    """

    def __init__(self, found: dict[str, tuple[Delta, Tensor]], base: Base, head: LanguageHead, plain: View) -> None:
        model = base.model
        self._found, self._base, self._head, self._plain = found, base, head, plain
        acting = {layer: layer.active for layer in low_rank_layers(model).values()}
        own = [(module, *pair) for module in model.modules() for pair in module.named_parameters(recurse=False)]
        self._wardrobe = Wardrobe(model, {path: delta for path, (delta, _) in found.items()})
        for layer in low_rank_layers(model).values():
            layer.active = acting.get(layer, ())
        # A table that embedding and head share may be parted for deltas of language models. A reward reads no logits, and a
        # policy that moves the table needs it whole.
        for module, name, parameter in own:
            setattr(module, name, parameter)

    def reward(self, path: str) -> ByModel:
        """Give the reward of a path."""
        view, score, tokenizer = self._wardrobe.view(path), self._found[path][1], self._base.tokenizer
        assert tokenizer is not None and isinstance(tokenizer.eos_token_id, int)

        @contextmanager
        def wearing() -> Iterator[None]:
            with self._plain(), view():
                yield

        return ByModel(self._head, wearing, score, tokenizer.eos_token_id, frozenset(tokenizer.all_special_ids))
