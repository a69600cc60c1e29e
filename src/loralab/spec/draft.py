"""A draft: the values of a recipe and its overrides before they are judged, each with the place it came from.

A recipe is YAML 1.2, so `1e-5` is a number and `no` is text; so is the value of an override, `section.key=value`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.reader import ReaderError

from loralab.errors import LoralabError

Key = tuple[str, ...]

PATH_LISTS = {"data": ("train", "validation", "general"), "probes": ("target", "source")}
"""Lists of sections of which a path alone may stand for one."""
LENGTHS = ("epochs", "steps", "tokens")
MERGE_TAG = "tag:yaml.org,2002:merge"


class Place(NamedTuple):
    """Where a value stands. Places sort by line of the file, then by turn of the override."""

    turn: int
    """0 for the file, else which override it is, counted from 1."""
    line: int
    """0 stands for the file as a whole."""
    text: str


@dataclass
class Draft:
    """Values as written, before any default is filled in.

    Attributes:
        file: the recipe, as it is named in messages.
        values: sections as written, overrides applied.
        places: key → where it was written; the empty key is the file.
        mistakes: everything that could not even be read, with its place.
        legible: False if the file is not YAML, so that nothing can be said about its keys.
    """

    file: str
    values: dict[Any, Any] = field(default_factory=dict)
    places: dict[Key, Place] = field(default_factory=dict)
    mistakes: list[tuple[Place, LoralabError]] = field(default_factory=list)
    legible: bool = True

    def place(self, key: Key) -> Place:
        """Return where `key` was written, or else something inside it, or else the nearest section around it."""
        if key not in self.places:
            key = next((known for known in self.places if known[: len(key)] == key), key)
        while key not in self.places:
            key = key[:-1]
        return self.places[key]

    def report(self, place: Place, what: str, fix: str | None = None) -> None:
        """Note a mistake; reading goes on, so that all of them are found."""
        self.mistakes.append((place, LoralabError(what, where=place.text, fix=fix)))


def read_draft(file: Path, overrides: list[str]) -> Draft:
    """Read a recipe file and apply overrides in their order.

    Args:
        file: a YAML file.
        overrides: `section.key=value`, the later one winning.

    Raises:
        LoralabError: if the file cannot be opened.
    """
    draft = Draft(_shown(file))
    draft.places[()] = Place(0, 0, draft.file)
    _read_file(draft, file)
    for turn, text in enumerate(overrides, 1):
        _override(draft, Place(turn, 0, f'override "{text}"'), text)
    return draft


def dotted(key: Key) -> str:
    """Write a key the way a person does: `data.train.0.path`."""
    return ".".join(key)


def _shown(file: Path) -> str:
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_absolute() and file.is_relative_to(here) else file)


def _read_file(draft: Draft, file: Path) -> None:
    try:
        text = file.read_text(encoding="utf-8-sig")
        root = YAML(typ="safe", pure=True).compose(text)
        forgiving = YAML(typ="safe", pure=True)
        forgiving.allow_duplicate_keys = True  # `_note_places` reports every one of them, the loader only the first
        values = forgiving.load(text)
        _note_places(draft, (), root, ())
    except OSError as error:
        raise LoralabError(f"cannot read the recipe: {error.strerror}", where=draft.file) from error
    except UnicodeDecodeError:
        draft.legible = False
        draft.report(draft.place(()), "the recipe is not UTF-8 text", "save it as UTF-8")
    except YAMLError as error:
        draft.legible = False
        line = _line_of(error, text)
        draft.report(_line(draft, line), f"not YAML: {_said(error)}", "check indentation, brackets and quotes there")
    else:
        draft.legible = root is None or isinstance(root, MappingNode)
        if draft.legible:
            draft.values = values or {}
            _spell_out_paths(draft)
        else:
            draft.report(_line(draft, 1), "a recipe is a mapping of sections", "begin with a line such as `method:`")


def _note_places(draft: Draft, key: Key, node: Node | None, around: tuple[Node, ...]) -> None:
    """Note the line of every key and list entry below `node`, and report keys that stand twice."""
    if any(node is outer for outer in around):
        raise MarkedYAMLError(problem="an alias contains itself", problem_mark=node.start_mark if node else None)
    if isinstance(node, SequenceNode):
        entries = [(str(index), value, value) for index, value in enumerate(node.value)]
    elif isinstance(node, MappingNode):
        entries = [(str(name.value), name, value) for name, value in node.value if name.tag != MERGE_TAG]
    else:
        return
    for name, marked, value in entries:
        inner = (*key, name)
        place = _line(draft, marked.start_mark.line + 1)
        if inner in draft.places:
            first = draft.places[inner]
            draft.report(place, f"{dotted(inner)} stands twice", f"keep one of them: the first is on line {first.line}")
            continue
        draft.places[inner] = place
        _note_places(draft, inner, value, (*around, node))


def _line(draft: Draft, line: int) -> Place:
    return Place(0, line, f"{draft.file}:{line}")


def _line_of(error: YAMLError, text: str) -> int:
    if isinstance(error, ReaderError):
        return text.count("\n", 0, error.position) + 1
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else 1


def _said(error: YAMLError) -> str:
    return getattr(error, "problem", None) or getattr(error, "reason", None) or "it cannot be parsed"


def _override(draft: Draft, place: Place, text: str) -> None:
    name, equals, written = text.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or "" in key:
        draft.report(place, "an override is section.key=value", "write for example method.rank=8")
        return
    try:
        value = YAML(typ="safe", pure=True).load(written)
        if key == ("probes",) and isinstance(value, str | list):
            key = ("probes", "source")  # what else the recipe says of probes stays
        _assign(draft.values, key, value)
    except YAMLError as error:
        fix = f"quote the text, for the shell too: '{name}=\"{written}\"'"
        draft.report(place, f"the value of {name} is not YAML: {_said(error)}", fix)
    except LookupError as error:
        draft.report(place, f"{name} leads nowhere: {error.args[0]}")
    _forget_places(draft, key)
    draft.places[key] = place
    if key[0] == "train" and key[-1] in LENGTHS:
        _give_way(draft, key[-1])
    _spell_out_paths(draft)


def _assign(inside: Any, key: Key, value: Any) -> None:
    """Set the value at `key`, making the sections and list entries on the way."""
    for depth, part in enumerate(key):
        slot = _slot(inside, part, key[:depth])
        if depth + 1 == len(key):
            inside[slot] = value
        elif inside[slot] is None:
            inside[slot] = [] if key[depth + 1].isdecimal() else {}
        inside = inside[slot]


def _slot(inside: Any, part: str, outer: Key) -> str | int:
    """Return the dictionary key or list index that `part` stands for, made if it is new.

    Raises:
        LookupError: if `inside` cannot hold it.
    """
    if isinstance(inside, dict):
        inside.setdefault(part, None)
        return part
    if not isinstance(inside, list):
        raise LookupError(f"{dotted(outer)} is {inside!r} and has no keys")
    if not part.isdecimal() or int(part) > len(inside):
        raise LookupError(f"{dotted(outer)} is a list of {len(inside)}, its entries are named 0, 1, ...")
    if int(part) == len(inside):
        inside.append(None)
    return int(part)


def _give_way(draft: Draft, chosen: str) -> None:
    """Drop the recipe's other run lengths: they exclude one another, and the override wins."""
    section = draft.values.get("train")
    if not isinstance(section, dict) or section.get(chosen) is None:
        return
    for other in LENGTHS:
        key = ("train", other)
        if other != chosen and draft.place(key).turn == 0:
            section.pop(other, None)
            _forget_places(draft, key)


