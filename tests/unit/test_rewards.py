"""Rewards: models on the policy's base against Transformers' own classifier, functions, graders, and what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from little_world import make_base, write_rows
from loralab.base.model import Base, load
from loralab.base.sources import Source
from loralab.delta.layers import low_rank_layers
from loralab.delta.lowrank import Delta, LowRank
from loralab.delta.store import save_lowrank
from loralab.errors import DataError, DeltaError, EvaluationError
from loralab.lab.prompts import Asked, read_prompts
from loralab.lab.reward_function import RewardFunction
from loralab.lab.reward_models import ByModel, RewardModels, read_reward
from loralab.lab.rewards import (
    Answered,
    Rewards,
    graded,
    is_delta,
    look_for_rewards,
    refuse_ungradable,
    rewards_of,
    true,
)
from loralab.methods.full import Full
from loralab.methods.lora import Lora
from loralab.spec.objective import RewardSourceSpec
from loralab.training.loss import LanguageHead

LAYER = "model.layers.1.mlp.down_proj"
TEXTS = [("ask a: ", ("abc", "abd ef", "f")), ("ask longer b: ", ("cab",))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("rewards") / "base")


@pytest.fixture
def base(folder) -> Base:
    return load(str(folder), device="cpu")


def asked(prompt: str, base: Base, **row: object) -> Asked:
    assert base.tokenizer is not None
    return Asked(_prompt(prompt, base), {"prompt": prompt, **row}, row.get("completion"), None, "here")  # type: ignore[arg-type]


def _prompt(text: str, base: Base):
    from loralab.evals.generate import Prompt

    assert base.tokenizer is not None
    return Prompt(base.tokenizer(text)["input_ids"], text, 16)


def answers(base: Base, *, ended: bool = True) -> list[Answered]:
    assert base.tokenizer is not None
    end = [base.tokenizer.eos_token_id] if ended else []
    found = []
    for prompt, mine in TEXTS:
        one = asked(prompt, base)
        found += [Answered(one, base.tokenizer(text)["input_ids"] + end, text) for text in mine]
    return found


def pairs(seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, 48, generator=generator), torch.randn(32, 2, generator=generator), 0.5)


def score(seed: int, outputs: int = 1) -> torch.Tensor:
    return torch.randn(outputs, 32, generator=torch.Generator().manual_seed(seed))


def own_scores(
    folder, pair: LowRank | None, norm: torch.Tensor | None, weight: torch.Tensor, base: Base
) -> list[float]:
    """Score each text alone with Transformers' classifier, into whose weights everything is merged."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    with torch.no_grad():
        if pair is not None:
            model.get_submodule(LAYER).weight += 0.5 * pair.B @ pair.A
        if norm is not None:
            model.get_parameter("model.norm.weight").copy_(norm)
        model.score.weight.copy_(weight)
        assert base.tokenizer is not None
        rows = [
            base.tokenizer(prompt + text)["input_ids"] + [base.tokenizer.eos_token_id]
            for prompt, mine in TEXTS
            for text in mine
        ]
        return [float(model(torch.tensor([row])).logits) for row in rows]


def save_reward(folder, base: Base, *, whole: dict[str, torch.Tensor], mark: str | None = None) -> str:
    delta = Delta({LAYER: pairs(3)}, whole, mark or base.fingerprint)
    save_lowrank(folder, delta, base.path)
    return str(folder)


def put_on(base: Base, path: str, method=None) -> tuple[RewardModels, ByModel]:
    found = {path: read_reward(path, base)}
    method = method or Lora(rank=2, alpha=4.0)
    method.attach(base, 0)
    models = RewardModels(found, base, LanguageHead(base.model), method.without)
    return models, models.reward(path)


# Models


@pytest.mark.parametrize("method", [lambda: Lora(rank=2, alpha=4.0), Full], ids=["lora", "full"])
def test_a_reward_model_scores_as_transformers_own_classifier_whatever_the_policy_is_by_then(
    folder, base, tmp_path, method
):
    norm = torch.linspace(0.5, 2, 32)
    path = save_reward(tmp_path / "reward", base, whole={"score.weight": score(5), "model.norm.weight": norm})
    policy = method()
    _, reward = put_on(base, path, policy)
    with torch.no_grad():
        moved = policy.parameters if isinstance(policy, Full) else policy._trainable()
        for parameter in moved.values():
            parameter.add_(0.3)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    expected = own_scores(folder, pairs(3), norm, score(5), base)
    assert reward(answers(base)) == pytest.approx(expected, abs=1e-4)
    assert reward(answers(base, ended=False)) == pytest.approx(expected, abs=1e-4), (
        "an answer cut off is read as a text"
    )
    assert all(torch.equal(value, before[name]) for name, value in base.model.state_dict().items())
    assert len({round(value, 3) for value in expected}) == 4


