"""Weights by name, a matrix at a time: what looks inside a model needs neither the model nor two of them in memory.

A folder's names come from its skeleton, the model built on torch's meta device, which takes no memory. Its numbers are read from
the safetensors files one tensor at a time, as they are stored. What the files do not hold as the model has it (quantised, fused or
split on loading) is read by loading the model once.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from loralab.base.hub import find, read_facts, weight_files
from loralab.base.model import draw_model, fingerprint, read_settings
from loralab.base.targets import in_out, linears, weight_of
from loralab.errors import ModelError

MODULES = (nn.Linear, nn.Embedding, Conv1D)
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")
AGAIN = "copy or download the model again"


class Weights(Protocol):
    """The weights of a model by the names that its modules have once it is loaded.

    Attributes:
        path: folder or hub id, as it was given.
        notes: what was done to the numbers, in words; may grow while weights are read.
    """

    path: str
    notes: list[str]

    def layers(self) -> dict[str, tuple[int, int]]:
        """Give every linear and embedding → (out, in); of an embedding (dim, vocabulary), as its deltas are."""
        ...

    def linears(self) -> list[str]:
        """List the linears of the transformer: what full fine-tuning's delta counts, neither embeddings nor heads."""
        ...

    def weight(self, name: str) -> Tensor:
        """Give one layer's weight (out, in) in its stored dtype. Raises ModelError that names a missing tensor."""
        ...

    def parameter(self, name: str) -> Tensor:
        """Give any parameter by its name in the model, as stored. Raises ModelError that names a missing tensor."""
        ...

    def fingerprint(self) -> str | None:
        """Give the base's fingerprint, as `Base` has it; of files, all of them are read once. None where unknown."""
        ...


def same_name(name: str, known: Iterable[str]) -> str | None:
    """Find a layer that may carry another prefix (`bert.encoder.0` for `encoder.0`), by whole dotted parts.

    The same name comes first; else the only one that ends with this name or is its end. None where there is none or several.
    """
    names = known if isinstance(known, Mapping | set | frozenset) else list(known)
    if name in names:
        return name
    alike = [other for other in names if f".{other}".endswith(f".{name}") or f".{name}".endswith(f".{other}")]
    return alike[0] if len(alike) == 1 else None


