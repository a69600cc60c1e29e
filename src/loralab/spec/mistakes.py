"""Say what is wrong with a recipe in the person's own keys, all of it at once, each with its place and a way out."""

import re
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from loralab.errors import did_you_mean
from loralab.spec.draft import Draft, Key, dotted
from loralab.spec.spec import RunSpec

# Names of the same things in Transformers, PEFT, TRL, Axolotl and LLaMA-Factory.
PEERS = {
    "adapter": "method.name",
    "base_model": "model.path",
    "bf16": "model.dtype (bfloat16)",
    "cutoff_len": "data.max_length",
    "dataset": "data.train",
    "dataset_path": "data.train",
    "eval_steps": "probes.every",
    "finetuning_type": "method.name",
    "fp16": "model.dtype (float16 cannot be trained: take bfloat16 or float32)",
    "gradient_accumulation_steps": "train.batch_size (of a whole step; train.micro_batch are computed at a time)",
    "gradient_checkpointing": "train.recompute (none, selective or full)",
    "init_lora_weights": "method.init",
    "layers_pattern": "method.targets",
    "learning_rate_ratio": "method.ratio",
    "load_in_4bit": "model.quantize (4bit)",
    "load_in_8bit": "model.quantize (8bit)",
    "lora_alpha": "method.alpha",
    "lora_dropout": "method.dropout",
    "lora_r": "method.rank",
    "lora_rank": "method.rank",
    "lora_target": "method.targets",
    "lora_target_linear": "method.targets (all-linear)",
    "lora_target_modules": "method.targets",
    "loraplus_lr_ratio": "method.ratio",
    "lr": "optimizer.learning_rate",
    "lr_scheduler": "schedule.name",
    "lr_scheduler_type": "schedule.name",
    "max_grad_norm": "train.clip",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "max_steps": "train.steps",
    "micro_batch_size": "train.micro_batch",
    "model_name_or_path": "model.path",
    "modules_to_save": "method.also_train",
    "num_epochs": "train.epochs",
    "num_train_epochs": "train.epochs",
    "optim": "optimizer.name",
    "per_device_train_batch_size": "train.micro_batch (at a time; train.batch_size is the whole step)",
    "r": "method.rank",
    "report_to": "trackers",
    "sample_packing": "data.packing",
    "save_steps": "checkpoints.every",
    "save_total_limit": "checkpoints.keep_last",
    "sequence_len": "data.max_length",
    "target_modules": "method.targets",
    "torch_dtype": "model.dtype",
    "use_rslora": "method.scaling (alpha/sqrt(r))",
    "val_set_size": "data.validation_share",
    "warmup_ratio": "schedule.warmup (below 1 it is a share of the run)",
    "warmup_steps": "schedule.warmup (from 1 on it counts steps)",
}

WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of keys",
    "model_attributes_type": "a section of keys",
}

BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}

CORRECT = "correct the value, or leave the key out to get its default"

PLACEHOLDERS = {"model.path": "FOLDER", "data.train": "FILE"}

TAGGED = [name for name, field in RunSpec.model_fields.items() if field.discriminator]

Words = tuple[str, str | None]
"""What was wrong, and what to do next."""


def report_mistakes(draft: Draft, error: ValidationError) -> None:
    """Translate what the spec refuses into mistakes of the draft."""
    refusals: list[Mapping[str, Any]] = [*error.errors(include_url=False)]
    for refusal in refusals + _inside_mistyped_tags(draft, refusals):
        key = _key(refusal["loc"])
        if refusal["type"] == "contradiction":
            key = tuple(refusal["ctx"]["key"].split("."))
        if refusal["type"].startswith("union_tag"):
            key = (*key, "name")
        if refusal["type"] != "missing" or key not in draft.places:  # else its override could not be read: reported
            draft.report(draft.place(key), *_words(draft, key, refusal))


def sections() -> list[str]:
    """Name the keys of a recipe that hold keys themselves."""
    return [name for name, field in RunSpec.model_fields.items() if _models_in(field.annotation)]


@cache
def every_key() -> tuple[str, ...]:
    """List every dotted key that some recipe may have; entries of lists without their number."""
    return tuple(_keys_below(RunSpec, ()))


