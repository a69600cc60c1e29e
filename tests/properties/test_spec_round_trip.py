"""Any spec, written as YAML and read again, is the same spec."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from loralab.spec import recipes
from loralab.spec.spec import RunSpec

TREACHEROUS = [
    "no",
    "on",
    "1e-5",
    "010",
    "0x1F",
    "null",
    "~",
    "",
    " x ",
    "1:30",
    "<<",
    "a: b",
    "# c",
    "é\u2028\x85\n",
    "😀",
]

words = st.sampled_from(TREACHEROUS) | st.text(max_size=20)
positive = st.floats(min_value=0, exclude_min=True, allow_infinity=False) | st.sampled_from([1e-5, 2e-4, 1e22])
shares = st.floats(min_value=0, max_value=1)
counts = st.integers(min_value=1, max_value=10**20)


def optional(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | values


def section(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Draw any subset of the keys; `name` and `path` always."""
    required = {key: value for key, value in keys.items() if key in ("name", "path", "train")}
    return st.fixed_dictionaries(required, optional={key: keys[key] for key in keys.keys() - required.keys()})


templates = st.fixed_dictionaries({"prompt": words, "completion": words})
sources = section(path=words, weight=positive, template=optional(templates), split=optional(words))
tasks = section(path=words, items=optional(counts))
low_rank = {
    "rank": counts,
    "alpha": optional(positive),
    "targets": st.lists(words, max_size=3),
    "rank_pattern": st.dictionaries(words, counts, max_size=3),
    "alpha_pattern": st.dictionaries(words, positive, max_size=3),
}
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)
methods = (
    section(name=st.just("full"), freeze=st.lists(words, max_size=2))
    | section(name=st.sampled_from(["lora", "lora_plus"]), **low_rank)
    | section(name=st.just("cola"), budgets=st.lists(positive, min_size=3, max_size=3), **low_rank)
    | section(name=st.just("peft"), tuner=words, keys=st.dictionaries(words, anything, max_size=3))
)


def may_branch(values: dict[str, Any]) -> bool:
    """Tell whether a recipe is allowed: a branch gives its warm-up in steps, so that shares of it are refused."""
    return values["branch_from"] in (None, "") or values["schedule"].get("warmup", 0.1) >= 1


specs = (
    st.fixed_dictionaries(
        {
            "name": words,
            "seed": st.integers(min_value=0),
            "model": section(path=words, revision=optional(words), attention_dropout=optional(shares)),
            "data": section(
                train=st.lists(sources, min_size=1, max_size=3),
                validation=optional(st.lists(sources, min_size=1, max_size=2)),
                template=optional(templates),
                packing=st.booleans(),
            ),
            "method": methods,
            "optimizer": section(name=st.sampled_from(["adamw", "lionw"]), learning_rate=optional(positive)),
            "schedule": section(name=st.sampled_from(["linear", "cosine"]), warmup=positive, final=shares),
            "train": st.fixed_dictionaries({"epochs": positive, "clip": optional(positive)})
            | st.fixed_dictionaries({"tokens": counts}),
            "probes": section(target=st.lists(tasks, max_size=2), source=st.lists(tasks, max_size=2), samples=counts),
            "branch_from": optional(words),
            "trackers": st.lists(st.sampled_from(["tensorboard", "wandb"]), unique=True),
        }
    )
    .filter(may_branch)
    .map(RunSpec.model_validate)
)


def minimal(word: str) -> RunSpec:
    return RunSpec.model_validate(
        {
            "name": word,
            "model": {"path": word},
            "data": {"train": [{"path": word}]},
            "method": {"name": "lora", "rank_pattern": {word: 1}},
            "train": {"steps": 1},
        }
    )


def read_back(spec: RunSpec) -> RunSpec:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "spec.yaml"
        file.write_text(recipes.dump(spec), encoding="utf-8")
        return recipes.read(file)


@settings(max_examples=60)
@given(specs)
@example(minimal("\x85"))
@example(minimal("1e-5"))
def test_written_and_read_it_is_the_same(spec):
    again = read_back(spec)
    assert again == spec
    assert again.hash8 == spec.hash8
    assert again.folder_name == spec.folder_name


@settings(max_examples=30)
@given(words)
@example("\ud800")
@example("\ufeff")
def test_every_text_survives(word):
    assert read_back(minimal(word)) == minimal(word)


@settings(max_examples=20)
@given(specs, specs)
def test_diff_is_empty_only_for_equal_specs(a, b):
    assert recipes.diff(a, a) == []
    assert bool(recipes.diff(a, b)) == (a != b)
