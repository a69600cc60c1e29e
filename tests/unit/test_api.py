"""The public names: each leads home, from the first use to the last, whatever was imported before."""

import subprocess
import sys

import pytest

import loralab

CALLABLE_TWICE = """
import loralab
assert callable(loralab.train) and callable(loralab.train)
import loralab.lab.experiment, loralab.training.loop
assert all(callable(getattr(loralab, name)) for name in loralab.__all__ for _ in range(2))
"""


def test_every_public_name_stays_callable() -> None:
    done = subprocess.run([sys.executable, "-c", CALLABLE_TWICE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_no_public_name_is_also_a_package() -> None:
    """A subpackage of the same name would take a function's place as soon as it is imported."""
    from pkgutil import iter_modules

    assert not set(loralab.__all__) & {module.name for module in iter_modules(loralab.__path__)}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="trian"):
        loralab.trian  # noqa: B018 - the access is the test
