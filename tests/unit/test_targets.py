import pytest
import torch
from torch import nn

from loralab.base.targets import in_out, linears, match, match_parameters, pattern_matches, weight_of
from loralab.errors import TargetError
from tiny import tiny

# Written from the papers' and model cards' drawings of a block, not from the code: attention, then mlp.
BLOCKS = {
    "llama": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "qwen3": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "gemma2": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "mistral": ("q_proj k_proj v_proj o_proj", "gate_proj up_proj down_proj"),
    "phi3": ("qkv_proj o_proj", "gate_up_proj down_proj"),
    "gpt2": ("attn.c_attn attn.c_proj", "mlp.c_fc mlp.c_proj"),
    "gpt_neox": ("query_key_value attention.dense", "dense_h_to_4h dense_4h_to_h"),
    "opt": ("q_proj k_proj v_proj out_proj", "fc1 fc2"),
    "bert": ("self.query self.key self.value attention.output.dense", "intermediate.dense 1.output.dense"),
    "roberta": ("self.query self.key self.value attention.output.dense", "intermediate.dense 1.output.dense"),
}


def of_block_1(names):
    return [name for name in names if ".1." in name]


@pytest.mark.parametrize("family", BLOCKS)
def test_kinds_follow_from_where_a_layer_lies(family):
    model = tiny(family)
    attention, mlp = (names.split() for names in BLOCKS[family])
    for kind, endings in (("attention", attention), ("mlp", mlp), ("all-linear", attention + mlp)):
        found = match(model, [kind])
        inside = of_block_1(found)
        assert len(found) == 2 * len(inside) == 2 * len(endings)
        assert all(any(name.endswith("." + ending) for name in inside) for ending in endings), (kind, inside)


@pytest.mark.parametrize("family", BLOCKS)
def test_heads_and_embeddings_are_no_linears(family):
    model = tiny(family)
    assert set(match(model, ["all-linear"])) == set(linears(model))
    assert all(101 not in in_out(layer) for layer in linears(model).values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "roberta"])
def test_classification_heads_are_no_linears(family):
    model = tiny(family, task="ForSequenceClassification", num_labels=7)
    assert any(name.startswith(("score", "classifier")) for name, _ in model.named_modules())
    assert not any(name.startswith(("score", "classifier")) for name in linears(model))


def test_names_come_in_the_models_order_and_once():
    model = tiny("llama")
    found = match(model, ["v_proj", "attention", "q_proj"])
    order = [name for name, _ in model.named_modules()]
    assert found == sorted(set(found), key=order.index)
    assert found[0] == "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern, count",
    [
        ("q_proj", 2),
        ("self_attn.q_proj", 2),
        ("model.layers.1.self_attn.q_proj", 1),
        ("*.layers.[1-9].*_proj", 7),
        ("*q_proj", 2),
        (r".*layers\.0\.(mlp|self_attn)\..*", 7),
        (r"re:.*\.(up|down)_proj", 4),
        ("embed_tokens", 1),
        ("lm_head", 1),
    ],
)
def test_patterns(pattern, count):
    assert len(match(tiny("llama"), [pattern])) == count


def test_embeddings_and_heads_come_only_by_name():
    model = tiny("llama")
    assert match(model, ["*"]) == match(model, ["re:.*"]) == match(model, ["all-linear"])
    assert match(model, ["all-linear", "embed_tokens"])[0] == "model.embed_tokens"


def test_parts_of_a_word_do_not_match():
    assert not pattern_matches("proj", "layers.0.q_proj")
    assert pattern_matches("0.q_proj", "layers.0.q_proj")
    assert not pattern_matches("0.q_proj", "layers.10.q_proj")
    assert pattern_matches("*proj", "layers.0.q_proj")
    assert not pattern_matches("[q", "layers.0.q_proj")


def test_exclude_takes_out_again():
    model = tiny("llama")
    assert match(model, ["attention"], ["k_proj", "*.layers.0.*"]) == [
        f"model.layers.1.self_attn.{name}_proj" for name in "qvo"
    ]