def test_a_dense_reward_model_is_what_its_checkpoint_has_otherwise_than_the_base(folder, base, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    pair = pairs(4)
    with torch.no_grad():
        model.get_submodule(LAYER).weight += 0.5 * pair.B @ pair.A
        model.score.weight.copy_(score(6))
    model.save_pretrained(tmp_path / "dense")
    delta, head = read_reward(str(tmp_path / "dense"), base)
    assert set(delta.whole) == {f"{LAYER}.weight"} and not delta.layers
    assert torch.equal(head, score(6))
    _, reward = put_on(base, str(tmp_path / "dense"))
    assert reward(answers(base)) == pytest.approx(own_scores(folder, pair, None, score(6), base), abs=1e-4)


def test_putting_a_reward_on_leaves_the_policy_active_and_its_tables_tied(folder, base, tmp_path):
    make_base(tmp_path / "tied", tie_word_embeddings=True)
    tied = load(str(tmp_path / "tied"), device="cpu")
    whole = {"score.weight": score(5), "model.norm.weight": torch.ones(32)}
    put_on(tied, save_reward(tmp_path / "reward", tied, whole=whole), full := Full())
    embedding, head = tied.model.get_input_embeddings(), tied.model.get_output_embeddings()
    assert embedding.weight is head.weight and any(p is head.weight for p in full.parameters.values())
    put_on(base, save_reward(tmp_path / "other", base, whole=whole), Lora(rank=2, alpha=4.0))
    assert all(layer.active == ("link-1",) for layer in low_rank_layers(base.model).values())


def test_only_the_policy_is_saved(base, tmp_path):
    whole = {"score.weight": score(5), "model.norm.weight": torch.full((32,), 2.0)}
    path = save_reward(tmp_path / "reward", base, whole=whole)
    before = {name: value.clone() for name, value in base.model.state_dict().items()}
    put_on(base, path, full := Full())
    full.save(tmp_path / "full")
    again = load(str(tmp_path / "full"), device="cpu", need_tokenizer=False)
    assert again.model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in again.model.state_dict().items())
    assert set(full.delta()) == {n for n, _ in again.model.named_modules() if n.endswith("_proj")}


@pytest.mark.parametrize(
    ("whole", "mark", "what"),
    [
        ({}, None, "has no head"),
        ({"score.weight": score(1, outputs=3)}, None, r"a head of shape \(3, 32\)"),
        ({"score.weight": score(1)}, "another", "trained on another base"),
        ({"score.weight": score(1), "model.norm.weight": torch.ones(31)}, None, "belongs to another base"),
    ],
)
def test_what_is_no_reward_of_this_base_is_refused(base, tmp_path, whole, mark, what):
    with pytest.raises(DeltaError, match=what):
        read_reward(save_reward(tmp_path / "reward", base, whole=whole, mark=mark), base)


def test_a_folder_without_a_reward_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(DeltaError, match="no reward"):
        look_for_rewards([RewardSourceSpec(path=str(tmp_path / "nothing"))])


def test_a_run_says_itself_on_which_base_its_reward_was_trained(base, tmp_path):
    whole = {"score.weight": score(1)}
    save_lowrank(tmp_path / "run" / "delta", Delta({LAYER: pairs(3)}, whole), base.path)
    environment = tmp_path / "run" / "environment.json"
    environment.write_text(json.dumps({"inputs": {"base": "0123456789ab"}}))
    with pytest.raises(DeltaError, match="another base"):
        read_reward(str(tmp_path / "run"), base)
    environment.write_text(json.dumps({"inputs": {"base": base.fingerprint}}))
    assert torch.equal(read_reward(str(tmp_path / "run"), base)[1], score(1))


# Functions and graders


def no_model(path: str):
    raise AssertionError(path)


