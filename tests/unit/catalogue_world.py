"""Tasks in lm-eval's format on disk, the models that answer them, and lm-eval's own evaluator beside ours."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tiny_tokenizers import byte_tokenizer

from little_world import write_rows
from loralab.base.attention import NAME
from loralab.evals.catalogue import CatalogueTask, load_tasks
from loralab.evals.taskfiles import Wanted, quiet
from loralab.evals.texts import TextEngine
from loralab.training.loss import LanguageHead
from tiny import tiny

PLAIN = [nullcontext]
WORDS = ["dog", "cat", "sun", "day", "red", "hat", "box", "pig", "log", "net"]

CHOICE = """
task: own_choice
tag: own_tag
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: !function forms.question
doc_to_choice: "{{{{choices}}}}"
doc_to_target: right
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 2.5}}
"""
SCORES = """
task: own_scores
tag: own_tag
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/yesno.jsonl}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "Is {{{{word}}}} red? "
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: f1}}
  - {{metric: mcc}}
  - {{metric: acc}}
"""
WRITTEN = """
task: own_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}\\nAnswer:"
doc_to_target: answer
generation_kwargs: {{until: ["zzz"], do_sample: false, max_gen_toks: 24}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true, ignore_case: true}}
filter_list:
  - name: strict
    filter: [{{function: regex, regex_pattern: "^(.)"}}, {{function: take_first}}]
  - name: flexible
    filter: [{{function: regex, regex_pattern: "([a-z])", group_select: -1}}, {{function: take_first}}]
"""
ROLLING = """
task: own_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: text
metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]
"""
LAST_WORD = """
task: own_last_word
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/texts.jsonl}}}}
output_type: loglikelihood
test_split: test
doc_to_text: "{{{{text.rsplit(' ', 1)[0]}}}}"
doc_to_target: "{{{{' ' + text.rsplit(' ', 1)[1]}}}}"
metric_list:
  - {{metric: perplexity, aggregation: perplexity, higher_is_better: false}}
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
SAMPLED = """
task: own_sampled
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
repeats: 5
generation_kwargs: {{until: ["zzz"], do_sample: true, temperature: 0.9, max_gen_toks: 6}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
filter_list:
  - name: most
    filter: [{{function: majority_vote}}, {{function: take_first}}]
"""
UNSAFE = """
task: own_unsafe
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/sums.jsonl}}}}
unsafe_code: true
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
generation_kwargs: {{until: ["zzz"], max_gen_toks: 4}}
metric_list: [{{metric: exact_match}}]
"""
FORMS = """
def question(doc):
    return f"Which one is {doc['asked']}?"
"""
TASKS = {"own_choice": CHOICE, "own_scores": SCORES, "own_written": WRITTEN, "own_rolling": ROLLING}
TASKS |= {"own_last_word": LAST_WORD, "own_sampled": SAMPLED, "own_unsafe": UNSAFE}


def choice_rows(count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        choices = rng.choice(WORDS, 2 + number % 3, replace=False).tolist()
        rows.append({"asked": f"{choices[0]} {number}", "choices": choices, "right": number % len(choices)})
    return rows


def make_tasks(made: Path) -> Path:
    """Write `TASKS`, a group of two of them, and their rows."""
    for name, text in TASKS.items():
        (made / f"{name}.yaml").write_text(text.format(folder=made), encoding="utf-8")
    (made / "own_group.yaml").write_text("group: own_group\ntask: [own_choice, own_scores]\n", encoding="utf-8")
    (made / "forms.py").write_text(FORMS, encoding="utf-8")
    write_rows(made / "train.jsonl", choice_rows(9, seed=1))
    write_rows(made / "test.jsonl", choice_rows(15, seed=2))
    yesno = [(w, np.random.default_rng(i).choice(WORDS, 2, replace=False).tolist()) for i, w in enumerate(WORDS * 2)]
    write_rows(
        made / "yesno.jsonl", [{"word": w, "choices": pair, "label": i % 2} for i, (w, pair) in enumerate(yesno)]
    )
    model = made_engine()
    prompts = [(f"What is {word}?\nAnswer:", {"until": ["zzz"], "max_gen_toks": 24}) for word in WORDS]
    (written,) = model.written(prompts, PLAIN)
    begins = [text[:1] if i % 2 else "0" for i, text in enumerate(written)]  # half of them the model has right
    write_rows(
        made / "sums.jsonl", [{"question": f"What is {w}?", "answer": a} for w, a in zip(WORDS, begins, strict=True)]
    )
    texts = [" ".join(np.random.default_rng(i).choice(WORDS, 4 + 9 * i)) for i in range(7)]
    write_rows(made / "texts.jsonl", [{"text": text} for text in texts])
    return made


def made_model():
    return tiny("llama", vocab_size=300, max_position_embeddings=512)


def made_engine(**tokenizer: Any) -> TextEngine:
    model = made_model()
    model.set_attn_implementation(NAME)
    return TextEngine(LanguageHead(model), byte_tokenizer(**tokenizer))


def made_peer() -> HFLM:
    with quiet():
        return HFLM(pretrained=made_model(), tokenizer=byte_tokenizer(), batch_size=4, device="cpu")


def one(engine: TextEngine, name: str, folder: Path | None = None, **changes: Any) -> CatalogueTask:
    include = () if folder is None else (str(folder),)
    (task,) = load_tasks([Wanted(name, include=include, **changes)], engine)
    return task


def harness(lm: Any, folder: Path, name: str, bootstrap_iters: int = 0, **chosen: Any) -> dict[str, Any]:
    """Run lm-eval's own evaluator."""
    known = TaskManager(include_path=str(folder), include_defaults=False)
    with quiet():
        return lm_eval.simple_evaluate(
            model=lm, tasks=[name], task_manager=known, bootstrap_iters=bootstrap_iters, **chosen
        )
