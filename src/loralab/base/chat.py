"""Chats rendered through Jinja templates, with the characters that the assistant wrote.

Labelled characters come from the template's `{% generation %}` markers where it has them. Else the chat is rendered up
to each assistant turn, once with the prompt for its answer and once with the answer: what the second adds is the turn.
"""

import json
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from loralab.base.forms import Chat, Message
from loralab.errors import DataError

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for message in messages %}{% if not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ message.role | capitalize }}: {{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{% if messages %}{{ '\n\n' }}{% endif %}Assistant:{% endif %}"
)  # no space at the end: tokenizers join it with the next word
TOOLS = (
    "{% if tools %}{% set messages = [{'role': 'system', 'content': 'Tools: ' ~ (tools | tojson)}] + messages %}"
    "{% endif %}"
)
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
GUARDS = [chr(code) for code in range(0xE000, 0xE020)]  # private use: no text has a meaning for them

Span = tuple[int, int]
Marked = tuple[str, list[Span]]


@dataclass(frozen=True)
class Document:
    """Text with the character ranges that are learned.

    Attributes:
        text: everything the model reads.
        spans: labelled character ranges, in order.
        rendered: a chat template wrote it: its special tokens are parsed and none are added. Else none are parsed,
            the tokenizer adds its own, and an end-of-sequence token follows.
        literal: ranges of a rendered text that only look like special tokens: a user wrote them.
    """

    text: str
    spans: tuple[Span, ...]
    rendered: bool = False
    literal: tuple[Span, ...] = ()

    @property
    def is_text(self) -> bool:
        """Plain text, learned from its beginning to its end."""
        return not self.rendered and self.spans == ((0, len(self.text)),)


class ChatTemplate:
    """A chat template together with the special tokens of its tokenizer.

    Args:
        tokenizer: gives the special tokens, and its own template if `chat_template` is None.
        chat_template: `chatml`, `plain` (role names and colons, for tokenizers without chat tokens), or a Jinja file.

    Raises:
        DataError: there is no template, the file is missing, or the tokenizer lacks the template's tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        special.update(tokenizer.all_special_tokens)
        self._special = re.compile("|".join(re.escape(t) for t in sorted(special, key=len, reverse=True)) or r"(?!)")
        self._closing = tuple(special)
        self._source = self._find_source(None)

    def _find_source(self, tools: Any) -> str:
        tokenizer, name = self.tokenizer, self.chat_template
        if name is None:
            if not tokenizer.chat_template:
                fix = "set data.chat_template to `plain`, `chatml` or a Jinja file"
                raise DataError("the rows are chats, but the tokenizer has no chat template", where="data", fix=fix)
            return tokenizer.get_chat_template(tools=tools)
        if name not in ("chatml", "plain"):
            return _read_file(name)
        ending = "<|im_end|>" if name == "chatml" else tokenizer.eos_token
        if ending is None or len(tokenizer.encode(ending, add_special_tokens=False)) != 1:
            what = f"the tokenizer has no token {ending or 'for the end of a text'}, which `{name}` ends a turn with"
            raise DataError(what, where="data.chat_template", fix="choose another template or another model")
        opening = "{{ bos_token }}" if _adds_bos(tokenizer) else ""
        return opening + TOOLS + (CHATML if name == "chatml" else PLAIN)

    def documents(self, chat: Chat, where: str) -> list[Document]:
        """Render a chat and find the characters to learn.

        Usually one document. Templates that write earlier turns differently from the last one (they drop its reasoning)
        give one document per assistant turn, each as the model will meet it.

        Raises:
            DataError: the template refuses the messages, or what it writes for a turn cannot be told apart.
        """
        source = self._find_source(chat.tools) if chat.tools and self.chat_template is None else self._source
        messages, guard = self._guard(_fold_calls(chat.messages, source))
        turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and chat.weights[i] != 0]
        if not turns:
            return []
        rendering = _Rendering(source, chat.tools, dict(self.tokenizer.special_tokens_map), where)
        by = self._by_marks if GENERATION.search(source) else self._by_prefixes
        return [self._document(text, spans, guard) for text, spans in by(rendering, messages, turns)]

    def _by_marks(self, rendering: "_Rendering", messages: list[Message], turns: list[int]) -> list[Marked]:
        whole, spans = rendering.marked(messages)
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if len(spans) == len(answers):
            spans = [span for span, turn in zip(spans, answers, strict=True) if turn in turns]
        elif len(turns) < len(answers):
            what = f"the template marks {len(spans)} spans for {len(answers)} assistant turns: weights find no place"
            fix = "mark each assistant turn once in the chat template"
            raise DataError(what, where=rendering.where, fix=fix)
        return [(whole, [self._with_stop(whole, span) for span in spans])]

    def _by_prefixes(self, rendering: "_Rendering", messages: list[Message], turns: list[int]) -> list[Marked]:
        whole = rendering.plain(messages)
        pairs = [rendering.turn(messages, turn, whole) for turn in turns]
        marked = [(after, self._trim(after, len(before))) for before, after in pairs]
        if all(whole.startswith(after) for after, _ in marked):
            return [(whole, [span for _, span in marked])]
        return [(after, [span]) for after, span in marked]

    def _with_stop(self, text: str, span: Span) -> Span:
        """Let a span reach over the special token that follows it: a turn that is not ended never stops."""
        follows = self._special.match(text, span[1])
        stopped = text[span[0] : span[1]].rstrip().endswith(self._closing)
        return self._trim(text[: span[1]], span[0]) if stopped or not follows else (span[0], follows.end())

    def _trim(self, text: str, start: int) -> Span:
        """Leave out the white space after a closing special token: the model has stopped before it."""
        bare = text.rstrip()
        return (start, len(bare) if len(bare) > start and bare.endswith(self._closing) else len(text))

    def _guard(self, messages: list[Message]) -> tuple[list[Message], str]:
        """Break special tokens that users wrote with a private character, so that they can be found after rendering."""
        texts = list(_strings(messages))
        if not any(self._special.search(text) for text in texts):
            return messages, ""
        guard = next(g for g in GUARDS if not any(g in text for text in texts))

        def broken(text: str) -> str:
            return self._special.sub(lambda match: match[0][0] + guard + match[0][1:], text)

        return _replace(messages, broken), guard

    def _document(self, text: str, spans: list[Span], guard: str) -> Document:
        if not guard:
            return Document(text, tuple(spans), rendered=True)
        breaks = [i for i, character in enumerate(text) if character == guard]
        clean = text.replace(guard, "")
        shifted = tuple((a - bisect_left(breaks, a), b - bisect_left(breaks, b)) for a, b in spans)
        starts = [place - number - 1 for number, place in enumerate(breaks)]
        matches = [self._special.match(clean, start) for start in starts]
        return Document(clean, shifted, rendered=True, literal=tuple(m.span() for m in matches if m))


@dataclass(frozen=True)
class _Rendering:
    source: str
    tools: list[dict[str, Any]] | None
    tokens: dict[str, Any]
    where: str

    def plain(self, messages: list[Message], **options: Any) -> str:
        return self._render(messages, **options)[0][0]

    def marked(self, messages: list[Message]) -> tuple[str, list[Span]]:
        texts, spans = self._render(messages, return_assistant_tokens_mask=True)
        return texts[0], [(start, end) for start, end in spans[0]]

    def turn(self, messages: list[Message], index: int, whole: str) -> tuple[str, str]:
        """Render the prompt for turn `index`, and the same with the answer."""
        before = self.plain(messages[:index], add_generation_prompt=True)
        after = self.plain(messages[: index + 1]) if index + 1 < len(messages) else whole
        if after.startswith(before):
            return before, after
        raise DataError(
            f"the chat template writes turn {index + 1} in a way that its prompt does not begin",
            where=self.where,
            fix="set data.chat_template to a Jinja file with {% generation %} markers around the assistant's text",
        )

    def _render(self, messages: list[Message], **options: Any) -> Any:
        try:
            tools: Any = self.tools  # declared there as a list that may also hold functions
            return render_jinja_template(
                [messages], tools=tools, chat_template=self.source, **{**self.tokens, **options}
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            what, fix = f"the chat template refuses the messages: {error}", "correct the row, or data.chat_template"
            raise DataError(what, where=self.where, fix=fix) from error


def _read_file(name: str) -> str:
    path = Path(name).expanduser()
    if not path.is_file():
        fix = "give `chatml`, `plain`, or the path of a Jinja file"
        raise DataError("the chat template is not a file", where=f"data.chat_template: {name}", fix=fix)
    return path.read_text(encoding="utf-8")


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _fold_calls(messages: list[Message], source: str) -> list[Message]:
    """Write tool calls as text where the template would leave them out."""
    if "tool_calls" in source:
        return messages
    folded = []
    for message in messages:
        if calls := message.get("tool_calls"):
            bodies = [json.dumps(call.get("function", call), ensure_ascii=False) for call in calls]
            message = {**message, "content": "\n".join(filter(None, [message["content"], *bodies]))}
        folded.append(message)
    return folded


def _strings(value: Any) -> Iterator[str]:
    """Yield every string inside plain lists and dicts."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


def _replace(value: Any, change: Callable[[str], str]) -> Any:
    """Apply `change` to every string inside plain lists and dicts."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_replace(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _replace(item, change) for key, item in value.items()}
    return value
