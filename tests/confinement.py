"""Can this machine confine programs? Asked without the sandbox, so that a defect of it is never taken for a weak machine."""

import platform
import subprocess
import sys
from functools import cache

import pytest

PROBE = """
import ctypes
libc = ctypes.CDLL(None)
namespaces = 0x20000 | 0x4000000 | 0x8000000 | 0x10000000 | 0x20000000 | 0x40000000
raise SystemExit(libc.unshare(namespaces) or libc.mount(b"none", b"/", None, 0x44000, None))
"""


@cache
def _missing() -> str | None:
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return f"the sandbox confines programs on Linux, x86_64 or aarch64, not on {sys.platform}, {platform.machine()}"
    if subprocess.run([sys.executable, "-c", PROBE], timeout=60, check=False).returncode:
        return "this machine or container refuses user namespaces, so programs cannot be confined"
    return None


def need_confinement() -> None:
    """Skip the test where the machine offers no namespaces."""
    if (missing := _missing()) is not None:
        pytest.skip(missing)
