"""The page of a spectra folder: intruders, ranks and spectra of deltas over one base, matrix by matrix."""

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from loralab.report import intruders, maps, panels, provenance, spectra, subspaces, trajectories
from loralab.report.drawing import BASE_COLOUR, marker_path
from loralab.report.figures import Drawn
from loralab.report.inside_tables import intruder_rows, matrix_rows, summary_rows
from loralab.report.read import printable
from loralab.report.rendering import inlined, rendered
from loralab.report.spectra_folder import Inside, short
from loralab.report.trajectories import many
from loralab.report.wording import duration, joined, share, whole

MOST_MAPS = 4
"""Deltas that get maps and panels of their own; of more, the first ones."""


def render(inside: Inside, name: str) -> str:
    """Give the page as text; `name` is what the person calls the folder."""
    return rendered(
        "inside.html.j2",
        name=name,
        kind="inside",
        chips=[(model.name, model.label, model.colour) for model in inside.models],
        chips_of="deltas",
        base=printable(str(inside.facts.get("base") or "unknown")),
        setting=inside.setting,
        k=inside.k,
        epsilon=f"{inside.epsilon:g}",
        verdicts=[(model.label, *verdict(inside, model.name)) for model in inside.models],
        more=_more(inside),
        owners={delta: owner(inside, delta) for delta in inside.deltas},
        summary=summary_rows(inside),
        figures={part: inlined(drawn) for part, drawn in figures(inside).items()},
        matrices=matrix_rows(inside),
        intruders=intruder_rows(inside),
        problems=_problems(inside),
        notes=_notes(inside),
        facts=_facts(inside),
    )


