"""From a spec to the objects of a run, by its objective. Shared by `train` and `check`."""

from loralab.lab.prepare import Prepared, prepare_text
from loralab.spec.objective import TextSpec
from loralab.spec.spec import RunSpec


def prepare(spec: RunSpec) -> Prepared:
    """Load, read and attach.

    Raises:
        LoralabError: whatever is wrong with model, data, method or objective.
    """
    objective = spec.objective
    if isinstance(objective, TextSpec):
        return prepare_text(spec, objective)
    raise AssertionError(objective.name)
