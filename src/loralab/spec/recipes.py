"""Recipes: find a YAML file, read it with overrides into a spec, and explain, compare and write specs.

Precedence: default < recipe < `section.key=value`. Relative paths inside a recipe count from the current directory.
"""

import io
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import RoundTripRepresenter

from loralab.errors import LoralabError, SpecError, did_you_mean
from loralab.spec.draft import Draft, Key, dotted, read_draft
from loralab.spec.mistakes import report_mistakes, sections
from loralab.spec.spec import RunSpec

_PACKAGE = Path(__file__).parents[1]
SHIPPED_FOLDERS = (_PACKAGE / "recipes", _PACKAGE.parents[1] / "recipes")
"""Inside an installed package, and in a source checkout."""


class Explained(NamedTuple):
    """One key of a resolved spec: its value, where that came from, and what the key means."""

    key: str
    value: Any
    source: str
    """`default`, `recipe FILE:LINE` or `override "key=value"`."""
    meaning: str


def shipped() -> list[tuple[str, str]]:
    """List the shipped recipes: name, and what it is for (the first comment of the file)."""
    return [
        (file.stem, file.read_text(encoding="utf-8").partition("\n")[0].removeprefix("#").strip())
        for file in _shipped_files()
    ]


def find(name_or_path: str | Path) -> Path:
    """Return the file of a recipe, given as a path or as the name of a shipped recipe.

    Raises:
        LoralabError: if there is no such file or name.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    files = {file.stem: file for file in _shipped_files()}
    if str(name_or_path) in files:
        return files[str(name_or_path)]
    near = did_you_mean(path.stem, list(files))
    guess = f"did you mean {near}? " if near else ""
    raise LoralabError(
        f"there is no recipe {name_or_path}",
        where=str(name_or_path),
        fix=f"{guess}name a YAML file or a shipped recipe: {', '.join(files)}",
    )


def copy(name_or_path: str | Path, to: str | Path) -> Path:
    """Copy a recipe to a new file, or into a folder under its own name.

    Raises:
        LoralabError: there is no such recipe, or the new file exists already.
    """
    source, target = find(name_or_path), Path(to)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise LoralabError("the file exists already", where=str(target), fix="name a new file")
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        reason = error.strerror or str(error)
        raise LoralabError(f"cannot write: {reason}", where=str(target), fix="name a file in a folder") from None
    return target


def read(name_or_path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> RunSpec:
    """Read a recipe into a spec.

    The file's stem becomes the spec's `name` unless the recipe sets it.

    Args:
        name_or_path: a YAML file, or the name of a shipped recipe.
        overrides: `section.key=value`, the value YAML 1.2, lists reached into by index: `data.train.0.weight=2`.

    Raises:
        LoralabError: if there is no such recipe.
        SpecError: if anything in it or in the overrides is wrong; names every mistake at once.
    """
    return _resolve(_draft(name_or_path, overrides))


def preview(name_or_path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> list[str]:
    """Give the overrides with stand-ins for the base and the data where neither says them: to show, not to run."""
    draft = _draft(name_or_path, overrides)
    found = list(overrides)
    for section, key, stand_in in (("model", "path", "FOLDER"), ("data", "train", "FILE")):
        if key not in (draft.values.get(section) or {}):
            found.append(f"{section}.{key}={stand_in}")
    return found


def explain(name_or_path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> list[Explained]:
    """Tell for every key of the resolved spec its value, where that came from and what it means.

    Raises:
        LoralabError: as `read`.
    """
    draft = _draft(name_or_path, overrides)
    return [
        Explained(dotted(key), value, _source(draft, key, value), meaning)
        for key, value, meaning in _leaves(_resolve(draft))
    ]


def diff(a: RunSpec, b: RunSpec) -> list[tuple[str, Any, Any]]:
    """List the keys in which two specs differ, with both values; None where one of them has no such key."""
    of_a = {dotted(key): value for key, value, _ in _leaves(a)}
    of_b = {dotted(key): value for key, value, _ in _leaves(b)}
    pairs = ((key, of_a.get(key), of_b.get(key)) for key in of_a | of_b)
    return [(key, left, right) for key, left, right in pairs if left != right]


def dump(spec: RunSpec) -> str:
    """Write a spec as YAML from which `read` makes an equal spec."""
    yaml = YAML()
    yaml.Representer = _Representer
    text = io.StringIO()
    yaml.dump(spec.model_dump(), text)
    return text.getvalue()


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, which editors use to complete and check it."""
    return RunSpec.model_json_schema()


class _Representer(RoundTripRepresenter):
    """Writes null by name, and text with unusual line ends in quotes that keep them."""


def _represent_null(representer: RoundTripRepresenter, _: None) -> ScalarNode:
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _represent_text(representer: RoundTripRepresenter, text: str) -> ScalarNode:
    style = '"' if len(text.splitlines()) > 1 or text != text.strip() else None
    return representer.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Representer.add_representer(type(None), _represent_null)
_Representer.add_representer(str, _represent_text)


def _shipped_files() -> list[Path]:
    folder = next(folder for folder in SHIPPED_FOLDERS if folder.is_dir())
    return sorted(folder.glob("*.yaml"), key=lambda file: file.stem)


def _draft(name_or_path: str | Path, overrides: list[str] | tuple[str, ...]) -> Draft:
    """Read a recipe; give it its file's name and open the sections that it leaves out or leaves empty."""
    file = find(name_or_path)
    draft = read_draft(file, list(overrides))
    for section in sections():
        if draft.values.get(section) is None:
            draft.values[section] = {}
    draft.values.setdefault("name", file.stem)
    return draft


def _resolve(draft: Draft) -> RunSpec:
    try:
        spec = RunSpec.model_validate(draft.values)
    except ValidationError as error:
        if draft.legible:
            report_mistakes(draft, error)
    if draft.mistakes:
        in_order = sorted(draft.mistakes, key=lambda mistake: mistake[0])
        raise SpecError([error for _, error in in_order])
    return spec


def _leaves(model: BaseModel, key: Key = ()) -> Iterator[tuple[Key, Any, str]]:
    """Walk the values of a spec: key, value, and what the key means; the entries of a list of sections one by one."""
    for name, field in type(model).model_fields.items():
        value, inner = getattr(model, name), (*key, name)
        if isinstance(value, BaseModel):
            yield from _leaves(value, inner)
        elif isinstance(value, list) and value and isinstance(value[0], BaseModel):
            for index, entry in enumerate(value):
                yield from _leaves(entry, (*inner, str(index)))
        else:
            tag_meaning = type(model).__doc__ if name == "name" and key else None
            yield inner, value, field.description or tag_meaning or ""


def _source(draft: Draft, key: Key, value: Any) -> str:
    written: Any = draft.values
    for part in key:
        if isinstance(written, list):
            written = written[int(part)]
        elif isinstance(written, dict) and part in written:
            written = written[part]
        else:
            return "default"
    if written is None and value is not None:
        return "default"
    place = draft.place(key)
    return place.text if place.turn else f"recipe {place.text}"
