"""What all tests share: one thread, no network, no traces outside temporary folders, shapes checked by beartype."""

import os
import random
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep3119Exception
from hypothesis import settings
from jaxtyping import install_import_hook

import loralab

TOWER = BeartypeConf(is_pep484_tower=True)  # an int is a float, as type checkers see it
CACHE = tempfile.mkdtemp(prefix="loralab-tests-")
os.environ |= {  # before torch, transformers and datasets are imported: they read these once
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "MPLCONFIGDIR": CACHE,
    "HF_DATASETS_OFFLINE": "1",
    "HF_HOME": CACHE,
    "HF_DATASETS_CACHE": str(Path(CACHE, "datasets")),
    "LORALAB_CACHE": str(Path(CACHE, "loralab")),
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}


def check_types(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check a function's types with beartype, except where a Protocol cannot be checked at run time."""
    try:
        return beartype(conf=TOWER)(function)
    except BeartypeDecorHintPep3119Exception:
        return function


# The same examples in every run, however slow the machine; --hypothesis-profile=wide draws new ones.
settings.register_profile("steady", derandomize=True, deadline=None)
settings.register_profile("wide", max_examples=1000, deadline=None)
settings.load_profile("steady")

# The pocket world has no shapes to check, and draws items by the hundred thousand.
CHECKED = [f"loralab.{module.name}" for module in iter_modules(loralab.__path__) if module.name != "pocket"]
install_import_hook(CHECKED, f"{__name__}.{check_types.__name__}")


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Start every test from the same random state; torch and NumPy only where a test has imported them."""
    random.seed(0)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(0)
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def assets() -> Path:
    """Return the folder of real small models and data that LORALAB_ASSETS names."""
    if not os.environ.get("LORALAB_ASSETS"):
        pytest.skip("LORALAB_ASSETS is not set: tests on real models and data are skipped")
    return Path(os.environ["LORALAB_ASSETS"])
