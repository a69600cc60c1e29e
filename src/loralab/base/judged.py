"""Forms of rows that people have judged: pairs of answers, answers with a thumb, texts with a class or a number.

Columns are those of TRL, LLaMA-Factory, GLUE and the Anthropic HH and Taskmaster sets, so their files work unchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loralab.base.forms import FORMS, Chat, Message, Prompted, as_text, find_form, template_form
from loralab.base.sources import Row, Source
from loralab.errors import DataError, did_you_mean

Kind = Literal["classify", "regression", "pairs", "thumbs"]

SENTENCES = (
    *(("text", "text_pair"), ("sentence1", "sentence2"), ("sentence_1", "sentence_2"), ("premise", "hypothesis")),
    *(("question1", "question2"), ("question", "sentence"), ("passage", "question")),
    *(("text",), ("sentence",), ("content",)),
)
"""Columns of a text to be classified, or of two, in the order in which they are looked for."""

LABELS: dict[str, tuple[str, ...]] = {
    "classify": ("label", "labels"),
    "regression": ("label", "labels", "score"),
    "thumbs": ("label", "reward", "thumb"),
}
ASKED = ("question", "query", "instruction", "history", "post", "context", "input")
"""Columns that a prompt may hide in."""

ANSWERS = "\n\nAssistant:"
"""Begins an answer in the texts of Anthropic's HH set."""

Said = tuple[str, str] | Chat
"""A text: what stands before, and what is judged (of a sentence pair the second); or a chat whose last turn is judged."""


@dataclass(frozen=True)
class Judged:
    """What a row says.

    Attributes:
        texts: the text, or of a pair the chosen and the rejected one.
        label: as it stands in the row; of a pair the margin, None where there is none.
    """

    texts: tuple[Said, ...]
    label: Any


Read = Callable[[Row, str], Judged]


def find_kind(source: Source, columns: Sequence[str]) -> Kind:
    """Tell by the columns what has been judged.

    Raises:
        DataError: the columns say nothing.
    """
    there = set(columns)
    if {"chosen", "rejected"} <= there:
        return "pairs"
    label = there & {*LABELS["classify"], *LABELS["thumbs"]}
    if source.template is not None:
        answered = bool(source.template.completion)
    else:
        answered = {"prompt", "completion"} <= there or not any(there.issuperset(names) for names in SENTENCES)
    if label:
        return "classify" if label & {*LABELS["classify"]} and not answered else "thumbs"
    what = f"nothing judged is found in the columns {', '.join(columns)}"
    fix = "name them prompt, chosen, rejected; prompt, completion, label; or text, label"
    raise DataError(what, where=source.path, fix=fix)


def judged_form(kind: Kind, source: Source, columns: list[str]) -> tuple[str, Read]:
    """Find how rows of a kind are read: the name of the form, and what reads a row.

    Raises:
        DataError: a column is missing, or the template shows the label or asks for what the kind has not.
    """
    if kind == "pairs":
        return _pairs_form(source, columns)
    label = next((name for name in LABELS[kind] if name in columns), None)
    if label is None:
        near = did_you_mean(LABELS[kind][0], columns)
        fix = f"did you mean `{near}`? " if near else ""
        what = f"no column `{'`, `'.join(LABELS[kind])}` says how a row was judged; there are {', '.join(columns)}"
        raise DataError(what, where=source.path, fix=f"{fix}rename the column to `{LABELS[kind][0]}`")
    if source.template is not None:
        name, form = "template", template_form(source.template, columns, source.path)
        if label in form.columns:
            what = f"the template shows the model `{label}`, which it is to tell"
            raise DataError(what, where=source.path, fix="leave it out of data.template")
        if kind != "thumbs" and source.template.completion:
            fix = "write the whole text into template.prompt, and leave template.completion empty"
            raise DataError("a text to be classified has no completion", where=source.path, fix=fix)
    elif kind == "thumbs":
        name, form = find_form(source.form, columns, source.path)
    else:
        return _sentences_form(columns, label, source.path)
    if kind == "thumbs":
        return name, lambda row, where: Judged((_said(form.read(row, where)),), row.get(label))

    def classified(row: Row, where: str) -> Judged:
        whole = form.read(row, where)
        assert isinstance(whole, Prompted)  # a template writes no chats
        return Judged((("", whole.prompt),), row.get(label))

    return name, classified


