"""Recipes: reading, precedence, every mistake at once, explaining and comparing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from loralab.errors import LoralabError, SpecError
from loralab.spec import recipes
from loralab.spec.mistakes import PEERS, every_key

MINIMAL = """\
model: {path: base}
data: {train: a.jsonl}
method: {name: lora}
train: {steps: 10}
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write recipe.yaml into an empty current directory and return its path."""
    monkeypatch.chdir(tmp_path)

    def write_recipe(text: str, name: str = "recipe.yaml") -> Path:
        file = Path(name)
        file.write_text(text, encoding="utf-8")
        return file

    return write_recipe


def mistakes(file: Path, *overrides: str) -> dict[str, tuple[str | None, str]]:
    """Read a wrong recipe and return what was wrong → (where, next)."""
    with pytest.raises(SpecError) as caught:
        recipes.read(file, list(overrides))
    return {problem.what: (problem.where, problem.fix or "") for problem in caught.value.problems}


class TestMistakes:
    def test_five_different_mistakes_are_all_reported_with_key_line_and_suggestion(self, write):
        file = write(
            "model: {path: base}\n"
            "data:\n"
            "  train: a.jsonl\n"
            "  max_lenght: 512\n"  # unknown
            "  packing: no\n"  # wrong type: text in YAML 1.2
            "method:\n"
            "  name: lora_puls\n"  # bad tag
            "  rank: 0\n"  # out of range, inside the section with the bad tag
            "optimizer: {lr: 1e-4}\n"  # a peer's name
            "train: {steps: 10}\n"
        )
        found = mistakes(file)
        assert list(found) == [
            "unknown key data.max_lenght",
            "data.packing wants true or false, not 'no'",
            "method.name cannot be 'lora_puls'",
            "method.rank must be at least 1, not 0",
            "unknown key optimizer.lr",
        ]
        assert [where for where, _ in found.values()] == [f"recipe.yaml:{line}" for line in (4, 5, 7, 8, 9)]
        fixes = [fix for _, fix in found.values()]
        assert "did you mean data.max_length?" in fixes[0]
        assert "write true or false" in fixes[1]
        assert "did you mean lora_plus?" in fixes[2] and "full, lora, lora_plus, cola, peft" in fixes[2]
        assert "here it is optimizer.learning_rate" in fixes[4]

    def test_missing_keys_say_what_to_give(self, write):
        found = mistakes(write("method: {name: lora}\nmodel:\n"))
        assert found["model.path is missing"] == ("recipe.yaml:2", "give model.path=FOLDER")
        assert found["data.train is missing"] == ("recipe.yaml", "give data.train=FILE")
        assert any(what.startswith("the run has ") for what in found)

    def test_an_empty_recipe_also_misses_a_method(self, write):
        assert "lora" in mistakes(write(""))["method.name is missing"][1]

    def test_cross_field_mistakes_come_with_the_others(self, write):
        file = write(MINIMAL.replace("steps: 10", "steps: 10, epochs: 1"))
        found = mistakes(file, "method.name=cola", "method.budgets=[3, 2]", "seed=-1")
        assert found == {
            "the run has 2 lengths: epochs, steps": (
                "recipe.yaml:4",
                "give exactly one of train.epochs, train.steps, train.tokens",
            ),
            "method.budgets has 2 entries but the chain has 3 links": (
                'override "method.budgets=[3, 2]"',
                "give one entry for each link",
            ),
            "seed must be at least 0, not -1": (
                'override "seed=-1"',
                "correct the value, or leave the key out to get its default",
            ),
        }

    def test_duplicate_keys_are_all_reported(self, write):
        found = mistakes(write(MINIMAL + "seed: 1\nseed: 2\nprobes:\n  every: 1\n  every: 2\n"))
        assert found == {
            "seed stands twice": ("recipe.yaml:6", "keep one of them: the first is on line 5"),
            "probes.every stands twice": ("recipe.yaml:9", "keep one of them: the first is on line 8"),
        }

    @pytest.mark.parametrize(
        ("text", "line"),
        [("a: 1\nb: [1\nc: 2\n", 3), ("a: 1\n\tb: 2\n", 2), ("a: 1\nb: \x00\n", 2), ("x: &x [*x]\n", 1)],
        ids=["bracket", "tab", "control character", "alias in itself"],
    )
    def test_what_is_not_yaml_is_reported_alone(self, write, text, line):
        found = mistakes(write(text))
        assert [what.startswith("not YAML: ") for what in found] == [True]
        assert [where for where, _ in found.values()] == [f"recipe.yaml:{line}"]

    def test_a_list_is_no_recipe(self, write):
        assert "a recipe is a mapping of sections" in mistakes(write("- a\n"))

    def test_bytes_that_are_no_utf8_are_named(self, write):
        file = write("")
        file.write_bytes(b"\xff\xfe")
        assert "the recipe is not UTF-8 text" in mistakes(file)

    @pytest.mark.parametrize(
        ("override", "what", "fix"),
        [
            ("seed", "an override is section.key=value", "method.rank=8"),
            (".seed=1", "an override is section.key=value", "method.rank=8"),
            ("method.rnak=3", "unknown key method.rnak", "did you mean method.rank?"),
            ("modle.path=x", "unknown key modle", "did you mean model?"),
            ("rank=3", "unknown key rank", "did you mean method.rank?"),
            ("method.targets=*.q", "the value of method.targets is not YAML", "quote the text"),
            ("data.train.4.weight=2", "data.train.4.weight leads nowhere: data.train is a list of 1", ""),
            ("train.steps.x=2", "train.steps.x leads nowhere: train.steps is 10", ""),
            ("model.revision=010", "model.revision wants text, not 10", "quotes"),
            ("train.steps=1e3", "train.steps wants a whole number, not 1000.0", "write 1000"),
            ("method.rank='8'", "method.rank wants a whole number, not '8'", "take the quotes away"),
            ("method=cola", "method wants a section of keys, not 'cola'", "write method.name=cola"),
            ("data.form=jsonl", "data.form cannot be 'jsonl'", "allowed: auto, text"),
            ("trackers=wandb", "trackers wants a list, not 'wandb'", "write [wandb]"),
            ("optimizer.learning_rate=.inf", "optimizer.learning_rate wants a finite number, not inf", ""),
            ("method.ratio=4", "method.ratio is a key of lora_plus, not of lora", "method.name=lora_plus"),
        ],
    )
    def test_a_wrong_override_is_named_as_it_was_typed(self, write, override, what, fix):
        found = mistakes(write(MINIMAL), override)
        assert len(found) == 1
        ((said, (where, way_out)),) = found.items()
        assert said.startswith(what)
        assert where == f'override "{override}"'
        assert fix in way_out

    def test_an_override_that_cannot_be_read_is_not_missing_too(self, write):
        found = mistakes(write(MINIMAL.replace("{train: a.jsonl}", "{}")), "data.train=@a")
        assert [what.split(" is not YAML")[0] for what in found] == ["the value of data.train"]

    def test_a_new_tag_names_the_recipes_keys_that_it_does_not_know(self, write):
        file = write(MINIMAL.replace("name: lora", "name: lora_plus, ratio: 4"))
        what = "method.ratio is a key of lora_plus, not of cola"
        where, fix = mistakes(file, "method.name=cola")[what]
        assert where == "recipe.yaml:3"
        assert 'override "method.name=cola"' in fix

    def test_keys_of_a_peft_tuner_are_sent_to_keys(self, write):
        file = write(MINIMAL.replace("lora}", "peft, r: 8}"))
        assert "method.keys" in mistakes(file)["unknown key method.r"][1]

    def test_nothing_of_pydantic_shows(self, write):
        with pytest.raises(SpecError) as caught:
            recipes.read(
                write(
                    "seed: x\nmethod: {name: lora, rank: a, foo: 1}\nmodel: 3\ndata: {train: 3}\ntrain: {tokens: 9}\n"
                )
            )
        assert "5 problems" in str(caught.value)
        for word in ("pydantic", "Input should", "http", "Spec", "method.lora"):
            assert word not in str(caught.value)

    def test_every_hint_for_a_peers_name_leads_to_a_key(self):
        known = set(every_key())
        assert {hint.split()[0] for hint in PEERS.values()} <= known
        assert not PEERS.keys() & {key.split(".")[-1] for key in known}


class TestReading:
    def test_default_then_recipe_then_override(self, write):
        file = write(MINIMAL + "seed: 3\n")
        assert (recipes.read(file).seed, recipes.read(file, ["seed=4", "seed=5"]).seed) == (3, 5)
        assert recipes.read(write(MINIMAL, "plain.yaml")).seed == 0

    def test_numbers_and_words_are_yaml_1_2(self, write):
        file = write(MINIMAL + "schedule: {warmup: 5e-2}\nname: no\n")
        spec = recipes.read(file, ["optimizer.weight_decay=1e-5", "model.revision=on"])
        assert spec.schedule.warmup == 0.05
        assert spec.optimizer.weight_decay == 0.00001
        assert (spec.name, spec.model.revision) == ("no", "on")

    def test_the_stem_is_the_name(self, write):
        assert recipes.read(write(MINIMAL, "my-run.yaml")).name == "my-run"
        assert recipes.read(write(MINIMAL + "name: other", "my-run.yaml")).name == "other"

    def test_a_section_without_its_name_keeps_the_default_kind(self, write):
        spec = recipes.read(write(MINIMAL), ["schedule.final=0.5", "optimizer.weight_decay=0.1"])
        assert (spec.schedule.name, spec.schedule.final) == ("cosine", 0.5)
        assert (spec.optimizer.name, spec.optimizer.weight_decay) == ("adamw", 0.1)

    def test_overrides_reach_into_lists_and_append(self, write):
        spec = recipes.read(
            write(MINIMAL),
            ["data.train.0.weight=2", "data.train.1.path=b", "data.train.1.weight=0.5", "data.validation.0.path=v"],
        )
        assert [(source.path, source.weight) for source in spec.data.train] == [("a.jsonl", 2), ("b", 0.5)]
        assert spec.data.validation is not None and spec.data.validation[0].path == "v"

    def test_overrides_hold_lists_and_whole_sections(self, write):
        spec = recipes.read(
            write(MINIMAL), ["data.train=[x, y]", "method={name: cola, links: 2}", "method.targets=mlp"]
        )
        assert [source.path for source in spec.data.train] == ["x", "y"]
        assert (spec.method.name, spec.method.links, spec.method.targets) == ("cola", 2, ["mlp"])

    def test_an_overridden_length_replaces_the_recipes(self, write):
        spec = recipes.read(write(MINIMAL), ["train.tokens=5000"])
        assert (spec.train.steps, spec.train.epochs, spec.train.tokens) == (None, None, 5000)
        assert len(mistakes(Path("recipe.yaml"), "train.tokens=5000", "train.epochs=2")) == 1

    def test_alpha_and_learning_rate_follow_the_overridden_method(self, write):
        low_rank = recipes.read(write(MINIMAL), ["method.rank=4"])
        full = recipes.read(write(MINIMAL), ["method.name=full"])
        assert low_rank.method.alpha == 2 * 4
        assert low_rank.optimizer.learning_rate == pytest.approx(10 * full.optimizer.learning_rate)

    def test_schema_allows_the_short_forms(self):
        definitions = recipes.schema()["$defs"]
        assert {"type": "string"} in definitions["DataSpec"]["properties"]["train"]["anyOf"]
        assert definitions["LoraSpec"]["additionalProperties"] is False


YOURS = (
    *("sft-lora", "sft-lora-plus", "sft-cola", "sft-full", "cpt-lora", "cpt-full"),
    *("reward-lora", "reward-full", "reward-tldr-lora", "reward-hh-lora", "reward-taskmaster-lora", "classify-lora"),
    *("rl-rloo", "rl-grpo", "rl-perl", "rl-tldr-perl"),
)
"""Recipes for the person's own model and data."""
OF_A_REWARD = ("rl-perl", "rl-tldr-perl")
"""Those that need a reward too."""
GIVEN = ["model.path=FOLDER", "data.train=FILE"]


