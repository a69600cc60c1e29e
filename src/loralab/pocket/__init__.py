"""A miniature world in which every claim can be tried with true accuracies in minutes: skills, graders, a small base."""

from pathlib import Path

BASE = Path(__file__).with_name("base")
"""The folder of the shipped base: weights, tokenizer, and the log of its pretraining."""