def figures(inside: Inside) -> dict[str, list[Drawn]]:
    """Draw everything, by the part of the page it stands in; parts without a figure are empty."""
    shown, models = inside.subjects, inside.models
    told = _keys([model.name for model in models])
    first = [one for one in shown if one.folder in told][:MOST_MAPS]
    counted = _counted(inside)
    with_some = [one for one in first if one.table["intruders"].sum() > 0]
    where = [maps.of_the_model(one, counted, f"intruders-{told[one.folder]}", _BLANK) for one in with_some]
    leading = [intruders.leading(inside, model, f"leading-{told[model.name]}") for model in models[:MOST_MAPS]]
    similar = [
        figure
        for model in models[: MOST_MAPS // 2]
        for figure in intruders.similar(inside, model, f"similar-{told[model.name]}")
    ]
    settings = [intruders.by_epsilon(inside, "by-epsilon"), *_counts(inside, told)]
    ranks = [maps.of_the_model(one, SHARE_OF_RANK, f"rank-{told[one.folder]}", _RANK) for one in first]
    values = [panels.by_kind(one, f"values-{told[one.folder]}") for one in first]
    made: dict[str, list[Drawn | None]] = {
        "where": where,
        "over": list(trajectories.of_chains(inside, "over")),
        "leading": leading,
        "similar": list(similar),
        "settings": list(settings),
        "spectra": [*spectra.drawn(shown, "change"), *values],
        "ranks": ranks,
        "subspaces": [subspaces.with_base(inside, "base-overlap"), *subspaces.of_deltas(inside, "overlap")],
    }
    alone = models[0].label if len(models) == 1 else ""
    return {part: [_titled(figure, alone) for figure in drawn if figure is not None] for part, drawn in made.items()}


def _titled(figure: Drawn, alone: str) -> Drawn:
    """Leave a delta's name out of a title where there is no other."""
    title = figure.title
    for name in (short(alone), alone) if alone else ():
        title = title.removeprefix(f"{name}: ").removeprefix(f"{name}, ")
    return replace(figure, title=title if title == figure.title or "." in title else title[:1].upper() + title[1:])


def _keys(names: list[str]) -> dict[str, str]:
    """Give each delta a word for the names of its figures' files."""
    words = {name: intruders.slug(name) for name in names}
    taken = list(words.values())
    return {n: word if taken.count(word) == 1 else f"{word}-{i}" for i, (n, word) in enumerate(words.items(), start=1)}


def _counts(inside: Inside, told: dict[str, str]) -> list[Drawn | None]:
    """Draw the maps of k and ε, all with the same tints."""
    k, epsilon = inside.k, inside.epsilon
    tables = [(model, intruders.counts(inside, model.name)) for model in inside.models[:MOST_MAPS]]
    full = max((float(table["high"].max()) for _, table in tables), default=1.0)
    return [maps.of_counts(model, t, k, epsilon, f"counts-{told[model.name]}", full) for model, t in tables]


def _counted(inside: Inside) -> maps.Measure:
    """Count intruders; the strongest tint is the largest cell of any delta."""
    title = f"intruders by block and kind of layer ({inside.setting})"
    most = max(
        (one.table.groupby(["depth", "module"])["intruders"].sum().max() for one in inside.subjects), default=1.0
    )
    return maps.Measure("intruders", title, "sum", float(most), many, lambda value: f"{value:.0f}")


_BLANK = "Blank: there is no such matrix, or it could not be measured."
SHARE_OF_RANK = maps.Measure(
    "rank90_share",
    "share of its rank that holds 90 % of the change",
    "median",
    1.0,
    lambda value: f"{100 * value:.0f} % of the rank holds 90 % of the energy",
    lambda value: f"{100 * value:.0f}",
)
_RANK = "In percent: directions that hold 90 % of the energy, of those the change can have. Low: capacity lies idle."


# In words


def verdict(inside: Inside, delta: str) -> tuple[str, str, str]:
    """Say how many intruders a delta has, where and how large; how it spreads; and what limits that."""
    table = inside.matrices[inside.matrices["delta"] == delta]
    there = table[table["problem"] == ""]
    if there.empty:
        return "None of its matrices could be measured.", "", ""
    vectors = inside.vectors_of(delta)
    found = vectors[vectors["intruder"]]
    limits = []
    if vectors.empty:
        said = "Its leading vectors were not measured."
    elif found.empty:
        said = (
            f"No intruder in its {_matrices(len(there))} ({inside.setting}): each leading direction of the tuned weights "
            "resembles one of the base."
        )
    else:
        held = trajectories.counted(vectors)["energy"][0]
        said = (
            f"{many(len(found))} in {found['layer'].nunique()} of {_matrices(len(there))} "
            f"({inside.setting}), {_where(inside, found)}; {'it holds' if len(found) == 1 else 'they hold'} {share(held)} "
            f"of the energy of the {inside.k} leading vectors (mean over matrices)."
        )
    if "stable" in vectors and (shaky := int((~vectors["stable"]).sum())):
        limits.append(
            f"{shaky} of {len(vectors)} verdicts are unstable: a neighbour of nearly the same singular value makes the "
            "vector arbitrary."
        )
    if len(there) < len(table):
        limits.append(f"{_matrices(len(table) - len(there))} could not be measured; they are listed below.")
    return said, _spread(there), " ".join(limits)


def _matrices(count: int) -> str:
    return f"{count} {'matrix' if count == 1 else 'matrices'}"


def _where(inside: Inside, found: pd.DataFrame) -> str:
    """Name the kinds of layer and the block with most intruders."""
    by_kind = found.groupby("kind", sort=False).size().sort_values(ascending=False, kind="stable")
    few = [f"{kind} ({count})" for kind, count in by_kind.head(3).items()]
    rest = len(by_kind) - len(few)
    said = f"most in {joined(few)}" if rest else f"in {joined(few)}"
    depth = inside.matrices.drop_duplicates("layer").set_index("layer")["depth"].reindex(found["layer"])
    by_block = depth[depth >= 0].value_counts()
    if len(by_block) > 1:
        top = by_block[by_block == by_block.max()].index.min()
        said += f"; the most in one block in block {top:.0f} ({by_block.max()})"
    return said


def _spread(there: pd.DataFrame) -> str:
    """Say how many directions hold the change, and how large it is."""
    needed, most = (float(pd.to_numeric(there[column], errors="coerce").median()) for column in ("rank90", "rank"))
    if not np.isfinite(needed) or not most:
        return ""
    said = f"A change needs {needed:g} of {most:g} directions for 90 % of its energy (medians)"
    size = pd.to_numeric(there.get("relative_norm", pd.Series(dtype=float)), errors="coerce").dropna()
    return said + (f"; its norm is {share(float(size.median()))} of the base weight's." if len(size) else ".")


def _more(inside: Inside) -> str:
    """Say which deltas have no figure of their own."""
    steps = {name for chain in inside.chains if chain.way == "step" for _, name in chain.places[:-1]}
    left = len(inside.deltas) - len(inside.models) - len(steps)
    said = [f"Of a run's checkpoints, the last stands for the run; the {len(steps)} others are in the trajectories."]
    said = said if steps else []
    if left > 0:
        said.append(f"Figures show the first {len(inside.models)} deltas; {left} more are in the tables.")
    if len(inside.models) > MOST_MAPS:
        said.append(f"Maps are drawn for the first {MOST_MAPS}, similarities for the first {MOST_MAPS // 2}.")
    return " ".join(said)


def owner(inside: Inside, delta: str) -> dict[str, Any]:
    """Give what rows and names of a delta carry: a checkpoint is shown and hidden with the last of its run."""
    last = {name: chain.places[-1][1] for chain in inside.chains if chain.way == "step" for _, name in chain.places}
    model = next((model for model in inside.models if model.name == last.get(delta, delta)), None)
    icon = marker_path(model.marker if model else "o")
    ink = model.colour if model else BASE_COLOUR
    method = model.name if model else delta
    return {"folder": delta, "method": method, "label": printable(delta), "icon": icon, "colour": ink, "state": ""}


# What limits it, where it comes from


def _problems(inside: Inside) -> list[tuple[str, str, str]]:
    rows = inside.matrices[inside.matrices["problem"] != ""]
    return [(str(row.delta), str(row.layer), str(row.problem)) for row in rows.itertuples(index=False)]


def _notes(inside: Inside) -> list[str]:
    """Give the folder's notes, and those of its matrices, counted."""
    told = inside.facts.get("notes")
    said = [printable(str(note)) for note in told] if isinstance(told, list) else []
    for note, rows in inside.matrices[inside.matrices["note"] != ""].groupby("note", sort=False):
        said.append(f"{note}: {_matrices(len(rows))}.")
    return said


def _facts(inside: Inside) -> list[tuple[str, str, bool]]:
    """Give what stands at the end of the page: a word, its value, whether the value is written as code."""
    where = provenance.of_environment(provenance.plain(inside.facts.get("environment")))
    seconds = provenance.plain(inside.facts.get("cost")).get("seconds")
    exact = "two dense decompositions in float64" if inside.facts.get("exact") else "certified or dense, per vector"
    rows = [("k", f"{inside.k} leading left singular vectors of each tuned weight", False)]
    rows += [("ε", f"{inside.epsilon:g}", False), ("Verdicts", exact, False)]
    rows.append(("Vectors", whole(len(inside.vectors)), False))
    rows.append(("Time", duration(seconds) if isinstance(seconds, int | float) else "", False))
    rows.append(("Base", str(inside.facts.get("base") or ""), True))
    for delta, told in provenance.plain(inside.facts.get("deltas")).items():
        told = provenance.plain(told)
        kind = f"{told['kind']}, " if told.get("kind") else ""
        rows.append((f"Delta {printable(str(delta))}", f"{kind}{told.get('path') or ''}", True))
    rows += [("Command", where["command"], True), ("Date", where["date"], False), ("Machine", where["hardware"], False)]
    rows += [("Versions", where["versions"], False), ("Commit", where["commit"], True)]
    return [row for row in rows if row[1]]
