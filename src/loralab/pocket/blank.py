"""What the pocket base is before pretraining: its shape and its tokenizer of single characters.

    python -m loralab.pocket.blank FOLDER

writes config.json and the tokenizer; `loralab train pocket-base model.path=FOLDER` then makes a base from nothing.
"""

import sys
from pathlib import Path
from string import ascii_letters, digits

CHARACTERS = ascii_letters + digits + " .,:?=+-*"
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


def write_blank(folder: str | Path) -> None:
    """Write config.json and the tokenizer of a Llama of 0.96M parameters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    ).save_pretrained(folder)


if __name__ == "__main__":
    write_blank(sys.argv[1])
