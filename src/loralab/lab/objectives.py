"""From a spec to the objects of a run, by its objective. Shared by `train` and `check`."""

from loralab.lab.policy import prepare_policy
from loralab.lab.prepare import Prepared, prepare_text
from loralab.lab.scored import prepare_scored
from loralab.spec.objective import ClassifySpec, RewardSpec, TextSpec
from loralab.spec.spec import RunSpec


def prepare(spec: RunSpec) -> Prepared:
    """Load, read and attach.

    Raises:
        LoralabError: whatever is wrong with model, data, method or objective.
    """
    objective = spec.objective
    if isinstance(objective, TextSpec):
        return prepare_text(spec, objective)
    if isinstance(objective, ClassifySpec | RewardSpec):
        return prepare_scored(spec, objective)
    return prepare_policy(spec, objective)