def function(tmp_path, body: str, name: str = "reward") -> str:
    (tmp_path / "mine.py").write_text(f"import math, time\n\n\ndef reward(prompts, answers, rows):\n    {body}\n")
    return f"{tmp_path / 'mine.py'}:{name}"


def test_a_function_sees_prompts_answers_and_rows(base, tmp_path):
    path = function(tmp_path, "return [len(p) + 10 * len(a) + 100 * r['k'] for p, a, r in zip(prompts, answers, rows)]")
    rewards = rewards_of([RewardSourceSpec(path=path, weight=0.5)], {path: RewardFunction(path, 20)}, model=no_model)
    one, two = asked("ab", base, k=1), asked("abc", base, k=2)
    found = rewards([Answered(one, [5], "x"), Answered(two, [5], "xyz")])
    assert found.parts == {"reward": [112.0, 233.0]} and found.total == [56.0, 116.5]


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("raise KeyError('price')", r"raised KeyError: 'price' \(line 5 of mine.py\)"),
        ("return [math.nan for _ in answers]", "gave nan"),
        ("return [math.inf for _ in answers]", "gave inf"),
        ("return ['good' for _ in answers]", "gave no number"),
        ("return [1.0]", "gave 1 values for 2 answers"),
        ("return None", "a NoneType for 2 answers"),
        ("import os; os._exit(7)", "ended its process"),
        ("time.sleep(60)", "did not answer within 0.2 s"),
    ],
)
def test_a_function_that_gives_no_rewards_is_named(tmp_path, body, what):
    path = function(tmp_path, body)
    with pytest.raises(EvaluationError, match=what) as caught:
        RewardFunction(path, 0.2 if "sleep" in body else 20.0)(["p", "p"], ["a", "b"], [{}, {}])
    assert caught.value.where == path and caught.value.exit_code == 2


def test_a_function_that_hung_gets_a_new_process(tmp_path):
    path = function(tmp_path, "time.sleep(60 if answers == ['slow'] else 0); return [1.0]")
    mine = RewardFunction(path, 0.5)
    with pytest.raises(EvaluationError):
        mine(["p"], ["slow"], [{}])
    mine.timeout = 20.0
    assert mine(["p"], ["fast"], [{}]) == [1.0]


def test_what_a_function_prints_is_no_answer_and_what_it_keeps_stays(tmp_path):
    (tmp_path / "mine.py").write_text(
        "calls = []\ndef reward(p, a, r):\n    print('x' * 100000)\n    calls.append(1)\n    return [len(calls)] * len(a)\n"
    )
    mine = RewardFunction(f"{tmp_path / 'mine.py'}:reward", 20)
    assert [mine(["p"], ["a"], [{}]) for _ in range(2)] == [[1.0], [2.0]]


def test_the_source_of_a_function_is_the_content_of_its_files(tmp_path, monkeypatch):
    path = function(tmp_path, "return [1.0]")
    first = RewardFunction(path, 20).source
    (tmp_path / "elsewhere").mkdir()
    same = (tmp_path / "elsewhere" / "other.py").write_bytes((tmp_path / "mine.py").read_bytes())
    assert same and RewardFunction(f"{tmp_path}/elsewhere/other.py:reward", 20).source == first, "names do not count"
    monkeypatch.syspath_prepend(tmp_path)
    assert RewardFunction("mine:reward", 20).source == first
    function(tmp_path, "return [2.0]")
    second = RewardFunction(path, 20).source
    (tmp_path / "door.py").write_text("from mine import reward\n")
    door = f"{tmp_path / 'door.py'}:reward"
    behind = RewardFunction(door, 20).source
    function(tmp_path, "return [3.0]")
    assert len({first, second, behind, RewardFunction(door, 20).source}) == 4, "the file that it is written in counts"
    (tmp_path / "built_in.py").write_text("from builtins import sum as reward\n")
    assert len(RewardFunction(f"{tmp_path / 'built_in.py'}:reward", 20).source) == 64


@pytest.mark.parametrize(
    ("name", "body", "what"),
    [
        ("reward", "return (", "raised SyntaxError when it was imported"),
        ("rewards", "return []", "has no function rewards"),
    ],
)
def test_a_function_that_is_not_there_is_refused_at_once(tmp_path, name, body, what):
    with pytest.raises(EvaluationError, match=what):
        RewardFunction(function(tmp_path, body, name), 20)