def _inside_mistyped_tags(draft: Draft, refusals: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Judge a section with a mistyped tag as the variant that was meant: pydantic stops at the tag."""
    values = dict(draft.values)
    repaired = set()
    for refusal in refusals:
        if refusal["type"] == "union_tag_invalid":
            section = refusal["loc"][0]
            if meant := did_you_mean(refusal["ctx"]["tag"], list(_variants(section))):
                values[section] = {**values[section], "name": meant}
                repaired.add(section)
    try:
        RunSpec.model_validate(values)
    except ValidationError as error:
        return [
            refusal
            for refusal in error.errors(include_url=False)
            if refusal["loc"][:1] and refusal["loc"][0] in repaired
        ]
    return []


def _key(location: tuple[int | str, ...]) -> Key:
    """Return the dotted key of a pydantic location, which names the tag of a section as if it were a key."""
    key = tuple(str(part) for part in location if part != "[key]")
    return key[:1] + key[2:] if key[:1] and key[0] in TAGGED else key


def _words(draft: Draft, key: Key, refusal: Mapping[str, Any]) -> Words:
    name, kind, value, facts = dotted(key), refusal["type"], refusal["input"], refusal.get("ctx", {})
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(draft, key)
    if kind == "missing":
        return f"{name} is missing", f"give {name}={PLACEHOLDERS.get(name, 'VALUE')}"
    if kind == "union_tag_not_found":
        return f"{name} is missing", f"give {name}=NAME, one of {', '.join(_variants(key[0]))}"
    if kind == "union_tag_invalid":
        return _not_among(name, value["name"], list(_variants(key[0])))
    if kind == "literal_error":
        allowed = re.findall(r"'[^']*'|True|False", facts["expected"])
        return _not_among(name, value, [word[1:-1] if word[0] == "'" else word.lower() for word in allowed])
    if kind == "contradiction":
        return facts["what"], facts["fix"]
    if kind in BOUNDS:
        bound, wanted = BOUNDS[kind]
        return f"{name} must be {wanted} {facts[bound]:g}, not {_said(value)}", CORRECT
    return f"{name} wants {WANTED.get(kind, 'another value')}, not {_said(value)}", _way_out(key, kind, value)


def _not_among(name: str, value: Any, allowed: list[str]) -> Words:
    near = did_you_mean(str(value), allowed)
    guess = f"did you mean {near}? " if near else ""
    return f"{name} cannot be {_said(value)}", f"{guess}allowed: {', '.join(allowed)}"


def _way_out(key: Key, kind: str, value: Any) -> str:
    if value is None:
        return "leave the key out to get its default"
    if kind == "bool_type":
        return "write true or false: in YAML 1.2 yes, no, on and off are text"
    if kind == "string_type":
        return "put it in quotes"
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"write {int(value)}, without the point"
    if kind in ("int_type", "float_type") and isinstance(value, str) and re.fullmatch(r"[-+.\deE]+", value):
        return "take the quotes away"
    if kind == "list_type" and isinstance(value, str):
        return f"write [{value}]"
    if kind == "model_attributes_type" and isinstance(value, str):
        return f"write {dotted(key)}.name={value}"
    if kind.startswith("model") and (model := _model_at(key, {})):
        return f"its keys are {', '.join(model.model_fields)}"
    return CORRECT


def _unknown(draft: Draft, key: Key) -> Words:
    name, last, section = dotted(key), key[-1], key[:-1]
    model = _model_at(section, draft.values)
    known = list(model.model_fields) if model else []
    what = f"unknown key {name}"
    owners = [tag for tag, variant in _variants(section[0]).items() if last in variant.model_fields] if section else []
    if owners:
        return _of_another_variant(draft, key, owners)
    if section and "keys" in known:
        return what, f"the tuner's own keys go under {dotted(section)}.keys"
    if last in PEERS:
        return what, f"here it is {PEERS[last]}"
    elsewhere = [other for other in every_key() if other.split(".")[-1] == last]
    if 1 <= len(elsewhere) <= 2:
        return what, f"did you mean {' or '.join(elsewhere)}?"
    if near := did_you_mean(last, known):
        return what, f"did you mean {dotted((*section, near))}?"
    return what, f"known {'here' if section else 'sections'}: {', '.join(known)}"


def _of_another_variant(draft: Draft, key: Key, owners: list[str]) -> Words:
    """Word a key that the section knows under another tag; often the tag was overridden and the recipe's key stayed."""
    tag_key = (key[0], "name")
    variant = _model_at(key[:1], draft.values)
    tag = variant.model_fields["name"].default if variant else None
    what = f"{dotted(key)} is a key of {' and '.join(owners)}, not of {tag}"
    if draft.place(tag_key).turn > 0 and draft.place(key).turn == 0:
        return what, f"{draft.place(tag_key).text} keeps the recipe's other keys: take this one out of the recipe"
    return what, f"leave it out, or write {dotted(tag_key)}={owners[0]}"


def _said(value: Any) -> str:
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if isinstance(value, bool) or value is None:
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_in(inner)]


def _variants(section: str) -> dict[str, type[BaseModel]]:
    """Return tag → class of a tagged section; nothing for other sections."""
    if section not in TAGGED:
        return {}
    return {model.model_fields["name"].default: model for model in _models_in(RunSpec.model_fields[section].annotation)}


def _model_at(key: Key, values: dict[Any, Any]) -> type[BaseModel] | None:
    """Return the class that judges the section at `key`."""
    model: type[BaseModel] = RunSpec
    for part in key:
        if part.isdecimal():
            continue
        field = model.model_fields.get(part)
        models = _models_in(field.annotation) if field else []
        if not field or not models:
            return None
        variants = _variants(part) if model is RunSpec else {}
        written = values.get(part)
        tag = did_you_mean(str(written.get("name")), list(variants)) if isinstance(written, dict) else None
        model = variants.get(tag or "", type(field.default) if type(field.default) in models else models[0])
    return model


def _keys_below(model: type[BaseModel], key: Key) -> list[str]:
    found: dict[str, None] = {}
    for name, field in model.model_fields.items():
        found[dotted((*key, name))] = None
        for inner in _models_in(field.annotation):
            found |= dict.fromkeys(_keys_below(inner, (*key, name)))
    return list(found)
