"""Weights come out of files as the loaded model has them, one at a time, whatever the files call them."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loralab.base import targets
from loralab.base.model import load
from loralab.base.targets import weight_of
from loralab.base.weights import loaded_weights, open_weights, same_name
from loralab.errors import ModelError
from tiny import tiny

FILE = "model.safetensors"
MATRICES = (nn.Linear, nn.Embedding, transformers.pytorch_utils.Conv1D)


@pytest.fixture(autouse=True)
def _silence() -> None:
    transformers.utils.logging.disable_progress_bar()


def saved(model: transformers.PreTrainedModel, folder: Path, **chosen: str) -> str:
    model.save_pretrained(folder, **chosen)
    return str(folder)


def edit(path: str, **changes: object) -> None:
    file = Path(path, "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(path: str, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, Path(path, FILE), metadata={"format": "pt"})


def as_loaded(model: nn.Module) -> dict[str, Tensor]:
    """Give every weight as (out, in), by what each kind of layer computes: the product with the unit vectors."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding):
            found[name] = module.weight.detach().clone().t()
        elif isinstance(module, MATRICES):
            inputs = module.weight.shape[0 if isinstance(module, transformers.pytorch_utils.Conv1D) else 1]
            bias = 0 if module.bias is None else module.bias.detach()
            found[name] = (module(torch.eye(inputs)) - bias).t().detach()
    return found


KINDS = [
    *(("llama", None), ("gpt2", None), ("gemma2", None), ("gpt_neox", None), ("bert", None), ("roberta", None)),
    *(
        ("bert", "Model"),
        ("bert", "ForSequenceClassification"),
        ("llama", "Model"),
        ("gpt2", "ForSequenceClassification"),
    ),
]


@pytest.mark.parametrize(("family", "task"), KINDS)
def test_files_give_what_the_model_has(family: str, task: str | None, tmp_path: Path) -> None:
    """Also tied tables (gemma2, gpt2), renamed tensors (gpt_neox's head), and encoders without a head."""
    model = tiny(family, task=task)
    weights = open_weights(saved(model, tmp_path))
    expected = as_loaded(model)
    assert weights.layers() == {name: tuple(matrix.shape) for name, matrix in expected.items()}
    for name, matrix in expected.items():
        torch.testing.assert_close(weights.weight(name), matrix, rtol=1e-5, atol=1e-5)
        assert weights.weight(name).shape == matrix.shape
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(weights.parameter(name), parameter), name
    assert weights.linears() == list(targets.linears(model)) and weights.notes == []


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_in_memory_gives_the_same(family: str, tmp_path: Path) -> None:
    model = tiny(family)
    files, memory = open_weights(saved(model, tmp_path)), loaded_weights("memory", model, "mark")
    assert memory.layers() == files.layers() and memory.linears() == files.linears()
    assert all(torch.equal(memory.weight(name), files.weight(name)) for name in files.layers())
    assert memory.fingerprint() == "mark" and not memory.weight(files.linears()[0]).requires_grad
    for ask in (memory.weight, memory.parameter, files.weight, files.parameter):
        with pytest.raises(ModelError, match="no such") as error:
            ask("nothing.here")
        assert "nothing.here" in str(error.value.where)


