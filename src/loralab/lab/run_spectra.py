"""What a run's delta looks like inside, measured once at its end and kept in the run's folder."""

from contextlib import nullcontext
from io import BytesIO
from typing import Any

from torch import Tensor, nn

from loralab.base.targets import weight_of
from loralab.delta.linear import LowRankModule
from loralab.lab.prepare import Prepared
from loralab.run.folder import RunFolder, write_atomic
from loralab.spectral.spectrum import LIMIT, table


def write_spectra(folder: RunFolder, prepared: Prepared, step: int) -> list[str]:
    """Write `spectra.parquet`, a row per matrix of the delta, and give the names of those left out for their cost.

    Columns: `step`, and those of `loralab.spectral.spectrum.table`. Large dense changes are not even formed: together they
    take more memory than the model.

    Raises:
        DeltaError: the weights cannot show their change.
        Interrupted: the disk is full.
    """
    model = prepared.base.model
    left_out: list[str] = []

    def is_cheap(name: str, size: int) -> bool:
        if size > LIMIT:
            left_out.append(name)
        return size <= LIMIT

    delta = prepared.method.delta(is_cheap)
    with prepared.method.without() if delta else nullcontext():
        found, _ = table(delta, lambda name: _base_weight(model, name))
    found.insert(0, "step", step)
    written = BytesIO()
    found.to_parquet(written, index=False)
    write_atomic(folder.spectra, written.getvalue())
    return left_out


def _base_weight(model: nn.Module, name: str) -> Tensor:
    """View the base's weight (out, in) of a layer that may carry a delta."""
    module: Any = model.get_submodule(name)
    if isinstance(module, LowRankModule):
        module = module.base
    elif hasattr(module, "get_base_layer"):  # of the peft library
        module = module.get_base_layer()
    return weight_of(module)
