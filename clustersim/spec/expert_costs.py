"""What one kernel of an expert-exchange library costs: the parameters in catalogue/expert_exchange.toml."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from clustersim.spec.quantities import Fraction, Time, Value

PerByte = Annotated[float, Field(ge=0.0)]


class ExpertKernel(Value):
    """Dispatch or combine of one library; how they make a time stands in `physics/expert_exchange.py`.

    launch   s before the first row moves: starting the kernel, barrier, reading the counts
    expert   s per expert of the layer: every GPU clears, sends and polls a counter for each
    signal   s per expert outside the own NVLink domain: its counter travels as a network message
    network  s once, where members stand in several NVLink domains: notify phase, proxies
    target   s per rank that the first token goes to or comes from: flags, one after the other
    fill     s per byte of a row: the first row's way through the kernel, before rows overlap
    token    s of one SM per token it reads
    replica  s of one SM per copy of a token
    byte     s of one SM per byte of copies
    relay    s of one SM per byte that came over the network and is handed on inside the server
    message  s of a card (or of the thread that feeds it) per row
    nvlink   share of the data sheet's NVLink bandwidth that rows reach
    nic      share of the card's bandwidth that rows reach
    """

    launch: Time = 0.0
    expert: Time = 0.0
    signal: Time = 0.0
    network: Time = 0.0
    target: Time = 0.0
    fill: PerByte = 0.0
    token: Time = 0.0
    replica: Time = 0.0
    byte: PerByte = 0.0
    relay: PerByte = 0.0
    message: Time = 0.0
    nvlink: Fraction = 1.0
    nic: Fraction = 1.0
