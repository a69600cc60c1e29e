"""Fine-tune language models with low-rank methods, and see what was learned, what was forgotten, and why.

    import loralab

    spec = loralab.recipe("sft-lora", ["model.path=FOLDER", "data.train=FILE"])
    result = loralab.train(spec)
    print(result.score("target/loss"), result.folder.delta)

Everything the command line does is one call here. Names are imported when they are first used, so that `import loralab`
stays quick and without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralab.base.model import load as load_base
    from loralab.delta.store import load_lowrank as load_delta
    from loralab.errors import LoralabError
    from loralab.lab.check import check
    from loralab.lab.engines import train_all
    from loralab.lab.evaluate import evaluate
    from loralab.lab.experiment import train
    from loralab.lab.index import index as runs
    from loralab.lab.merging import merge
    from loralab.lab.repair import repair
    from loralab.lab.repair import sweep as repair_sweep
    from loralab.lab.spectra import spectra
    from loralab.report.page import write as write_report
    from loralab.spec.recipes import read as recipe
    from loralab.spec.spec import RunSpec

__version__ = "0.1.0"

_HOMES = {
    "LoralabError": "loralab.errors:LoralabError",
    "RunSpec": "loralab.spec.spec:RunSpec",
    "check": "loralab.lab.check:check",
    "evaluate": "loralab.lab.evaluate:evaluate",
    "load_base": "loralab.base.model:load",
    "load_delta": "loralab.delta.store:load_lowrank",
    "merge": "loralab.lab.merging:merge",
    "repair": "loralab.lab.repair:repair",
    "repair_sweep": "loralab.lab.repair:sweep",
    "recipe": "loralab.spec.recipes:read",
    "runs": "loralab.lab.index:index",
    "spectra": "loralab.lab.spectra:spectra",
    "train": "loralab.lab.experiment:train",
    "train_all": "loralab.lab.engines:train_all",
    "write_report": "loralab.report.page:write",
}

__all__ = [
    "LoralabError",
    "RunSpec",
    "check",
    "evaluate",
    "load_base",
    "load_delta",
    "merge",
    "recipe",
    "repair",
    "repair_sweep",
    "runs",
    "spectra",
    "train",
    "train_all",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'loralab' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute)
