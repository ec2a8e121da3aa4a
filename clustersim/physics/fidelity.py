"""The choice among network models: one name in the scenario, one Network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from clustersim.errors import pick
from clustersim.physics.chunked import USUAL, Chunked, Queues
from clustersim.physics.fluid import Fluid
from clustersim.physics.network import Network, PortBound


def build(fidelity: str, bandwidth: np.ndarray, chunk: float, queues: Queues = USUAL) -> Network:
    """A network without traffic.

    fidelity   a key of NETWORKS
    bandwidth  float64[K] nominal bytes/s of every link
    chunk      bytes of a chunk, > 0; only "chunked" looks at it
    queues     how chunks are served; only "chunked" looks at it
    Raises     ClustersimError if there is no such fidelity
    """
    return pick(NETWORKS, fidelity, where="network.fidelity")(bandwidth, chunk, queues)


def depths(network: Network, end: float) -> tuple[np.ndarray, np.ndarray]:
    """How many bytes waited for each link over time, as far as the network knows queues.

    end      when the run is over, s
    Returns  int[N] link, float64[N, 4] begin s, end s, mean bytes, most bytes
    """
    if isinstance(network, Chunked):
        return network.depths(end)
    return np.empty(0, dtype=np.intp), np.empty((0, 4))


NETWORKS: Mapping[str, Callable[[np.ndarray, float, Queues], Network]] = {
    "port_bound": lambda bandwidth, chunk, queues: PortBound(bandwidth),
    "fluid": lambda bandwidth, chunk, queues: Fluid(bandwidth),
    "chunked": Chunked,
}
