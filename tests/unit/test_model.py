import json
import shutil

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from loralab.base import device as devices
from loralab.base.attention import NAME
from loralab.base.device import choose_device, choose_dtype, facts, peak_bytes
from loralab.base.model import backbone, fingerprint, head, load
from loralab.errors import ModelError
from tiny import DECODERS, tiny


def write_tokenizer(folder, words=101):
    vocabulary = {f"w{number}": number for number in range(words)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w0"))).save_pretrained(folder)


@pytest.fixture
def folder(tmp_path):
    """A model folder with weights and a tokenizer."""
    tiny("llama").save_pretrained(tmp_path / "tiny-llama")
    write_tokenizer(tmp_path / "tiny-llama")
    return tmp_path / "tiny-llama"


def change_settings(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_base_is_frozen_in_evaluation_mode_with_own_attention(folder):
    base = load(str(folder))
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    assert base.model.config._attn_implementation == NAME
    assert (base.path, base.revision, len(base.tokenizer)) == (str(folder), None, 101)
    expected = tiny("llama").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in base.model.state_dict().items())


@pytest.mark.parametrize("dtype, expected", [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_float16_file_is_never_loaded_as_float16(folder, dtype, expected):
    tiny("llama").half().save_pretrained(folder)
    assert {p.dtype for p in load(str(folder), device="cpu", dtype=dtype).model.parameters()} == {expected}


def test_the_fingerprint_is_of_the_weights_not_of_the_files(folder, tmp_path):
    mark = load(str(folder)).fingerprint
    model = tiny("llama")
    model.save_pretrained(tmp_path / "cut", max_shard_size="20KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 1
    assert load(str(tmp_path / "cut"), need_tokenizer=False).fingerprint == mark
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-6
    model.save_pretrained(tmp_path / "other")
    assert load(str(tmp_path / "other"), need_tokenizer=False).fingerprint != mark


@pytest.mark.parametrize(
    "other", [{"b": torch.ones(2, 3)}, {"a": torch.ones(3, 2)}, {"a": torch.ones(2, 3, dtype=torch.float64)}]
)
def test_the_fingerprint_sees_names_shapes_and_dtypes(other):
    assert fingerprint({"a": torch.ones(2, 3)}.items()) != fingerprint(other.items())


def test_random_weights_follow_the_seed(folder):
    (folder / "model.safetensors").unlink()

    def drawn(seed):
        torch.manual_seed(seed)
        return load(str(folder), random_init=True)

    first, same, other = drawn(1), drawn(1), drawn(2)
    assert first.fingerprint == same.fingerprint != other.fingerprint
    assert first.model.config._attn_implementation == NAME
    assert not any(parameter.requires_grad for parameter in first.model.parameters())


@pytest.mark.parametrize("family, attribute", [("llama", "attention_dropout"), ("gpt2", "attn_dropout.p")])
def test_attention_dropout_reaches_the_layers(tmp_path, family, attribute):
    tiny(family).save_pretrained(tmp_path)
    model = load(str(tmp_path), need_tokenizer=False, attention_dropout=0.3).model
    layers = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
    for part in attribute.split("."):
        layers = [getattr(layer, part) for layer in layers]
    assert layers == [0.3, 0.3]


def test_attention_dropout_is_refused_where_the_family_has_none(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    with pytest.raises(ModelError, match="no dropout on attention"):
        load(str(tmp_path), random_init=True, need_tokenizer=False, attention_dropout=0.1)


@pytest.mark.parametrize("family", DECODERS)
def test_backbone_and_head_are_the_two_parts_of_the_model(family):
    model = tiny(family, **({"final_logit_softcapping": None} if family == "gemma2" else {}))
    ids = torch.randint(3, 101, (2, 7))
    torch.testing.assert_close(head(model)(backbone(model)(ids).last_hidden_state), model(ids).logits)


def test_a_masked_language_model_is_loaded_as_one(tmp_path):
    tiny("bert").save_pretrained(tmp_path)
    assert type(load(str(tmp_path), need_tokenizer=False).model).__name__ == "BertForMaskedLM"


# What can be wrong


def remove(name):
    return lambda folder: (folder / name).unlink()


def cut_short(folder):
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def lose_a_shard(folder):
    remove("model.safetensors")(folder)
    tiny("llama").save_pretrained(folder, max_shard_size="20KB")
    sorted(folder.glob("*.safetensors"))[1].unlink()


def own_code(folder):
    change_settings(folder, model_type="never_seen", auto_map={"AutoModelForCausalLM": "code.Model"})


@pytest.mark.parametrize(
    "damage, what, fix",
    [
        (remove("config.json"), "no config.json", "name the folder"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON", "download"),
        (remove("model.safetensors"), "holds no weights", "download"),
        (only_pickles, "pickles", "save_pretrained"),
        (cut_short, "weights cannot be read", "damaged"),
        (lose_a_shard, "weight files are missing", "download"),
        (remove("tokenizer.json"), "no tokenizer", "tokenizer.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "tokenizer cannot be read", "again"),
        (lambda folder: write_tokenizer(folder, 102), "102 tokens", "belongs to the model"),
        (own_code, "its own Python code", "model.trust_remote_code=true"),
        (lambda folder: change_settings(folder, model_type="llamaa"), "'llamaa'", "did you mean 'llama'"),
        (lambda folder: change_settings(folder, num_hidden_layers=3), "would be random", "download"),
        (lambda folder: change_settings(folder, intermediate_size=52), "cannot load", "belong to its config.json"),
        (lambda folder: change_settings(folder, num_attention_heads="four"), "config.json cannot be used", "correct"),
    ],
)
def test_a_damaged_folder_is_named_with_what_to_do(folder, damage, what, fix):
    damage(folder)
    with pytest.raises(ModelError) as caught:
        load(str(folder))
    assert what in caught.value.what
    assert str(folder) in caught.value.where
    assert fix in caught.value.fix


def test_a_mistyped_folder_gets_a_suggestion(folder, monkeypatch):
    with pytest.raises(ModelError, match="no such folder") as caught:
        load(str(folder.parent / "tiny-lama"))
    assert str(folder) in caught.value.fix
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(ModelError, match="no such folder") as caught:
        load(f"{folder.parent.name}/tiny-lama")  # could be a hub id, but its first part is a folder here
    assert "tiny-llama" in caught.value.fix


def hub_error(kind):
    error = kind.__new__(kind)
    Exception.__init__(error, "no")
    return error


@pytest.mark.parametrize(
    "error, what, fix",
    [
        (LocalEntryNotFoundError("no"), "hub cannot be reached", "run the same command again"),
        (ConnectionError("reset by peer"), "interrupted: reset by peer", "run the same command again: it resumes"),
        (hub_error(RepositoryNotFoundError), "no such model on the hub", "model.path"),
        (hub_error(RevisionNotFoundError), "no such revision", "model.revision"),
        (hub_error(GatedRepoError), "gated", "hf auth login"),
    ],
)
def test_what_the_hub_answers_is_told(monkeypatch, error, what, fix):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelError) as caught:
        load("someone/some-model", revision="v2")
    assert what in caught.value.what
    assert caught.value.where == "someone/some-model at v2"
    assert fix in caught.value.fix


def test_a_hub_model_is_fetched_whole_and_named_by_its_commit(folder, monkeypatch):
    asked = {}

    def fetch(hub_id, **named):
        asked.update(named, hub_id=hub_id)
        target = folder.with_name("0123abc")
        shutil.copytree(folder, target)
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    base = load("someone/some-model")
    assert (base.path, base.revision) == ("someone/some-model", "0123abc")
    assert base.fingerprint == load(str(folder)).fingerprint
    assert asked["hub_id"] == "someone/some-model"
    assert not {"*.py", "*.bin"} & set(asked["allow_patterns"])


def test_offline_without_the_model_says_so():
    with pytest.raises(ModelError, match="hub cannot be reached"):
        load("someone/some-model")


def test_quantising_needs_cuda_and_bitsandbytes(folder, monkeypatch):
    with pytest.raises(ModelError, match="needs CUDA"):
        load(str(folder), device="cpu", quantize="4bit")
    with pytest.raises(ModelError, match="no quantisation '3bit'"):
        load(str(folder), device="cpu", quantize="3bit")
    monkeypatch.setattr("loralab.base.model.choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr("loralab.base.model.choose_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr("loralab.base.device.installed", lambda _: None)
    with pytest.raises(ModelError, match="needs bitsandbytes"):
        load(str(folder), quantize="4bit")


# The machine


@pytest.mark.parametrize("name", ["cdua", "cpu:x", "tpu", "cuda:999", "cpu:1", ""])
def test_an_unknown_or_absent_device_is_refused(name):
    with pytest.raises(ModelError) as caught:
        choose_device(name)
    assert caught.value.where == "model.device"


def test_auto_takes_the_accelerator_and_bfloat16_where_it_is_fast(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for has_bfloat16, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bfloat16: has)
        assert choose_dtype("auto", choose_device("auto")) is expected
    assert str(choose_device("cuda:1")) == "cuda:1"
    assert choose_dtype("auto", torch.device("cpu")) is torch.float32


def test_float16_is_refused_and_a_typo_gets_a_suggestion():
    with pytest.raises(ModelError, match="float16 cannot be trained"):
        choose_dtype("float16", torch.device("cpu"))
    with pytest.raises(ModelError) as caught:
        choose_dtype("bfloat", torch.device("cpu"))
    assert "bfloat16" in caught.value.fix


def test_facts_are_plain_and_name_what_decides():
    found = facts()
    assert json.loads(json.dumps(found)) == found
    assert found["threads"] == torch.get_num_threads()
    assert found["packages"]["torch"] == torch.__version__
    assert devices.installed("no-such-package") is None


def test_peak_memory_covers_what_was_held_and_remembers_it():
    held = torch.ones(20_000_000)
    peak = peak_bytes()
    assert held.nbytes < peak < facts()["memory_bytes"]
    del held
    assert peak_bytes() >= peak


def test_a_real_model_loads_and_writes_a_story(assets):
    base = load(str(assets / "models" / "stories260K"))
    ids = base.tokenizer("Once upon a time", return_tensors="pt")
    told = base.model.generate(**ids, max_new_tokens=12, do_sample=False)
    assert "there was a little girl named Lily" in base.tokenizer.decode(told[0])
