"""Forms of rows: how columns become a prompt and a completion, or the messages of a chat.

Names and columns are those that TRL, LLaMA-Factory and axolotl read, so their files work unchanged.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, time
from string import Formatter
from typing import Any

from loralab.base.sources import Row, Template
from loralab.errors import DataError, did_you_mean

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}


@dataclass(frozen=True)
class Prompted:
    """A text whose completion is learned; an empty prompt makes the whole text the completion."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """Messages with `role`, `content` and perhaps `tool_calls`; `weights` says which may be learned (0: not)."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    weights: list[float] = field(default_factory=list)


Read = Callable[[Row, str], Prompted | Chat]


@dataclass(frozen=True)
class Form:
    """A form: the columns that it needs, those that it reads besides, and how it reads a row."""

    needs: tuple[str, ...]
    read: Read
    may_read: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column that decides what is learned from a row."""
        return (*self.needs, *self.may_read)


def as_text(value: Any, where: str) -> str:
    """Turn a cell into text: None is empty, numbers are written out, a list of text parts is joined.

    Raises:
        DataError: the cell is an object or a date, or holds a part that is not text.
    """
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list):
        return "".join(_part_text(part, where) for part in value)
    if isinstance(value, dict):
        raise DataError("a text was expected, an object found", where=where, fix="write the column as a string")
    if isinstance(value, date | time):
        fix = "write the file as parquet, where a string stays one"
        raise DataError("the reader takes the column's strings for dates", where=where, fix=fix)
    return str(value)


def _part_text(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict) and part.get("type", "text") == "text":
        text = part.get("text") if part.get("text") is not None else part.get("value")
        if isinstance(text, str):
            return text
    kind = part.get("type") if isinstance(part, dict) else type(part).__name__
    raise DataError(f"a part of the content is not text: {kind}", where=where, fix="remove such rows")


def _cell(row: Row, name: str, where: str) -> str:
    if name not in row:
        raise _no_column(name, row, where)
    return as_text(row[name], f"{where}, column {name}")


def _no_column(name: str, row: Row, where: str) -> DataError:
    near = did_you_mean(name, list(row))
    fix = f"did you mean `{near}`?" if near else "correct the row, or choose another `form`"
    return DataError(f"the row has no column `{name}`; it has {', '.join(row)}", where=where, fix=fix)


def _text(row: Row, where: str) -> Prompted:
    return Prompted("", _cell(row, "text", where))


def _prompt_completion(row: Row, where: str) -> Prompted | Chat:
    prompt, completion = row.get("prompt"), row.get("completion")
    if not (_are_messages(prompt) and _are_messages(completion)):
        return Prompted(_cell(row, "prompt", where), _cell(row, "completion", where))
    assert prompt is not None and completion is not None
    chat = _chat([*prompt, *completion], row, where)
    return Chat(chat.messages, chat.tools, [0.0] * len(prompt) + chat.weights[len(prompt) :])


def _are_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(m, dict) and m.get("role") for m in value)


def _alpaca(row: Row, where: str) -> Prompted:
    """Write a row in the words of Stanford Alpaca (Taori et al. 2023); alpaca-lora's line break ends the prompt."""
    instruction, given = _cell(row, "instruction", where), as_text(row.get("input"), where)
    with_input = ", paired with an input that provides further context" if given else ""
    preamble = as_text(row.get("system"), where) or (
        f"Below is an instruction that describes a task{with_input}. "
        "Write a response that appropriately completes the request."
    )
    history = row.get("history") or []
    if not all(isinstance(turn, list | tuple) and len(turn) == 2 for turn in history):
        raise DataError("`history` is not a list of pairs", where=where, fix="write [[instruction, response], ...]")
    turns = [f"### Instruction:\n{asked}\n\n### Response:\n{answered}" for asked, answered in history]
    last = f"### Instruction:\n{instruction}\n\n" + (f"### Input:\n{given}\n\n" if given else "") + "### Response:\n"
    return Prompted("\n\n".join([preamble, *turns, last]), _cell(row, "output", where))


def _messages(row: Row, where: str) -> Chat:
    if "messages" not in row:
        raise _no_column("messages", row, where)
    return _chat(row["messages"], row, where)


