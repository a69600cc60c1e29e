"""Any tuner of the peft library by its own keys: DoRA, PiSSA, OFT, IA3, VeRA and more.

The library injects its layers and saves its own folder; this file only fits it to the seam. Tuners that rewrite base
weights when they begin (PiSSA, OLoRA) are undone exactly by `without`, because the touched weights are kept.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from transformers.pytorch_utils import Conv1D

from loralab.base.model import Base
from loralab.delta.lowrank import Delta, Dense, LayerDelta
from loralab.delta.store import task_type
from loralab.errors import DeltaError, LoralabError, SpecError, TargetError, did_you_mean
from loralab.methods.base import Attachment, OneStage, ParamGroup, Wanted, all_wanted, count, count_all, split_vectors

ADAPTER = "default"
VARIANTS = {
    "DORA": "use_dora=true",
    "RSLORA": "use_rslora=true",
    "PISSA": "init_lora_weights=pissa",
    "OLORA": "init_lora_weights=olora",
}
"""Methods that people name like tuners, and the keys of LORA that they are."""
DATA_DRIVEN = ("eva", "corda", "lora_ga")


class Peft(OneStage):
    """One adapter of the peft library."""

    def __init__(self, *, tuner: str = "LORA", keys: dict[str, Any] | None = None) -> None:
        self.tuner, self.keys = tuner.upper(), keys or {}

    def attach(self, base: Base, seed: int) -> Attachment:
        """Let the library inject its layers.

        Raises:
            LoralabError: the library is not installed.
            SpecError: it knows no such tuner or key.
            TargetError: its target patterns match nothing.
        """
        peft = _library()
        self._base = base
        model: Any = base.model
        self._settings = self._tuner_settings(peft)
        all_parameters = count_all(model)
        own = {id(parameter): name for name, parameter in model.named_parameters()}
        kept = {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}
        # The library draws its starting values from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", FutureWarning)  # peft calls what Transformers is about to rename
                    self._model = peft.get_peft_model(model, self._settings, adapter_name=ADAPTER)
                with torch.no_grad():
                    model(input_ids=torch.ones(1, 2, dtype=torch.long, device=model.device))
            except Exception as error:  # a tuner's code raises what it likes; all of it is about its keys
                raise TargetError(
                    f"peft's {self.tuner}: {error}", where="method.keys", fix=self._documentation
                ) from None
        # The library writes the folder that the weights came from, which for a hub base is one of the local cache.
        self._settings.base_model_name_or_path = self._base.path
        self._layers = self._tuner_layers()
        self._refuse_what_needs_more()
        self.parameters: dict[str, Parameter] = {
            name: p for name, p in self._model.named_parameters() if p.requires_grad
        }
        # The base's own tensors that train (biases), or that the tuner rewrote when it began (PiSSA, OLoRA).
        mine = {own[id(p)]: p for p in self._model.parameters() if id(p) in own}
        self._own = {n: p for n, p in mine.items() if p.requires_grad or not torch.equal(p.detach().cpu(), kept[n])}
        self._before = {name: kept[name] for name in self._own}
        return Attachment(tuple(self._layers), count(self.parameters), all_parameters)

    def _refuse_what_needs_more(self) -> None:
        """Refuse tuners that a delta cannot hold, or that ask for calls of their own during training."""
        if not self._layers:
            what, fix = "changes no layer, so it has no delta", "choose a tuner of weights, such as LORA, OFT or IA3"
        elif hasattr(self._model.base_model, "update_and_allocate"):
            what, fix = "moves its ranks by calls of its own during training", "use method lora with rank_pattern"
        else:
            return
        raise TargetError(f"peft's {self.tuner} {what}", where="method.tuner", fix=fix)

    def _tuner_settings(self, peft: Any) -> Any:
        known = {kind.value if hasattr(kind, "value") else str(kind): kind for kind in peft.PeftType}
        if self.tuner in VARIANTS:
            fix = f"method.tuner=LORA with method.keys.{VARIANTS[self.tuner]}"
            raise SpecError([LoralabError(f"{self.tuner} is a variant of LORA", where="method.tuner", fix=fix)])
        if self.tuner not in known:
            near = did_you_mean(self.tuner, list(known))
            fix = f"did you mean {near}?" if near else f"choose one of {', '.join(sorted(known))}"
            raise SpecError([LoralabError(f"peft has no tuner {self.tuner!r}", where="method.tuner", fix=fix)])
        kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[known[self.tuner]]
        problems: list[LoralabError] = []
        for key in self.keys:
            if key not in kind.__dataclass_fields__:
                close = did_you_mean(key, list(kind.__dataclass_fields__))
                fix = f"did you mean {close!r}?" if close else self._documentation
                problems.append(LoralabError(f"{self.tuner} has no key {key!r}", where=f"method.keys.{key}", fix=fix))
        if self.keys.get("init_lora_weights") in DATA_DRIVEN:
            what = f"this start needs a pass over data: {self.keys['init_lora_weights']}"
            problems.append(LoralabError(what, where="method.keys.init_lora_weights", fix="choose another start"))
        if problems:
            raise SpecError(problems)
        given: dict[str, Any] = {"task_type": task_type(self._base.model)}
        # A tuner that names its feed-forward layers too (IA3) has defaults for both, by family.
        if "target_modules" in kind.__dataclass_fields__ and "feedforward_modules" not in kind.__dataclass_fields__:
            given["target_modules"] = "all-linear"
        try:
            return kind(**{**given, **self.keys})
        except (TypeError, ValueError) as error:
            raise SpecError([LoralabError(f"peft: {error}", where="method.keys", fix=self._documentation)]) from None

    @property
    def _documentation(self) -> str:
        return f"correct the keys after peft's own documentation of {self.tuner}"

    def _tuner_layers(self) -> dict[str, Any]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        return {name: m for name, m in self._base.model.named_modules() if isinstance(m, BaseTunerLayer)}

    def param_groups(self, learning_rate: float, weight_decay: float) -> list[ParamGroup]:
        return split_vectors(self.parameters, learning_rate, weight_decay)

    def delta(self, wanted: Wanted = all_wanted) -> Delta:
        """Merge each layer for a moment and give its dense difference from the base; what trains whole is added.

        Raises:
            DeltaError: the base is quantised, so merging would round it anew.
        """
        layers: dict[str, LayerDelta] = {}
        embeddings = set()
        for name, layer in self._layers.items():
            inner = layer.get_base_layer()
            weight = inner.weight
            if not weight.is_floating_point():
                fix = "measure it with method lora, whose pairs stay apart from the base"
                raise DeltaError(
                    "a change of quantised weights by the peft library cannot be seen", where=name, fix=fix
                )
            if not wanted(name, weight.numel()):
                continue
            held = weight.detach().clone()
            before = self._before.get(f"{name}.weight", held).to(held.device)
            try:
                layer.merge(adapter_names=[ADAPTER])
                moved = weight.detach().float() - before.float()
            finally:
                if layer.merged:
                    layer.unmerge()
                with torch.no_grad():
                    weight.copy_(held)
            transposed = isinstance(inner, Conv1D | nn.Embedding)
            layers[name] = Dense(moved.t() if transposed else moved)
            if isinstance(inner, nn.Embedding):
                embeddings.add(name)
        return Delta(layers, self._whole(), self._base.fingerprint, frozenset(embeddings))

    def _whole(self) -> dict[str, Tensor]:
        from peft.utils.other import ModulesToSaveWrapper

        whole = {name: p.detach() for name, p in self._own.items() if p.requires_grad}
        for name, module in self._base.model.named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                trained = module.modules_to_save[ADAPTER].state_dict()
                whole |= {f"{name}.{leaf}": value for leaf, value in trained.items()}
        return whole

    @contextmanager
    def without(self) -> Iterator[None]:
        """Restore the base exactly inside the block."""
        tuned = {name: parameter.detach().clone() for name, parameter in self._own.items()}
        self._set_own(self._before)
        try:
            with warnings.catch_warnings():
                # peft warns that it leaves trained biases in place; they were set back above.
                warnings.simplefilter("ignore", UserWarning)
                with self._model.disable_adapter():
                    yield
        finally:
            self._set_own(tuned)

    def _set_own(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self._own.items():
                parameter.copy_(values[name])

    def save(self, folder: Path) -> None:
        """Write the library's own adapter folder."""
        self._model.save_pretrained(str(folder))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        buffers = {f"buffer/{n}": b for n, b in self._model.named_buffers() if ADAPTER in n.split(".")}
        return {name: p.detach() for name, p in self.parameters.items()} | buffers, {}

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        targets = dict(self.parameters) | {
            f"buffer/{n}": b for n, b in self._model.named_buffers() if ADAPTER in n.split(".")
        }
        with torch.no_grad():
            for name, target in targets.items():
                target.copy_(tensors[name])


def _library() -> Any:
    try:
        import peft
        import peft.mapping
    except ImportError:
        raise LoralabError(
            "method peft needs the peft library", where="method.name", fix='pip install "loralab[peft]"'
        ) from None
    return peft
