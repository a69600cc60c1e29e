"""Tiny seeded models of many families: 2 layers, hidden size 32, 4 heads, a vocabulary of 101."""

import torch
import transformers
from transformers import PreTrainedModel

_SIZES = {"vocab_size": 101, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTH = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_GROUPED = {**_WIDTH, "num_key_value_heads": 2, "max_position_embeddings": 64}
_ENCODER = {**_WIDTH, "max_position_embeddings": 66, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

_FAMILIES = {
    "llama": ("Llama", "ForCausalLM", _GROUPED),
    "qwen2": ("Qwen2", "ForCausalLM", _GROUPED),
    "qwen3": ("Qwen3", "ForCausalLM", {**_GROUPED, "head_dim": 8}),
    "mistral": ("Mistral", "ForCausalLM", {**_GROUPED, "sliding_window": 4}),
    # Caps low enough to bend the small scores of a random model.
    "gemma2": (
        "Gemma2",
        "ForCausalLM",
        {
            **_GROUPED,
            "head_dim": 8,
            "sliding_window": 4,
            "attn_logit_softcapping": 0.5,
            "final_logit_softcapping": 0.5,
            "query_pre_attn_scalar": 8,
        },
    ),
    "phi3": ("Phi3", "ForCausalLM", {**_GROUPED, "original_max_position_embeddings": 64}),
    "gpt2": (
        "GPT2",
        "LMHeadModel",
        {
            **{"n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 64},
            **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        },
    ),
    "gpt_neox": ("GPTNeoX", "ForCausalLM", {**_WIDTH, "max_position_embeddings": 64}),
    "opt": (
        "OPT",
        "ForCausalLM",
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48},
            **{"word_embed_proj_dim": 32, "max_position_embeddings": 64, "dropout": 0.0},
        },
    ),
    "bert": ("Bert", "ForMaskedLM", _ENCODER),
    "roberta": ("Roberta", "ForMaskedLM", _ENCODER),
}
DECODERS = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "opt")
ENCODERS = ("bert", "roberta")


def tiny(family: str, *, seed: int = 0, task: str | None = None, **changes: object) -> PreTrainedModel:
    """Build a tiny model in evaluation mode.

    Args:
        family: one of DECODERS or ENCODERS.
        seed: of the weights; torch's global generator is left as it was.
        task: ending of the class name, e.g. `ForSequenceClassification`; None is the family's language model.
        changes: entries of the model's configuration.
    """
    name, language_model, sizes = _FAMILIES[family]
    settings = getattr(transformers, f"{name}Config")(**{**_SIZES, **sizes, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name + (task or language_model))(settings)
        # Larger than usual, so that attention, biases and positions matter at this size.
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()