def _sharegpt(row: Row, where: str) -> Chat:
    if "conversations" not in row:
        raise _no_column("conversations", row, where)
    turns = [] if row.get("system") is None else [{"role": "system", "content": row["system"]}]
    for turn in row["conversations"] or ():
        if not isinstance(turn, dict):
            raise DataError("a turn is not an object", where=where, fix='write {"from": "human", "value": "..."}')
        role: Any = turn.get("from") or turn.get("role")
        content = turn["value"] if turn.get("value") is not None else turn.get("content")
        message = {"role": ROLES.get(role, role), "content": content, "loss_weight": turn.get("loss_weight")}
        if role == "function_call" and (calls := _function_calls(content)):
            message |= {"content": "", "tool_calls": calls}
        turns.append(message)
    return _chat(turns, row, where)


def _function_calls(content: Any) -> list[dict[str, Any]] | None:
    """Read the JSON of a function call; None if it is none, and then it stays the text that it is."""
    try:
        value = json.loads(content)
    except (TypeError, ValueError):
        return None
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        return None
    return [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]


def _chat(turns: Any, row: Row, where: str) -> Chat:
    messages, weights = [], []
    for number, turn in enumerate(turns or (), 1):
        here = f"{where}, message {number}"
        if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
            raise DataError("a message has no role", where=here, fix='write {"role": "user", "content": "..."}')
        kept = {k: v for k, v in turn.items() if v is not None and k not in ("content", "loss_weight")}
        messages.append({**kept, "content": as_text(turn.get("content"), here)})
        weight = turn.get("loss_weight")
        weights.append(1.0 if weight is None else float(weight))
    return Chat(messages, _tools(row.get("tools"), where), weights)


def _tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DataError("`tools` is not JSON", where=where, fix="write a list of JSON schemas") from error
    return value or None


FORMS: dict[str, Form] = {
    "messages": Form(("messages",), _messages, ("tools",)),
    "sharegpt": Form(("conversations",), _sharegpt, ("system", "tools")),
    "prompt_completion": Form(("prompt", "completion"), _prompt_completion, ("tools",)),
    "alpaca": Form(("instruction", "output"), _alpaca, ("input", "system", "history")),
    "text": Form(("text",), _text),
}
"""In the order in which `auto` tries them."""


def find_form(name: str, columns: list[str], where: str) -> tuple[str, Form]:
    """Look a form up by name, or by the columns found if the name is `auto`.

    Raises:
        DataError: no form fits the columns, or the named one needs others.
    """
    tried = FORMS if name == "auto" else {name: FORMS[name]} if name in FORMS else {}
    for known, form in tried.items():
        if set(form.needs) <= set(columns):
            return known, form
    needs = "; ".join(f"{known} ({', '.join(form.needs)})" for known, form in (tried or FORMS).items())
    what = f"no form fits the columns {', '.join(columns)}" if tried else f"unknown form `{name}`"
    fix = "rename the columns, or give `template` with a prompt and a completion in their names"
    raise DataError(f"{what}; tried {needs}", where=where, fix=fix)


def template_form(template: Template, columns: list[str], where: str) -> Form:
    """Make a form of a template.

    Raises:
        DataError: a brace does not close, or a name in braces is not a column.
    """
    parts = {key: _parse(getattr(template, key), key, columns, where) for key in ("prompt", "completion")}
    names = tuple(dict.fromkeys(name for pieces in parts.values() for _, name in pieces if name))

    def fill(row: Row, key: str, at: str) -> str:
        return "".join(text + (_cell(row, name, at) if name else "") for text, name in parts[key])

    return Form(names, lambda row, at: Prompted(fill(row, "prompt", at), fill(row, "completion", at)))


def _parse(text: str, key: str, columns: list[str], where: str) -> list[tuple[str, str | None]]:
    here = f"template.{key} of {where}"
    try:
        parsed = list(Formatter().parse(text))
    except ValueError as error:
        what = f"the template cannot be read: {error}"
        raise DataError(what, where=here, fix="double braces that are text") from error
    for _, name, layout, conversion in parsed:
        if layout or conversion:
            what = f"`{{{name}}}` asks for a layout, but only column names stand in braces"
            raise DataError(what, where=here, fix="double braces that are text")
        if name is not None and name not in columns:
            near = did_you_mean(name, columns)
            fix = (f"did you mean `{{{near}}}`? " if near else "") + f"columns: {', '.join(columns)}"
            raise DataError(f"the template names `{{{name}}}`, which is not a column", where=here, fix=fix)
    return [(literal, name) for literal, name, _, _ in parsed]