def test_paths_of_functions_and_deltas_are_told_apart(tmp_path):
    assert not any(
        map(is_delta, ("pocket:true", "grade", "mine.py:reward", "/a/b/mine.py:reward", "package.mine:reward"))
    )
    assert all(map(is_delta, ("runs/reward-1", "/a/b", "C:/rewards", str(tmp_path))))
    with pytest.raises(EvaluationError, match="does not exist") as caught:
        (tmp_path / "mine.py").write_text("")
        look_for_rewards([RewardSourceSpec(path=f"{tmp_path}/mime.py:reward")])
    assert "mine.py:reward" in str(caught.value.fix)


def test_the_same_name_twice_gets_a_number_and_weights_add(base, tmp_path):
    sources = [RewardSourceSpec(path="pocket:true", weight=2.0), RewardSourceSpec(path="pocket:true", weight=-0.5)]
    rewards = rewards_of(sources, {}, model=no_model)
    story = asked("story of fox and bell: ", base)
    text = "anna the fox found a bell. there the fox helped a hare. anna was glad."
    found = rewards([Answered(story, [5], text), Answered(story, [5], "a")])
    assert found.parts == {"true": [4.0, -1.0], "true-2": [4.0, -1.0]}, "a point each for fox, bell, kindness, gladness"
    assert found.total == [6.0, -1.5]


def items(path: str, base: Base) -> list[Asked]:
    assert base.tokenizer is not None
    rules = {"chat_template": None, "max_length": 400, "max_tokens": 100}
    return list(read_prompts([Source(path)], base.tokenizer, **rules).asked)


@pytest.mark.parametrize("name", ["calc", "stack", "reverse"])
def test_items_of_the_pocket_world_are_graded_by_their_own_rules(base, name):
    found = items(f"pocket:{name}?items=5", base)
    right = [Answered(one, [5], str(one.known)) for one in found]
    assert graded(right) == [1.0] * 5
    assert graded([Answered(one, [5], "wrong") for one in found]) == [0.0] * 5
    if name == "calc":
        assert graded([Answered(found[0], [5], f"no steps. answer {str(found[0].known).split()[-1]}")]) == [1.0]


def test_rows_are_graded_by_their_answer_or_by_running_their_tests(base):
    exact = asked("2+3=", base, completion=" 5")
    final = asked("q", base, completion="2 and 3 #### 1,005")
    tested = asked("def add(a, b):\n", base, test="def check(f):\n    assert f(1, 2) == 3", entry_point="add")
    listed = asked("write add", base, tests=["assert add(1, 2) == 3", "assert add(0, 0) == 0"])
    program = "def add(a, b):\n    return a + b"
    given = [
        (exact, "5\n", 1.0),
        (exact, "15", 0.0),
        (final, "so #### 1005", 1.0),
        (final, "1005", 0.0),
        (tested, "    return a + b\n\ndef more", 1.0),
        (tested, "    return a - b", 0.0),
        (listed, program, 1.0),
        (listed, program.replace("+", "-"), 0.0),
    ]
    assert graded([Answered(one, [5], text) for one, text, _ in given]) == [expected for *_, expected in given]


def test_rewards_that_say_nothing_about_a_prompt_are_refused(base, tmp_path):
    file = write_rows(tmp_path / "bare.jsonl", [{"prompt": "ask "}])
    for path, data, what in (
        ("grade", "pocket:story?items=2", "needs a right answer"),
        ("grade", str(file), "needs a right answer"),
        ("pocket:true", "pocket:calc?items=2", "rewards stories"),
    ):
        with pytest.raises(DataError, match=what) as caught:
            refuse_ungradable(items(data, base), path)
        assert data in str(caught.value.where)
    refuse_ungradable(items("pocket:story?items=2", base), "pocket:true")
    refuse_ungradable(items("pocket:calc?items=2", base), "grade")


def test_true_rewards_are_those_of_the_pocket_world(base):
    story = items("pocket:story?items=1", base)[0]
    assert (
        true([Answered(story, [5], str(story.known).removesuffix("."))])[0]
        == true([Answered(story, [5], str(story.known))])[0] - 1.0
    ), "no full stop"
    assert isinstance(Rewards({})([]).total, list)