def _sentences_form(columns: list[str], label: str, where: str) -> tuple[str, Read]:
    names = next((names for names in SENTENCES if set(names) <= set(columns)), None)
    if names is None:
        known = "; ".join(", ".join(names) for names in SENTENCES)
        what = f"no text is found in the columns {', '.join(columns)}; tried {known}"
        raise DataError(what, where=where, fix="rename the columns, or give data.template with the text as its prompt")

    def read(row: Row, at: str) -> Judged:
        texts = [as_text(row.get(name), f"{at}, column {name}") for name in names]
        return Judged(((texts[0] if len(texts) == 2 else "", texts[-1]),), row.get(label))

    return ", ".join(names), read


def _pairs_form(source: Source, columns: list[str]) -> tuple[str, Read]:
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    if missing:
        near = did_you_mean(missing[0], columns)
        fix = f"did you mean `{near}`?" if near else "pairs need the columns prompt, chosen, rejected"
        raise DataError(f"the rows have no column `{missing[0]}`", where=source.path, fix=fix)
    prompts = None
    if source.template is not None:
        if source.template.completion:
            fix = "leave template.completion empty: the answers are the columns `chosen` and `rejected`"
            raise DataError("a pair has two answers, the template one completion", where=source.path, fix=fix)
        prompts = template_form(source.template, columns, source.path)
    alpaca = "instruction" in columns and "prompt" not in columns
    if prompts is None and not alpaca and not {"prompt", "conversations"} & set(columns):
        for name in ASKED:
            if name in columns:
                fix = f"rename it to `prompt`, or give data.template with prompt: '{{{name}}}' and completion: ''"
                raise DataError(f"the rows have no `prompt`; is `{name}` one?", where=source.path, fix=fix)

    def read(row: Row, where: str) -> Judged:
        sides = [row.get("chosen"), row.get("rejected")]
        before = row.get("prompt") if row.get("prompt") is not None else row.get("conversations")
        said: tuple[Said, ...]
        if prompts is not None or alpaca:
            form = prompts or FORMS["alpaca"]
            given = {**row, "output": ""} if alpaca and prompts is None else row
            asked = form.read(given, where)
            assert isinstance(asked, Prompted)
            said = tuple((asked.prompt, as_text(side, where)) for side in sides)
        elif any(map(_turns, (before, *sides))):
            said = tuple(_conversation(before, side, row, where) for side in sides)
        else:
            said = _texts(before, [as_text(side, where) for side in sides], where)
        return Judged(said, row.get("margin"))

    return "pairs", read


def _texts(before: Any, sides: list[str], where: str) -> tuple[Said, ...]:
    if before is not None:
        prompt = as_text(before, where)
        return tuple((prompt, side) for side in sides)
    shared = common(*sides)  # both are whole: what they begin with is the prompt
    answer = sides[0].rfind(ANSWERS, 0, shared)
    cut = shared if answer < 0 else answer + len(ANSWERS)
    return tuple((side[:cut], side[cut:]) for side in sides)


def common(left: Sequence[Any], right: Sequence[Any]) -> int:
    """Count the items that two sequences begin with alike."""
    differing = (number for number, (a, b) in enumerate(zip(left, right, strict=False)) if a != b)
    return next(differing, min(len(left), len(right)))


def _turns(value: Any) -> list[Message] | None:
    """Give messages as a list; None if it is none."""
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list) and turns and all(isinstance(t, dict) and (_role(t) is not None) for t in turns):
        return turns
    return None


def _role(turn: Message) -> Any:
    return turn.get("role") or turn.get("from")


def _conversation(before: Any, side: Any, row: Row, where: str) -> Chat:
    """Join prompt and answer; an answer that begins with the prompt itself, as UltraFeedback's do, is the whole."""
    said = _turns(side) or [{"role": "assistant", "content": as_text(side, where)}]
    asked = _turns(before)
    if asked is None:
        alone = _role(said[0]) in ("assistant", "gpt") and before is not None
        asked = [{"role": "user", "content": as_text(before, where)}] if alone else []
    elif said[: len(asked)] == asked:
        asked = []
    turns = [*asked, *said]
    name, column = ("sharegpt", "conversations") if any(t.get("from") for t in turns) else ("messages", "messages")
    chat = FORMS[name].read({**row, column: turns}, where)
    assert isinstance(chat, Chat)
    return _last_judged(chat)


def _said(content: Prompted | Chat) -> Said:
    return (content.prompt, content.completion) if isinstance(content, Prompted) else _last_judged(content)


def _last_judged(chat: Chat) -> Chat:
    return Chat(chat.messages, chat.tools, [0.0] * (len(chat.messages) - 1) + [1.0])


def is_empty(said: Said) -> bool:
    """Tell whether nothing is there to be judged."""
    if isinstance(said, Chat):
        last = said.messages[-1] if said.messages else {}
        return last.get("role") != "assistant" or not (last["content"].strip() or last.get("tool_calls"))
    return not said[1].strip()