def test_weights_stay_as_they_are_stored_and_are_found_in_shards(tmp_path: Path) -> None:
    model = tiny("llama").bfloat16()
    path = saved(model, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    weights = open_weights(path)
    for name in weights.layers():
        found = weights.weight(name)
        assert found.dtype is torch.bfloat16 and torch.equal(found, weight_of(model.get_submodule(name)))


@pytest.mark.parametrize("sharded", [True, False])
def test_the_fingerprint_is_that_of_the_loaded_base(sharded: bool, tmp_path: Path) -> None:
    path = saved(tiny("gemma2"), tmp_path, max_shard_size="20KB" if sharded else "1GB")
    assert open_weights(path).fingerprint() == load(path, need_tokenizer=False, device="cpu").fingerprint


def test_the_pocket_base_is_a_base_too() -> None:
    weights = open_weights("pocket")
    assert weights.fingerprint() == load("pocket", device="cpu").fingerprint
    assert weights.weight("model.layers.4.mlp.down_proj").shape == (128, 320)


def test_files_may_lack_or_bear_a_prefix(tmp_path: Path) -> None:
    bare = tiny("bert", task="Model")
    path = saved(bare, tmp_path)
    tensors = load_file(tmp_path / FILE)
    edit(path, architectures=["BertForMaskedLM"])
    edit_tensors(path, {f"encoder_model.{name}": tensor for name, tensor in tensors.items()})
    for renamed in (tensors, {f"wrapped.bert.{name}": tensor for name, tensor in tensors.items()}):
        edit_tensors(path, renamed)
        weights = open_weights(path)
        name = "encoder.layer.1.attention.self.query"
        assert torch.equal(weights.weight(f"bert.{name}"), bare.get_submodule(name).weight)
        with pytest.raises(ModelError, match="lack"):
            weights.weight("cls.predictions.transform.dense")


def test_same_name_takes_what_can_be_only_one() -> None:
    known = ["encoder.0.query", "decoder.0.query", "head"]
    assert same_name("decoder.0.query", known) == "decoder.0.query"
    assert same_name("bert.encoder.0.query", known) == "encoder.0.query"
    assert same_name("0.query", known) is None, "either could be meant"
    assert same_name("ahead", known) is None, "whole parts of a name only"
    assert same_name("model.head", set(known)) == "head"


def test_a_missing_tensor_is_named_and_the_others_are_read(tmp_path: Path) -> None:
    model = tiny("llama")
    path = saved(model, tmp_path)
    tensors = load_file(tmp_path / FILE)
    lost = "model.layers.1.mlp.up_proj"
    del tensors[f"{lost}.weight"]
    edit_tensors(path, tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    weights = open_weights(path)
    with pytest.raises(ModelError, match="lack") as error:
        weights.weight(lost)
    assert lost in str(error.value.where)
    assert torch.equal(weights.weight("model.layers.0.mlp.up_proj"), model.model.layers[0].mlp.up_proj.weight)
    assert weights.notes == [], "a few stray numbers are no reason to load the model"


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    path = saved(tiny("llama"), tmp_path)
    tensors = load_file(tmp_path / FILE)
    name = "model.layers.0.self_attn.q_proj.weight"
    edit_tensors(path, tensors | {name: tensors[name][:, :5].clone()})
    with pytest.raises(ModelError, match=r"\(32, 5\).*\(32, 32\)") as error:
        open_weights(path).weight(name.removesuffix(".weight"))
    assert name in str(error.value.where)


@pytest.mark.parametrize("task", ["ForMaskedLM", "Model"])
def test_what_is_fused_in_the_files_is_read_from_the_model(task: str, tmp_path: Path) -> None:
    """Transformers writes this family's three projections as one tensor, and splits them on loading."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "head_dim": 8,
    }
    settings = transformers.NomicBertConfig(vocab_size=101, num_key_value_heads=4, pad_token_id=0, **sizes)
    model = getattr(transformers, f"NomicBert{task}")(settings).eval()
    weights = open_weights(saved(model, tmp_path))
    assert not any("k_proj" in name for name in load_file(tmp_path / FILE))
    prefix = "nomic_bert." if task == "ForMaskedLM" else ""
    weights.weight(f"{prefix}layers.0.mlp.down_proj")
    assert weights.notes == []
    for name, matrix in as_loaded(model).items():
        torch.testing.assert_close(weights.weight(name), matrix, rtol=1e-5, atol=1e-5)
    assert [note for note in weights.notes if "loaded whole" in note] == weights.notes != []


def test_quantised_files_are_dequantised_and_said_so(tmp_path: Path) -> None:
    path = saved(tiny("llama"), tmp_path)
    tensors, expected = load_file(tmp_path / FILE), {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().max() / 448
        expected[name] = (tensors[name] / scale).to(torch.float8_e4m3fn).float() * scale
        tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    edit_tensors(path, tensors)
    with pytest.raises(ModelError, match="quantised"):
        open_weights(path).weight("model.layers.0.mlp.up_proj")  # config.json does not say how
    edit(path, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    weights = open_weights(path)
    for name, matrix in expected.items():
        torch.testing.assert_close(weights.weight(name.removesuffix(".weight")).float(), matrix)
    assert len(weights.notes) == 1 and "dequantised" in weights.notes[0] and "fp8" in weights.notes[0]


def test_a_quantisation_without_its_package_is_an_error_in_words(tmp_path: Path) -> None:
    path = saved(tiny("llama"), tmp_path)
    edit(path, quantization_config={"quant_method": "gptq", "bits": 4})
    weights = open_weights(path)
    for _ in range(2):
        with pytest.raises(ModelError, match="optimum") as error:
            weights.weight("model.layers.0.mlp.up_proj")
        assert "unquantised" in str(error.value.fix)


class EightBits(nn.Linear):
    """Looks as bitsandbytes' 8-bit linear does."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        largest = weight.abs().amax(1)
        self.weight = nn.Parameter((weight / largest[:, None] * 127).round().to(torch.int8), requires_grad=False)
        self.weight.SCB, self.state = largest, None


def test_a_quantised_model_in_memory_is_dequantised_and_said_so() -> None:
    model, weight = tiny("llama"), torch.randn(48, 32)
    model.model.layers[0].mlp.up_proj = EightBits(weight)
    weights = loaded_weights("memory", model, None)
    assert weights.notes == ["dequantised from 8 bits"]
    found = weights.weight("model.layers.0.mlp.up_proj")
    assert found.is_floating_point() and (found - weight).abs().max() <= weight.abs().max() / 127
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(torch.zeros(48, 32, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="quantised"):
        weights.weight("model.layers.0.mlp.up_proj")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "llamma"}, "no model family 'llamma'"),
        ({"hidden_size": 33}, "config.json cannot be used"),
        ({"architectures": ["BertModel"]}, "cannot make this model"),
    ],
)
def test_a_folder_that_is_no_model_is_an_error(change: dict[str, object], said: str, tmp_path: Path) -> None:
    path = saved(tiny("llama"), tmp_path)
    edit(path, **change)
    with pytest.raises(ModelError, match=said):
        open_weights(path)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = saved(tiny("llama"), tmp_path)
    weights = open_weights(path)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes()[:-100])
    for read in (lambda: open_weights(path), lambda: weights.weight("model.layers.0.mlp.up_proj")):
        with pytest.raises(ModelError, match="cannot be read") as error:
            read()
        assert FILE in str(error.value.where)
    with pytest.raises(ModelError, match="no such folder"):
        open_weights(str(tmp_path / "nowhere"))


def resident() -> int:
    """Give the bytes of this process that lie in memory, files that it maps included."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc to measure memory")
def test_one_matrix_is_in_memory_at_a_time(tmp_path: Path) -> None:
    """As many bytes as are read in all do not stay: a file that is kept open holds every page that was read from it."""
    model = tiny("llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=4, num_attention_heads=8)
    weights = open_weights(saved(model, tmp_path))
    one, whole = 512 * 4096 * 4, sum(p.nbytes for p in model.parameters())
    del model
    before, peak = resident(), 0
    for name in weights.layers():
        float(weights.weight(name).sum())
        peak = max(peak, resident() - before)
    weights.fingerprint()
    assert whole > 10 * one
    assert max(peak, resident() - before) < 3 * one
