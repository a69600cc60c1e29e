"""What classifiers and reward models forget: general text read through the pretrained head of the same files."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_scored_runs import judged, make_encoder
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer, BertModel

import loralab as loralab_api
from little_world import loralab, make_base, rows, same_bits, stop_at, write_rows
from loralab.base.model import load, with_words
from loralab.delta.store import load_lowrank
from loralab.errors import Interrupted, LoralabError
from loralab.lab.experiment import train
from loralab.lab.general import PREDICTED
from loralab.lab.index import index
from loralab.lab.result import Result
from loralab.run.folder import read_lines
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec
from tiny import tiny

TEXTS = [f"{row['completion']} is {i}." for i, row in enumerate(rows(6, seed=4))]
"""Short enough that an encoder predicts every token of some, and not of others."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("general")
    make_base(folder / "llama")
    make_base(folder / "tied", tie_word_embeddings=True)
    for family in ("bert", "roberta"):
        make_encoder(folder / family, family)
        tokenizer = AutoTokenizer.from_pretrained(folder / family)
        tokenizer.mask_token = "<unk>"
        tokenizer.save_pretrained(folder / family)
    for kind in ("pairs", "classify"):
        write_rows(folder / f"{kind}.jsonl", judged(kind, 64, 1))
        write_rows(folder / f"{kind}-held.jsonl", judged(kind, 16, 2))
    write_rows(folder / "general.jsonl", [{"text": text} for text in TEXTS])
    return folder


def spec(world: Path, base: str, kind: str = "classify", method: str = "lora", **keys: Any) -> RunSpec:
    found: dict[str, Any] = {
        "model.path": str(world / base),
        "model.device": "cpu",
        "model.dtype": "float32",
        "data.train": str(world / f"{kind}.jsonl"),
        "data.validation": str(world / f"{kind}-held.jsonl"),
        "data.general": str(world / "general.jsonl"),
        "data.max_length": 48,
        "data.packing": False,
        "objective": {"name": "reward" if kind == "pairs" else "classify"},
        "method.name": method,
        "optimizer.learning_rate": 3e-3 if method == "full" else 0.02,
        "train.steps": 8,
        "train.batch_size": 8,
        "probes.every": 4,
        "checkpoints.every": 8,
        "checkpoints.keep_best": False,
    }
    found |= {} if method == "full" else {"method.rank": 4, "method.targets": "all-linear"}
    found |= {name.replace("__", "."): value for name, value in keys.items()}
    recipe = world / "empty.yaml"
    recipe.write_text("name: general\n", encoding="utf-8")
    return read(recipe, [f"{name}={json.dumps(value)}" for name, value in found.items()])


def tuned(auto: Any, world: Path, base: str, run: Result, method: str) -> nn.Module:
    """The language model of the files with the run's delta on its backbone, put there by hand."""
    model = auto.from_pretrained(world / base, dtype=torch.float32).eval()
    named = dict(model.named_parameters())
    with torch.no_grad():
        if method == "full":
            for name, value in auto_scores(run).items():
                if name in named and name.startswith(f"{model.base_model_prefix}."):
                    named[name].copy_(value)
        else:
            delta = load_lowrank(run.folder.delta)
            for name, pair in delta.items():
                if f"{name}.weight" in named:
                    named[f"{name}.weight"] += pair.scale * pair.B @ pair.A
    return model


def auto_scores(run: Result) -> dict[str, torch.Tensor]:
    return load_file(run.folder.delta / "model.safetensors")


