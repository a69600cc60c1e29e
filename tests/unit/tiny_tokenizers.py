"""Tokenizers of one token a byte, built in memory; merges and special tokens as a test needs them."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

EOS = "</s>"
BOS = "<s>"
CHATML_TOKENS = ["<|im_start|>", "<|im_end|>"]

CHATML_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(*, bos=False, eos=EOS, chat_template=None, special=(), merges=(), trim_offsets=False):
    """Bytes as tokens, then `merges` as pairs of the byte alphabet's characters; `bos` is put before every text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, *(left + right for left, right in merges)]
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=eos,
        bos_token=BOS if bos else None,
        additional_special_tokens=list(special) or None,
    )
    steps = [processors.ByteLevel(trim_offsets=True)] if trim_offsets else []
    if bos:
        steps.append(processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, tokenizer.bos_token_id)]))
    if steps:
        tokenizer.backend_tokenizer.post_processor = processors.Sequence(steps)
    tokenizer.chat_template = chat_template
    return tokenizer


def chatml_tokenizer(**options):
    return byte_tokenizer(special=CHATML_TOKENS, chat_template=CHATML_TEMPLATE, **options)


def labelled_text(example, tokenizer):
    """Decode the labelled tokens, runs divided by a bar."""
    from loralab.base.text import pieces

    return "|".join(text for text, labelled in pieces(example, tokenizer) if labelled)
