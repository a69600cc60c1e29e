"""Runs, their comparison, and what follows from it."""
