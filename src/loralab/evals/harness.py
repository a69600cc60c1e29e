"""Our engines as a model of lm-eval: `lm_eval.simple_evaluate(model=HarnessModel.of("gpt2"), tasks=["hellaswag"])`."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from loralab.base.model import Base, load
from loralab.evals.chat import chat_template
from loralab.evals.texts import TextEngine
from loralab.training.loss import LanguageHead


class HarnessModel(LM):
    """A base, or the delta that it wears in `view`, as lm-eval asks a model: with contexts, texts and prompts in words.

    Args:
        engine: that answers.
        view: gives the context inside which the model is as it is to be measured.
    """

    def __init__(self, engine: TextEngine, view: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        super().__init__()
        self.engine, self.view = engine, view

    @classmethod
    def of(cls, path: str, **loading: Any) -> "HarnessModel":
        """Load a base (see `loralab.load_base`) and make a model of lm-eval of it."""
        return cls.of_base(load(path, **loading))

    @classmethod
    def of_base(cls, base: Base) -> "HarnessModel":
        """Make a model of lm-eval of a loaded base with its tokenizer."""
        assert base.tokenizer is not None
        return cls(TextEngine(LanguageHead(base.model), base.tokenizer))

    @property
    def tokenizer_name(self) -> str:
        return str(self.engine.tokenizer.name_or_path).replace("/", "__")

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Give log p in nats of each continuation behind its context, and whether greedy decoding would write it."""
        (scored,) = self.engine.log_likelihoods([request.args[:2] for request in requests], [self.view])
        return [(one.log_likelihood, one.is_greedy) for one in scored]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Give log p in nats of whole texts."""
        (scored,) = self.engine.rolling([request.args[0] for request in requests], [self.view])
        return scored

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Write an answer to each prompt, up to the texts that end it."""
        (written,) = self.engine.written([request.args[:2] for request in requests], [self.view])
        return written

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Put messages through the tokenizer's chat template."""
        return chat_template(self.engine.tokenizer)(chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Give the tokenizer's chat template as text."""
        found: Any = self.engine.tokenizer
        return str(found.chat_template or "")