def open_weights(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> "FileWeights":
    """Open the weights of a model folder, hub id, or `pocket`; no weight is read yet.

    Raises:
        ModelError: there is no such model, it holds no weights that may be read, or its family is unknown.
    """
    folder, _ = find(path, revision, code=trust_remote_code)
    skeleton = _skeleton(folder, read_settings(folder, trust_remote_code), trust_remote_code)
    return FileWeights(path, folder, skeleton, trust_remote_code=trust_remote_code)


class FileWeights:
    """The weights of a model folder, read from its files when they are asked for."""

    def __init__(self, path: str, folder: Path, skeleton: PreTrainedModel, *, trust_remote_code: bool = False) -> None:
        self.path, self.notes, self.folder = path, list[str](), folder
        self._modules = {name: m for name, m in skeleton.named_modules() if isinstance(m, MODULES)}
        self._linears = list(linears(skeleton))
        self._files = _files(folder)
        parameters = dict(skeleton.named_parameters(remove_duplicate=False))
        self._shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self._keys = _keys(skeleton, self._files, parameters)
        self._quantised = read_facts(folder).get("quantization_config")
        self._kind: Any = type(skeleton)
        self._trusted = trust_remote_code
        self._whole: LoadedWeights | ModelError | None = None
        self._missing: set[str] = set()
        self._mark: str | None = None

    def layers(self) -> dict[str, tuple[int, int]]:
        return _shapes(self._modules)

    def linears(self) -> list[str]:
        return list(self._linears)

    def weight(self, name: str) -> Tensor:
        module = self._modules.get(name)
        if module is None:
            raise ModelError("the model has no such layer", where=f"{name} of {self.path}")
        if self._quantised:
            return self._load_with(f"{name}.weight").weight(name)
        stored = _wide(self.parameter(f"{name}.weight"), f"{name} of {self.path}")
        return stored.t() if isinstance(module, Conv1D | nn.Embedding) else stored

    def parameter(self, name: str) -> Tensor:
        if name not in self._shapes:
            raise ModelError("the model has no such parameter", where=f"{name} of {self.path}")
        key = self._keys.get(name)
        if self._quantised or (key is None and self._may_be_converted(name)):
            return self._load_with(name).parameter(name)
        if key is None:
            raise self._lacks(name)
        found = _read(self._files[key], key)
        if tuple(found.shape) != self._shapes[name]:
            raise ModelError(
                f"the tensor is {tuple(found.shape)}, config.json means {self._shapes[name]}",
                where=f"{key} in {self._files[key]}",
                fix=AGAIN,
            )
        return found

    def fingerprint(self) -> str:
        if self._mark is None:
            self._mark = fingerprint((key, _read(self._files[key], key)) for key in sorted(self._files))
        return self._mark

    def _lacks(self, name: str) -> ModelError:
        return ModelError("the files lack this tensor", where=f"{name} of {self.path}", fix=AGAIN)

    def _may_be_converted(self, name: str) -> bool:
        """Tell whether Transformers may make a missing tensor from what the files hold beyond the model's own names."""
        claimed = set(self._keys.values())
        left = sum(_size(file, key) for key, file in self._files.items() if key not in claimed)
        return left >= torch.Size(self._shapes[name]).numel()

    def _load_with(self, name: str) -> "LoadedWeights":
        """Load the model once, in float32. Raises ModelError if that cannot be done, or leaves this parameter without numbers."""
        if self._whole is None:
            self._whole = self._loaded()
        if isinstance(self._whole, ModelError):
            raise self._whole
        if name in self._missing:
            raise self._lacks(name)
        return self._whole

    def _loaded(self) -> "LoadedWeights | ModelError":
        disable_progress_bar()  # of Transformers, which would write between the lines of a command
        stored: dict[str, Any] = {"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True}
        try:
            model, report = self._kind.from_pretrained(self.folder, trust_remote_code=self._trusted, **stored)
        except (ValueError, RuntimeError, OSError, ImportError) as error:
            what = f"Transformers cannot load this model: {str(error).strip().splitlines()[0]}"
            fix = "install what the message names, or use the model that it was made from, unquantised"
            return ModelError(what, where=self.path, fix=fix if self._quantised else AGAIN)
        self._missing = set(report["missing_keys"])
        found = loaded_weights(self.path, model.requires_grad_(False), None)
        by = self._quantised.get("quant_method", "?") if isinstance(self._quantised, dict) else "?"
        how = (
            f"dequantised: its files are quantised ({by})"
            if self._quantised
            else "its files hold some weights in another form"
        )
        self.notes += [f"the model was loaded whole, {how}", *found.notes]
        return found


class LoadedWeights:
    """The weights of a model in memory, viewed; quantised ones are dequantised as they are asked for."""

    def __init__(
        self,
        path: str,
        modules: Mapping[str, nn.Module],
        parameters: Mapping[str, Tensor],
        inside: Iterable[str],
        mark: str | None,
    ) -> None:
        self.path, self.notes = path, list[str]()
        self._modules, self._parameters, self._inside, self._mark = modules, parameters, list(inside), mark
        bits = sorted({bits for module in modules.values() if (bits := _bits(module))})
        self.notes += [f"dequantised from {number} bits" for number in bits]

    def layers(self) -> dict[str, tuple[int, int]]:
        return _shapes(self._modules)

    def linears(self) -> list[str]:
        return list(self._inside)

    def weight(self, name: str) -> Tensor:
        if name not in self._modules:
            raise ModelError("the model has no such layer", where=f"{name} of {self.path}")
        module: Any = self._modules[name]
        if _bits(module) is None:
            _wide(getattr(module, "weight", None), f"{name} of {self.path}")
        return weight_of(module).detach()

    def parameter(self, name: str) -> Tensor:
        if name not in self._parameters:
            raise ModelError("the model has no such parameter", where=f"{name} of {self.path}")
        return self._parameters[name].detach()

    def fingerprint(self) -> str | None:
        return self._mark


def loaded_weights(path: str, model: nn.Module, mark: str | None) -> LoadedWeights:
    """View a plain model in memory, one without pairs on it."""
    modules = {name: module for name, module in model.named_modules() if isinstance(module, MODULES)}
    return LoadedWeights(path, modules, dict(model.named_parameters(remove_duplicate=False)), linears(model), mark)


def _wide(weight: Any, where: str) -> Tensor:
    """Refuse a weight whose numbers mean nothing without the scales of a quantisation that is not known here."""
    if not isinstance(weight, Tensor) or not weight.is_floating_point() or weight.element_size() < 2:
        fix = "use the model that it was made from, unquantised"
        raise ModelError("this quantised weight cannot be read", where=where, fix=fix)
    return weight


def _bits(module: nn.Module) -> int | None:
    """Give the bits of a weight of bitsandbytes, None for a plain one."""
    weight: Any = getattr(module, "weight", None)
    if getattr(weight, "quant_state", None) is not None:
        return 4
    return 8 if hasattr(weight, "SCB") else None


def _shapes(modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
    return {name: (in_out(module)[1], in_out(module)[0]) for name, module in modules.items()}


def _skeleton(folder: Path, settings: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedModel:
    """Build the model without numbers: the one that `load` gives, or the encoder or classifier that config.json names."""
    named = [
        kind for name in settings.architectures or () if isinstance(kind := getattr(transformers, name, None), type)
    ]
    found: Any = None
    try:
        with torch.device("meta"):
            if named and not named[0].__name__.endswith(LANGUAGE_MODELS):
                found = named[0](settings)
            else:
                with suppress(ModelError):
                    found = draw_model(folder, settings, torch.float32, trust_remote_code)
            if found is None:  # a family that is no language model
                found = AutoModel.from_config(settings, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise ModelError(
            f"Transformers cannot make this model: {str(error).strip().splitlines()[0]}",
            where=str(folder / "config.json"),
            fix="correct or download it again",
        ) from None
    assert isinstance(found, PreTrainedModel)
    return found


def _files(folder: Path) -> dict[str, Path]:
    """Say of every stored tensor in which file it lies. Raises ModelError for a damaged file."""
    found: dict[str, Path] = {}
    for file in weight_files(folder):
        try:
            with safe_open(file, "pt") as opened:
                found |= dict.fromkeys(opened.keys(), file)
        except (SafetensorError, OSError) as error:
            raise _damaged(file, error) from None
    return found


def _keys(skeleton: PreTrainedModel, files: Mapping[str, Path], parameters: Mapping[str, Tensor]) -> dict[str, str]:
    """Say of every parameter under which name it is stored: renamed as Transformers does, tied, or with another prefix."""
    transforms = get_model_conversion_mapping(skeleton)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    known = skeleton.state_dict()
    found: dict[str, str] = {}
    kept: list[str] = []
    for key in files:
        name, converted = rename_source_key(key, renamings, converters, skeleton.base_model_prefix, known)
        if converted is None:
            kept.append(key)
            found.setdefault(name, key)
    found = {name: key for name, key in found.items() if name in parameters}
    left = [key for key in kept if key not in set(found.values())]
    for name in parameters:
        if name not in found and (alike := same_name(name, left)) is not None:
            found[name] = alike
    first = {id(parameters[name]): key for name, key in reversed(found.items())}
    return {name: found.get(name) or first[id(p)] for name, p in parameters.items() if name in found or id(p) in first}


def _read(file: Path, key: str) -> Tensor:
    """Read one tensor. The file is opened anew each time: while it stays open, every page ever read counts as memory."""
    try:
        with safe_open(file, "pt") as opened:
            found: Tensor = opened.get_tensor(key)
    except (SafetensorError, OSError) as error:
        raise _damaged(file, error) from None
    return found


def _size(file: Path, key: str) -> int:
    with safe_open(file, "pt") as opened:
        return torch.Size(opened.get_slice(key).get_shape()).numel()


def _damaged(file: Path, error: Exception) -> ModelError:
    fix = "the file is damaged or was cut short: copy or download it again"
    return ModelError(f"the weights cannot be read: {error}", where=str(file), fix=fix)
