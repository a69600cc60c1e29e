"""The shipped base: small, complete, rebuilt by a recipe, good at its skills and ignorant of the targets."""

import json
from collections import defaultdict

import pytest

from loralab.base.hub import find
from loralab.base.model import load
from loralab.errors import FolderError
from loralab.evals.tasks import AccuracyProbe, ChoiceProbe
from loralab.lab.tasks import read_tasks
from loralab.pocket import BASE, world
from loralab.pocket.blank import write_blank
from loralab.pocket.shipping import ship
from loralab.spec import recipes
from loralab.spec.spec import TaskSpec
from loralab.training.loss import LanguageHead

MOST_BYTES = 4_000_000
ITEMS = 200


@pytest.fixture(scope="module")
def base():
    return load("pocket", device="cpu", dtype="float32")


def right_by_skill(base, path, probe=AccuracyProbe):
    """Share of items that are right, by skill."""
    tasks = read_tasks([TaskSpec(path=path, items=ITEMS)])
    found = defaultdict(list)
    for row in probe("source/accuracy", tasks, LanguageHead(base.model), base.tokenizer).read().items:
        found[row["skill"]].append(row["right"])
    return {skill: sum(right) / len(right) for skill, right in found.items()}


def test_it_is_small_and_found_by_its_name():
    assert (BASE / "model.safetensors").stat().st_size <= MOST_BYTES
    assert find("pocket") == (BASE, None)


def test_it_has_at_least_8_of_10_skills(base):
    shares = right_by_skill(base, "pocket:source")
    assert set(shares) == set(world.GRADED) and len(shares) == 10
    assert sum(share >= 0.95 for share in shares.values()) >= 8, shares


def test_it_knows_nothing_of_the_targets(base):
    assert right_by_skill(base, "pocket:calc") == {"calc": 0}
    assert right_by_skill(base, "pocket:stack")["stack"] <= 0.02
    tasks = read_tasks([TaskSpec(path="pocket:cipher?difficulty=5", items=ITEMS)])
    probe = ChoiceProbe("target/choice", tasks, LanguageHead(base.model), base.tokenizer)
    low, high = probe.read().scores[0].interval()
    assert probe.chance == 0.25 and low <= 0.35, (low, high)


def test_its_log_shows_the_curve_and_belongs_to_the_recipes(tmp_path):
    first, more = json.loads((BASE / "training.json").read_text(encoding="utf-8"))
    for stage, recipe in ((first, "pocket-base"), (more, "pocket-base-more")):
        spec = tmp_path / f"{recipe}.yaml"
        spec.write_text(stage["spec"], encoding="utf-8")
        made = recipes.read(spec)
        given = [f"model.path={made.model.path}"] if recipe == "pocket-base-more" else []
        assert recipes.read(recipe, given) == made
        assert stage["curve"][-1]["step"] == stage["total_steps"]
    losses = [line["loss"] for line in first["curve"]]
    assert len(losses) >= 50 and losses[-1] < losses[0] / 5
    assert first["curve"][-1]["validation_loss"] > more["curve"][-1]["validation_loss"]


def test_only_a_finished_run_is_shipped(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "environment.json").write_text("{}")
    (run / "status.json").write_text(json.dumps({"state": "interrupted"}))
    with pytest.raises(FolderError, match="not finished"):
        ship([run], tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_its_shape_and_tokenizer_are_those_of_a_blank_one(tmp_path):
    write_blank(tmp_path)
    for name, keys in {
        "config.json": ("hidden_size", "num_hidden_layers", "vocab_size"),
        "tokenizer.json": ("model",),
    }.items():
        ours, blank = (json.loads((folder / name).read_text(encoding="utf-8")) for folder in (BASE, tmp_path))
        assert [ours[key] for key in keys] == [blank[key] for key in keys]


def test_every_character_of_the_world_is_a_token(base):
    rows = [row for name in world.NAMES for row in world.rows(f"pocket:{name}?items=300&difficulty=5")]
    text = "".join("".join(row.values()) for row in rows)
    unknown = base.tokenizer.unk_token_id
    assert unknown not in base.tokenizer(text, add_special_tokens=False).input_ids
