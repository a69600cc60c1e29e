"""Chat templates as lm-eval calls them."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

from loralab.errors import EvaluationError


def chat_template(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, str]], bool], str]:
    """Give the function that makes a prompt of messages. Raises EvaluationError for a tokenizer without a template."""
    known: Any = tokenizer
    if not known.chat_template:
        fix = "take a base with a chat template, or ask without one"
        raise EvaluationError("the tokenizer has no chat template", where="--chat", fix=fix)

    def apply(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            known.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    return apply
