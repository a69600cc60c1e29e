"""Arguments and options that several commands share."""

from typing import Annotated

import typer

Recipe = Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides by dotted key.")]
Runs = Annotated[str, typer.Option("--runs", help="Folder that holds the run folders.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
