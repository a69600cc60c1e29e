"""Requests in words, as lm-eval makes them, answered by our engines in every view.

Words become tokens exactly as in lm-eval's own Hugging Face backend (0.4.13), so that decisions agree: spaces at the end of a
context belong to the continuation; context and continuation are tokenised together and cut where the context alone ends; an
empty context is the tokenizer's first token; what is too long loses its beginning. Here they are tokenised in batches, and
each text once.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedTokenizerBase

from loralab.delta.several import View
from loralab.errors import EvaluationError
from loralab.evals.generate import Prompt, Sampling, Writer, room
from loralab.evals.likelihood import Engine, Likelihood, Prepared, Request
from loralab.training.loss import LanguageHead

LONGEST_UNKNOWN = 2048
"""Window of a model that does not say how much it reads, as in lm-eval."""
MOST_NEW_TOKENS = 256
"""Of an answer whose task does not say, as in lm-eval."""


class TextEngine:
    """Answers requests in words on a model and the deltas that it wears.

    Args:
        head: of the model.
        tokenizer: of the model.
        row_tokens: most tokens in one scoring pass; None is the engine's own.
    """

    def __init__(
        self, head: LanguageHead, tokenizer: PreTrainedTokenizerBase, *, row_tokens: int | None = None
    ) -> None:
        self.head, self.tokenizer = head, tokenizer
        self.likelihood = Engine(head, row_tokens) if row_tokens else Engine(head)
        self.writer = Writer(head.model, tokenizer, together=head.packs)
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise EvaluationError(
                "the tokenizer has neither a first nor an end token, so a text's beginning cannot be scored",
                fix="set bos_token or eos_token in tokenizer_config.json",
            )
        self.first: int = int(first)
        self._first_text = str(tokenizer.decode([self.first]))

    @property
    def window(self) -> int:
        """Most tokens that the model reads."""
        longest = room(self.head.model)
        return int(longest) if longest < float("inf") else LONGEST_UNKNOWN

    def tokens(self, texts: Iterable[str], *, special: bool = True) -> dict[str, list[int]]:
        """Tokenise each text once; where it begins with the first token in words, no other is put before it."""
        wanted = dict.fromkeys(texts)
        found: dict[str, list[int]] = {}
        for begun in (False, True):
            group = [text for text in wanted if (special and text.startswith(self._first_text)) is begun]
            if group:
                encoded = self.tokenizer(group, add_special_tokens=special and not begun)["input_ids"]
                found |= dict(zip(group, encoded, strict=True))
        return found

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Make requests of contexts and continuations. Raises EvaluationError where a continuation has no token."""
        split = [_split(context, continuation) for context, continuation in pairs]
        known = self.tokens(text for context, rest in split if context for text in (context, context + rest))
        bare = self.tokens((rest for context, rest in split if not context), special=False)
        requests = []
        for context, rest in split:
            if context:
                before, behind = known[context], known[context + rest][len(known[context]) :]
            else:
                before, behind = [self.first], bare[rest]
                behind = behind[1:] if behind[:1] == before else behind
            if not behind:
                what = f"a continuation has no token of its own: {rest[:60]!r}"
                raise EvaluationError(what, fix="leave such items out")
            requests.append(Request(tuple(before), tuple(behind)))
        return requests

    def windows(self, text: str, tokens: Sequence[int]) -> list[Request]:
        """Cut a text into windows, in which each token is predicted once, with as much before it as the model reads."""
        disjoint = map(
            make_disjoint_window,
            get_rolling_token_windows(
                token_list=list(tokens), prefix_token=self.first, max_seq_len=self.window, context_len=1
            ),
        )
        return [Request(tuple(context), tuple(continuation)) for context, continuation in disjoint]

    def prepared(self, pairs: Sequence[tuple[str, str]]) -> Prepared:
        """Lay pairs out once, to be scored again and again."""
        return self.likelihood.prepared(self.pairs(pairs))

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]], views: Sequence[View]) -> list[list[Likelihood]]:
        """Score continuations behind contexts: views × pairs."""
        return self.prepared(pairs).score(views)

    def rolling(self, texts: Sequence[str], views: Sequence[View]) -> list[list[float]]:
        """Give log p of whole texts in nats: views × texts."""
        known = self.tokens(texts)
        cut = [self.windows(text, known[text]) for text in texts]
        scored = self.likelihood.score([window for windows in cut for window in windows], views)
        results = []
        for view in scored:
            parts = iter(view)
            results.append([sum(next(parts).log_likelihood for _ in windows) for windows in cut])
        return results

    def written(
        self, prompts: Sequence[tuple[str, Mapping[str, Any]]], views: Sequence[View], *, seed: int = 0
    ) -> list[list[str]]:
        """Write answers: views × prompts. Each prompt has lm-eval's generation settings, such as `until`.

        Raises:
            EvaluationError: an answer may be as long as all that the model reads; a setting that is not known here.
        """
        results = [[""] * len(prompts) for _ in views]
        known = self.tokens(text for text, _ in prompts)
        groups: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(prompts):
            groups.setdefault(repr(sorted(settings.items())), []).append(number)
        for group in groups.values():
            wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(prompts[group[0]][1]), MOST_NEW_TOKENS))
            until, limit = self._stop_texts(wanted.pop("until", None)), int(wanted.pop("max_gen_toks"))
            if limit >= self.window:
                raise EvaluationError(
                    f"answers of up to {limit} tokens leave no room for a prompt: the model reads {self.window}",
                    fix="take a model that reads more",
                )
            longest = self.window - limit
            self.likelihood.tally.truncated += sum(len(known[prompts[i][0]]) > longest for i in group)
            asked = [Prompt(known[prompts[i][0]][-longest:], None, limit, until) for i in group]
            found = self.writer.write(asked, sampling=_sampling(wanted, seed), views=views)
            for texts, answers in zip(results, found, strict=True):
                for number, (answer,) in zip(group, answers, strict=True):
                    # Decoded alone and cut as lm-eval does, which drops the space that a text's first token may hold.
                    text = str(self.tokenizer.decode(answer.tokens, skip_special_tokens=True))
                    texts[number] = postprocess_generated_text(text, list(until), None)
        return results

    def _stop_texts(self, until: Any) -> tuple[str, ...]:
        end = self.tokenizer.eos_token_id
        last = None if end is None else str(self.tokenizer.decode([end], skip_special_tokens=False))
        return tuple(text for text in handle_stop_sequences(until, eos=last) if text)


def _sampling(wanted: Mapping[str, Any], seed: int) -> Sampling:
    """Read lm-eval's generation settings: greedy unless they ask to sample."""
    known = {"do_sample", "temperature", "top_p", "top_k"}
    if strange := sorted(set(wanted) - known):
        fix = "leave it out of the task's generation_kwargs"
        raise EvaluationError(f"this engine knows no generation setting {strange[0]!r}", where="the task", fix=fix)
    if not wanted.get("do_sample") or not wanted.get("temperature"):
        return Sampling()
    return Sampling(
        temperature=float(wanted["temperature"]),
        top_p=float(wanted.get("top_p") or 1.0),
        top_k=int(wanted.get("top_k") or 0),
        seed=seed,
    )


def _split(context: str, continuation: str) -> tuple[str, str]:
    """Move spaces at the end of a context to its continuation."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
