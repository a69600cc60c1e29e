"""The example tasks in lm-eval's format: what they make of rows, and on real rows the decisions of lm-eval's backend."""

from pathlib import Path

import pytest
from catalogue_world import PLAIN, made_engine, one
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from little_world import write_rows
from loralab.base.model import load
from loralab.evals.taskfiles import quiet
from loralab.evals.texts import TextEngine
from loralab.training.loss import LanguageHead

EXAMPLES = Path(__file__).parents[2] / "examples" / "tasks"

CASES = {
    "arc_adapters": (
        {
            "instruction": "Please choose the correct answer to the question: What barks?\n\nAnswer1: a cat Answer2: a dog "
            "Answer3: a log\n\nAnswer format: answer1/answer2/answer3",
            "answer": "answer2",
        },
        [("Question: What barks?\nAnswer:", end) for end in (" a cat", " a dog", " a log")],
        1,
    ),
    "boolq_adapters": (
        {
            "instruction": "Please answer the following question with true or false, question: do dogs bark?\n\n"
            "Answer format: true/false",
            "answer": "true",
        },
        [("Question: do dogs bark?\nAnswer:", end) for end in (" no", " yes")],
        1,
    ),
    "winogrande_mosaic": (
        {
            "context_options": ["The dog saw the cat so the dog", "The dog saw the cat so the cat"],
            "continuation": "ran.",
            "gold": 1,
        },
        [("The dog saw the cat so the dog", " ran."), ("The dog saw the cat so the cat", " ran.")],
        1,
    ),
    "piqa_mosaic": (
        {"query": "Question: To sit, ", "choices": ["stand.", "use a chair."], "gold": 1},
        [("Question: To sit, \nAnswer:", " stand."), ("Question: To sit, \nAnswer:", " use a chair.")],
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_rows_become_questions_with_choices(tmp_path, name):
    row, requests, right = CASES[name]
    file = write_rows(tmp_path / "rows.jsonl", [row])
    task = one(made_engine(), name, EXAMPLES, data={"test": str(file)})
    assert [instance.args for instance in task.instances] == requests
    for taken in range(len(requests)):
        scored = [(-1.0 if number == taken else -99.0, False) for number in range(len(requests))]
        (outcome,) = task.judged(scored)
        assert outcome.values["acc"] == float(taken == right)


REAL = {
    "hellaswag": "hellaswag/val_1000.jsonl",
    "arc_adapters": "arc_challenge/test.json",
    "winogrande_mosaic": "mosaic_winogrande/val.jsonl",
    "boolq_adapters": "boolq/test.json",
    "piqa_mosaic": "mosaic_piqa/val.jsonl",
}


def test_decisions_on_real_rows_are_those_of_lm_evals_backend(assets):
    folder = str(assets / "models/stories260K")
    base = load(folder, dtype="float32", device="cpu")
    engine = TextEngine(LanguageHead(base.model), base.tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    with quiet():
        peer = HFLM(pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder), batch_size=8, device="cpu")
    for name, file in REAL.items():
        task = one(engine, name, EXAMPLES, limit=15, data={"test": str(assets / "data" / file)})
        (scored,) = engine.log_likelihoods([instance.args for instance in task.instances], PLAIN)
        with quiet():
            theirs = peer.loglikelihood(task.instances, disable_tqdm=True)
        for mine, other in zip(scored, theirs, strict=True):
            assert mine.log_likelihood == pytest.approx(other[0], abs=1e-4) and mine.is_greedy == other[1]
        (outcomes,) = task.outcomes(PLAIN)
        assert outcomes == task.judged(theirs)
