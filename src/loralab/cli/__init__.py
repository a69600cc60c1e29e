"""The command line: commands parse, call and print. No logic lives here; each is one call of the public API."""

import sys

import typer

from loralab.cli import deltas, inside, machine, runs
from loralab.cli.recipes import recipes_app
from loralab.errors import Interrupted, LoralabError

app = typer.Typer(
    name="loralab",
    help="Fine-tune language models with low-rank methods; see what was learned, what was forgotten, and why.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    *(runs.train, runs.check),
    *(deltas.evaluate, inside.spectra, inside.repair, deltas.merge),
    *(runs.runs, runs.report, runs.demo, machine.doctor),
)
for command in COMMANDS:
    app.command()(command)
app.add_typer(recipes_app, name="recipes")


def main() -> None:
    """Run the command line; errors meant for the person become a message and an exit code."""
    try:
        app(standalone_mode=True)
    except LoralabError as error:
        print(f"loralab: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("loralab: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(Interrupted.exit_code)