def given(name: str) -> list[str]:
    """Give what a recipe leaves to the person."""
    return GIVEN + (["objective.reward=RUN"] if name in OF_A_REWARD else [])


class TestShipped:
    def test_they_are_there_with_one_line_each(self):
        described = dict(recipes.shipped())
        assert set(described) == {
            *YOURS,
            "pocket-base",
            "pocket-base-more",
            "pocket-lora",
            "pocket-reward",
            "pocket-reward-close",
            "pocket-rl",
            "pocket-rl-full",
        }
        for text in described.values():
            assert text.endswith(".") and not text.startswith("#")

    @pytest.mark.parametrize("name", YOURS)
    def test_it_reads_once_model_and_data_are_given(self, name):
        spec = recipes.read(name, given(name))
        assert spec.name == name
        assert f"loralab train {name} {' '.join(given(name))}" in recipes.find(name).read_text(encoding="utf-8")
        with pytest.raises(SpecError) as caught:
            recipes.read(name)
        missing = [f"{key.partition('=')[0]} is missing" for key in given(name)]
        assert sorted(problem.what for problem in caught.value.problems) == sorted(missing)

    def test_those_of_the_pocket_world_bring_their_data(self):
        assert recipes.read("pocket-lora").method.name == "lora"
        assert recipes.read("pocket-base-more", ["model.path=RUN"]).model.random_init is False
        spec = recipes.read("pocket-base")
        assert (spec.model.path, spec.model.random_init, spec.method.name) == ("pocket", True, "full")

    @pytest.mark.parametrize("name", [name for name, _ in recipes.shipped()])
    def test_it_repeats_no_default(self, write, name):
        missing = [] if name.startswith("pocket-") else given(name)
        missing = ["model.path=FOLDER"] if name == "pocket-base-more" else missing
        written = YAML(typ="safe", pure=True).load(recipes.find(name))
        for section, keys in written.items():
            for key in keys:
                rest = {**written, section: {other: value for other, value in keys.items() if other != key}}
                try:  # JSON is YAML
                    without = recipes.read(write(json.dumps(rest), f"{name}.yaml"), missing)
                except SpecError:
                    continue  # the key is required
                assert without != recipes.read(name, missing), f"{section}.{key}"

    def test_unknown_names_are_answered_with_the_nearest(self):
        with pytest.raises(LoralabError) as caught:
            recipes.find("sft-loar")
        assert "did you mean sft-lora?" in (caught.value.fix or "")
        with pytest.raises(LoralabError, match="no recipe"):
            recipes.find("nowhere/recipe.yaml")

    def test_a_path_wins_over_a_shipped_name(self, write):
        file = write(MINIMAL, "sft-lora")
        assert recipes.find("sft-lora") == file


