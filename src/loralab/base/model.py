"""Load a base: any language model of Transformers, frozen, with attention that keeps packed documents apart."""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from loralab.base.attention import NAME
from loralab.base.device import choose_device, choose_dtype, refuse_quantize
from loralab.base.hub import find, read_facts, stored_tensors
from loralab.errors import ModelError, did_you_mean

VOCABULARIES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
ATTENTION_DROPOUT = ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
SCORING = "ForSequenceClassification"
POOLER = "pooler"
HEADS = ["score", "classifier", "pre_classifier", "classification_head", POOLER, "lm_head"]
"""Usual names of heads and poolers: they are not quantised."""


@dataclass(frozen=True)
class Base:
    """A pretrained model, frozen in memory once.

    Attributes:
        model: every parameter has `requires_grad=False`.
        tokenizer: None only where it was not asked for.
        path: folder or hub id, as it was given.
        revision: as it was given; for a hub id without one, the commit that was loaded.
        fingerprint: SHA-256 over names, dtypes, shapes and bytes of the weights, however they are cut into files.
        drawn: parameters that the files do not hold: those of a new head.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    path: str
    revision: str | None
    fingerprint: str
    drawn: tuple[str, ...] = ()


def load(
    path: str,
    *,
    revision: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str | None = None,
    trust_remote_code: bool = False,
    attention_dropout: float | None = None,
    random_init: bool = False,
    need_tokenizer: bool = True,
    outputs: int | None = None,
) -> Base:
    """Load a base from a folder or the hub, frozen, in evaluation mode.

    With `outputs` the model gives so many scores for a text instead of logits for each token. A head that the files do not
    hold (and the pooler of an encoder) is drawn from torch's global generator; the fingerprint stays that of the files.

    Args:
        path: folder with a Hugging Face model, or hub id.
        revision: commit, tag or branch of a hub id.
        dtype: `auto`, `float32` or `bfloat16`; whatever the file holds is converted.
        device: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.
        quantize: `4bit` or `8bit` with bitsandbytes, on CUDA.
        trust_remote_code: run the model's own Python code.
        attention_dropout: replaces the model's own; None keeps it.
        random_init: draw the weights from torch's global generator; the folder needs none.
        need_tokenizer: whether a missing tokenizer is an error.
        outputs: scores for each text; None is a language model.

    Raises:
        ModelError: anything that keeps the model from being what was asked for.
    """
    disable_progress_bar()  # of Transformers, which would write between the lines of a run
    place = choose_device(device)
    kind = choose_dtype(dtype, place)
    refuse_quantize(quantize, place)
    folder, commit = find(path, revision, weights=not random_init, code=trust_remote_code)
    settings = read_settings(folder, trust_remote_code)
    if attention_dropout is not None:
        _set_attention_dropout(settings, attention_dropout, path)
    tokenizer = _tokenizer(folder, trust_remote_code, need_tokenizer)
    if outputs is not None:
        settings.num_labels = outputs
    elif any(name.endswith("ForSequenceClassification") for name in settings.architectures or ()):
        raise ModelError(
            "this model scores texts: it is a classifier or reward model, and has no head that writes",
            where=path,
            fix="name it as objective.reward of a policy, or load it with AutoModelForSequenceClassification",
        )
    drawn: tuple[str, ...] = ()
    if random_init:
        model = draw_model(folder, settings, kind, trust_remote_code, scoring=outputs is not None).to(place)
        mark = fingerprint(sorted(model.state_dict().items()))
    else:
        mark = fingerprint(stored_tensors(folder))
        model, drawn = _read_model(
            folder, settings, kind, place, quantize, trust_remote_code, scoring=outputs is not None
        )
    if outputs is not None:
        _set_padding(model, tokenizer)
    if tokenizer is not None and len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ModelError(
            f"the tokenizer has {len(tokenizer)} tokens, the model only "
            f"{model.get_input_embeddings().weight.shape[0]} embeddings",
            where=path,
            fix="use the tokenizer that belongs to the model",
        )
    _use_own_attention(model)
    return Base(model.requires_grad_(False).eval(), tokenizer, path, commit, mark, drawn)


def with_words(base: Base, trust_remote_code: bool = False) -> PreTrainedModel:
    """Give the language model whose backbone a model of scores wears: the head of the same files that predicts words, around it.

    What moves the backbone moves both. Only the head is held besides; where it is tied to the embeddings, it is their table in
    the backbone, which moves where it is trained itself and stays where a pair lies on it.

    Raises:
        ModelError: the files hold no such head.
    """
    folder, _ = find(base.path, base.revision, code=trust_remote_code)
    settings = read_settings(folder, trust_remote_code)
    kind, place = base.model.dtype, base.model.device
    try:
        found, _ = _read_model(folder, settings, kind, torch.device("cpu"), None, trust_remote_code)
    except ModelError as error:
        what = f"this base has no head that predicts words, through which general text could be read: {error.what}"
        raise ModelError(
            what, where="data.general", fix="drop data.general, or take a base with its pretrained head"
        ) from None
    setattr(found, found.base_model_prefix, backbone(base.model))
    found.tie_weights(
        recompute_mapping=False
    )  # what the files hold twice, and different, was parted when they were read
    _use_own_attention(found)
    return found.requires_grad_(False).eval().to(place)


def read_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> PreTrainedTokenizerBase:
    """Read the tokenizer of a base alone.

    Raises:
        ModelError: there is no such base, or it has no tokenizer that can be read.
    """
    folder, _ = find(path, revision, weights=weights, code=trust_remote_code)
    read_settings(folder, trust_remote_code)
    tokenizer = _tokenizer(folder, trust_remote_code, needed=True)
    assert tokenizer is not None
    return tokenizer


def scores_texts(model: nn.Module) -> bool:
    """Tell whether a model gives scores for a text (Transformers' sequence classification), not logits for tokens."""
    return type(model).__name__.endswith(SCORING)


def reads_both_ways(model: nn.Module) -> bool:
    """Tell an encoder, which predicts masked tokens, from a decoder, which predicts the next."""
    return type(model).__name__.endswith("MaskedLM")


def heads(model: PreTrainedModel) -> list[str]:
    """Name the modules of a model of scores that turn hidden states into scores: all outside its backbone, and a pooler."""
    inner = backbone(model)
    found = {f"{model.base_model_prefix}.{POOLER}": getattr(inner, POOLER, None)}
    found |= {name: module for name, module in model.named_children() if module is not inner}
    return [name for name, module in found.items() if module is not None and list(module.parameters())]


def longest_text(model: PreTrainedModel) -> int | None:
    """Give the most tokens of a text that the model has positions for; None where nothing limits it."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    table = getattr(getattr(backbone(model), "embeddings", None), "position_embeddings", None)
    offset = getattr(table, "padding_idx", None)  # positions of RoBERTa begin behind that of padding
    return longest - offset - 1 if longest and offset is not None else longest


def backbone(model: nn.Module) -> nn.Module:
    """Give the transformer under the head; its output has `last_hidden_state` (batch, tokens, hidden)."""
    found = getattr(model, "base_model", model)
    assert isinstance(found, nn.Module)
    return found


def head(model: nn.Module) -> nn.Module | None:
    """Give the layer from hidden states to logits, or None. Some families shape the logits after or before it."""
    find_head = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = find_head() if find_head is not None else None
    return found


def fingerprint(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Hash names, dtypes, shapes and bytes of tensors (SHA-256), in the order given; the callers sort by name."""
    digest = hashlib.sha256()
    for name, tensor in weights:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_settings(folder: Path, trust_remote_code: bool) -> PreTrainedConfig:
    """Read config.json as Transformers' settings of a family that it knows, or that brings its own code."""
    facts = read_facts(folder)
    family = facts.get("model_type")
    if family not in CONFIG_MAPPING and not trust_remote_code:
        if "auto_map" in facts:
            raise ModelError(
                "this model runs its own Python code",
                where=str(folder),
                fix="read that code; if you trust it, set model.trust_remote_code=true",
            )
        near = did_you_mean(str(family), list(CONFIG_MAPPING))
        raise ModelError(
            f"this version of Transformers knows no model family {family!r}",
            where=f"model_type in {folder / 'config.json'}",
            fix=f"did you mean {near!r}?" if near else "install a newer Transformers",
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, TypeError, OSError, StrictDataclassError) as error:
        raise ModelError(
            f"config.json cannot be used: {' '.join(str(error).split())}",
            where=str(folder / "config.json"),
            fix="correct or download it again",
        ) from None


def _set_attention_dropout(settings: PreTrainedConfig, share: float, path: str) -> None:
    text = settings.get_text_config()
    present = [key for key in ATTENTION_DROPOUT if hasattr(text, key)]
    if not present:
        raise ModelError(
            f"the family {text.model_type!r} has no dropout on attention",
            where=f"model.attention_dropout for {path}",
            fix="drop model.attention_dropout",
        )
    for key in present:
        setattr(text, key, share)


def _tokenizer(folder: Path, trust_remote_code: bool, needed: bool) -> PreTrainedTokenizerBase | None:
    # Without a vocabulary on disk Transformers makes an empty tokenizer for some families, in silence.
    if not any(item for pattern in VOCABULARIES for item in folder.glob(pattern)):
        if needed:
            raise ModelError(
                "this model has no tokenizer",
                where=str(folder),
                fix="copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into the model's folder",
            )
        return None
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"the tokenizer cannot be read: {str(error).strip().splitlines()[0]}",
            where=str(folder),
            fix="copy or download its files again, or install the package that the message names",
        ) from None
    return found


