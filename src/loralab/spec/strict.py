"""What every spec class shares: strictness, and the kinds of values."""

from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
)
from pydantic_core import PydanticCustomError

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Betas = Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
Patterns = Annotated[
    list[str],
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given, json_schema_input_type=str | list[str]),
]


def contradiction(key: str, what: str, fix: str) -> PydanticCustomError:
    """Make the error for keys that do not go together.

    Args:
        key: dotted key to blame, from the root of the recipe.
        what: what is wrong with them.
        fix: what to do next.
    """
    return PydanticCustomError("contradiction", "{what}", {"key": key, "what": what, "fix": fix})


class Strict(BaseModel):
    """A frozen model that refuses unknown keys and silent conversions."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Grown(Strict):
    """A model that got keys after runs had been begun: where they say nothing they are left out, so that specs keep their hash."""

    LATER: ClassVar[tuple[str, ...]] = ()
    """Keys that came later; None is what was before there were any."""

    @model_serializer(mode="wrap")
    def _as_before_there_were_the_keys(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = dump(self)
        return {key: value for key, value in found.items() if key not in self.LATER or value is not None}