@pytest.mark.parametrize(
    "targets, exclude, what, fix",
    [
        (["q_prj"], [], "'q_prj'", "did you mean 'q_proj'"),
        (["q_proj", "attenttion"], [], "'attenttion'", "did you mean 'attention'"),
        (["zzz"], [], "'zzz'", "known: all-linear"),
        (["q_proj"], ["k_prooj"], "'k_prooj'", "did you mean 'k_proj'"),
        (["q_proj"], ["attention"], "no layer is left", "exclude less"),
        (["re:(q_proj"], [], "not a regular expression", "correct"),
    ],
)
def test_a_pattern_without_a_layer_is_an_error(targets, exclude, what, fix):
    with pytest.raises(TargetError, match=r".") as caught:
        match(tiny("llama"), targets, exclude)
    assert what in caught.value.what
    assert fix in caught.value.fix


def test_all_parameters_are_named_once_though_tied():
    model = tiny("llama", tie_word_embeddings=True)
    names = match_parameters(model, ["all"])
    assert names == [name for name, _ in model.named_parameters()]
    assert match_parameters(model, ["lm_head"]) == match_parameters(model, ["embed_tokens"])
    assert match_parameters(model, ["lm_head.weight"]) == ["model.embed_tokens.weight"]
    assert "model.embed_tokens.weight" not in match_parameters(model, ["all"], ["lm_head"])


@pytest.mark.parametrize(
    "pattern, count",
    [("norm", 1), ("*norm.weight", 5), ("layers.1", 9), ("q_proj", 2), (r"re:.*layernorm\.weight", 4), ("lm_head", 1)],
)
def test_parameter_patterns(pattern, count):
    assert len(match_parameters(tiny("llama", tie_word_embeddings=False), [pattern])) == count


@pytest.mark.parametrize(
    "patterns, freeze, what",
    [(["q_prj"], [], "q_prj"), (["all"], ["embd_tokens"], "embd_tokens"), (["norm"], ["all"], "no parameter is left")],
)
def test_a_pattern_without_a_parameter_is_an_error(patterns, freeze, what):
    with pytest.raises(TargetError, match=what):
        match_parameters(tiny("llama"), patterns, freeze)


class Quantised(nn.Linear):
    """Looks as bitsandbytes' 8-bit linear does: int8 rows, and the largest magnitude of each row beside them."""

    def __init__(self, weight, scale_on_weight):
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        largest = weight.abs().amax(1)
        rounded = (weight / largest[:, None] * 127).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)
        self.weight.SCB = largest if scale_on_weight else None
        self.state = type("State", (), {"SCB": None if scale_on_weight else largest})()


@pytest.mark.parametrize("scale_on_weight", [True, False])
def test_an_8bit_weight_is_restored(scale_on_weight):
    weight = torch.randn(6, 4)
    restored = weight_of(Quantised(weight, scale_on_weight))
    assert (restored - weight).abs().max() <= weight.abs().max() / 127


def test_a_quantised_weight_cannot_be_fully_tuned():
    model = nn.ModuleDict({"layer": Quantised(torch.randn(6, 4), True)})
    with pytest.raises(TargetError, match="quantised"):
        match_parameters(model, ["all"])


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_weight_of_is_out_by_in(family):
    for layer in linears(tiny(family)).values():
        width, out = in_out(layer)
        x = torch.randn(3, width)
        bias = 0 if layer.bias is None else layer.bias
        assert weight_of(layer).shape == (out, width)
        torch.testing.assert_close(x @ weight_of(layer).t() + bias, layer(x))


def test_an_embedding_is_a_linear_of_one_hot_tokens():
    embedding = nn.Embedding(7, 3)
    assert in_out(embedding) == (7, 3)
    torch.testing.assert_close(torch.eye(7) @ weight_of(embedding).t(), embedding(torch.arange(7)))


def test_weight_of_is_a_view():
    layer = linears(tiny("gpt2"))["transformer.h.0.attn.c_attn"]
    assert weight_of(layer).data_ptr() == layer.weight.data_ptr()