class TestExplainAndDiff:
    def test_every_source_is_named(self, write):
        file = write(MINIMAL)
        rows = {row.key: row for row in recipes.explain(file, ["method.rank=4", "data.train.0.weight=2"])}
        assert (rows["method.rank"].value, rows["method.rank"].source) == (4, 'override "method.rank=4"')
        assert rows["train.steps"].source == "recipe recipe.yaml:4"
        assert rows["data.train.0.path"].source == "recipe recipe.yaml:2"
        assert rows["data.train.0.weight"].source == 'override "data.train.0.weight=2"'
        assert rows["data.train.0.split"].source == "default"
        assert (rows["method.alpha"].value, rows["method.alpha"].source) == (8, "default")
        assert rows["name"].source == "recipe recipe.yaml"
        assert "2·rank" in rows["method.alpha"].meaning

    def test_explain_covers_the_whole_spec(self, write):
        file = write(MINIMAL)
        sections = {row.key.split(".")[0] for row in recipes.explain(file)}
        assert sections == set(recipes.read(file).model_dump())

    def test_diff_lists_what_differs_and_nothing_else(self, write):
        a = recipes.read(write(MINIMAL))
        b = recipes.read(write(MINIMAL), ["seed=1", "data.train=[a.jsonl, b.jsonl]"])
        assert recipes.diff(a, a) == []
        assert recipes.diff(a, b) == [
            ("seed", 0, 1),
            ("data.train.1.path", None, "b.jsonl"),
            ("data.train.1.weight", None, 1.0),
        ]


def test_no_torch_is_imported():
    program = "import sys, loralab.spec.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