def _auto_class(settings: PreTrainedConfig, scoring: bool) -> Any:
    if scoring:
        return AutoModelForSequenceClassification
    names, family = settings.architectures or (), settings.model_type
    masked = any(name.endswith("ForMaskedLM") for name in names)
    if not masked and not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names):
        # Files of encoders may name another task than this, or none; read as decoders they would see what they predict.
        one_way = getattr(settings, "is_decoder", False) or getattr(settings, "is_encoder_decoder", False)
        masked = family in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not one_way
    return AutoModelForMaskedLM if masked else AutoModelForCausalLM


def draw_model(
    folder: Path, settings: PreTrainedConfig, dtype: torch.dtype, trust_remote_code: bool, *, scoring: bool = False
) -> Any:
    """Make a model of its settings, its weights drawn. Raises ModelError where Transformers cannot."""
    try:
        return _auto_class(settings, scoring).from_config(settings, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError) as error:  # no such task for this family; sizes that do not go together
        raise ModelError(
            f"Transformers cannot make this model: {str(error).strip().splitlines()[0]}",
            where=str(folder / "config.json"),
            fix=f"use the config.json of a {_wanted(scoring)}",
        ) from None


def _wanted(scoring: bool) -> str:
    return "family that Transformers has sequence classification for" if scoring else "causal or masked language model"


