"""Our engines as a model of lm-eval: its evaluator runs on them, with the delta that the model wears."""

import lm_eval
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from exam_world import make_exam_world
from loralab.base.model import load
from loralab.delta.several import Wardrobe
from loralab.errors import EvaluationError
from loralab.evals.harness import HarnessModel
from loralab.evals.taskfiles import quiet
from loralab.lab.deltas import read_delta
from loralab.lab.evaluate import evaluate


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_exam_world(tmp_path_factory.mktemp("exams"))


def results(lm, world) -> dict[str, dict[str, float]]:
    known = TaskManager(include_path=str(world / "tasks"), include_defaults=False)
    with quiet():
        found = lm_eval.simple_evaluate(
            model=lm, tasks=["pick", "say", "read"], task_manager=known, bootstrap_iters=0, log_samples=False
        )
    return found["results"]


def test_lm_evals_evaluator_finds_what_our_command_finds(world):
    base = load(str(world / "base"), device="cpu")
    lm = HarnessModel.of_base(base)
    wardrobe = Wardrobe(base.model, {"wide": read_delta(str(world / "wide"), base)})
    worn = HarnessModel(lm.engine, wardrobe.view("wide"))
    ours = evaluate(
        str(world / "base"), ["pick", "say", "read"], deltas=[str(world / "wide")], include=(str(world / "tasks"),)
    )
    for model, mine in (("base", lm), ("wide", worn)):
        theirs = results(mine, world)
        for task, metric in (("pick", "acc"), ("pick", "acc_norm"), ("say", "exact_match"), ("read", "bits_per_byte")):
            expected = theirs[task][f"{metric},none"]
            assert ours.find(model, f"{task}/{metric}").score.value == pytest.approx(expected, rel=1e-6)


def test_a_path_is_enough(world):
    lm = HarnessModel.of(str(world / "base"), device="cpu", dtype="float32")
    (first, second) = lm.loglikelihood([Instance("loglikelihood", {}, ("a b", end), 0) for end in (" c", " dog")])
    assert first[0] < 0 and type(first[1]) is bool and first != second
    (whole,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("a b c",), 0)])
    assert whole < 0
    (text,) = lm.generate_until([Instance("generate_until", {}, ("a b", {"until": ["\n"], "max_gen_toks": 3}), 0)])
    assert isinstance(text, str)
    assert lm.tokenizer_name.endswith("base") and "/" not in lm.tokenizer_name
    assert lm.engine.head.model.dtype is torch.float32


def test_chat_templates_come_from_the_tokenizer(world):
    lm = HarnessModel.of(str(world / "base"), device="cpu")
    messages = [{"role": "user", "content": "hi"}]
    with pytest.raises(EvaluationError, match="no chat template"):
        lm.apply_chat_template(messages)
    lm.engine.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    lm.engine.tokenizer.chat_template += "{% if add_generation_prompt %}it: {% endif %}"
    assert lm.apply_chat_template(messages) == "user: hi\nit: "
    assert lm.apply_chat_template([*messages, {"role": "it", "content": "yes"}], add_generation_prompt=False).endswith(
        "yes"
    )
    assert lm.chat_template() == lm.engine.tokenizer.chat_template
