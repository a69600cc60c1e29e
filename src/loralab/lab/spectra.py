"""What a run's delta looks like inside, measured once at its end and kept in the run's folder."""

from io import BytesIO
from typing import Any

from torch import Tensor, nn

from loralab.base.targets import weight_of
from loralab.delta.linear import LowRankModule
from loralab.lab.prepare import Prepared
from loralab.run.folder import RunFolder, write_atomic
from loralab.spectral.spectrum import table


def write_spectra(folder: RunFolder, prepared: Prepared, step: int) -> list[str]:
    """Write `spectra.parquet`, a row per matrix of the delta, and give the names of those left out for their cost.

    Columns: `step`, and those of `loralab.spectral.spectrum.table`.
    """
    model = prepared.base.model
    delta = prepared.method.delta()
    with prepared.method.without():
        found, left_out = table(delta, lambda name: _base_weight(model, name))
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