def _forget_places(draft: Draft, key: Key) -> None:
    draft.places = {known: place for known, place in draft.places.items() if known[: len(key)] != key}


def _spell_out_paths(draft: Draft) -> None:
    """Write `data.train: FILE` out as `data.train: [{path: FILE}]`, so that overrides can reach into it.

    So too `probes: TASK` as `probes: {source: [{path: TASK}]}`.
    """
    for section, names in PATH_LISTS.items():
        inside = draft.values.get(section)
        if section == "probes" and isinstance(inside, str | list):
            draft.places = {
                (section, "source", *key[1:]) if key[:1] == (section,) and key[1:] else key: place
                for key, place in draft.places.items()
            }
            inside = draft.values[section] = {"source": inside}
        if not isinstance(inside, dict):
            continue
        for name in names:
            written = inside.get(name)
            if isinstance(written, dict):
                draft.places = {_in_first_entry(key, (section, name)): place for key, place in draft.places.items()}
            if isinstance(written, str | dict):
                written = [written]
            if isinstance(written, list):
                inside[name] = [{"path": entry} if isinstance(entry, str) else entry for entry in written]


def _in_first_entry(key: Key, of: Key) -> Key:
    return (*of, "0", *key[2:]) if key[:2] == of and len(key) > 2 else key
