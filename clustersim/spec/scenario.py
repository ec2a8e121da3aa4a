"""The first paper: what was asked."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from clustersim.spec.deployment import Deployment
from clustersim.spec.hardware import TopologySpec
from clustersim.spec.model import Model
from clustersim.spec.quantities import Value
from clustersim.spec.workload import Beside, Claimed, Fault, Gating, Network, TraceLevel, Workload


class Scenario(Value):
    """Everything a run depends on; equal scenarios give equal bytes.

    name         letters, digits, "_" and "-"; names the result folder
    description  for people: what this is and which assumptions it makes
    seed         of every random stream
    topology     the machine: a TOML file, or a table with `family`
    model        a name from the catalogue, or a table
    deployment   how the model is cut over the GPUs
    workload     what has to be done
    gating       how popular the experts are
    beside       another gating that the run is compared with
    network      how finely links are simulated
    trace        how much is written down
    faults       what goes wrong, one table each
    claimed      what a document says, for comparison
    """

    name: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")
    description: str = ""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    topology: TopologySpec
    model: Model
    deployment: Deployment
    workload: Workload
    gating: Gating = Gating()
    beside: Beside | None = None
    network: Network = Network()
    trace: TraceLevel = TraceLevel()
    faults: tuple[Fault, ...] = ()
    claimed: Claimed | None = None

    @field_validator("faults", mode="before")
    @classmethod
    def _list_is_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value
