"""The machine: which device and dtype to compute with, what is installed, and how much memory was used at most."""

import importlib.metadata
import os
import platform
import resource
import sys
from typing import Any

import torch

from loralab.errors import ModelError, did_you_mean
from loralab.run.folder import cores

PACKAGES = ("loralab", "torch", "transformers", "datasets", "safetensors", "peft", "bitsandbytes")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def choose_device(name: str = "auto") -> torch.device:
    """Turn a name into a device; `auto` is CUDA where there is one, else Apple's MPS, else the CPU.

    Raises:
        ModelError: the name is no device that this package computes on, or this machine has none of it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not number.isdecimal()):
        near = did_you_mean(kind, ["cpu", "cuda", "mps"])
        fix = f"did you mean {near!r}?" if near else "use auto, cpu, cuda, cuda:1 or mps"
        raise ModelError(f"there is no device {name!r}", where="model.device", fix=fix)
    present = {
        "cpu": 1,
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
    }[kind]
    if int(number or 0) >= present:
        raise ModelError(
            f"this machine has no {name}: {present} {kind} device(s) are visible to torch",
            where="model.device",
            fix="use model.device=auto; `loralab doctor` shows what is there",
        )
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Turn a name into a dtype; `auto` is bfloat16 on a CUDA device that computes with it, else float32.

    Raises:
        ModelError: float16, whose range is too small to train in, or an unknown name.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name == "float16":
        raise ModelError(
            "float16 cannot be trained here: its gradients underflow",
            where="model.dtype",
            fix="use float32 or bfloat16 (a float16 file is converted as it is loaded)",
        )
    if name not in DTYPES:
        near = did_you_mean(name, list(DTYPES))
        fix = f"did you mean {near!r}?" if near else f"use auto or one of {', '.join(DTYPES)}"
        raise ModelError(f"there is no dtype {name!r}", where="model.dtype", fix=fix)
    return DTYPES[name]


def installed(package: str) -> str | None:
    """Give the version of an installed package without importing it, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """Describe what decides which runs are possible here; plain values, sizes in bytes."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {package: installed(package) for package in PACKAGES},
        "cores": cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "device": str(choose_device()),
        "dtype": str(choose_dtype("auto", choose_device())).removeprefix("torch."),
        "accelerators": _accelerators(),
        "quantize": torch.cuda.is_available() and installed("bitsandbytes") is not None,
    }


def _accelerators() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        found[f"cuda:{index}"] = {
            "name": card.name,
            "memory_bytes": card.total_memory,
            "compute_capability": f"{card.major}.{card.minor}",
        }
    if torch.backends.mps.is_available():
        found["mps"] = {"name": platform.processor() or "Apple GPU"}
    return found


def peak_bytes() -> int:
    """Give the most memory used so far: tensors on the current CUDA device, else this process's resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return most if sys.platform == "darwin" else most * 1024


def refuse_quantize(quantize: str | None, device: torch.device) -> None:
    """Raise ModelError for a quantisation that there is not, or not here."""
    if quantize is None:
        return
    if quantize not in ("4bit", "8bit"):
        raise ModelError(f"there is no quantisation {quantize!r}", where="model.quantize", fix="use 4bit or 8bit")
    if device.type != "cuda":
        raise ModelError("quantising needs CUDA", where="model.quantize", fix="drop model.quantize on this machine")
    if installed("bitsandbytes") is None:
        raise ModelError(
            "quantising needs bitsandbytes", where="model.quantize", fix="install it: pip install 'loralab[bnb]'"
        )