@torch.no_grad()
def next_token_loss(model: nn.Module, folder: Path) -> float:
    """Mean nats per token of the texts, each begun as the tokenizer begins texts, and ended."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    total, count = 0.0, 0
    for text in TEXTS:
        tokens = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1].double()
        total += float(F.cross_entropy(logits, torch.tensor(tokens[1:]), reduction="sum"))
        count += len(tokens) - 1
    return total / count


@torch.no_grad()
def masked_loss(model: nn.Module, folder: Path) -> float:
    """Mean nats per token over every token, each masked alone in a row without padding."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for text in TEXTS:
        tokens = tokenizer(text)["input_ids"]
        for place in range(1, len(tokens) - 1):
            row = torch.tensor([tokens])
            row[0, place] = tokenizer.mask_token_id
            found.append(float(-model(input_ids=row).logits[0, place].double().log_softmax(-1)[tokens[place]]))
    return float(np.mean(found))


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("base, kind", [("llama", "classify"), ("tied", "pairs")])
def test_a_decoder_is_read_as_the_language_model_that_it_was(world, tmp_path, base, kind, method):
    run = train(spec(world, base, kind, method), tmp_path)
    pristine = AutoModelForCausalLM.from_pretrained(world / base, dtype=torch.float32).eval()
    before = next_token_loss(pristine, world / base)
    after = next_token_loss(tuned(AutoModelForCausalLM, world, base, run, method), world / base)
    assert run.before["general/loss"].value == pytest.approx(before, abs=1e-5)
    assert run.after["general/loss"].value == pytest.approx(after, abs=1e-5)
    assert run.after["general/loss_rise"].value == pytest.approx(after - before, abs=1e-5)
    assert abs(after - before) > 1e-3, "it has moved"
    assert run.after["drift/kl"].value > 0
    assert run.after["target/accuracy"].n == 16


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("base", ["bert", "roberta"])
def test_an_encoder_predicts_tokens_that_are_masked_one_at_a_time(world, tmp_path, base, method, monkeypatch):
    monkeypatch.setattr("loralab.lab.general.PREDICTED", 100)  # every token, as by hand
    run = train(spec(world, base, method=method), tmp_path)
    pristine = AutoModelForMaskedLM.from_pretrained(world / base, dtype=torch.float32).eval()
    before = masked_loss(pristine, world / base)
    after = masked_loss(tuned(AutoModelForMaskedLM, world, base, run, method), world / base)
    assert run.before["general/pseudo_loss"].value == pytest.approx(before, abs=1e-5)
    assert run.after["general/pseudo_loss"].value == pytest.approx(after, abs=1e-5)
    assert run.after["general/pseudo_loss_rise"].value == pytest.approx(after - before, abs=1e-5)
    assert abs(after - before) > 1e-3, "it has moved"


def test_what_an_encoder_computes_stays_within_the_budget(world, tmp_path):
    run = train(spec(world, "bert", probes__tokens=300, train__steps=1), tmp_path)
    lengths = [len(text) + 2 for text in TEXTS]
    each = 300 // sum(lengths)
    assert 1 < each < PREDICTED, "there are few texts, so fewer tokens of each are predicted"
    assert run.after["general/pseudo_loss"].n == len(TEXTS)
    tight = train(spec(world, "bert", probes__tokens=2 * max(lengths), train__steps=1), tmp_path)
    assert tight.after["general/pseudo_loss"].n in (2, 3)


def test_being_watched_changes_nothing_of_training(world, tmp_path):
    """Dropout stays on after an evaluation: the shared backbone is left in training mode."""
    keys = {"method__dropout": 0.3, "probes__spectra": False, "probes__every": 2, "train__steps": 5}
    for base in ("llama", "bert"):
        watched = train(spec(world, base, **keys), tmp_path / "watched")
        alone = train(spec(world, base, **keys, data__general=None), tmp_path / "alone")
        mine, theirs = (load_lowrank(run.folder.delta) for run in (watched, alone))
        assert all(torch.equal(mine[name].B, theirs[name].B) and mine[name].B.any() for name in theirs)


def test_a_run_that_was_stopped_ends_in_the_same_bits(world, tmp_path):
    keys = {"method__dropout": 0.3, "probes__spectra": False, "probes__every": 2, "checkpoints__every": 2}
    chosen = spec(world, "bert", **keys)
    whole = train(chosen, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train(chosen, tmp_path / "stopped", display=stop_at(3))
    again = train(chosen, tmp_path / "stopped")
    same_bits(again.folder.path, whole.folder.path)


def test_a_head_that_was_parted_from_its_embeddings_stays_so(world, tmp_path):
    shutil.copytree(world / "tied", tmp_path / "parted")
    model = AutoModelForCausalLM.from_pretrained(world / "tied", dtype=torch.float32)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].flip(0) * 3
    save_file(weights, tmp_path / "parted" / "model.safetensors", metadata={"format": "pt"})
    pristine = AutoModelForCausalLM.from_pretrained(tmp_path / "parted", dtype=torch.float32).eval()
    language = with_words(load(str(tmp_path / "parted"), device="cpu", dtype="float32", outputs=1))
    tokens = torch.arange(5, 15)[None]
    with torch.no_grad():
        found, expected = (one(input_ids=tokens).logits for one in (language, pristine))
        other = model.eval()(input_ids=tokens).logits
    torch.testing.assert_close(found, expected)
    assert (expected - other).abs().max() > 0.1


