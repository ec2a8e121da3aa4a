"""Field types of the specification: text with a unit on the outside, an SI float on the inside."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from clustersim.errors import UnitError
from clustersim.units import EXAMPLES, exact, parse, show

#: Beyond what can be meant, in SI units: so that no sum of a run leaves what a float can tell apart.
MOST = {"time": 1e9, "size": 1e21, "bandwidth": 1e18, "flop rate": 1e24, "power": 1e9, "frequency": 1e15}
#: Slower than any link, bytes/s; 0 is for what is not there.
LEAST_BANDWIDTH = 1.0


def _quantity(dimension: str) -> Any:
    def read(value: object) -> float:
        try:
            found = parse(value, dimension)
        except UnitError as error:
            raise ValueError(str(error)) from None
        if found > MOST[dimension]:
            raise ValueError(
                f'"{value}" is too much; at most {show(MOST[dimension], dimension)} can be meant'
            )
        if dimension == "bandwidth" and 0 < found < LEAST_BANDWIDTH:
            raise ValueError(f'"{value}" is too little; a link has at least 1 B/s')
        return found

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
Power = Annotated[float, *_quantity("power")]
Frequency = Annotated[float, *_quantity("frequency")]
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Whole = Annotated[int, Field(ge=0, le=10_000_000)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


class Value(BaseModel):
    """A frozen, strict value: unknown keys and silent conversions are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)
