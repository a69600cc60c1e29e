"""Any tuner of the peft library by its own keys: DoRA, PiSSA, OFT, IA3, VeRA and more.

The library injects its layers and saves its own folder; this file only fits it to the seam. Tuners that rewrite base
weights when they begin (PiSSA, OLoRA) are undone exactly by `without`, because the touched weights are kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from loralab.base.model import Base
from loralab.base.targets import linears, weight_of
from loralab.delta.lowrank import Delta, Dense, LayerDelta
from loralab.errors import LoralabError, SpecError, TargetError, did_you_mean
from loralab.methods.base import Attachment, OneStage, ParamGroup, count, count_all, split_vectors

ADAPTER = "default"


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
        kept: dict[str, Tensor] = {name: weight_of(layer).detach().clone() for name, layer in linears(model).items()}
        # The library draws its starting values from torch's global generator.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                self._model = peft.get_peft_model(model, self._settings, adapter_name=ADAPTER)
            except (TypeError, ValueError) as error:
                raise TargetError(f"peft: {error}", where="method.keys", fix=self._documentation) from None
        # The library writes the folder that the weights came from, which for a hub base is one of the local cache.
        self._settings.base_model_name_or_path = self._base.path
        self._layers = self._tuner_layers()
        self._before = {name: kept[name] for name in self._layers if name in kept}
        self.parameters: dict[str, Parameter] = {
            name: p for name, p in self._model.named_parameters() if p.requires_grad
        }
        return Attachment(tuple(self._layers), count(self.parameters), all_parameters)

    def _tuner_settings(self, peft: Any) -> Any:
        known = {kind.value if hasattr(kind, "value") else str(kind): kind for kind in peft.PeftType}
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
        if problems:
            raise SpecError(problems)
        causal = hasattr(self._base.model, "prepare_inputs_for_generation")
        given = {"task_type": "CAUSAL_LM" if causal else None}
        if "target_modules" in kind.__dataclass_fields__:
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

    def delta(self) -> Delta:
        """Merge each layer for a moment and give its dense difference from the base."""
        layers: dict[str, LayerDelta] = {}
        for name, layer in self._layers.items():
            if name not in self._before:
                continue
            weight = weight_of(layer.get_base_layer())
            held = weight.detach().clone()
            layer.merge(adapter_names=[ADAPTER])
            layers[name] = Dense(weight.detach().float() - self._before[name].float())
            layer.unmerge()
            with torch.no_grad():
                weight.copy_(held)
        return Delta(layers, {}, self._base.fingerprint)

    @contextmanager
    def without(self) -> Iterator[None]:
        """Restore the base exactly inside the block."""
        weights = {name: weight_of(self._layers[name].get_base_layer()) for name in self._before}
        changed = {name: w.detach().clone() for name, w in weights.items() if not torch.equal(w, self._before[name])}
        with torch.no_grad():
            for name in changed:
                weights[name].copy_(self._before[name])
        try:
            with self._model.disable_adapter():
                yield
        finally:
            with torch.no_grad():
                for name, value in changed.items():
                    weights[name].copy_(value)

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