def _set_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Give the model a padding token that ends no text: decoders of Transformers score the last token that is no padding."""
    text = model.config.get_text_config()
    ends = getattr(tokenizer, "eos_token_id", None)
    ends = getattr(text, "eos_token_id", None) if ends is None else ends
    ends = ends if isinstance(ends, list) else [ends]
    if getattr(text, "pad_token_id", None) is None or text.pad_token_id in ends:
        own = [getattr(tokenizer, f"{name}_token_id", None) for name in ("pad", "unk", "bos")]
        fit = [token for token in (*own, *range(len(ends) + 1)) if token is not None and token not in ends]
        text.pad_token_id = model.config.pad_token_id = fit[0]


@contextmanager
def _without_load_report() -> Iterator[None]:
    """Keep Transformers from listing what a head does not find: it is drawn, and what else is missing is refused."""
    before = get_verbosity()
    set_verbosity_error()
    try:
        yield
    finally:
        set_verbosity(before)


def _read_model(
    folder: Path,
    settings: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    trust_remote_code: bool,
    *,
    scoring: bool = False,
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    named: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code, "use_safetensors": True}
    if quantize is not None:
        named["device_map"] = {"": device}
        named["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=quantize == "4bit",
            load_in_8bit=quantize == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=HEADS if scoring else None,
        )
    try:
        with _without_load_report() if scoring else nullcontext():
            model, report = _auto_class(settings, scoring).from_pretrained(
                folder, config=settings, output_loading_info=True, **named
            )
    except (ValueError, RuntimeError) as error:  # no such task for this family; other shapes than config.json says
        raise ModelError(
            f"Transformers cannot load this model: {str(error).strip().splitlines()[0]}",
            where=str(folder),
            fix=f"use a {_wanted(scoring)}, with weights that belong to its config.json",
        ) from None
    inside = f"{model.base_model_prefix}."
    drawn = tuple(sorted(report["missing_keys"]))
    missing = [n for n in drawn if not scoring or (n.startswith(inside) and not n.startswith(f"{inside}{POOLER}."))]
    if missing:
        raise ModelError(
            f"{len(missing)} weights are missing from the files, {missing[0]} for one; they would be random",
            where=str(folder),
            fix="copy or download the model again, or correct `architectures` in config.json",
        )
    found: PreTrainedModel = model if quantize is not None else model.to(device)
    return found, drawn


def _use_own_attention(model: PreTrainedModel) -> None:
    """Switch to our attention where the family lets attention be chosen and ours computes the same as its own."""
    text = model.config.get_text_config()
    same = model._supports_sdpa or getattr(text, "attn_logit_softcapping", None) is not None
    if same and model._supports_attention_backend:
        model.set_attn_implementation(NAME)
