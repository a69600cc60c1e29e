"""Lets `python -m loralab.cli` run the command line."""

from loralab.cli import main

main()
