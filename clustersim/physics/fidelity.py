"""The choice among network models: one name in the scenario, one Network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clustersim.errors import pick
from clustersim.physics import sharing
from clustersim.physics.chunked import USUAL, Chunked, Queues
from clustersim.physics.fluid import Fluid
from clustersim.physics.kernel import COMPILES
from clustersim.physics.network import Network, PortBound
from clustersim.physics.plain_fluid import PlainFluid


def build(
    fidelity: str, bandwidth: np.ndarray, chunk: float, queues: Queues = USUAL, tolerance: float = 0.0
) -> Network:
    """A network without traffic.

    fidelity   a key of NETWORKS
    bandwidth  float64[K] nominal bytes/s of every link
    chunk      of "chunked": bytes of a chunk, > 0
    queues     of "chunked": how chunks are served
    tolerance  of "fluid": for what share of its bytes a flow that has ended may still take bandwidth
    Raises     ClustersimError if there is no such fidelity
    """
    make = pick(NETWORKS, fidelity, where="network.fidelity")
    return make(bandwidth, chunk, queues, tolerance)


def wait(fidelity: str) -> str:
    """Why the first flows may take longer than usual, as a sentence; "" where they do not."""
    if fidelity != "fluid":
        return ""
    if not COMPILES:
        return "numba cannot be imported: the network runs in plain numpy, the same but slowly."
    kept: Any = sharing.advance
    place = kept.stats.cache_path
    if place is not None and any(Path(place).glob("sharing.advance-*.nbi")):
        return ""
    return "The network model is being compiled, once for this computer: some seconds."


def depths(network: Network, end: float) -> tuple[np.ndarray, np.ndarray]:
    """How many bytes waited for each link over time, as far as the network knows queues.

    end      when the run is over, s
    Returns  int[N] link, float64[N, 4] begin s, end s, mean bytes, most bytes
    """
    if isinstance(network, Chunked):
        return network.depths(end)
    return np.empty(0, dtype=np.intp), np.empty((0, 4))


#: The same model twice: as machine code, and where there is no numba in plain numpy.
FLUID = Fluid if COMPILES else PlainFluid

NETWORKS: Mapping[str, Callable[[np.ndarray, float, Queues, float], Network]] = {
    "port_bound": lambda bandwidth, chunk, queues, tolerance: PortBound(bandwidth),
    "fluid": lambda bandwidth, chunk, queues, tolerance: FLUID(bandwidth, tolerance),
    "chunked": lambda bandwidth, chunk, queues, tolerance: Chunked(bandwidth, chunk, queues),
}