@pytest.mark.parametrize("named", [None, ["BertForPreTraining"]])
def test_an_encoder_is_known_by_its_family_where_its_files_name_no_task(world, tmp_path, named):
    shutil.copytree(world / "bert", tmp_path / "bert")
    facts = json.loads((tmp_path / "bert" / "config.json").read_text())
    facts.pop("architectures")
    facts |= {} if named is None else {"architectures": named}
    (tmp_path / "bert" / "config.json").write_text(json.dumps(facts))
    language = with_words(load(str(tmp_path / "bert"), device="cpu", dtype="float32", outputs=1))
    assert type(language).__name__ == "BertForMaskedLM"


def test_the_language_model_holds_its_head_and_nothing_else(world):
    for name, tied in (("llama", False), ("tied", True), ("bert", True)):
        base = load(str(world / name), device="cpu", dtype="float32", outputs=2)
        mine = {p.data_ptr() for p in base.model.parameters()}
        language = with_words(base)
        more = {name for name, p in language.named_parameters() if p.data_ptr() not in mine}
        table = language.get_input_embeddings().weight.shape
        assert not any(name.startswith(f"{language.base_model_prefix}.") for name in more)
        wide = [name for name in more if language.get_parameter(name).shape == table]
        assert bool(wide) is not tied, name


def test_classifiers_that_answer_with_words_are_read_through_the_same_head(world, tmp_path):
    keys = {"objective": {"name": "classify", "words": ["a", "b"]}}
    run = train(spec(world, "llama", **keys), tmp_path)
    pristine = AutoModelForCausalLM.from_pretrained(world / "llama", dtype=torch.float32).eval()
    assert run.before["general/loss"].value == pytest.approx(next_token_loss(pristine, world / "llama"), abs=1e-5)


def test_forgetting_stands_in_the_index_and_on_the_page(world, tmp_path):
    run = train(spec(world, "bert"), tmp_path)
    (row,) = index(tmp_path).to_dict("records")
    assert row["general_loss_base"] == run.before["general/pseudo_loss"].value
    assert row["general_loss_end"] == run.after["general/pseudo_loss"].value
    page = Path(loralab_api.write_report(run.folder.path)).read_text(encoding="utf-8")
    assert "masked one at a time" in page
    steps = [line["step"] for line in read_lines(run.folder.scores) if line["name"] == "general/pseudo_loss_rise"]
    assert steps == [0, 4, 8]
    environment = json.loads(run.folder.environment.read_text(encoding="utf-8"))
    assert len(environment["inputs"]["data"]["general"]) == 64


def test_bases_without_what_it_takes_are_refused(world, tmp_path, capsys):
    BertModel(tiny("bert", type_vocab_size=2).config).save_pretrained(tmp_path / "headless")
    shutil.copytree(world / "bert", tmp_path / "maskless")
    for file in (world / "bert").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "headless")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "maskless")
    tokenizer.mask_token = None
    tokenizer.save_pretrained(tmp_path / "maskless")
    write_rows(tmp_path / "empty.jsonl", [{"text": ""}, {"text": " "}])
    with pytest.raises(LoralabError, match="nothing to learn") as caught:
        train(spec(world, "bert", data__general=str(tmp_path / "empty.jsonl")), tmp_path / "runs")
    for base, message in (("headless", "no head that predicts words"), ("maskless", "no mask token")):
        with pytest.raises(LoralabError, match=message) as caught:
            train(spec(world, base, model__path=str(tmp_path / base)), tmp_path / "runs")
        assert caught.value.exit_code == 2 and caught.value.fix
    words = [f"{key}={value}" for key, value in (("data.train", world / "pairs.jsonl"), ("model.random_init", True))]
    more = [
        f"data.general={world / 'general.jsonl'}",
        f"model.path={world / 'llama'}",
        "data.max_length=48",
        "train.steps=1",
    ]
    assert loralab("train", "reward-full", *words, *more, "--runs", tmp_path / "runs") == 2
    assert "no pretrained head at hand" in " ".join(capsys.readouterr().err.split())
