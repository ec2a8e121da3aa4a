"""Field types of the specification: text with a unit on the outside, an SI float on the inside."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from clustersim.errors import UnitError
from clustersim.units import EXAMPLES, exact, parse


def _quantity(dimension: str) -> Any:
    def read(value: object) -> float:
        try:
            return parse(value, dimension)
        except UnitError as error:
            raise ValueError(str(error)) from None

    return (
        BeforeValidator(read),
        PlainSerializer(lambda value: exact(value, dimension), return_type=str),
        WithJsonSchema(
            {
                "type": "string",
                "description": f"a {dimension}",
                "examples": [EXAMPLES[dimension]],
                "pattern": r"^\s*[-+]?[0-9.]",
            }
        ),
    )


Time = Annotated[float, *_quantity("time")]
Size = Annotated[float, *_quantity("size")]
Bandwidth = Annotated[float, *_quantity("bandwidth")]
FlopRate = Annotated[float, *_quantity("flop rate")]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Whole = Annotated[int, Field(ge=0, le=10_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Value(BaseModel):
    """A frozen, strict value: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
