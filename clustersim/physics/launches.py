"""How much of a kernel's price is launching it: the constant that its formula begins with."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache
from typing import Any

import numpy as np

from clustersim.physics.kernels import KERNELS, has_guess
from clustersim.plan.stepgraph import Call
from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import TableKey, kernel_table


def launch_seconds(call: Call, gpu: Gpu, basis: TableKey | None) -> np.ndarray:
    """float64[R] s of launches in what a call was priced at, on every rank.

    basis    the table that the price rests on, None for none
    Returns  the launch of the formula, of the costlier way where it has several; what a measured curve
             makes of the whole is not made of it
    """
    kernel = KERNELS[call.kernel]
    ranks = len(next(iter(call.columns.values())))
    if basis is None:
        guessed = asdict(kernel.unmeasured) if has_guess(kernel, gpu) else {}
        return np.full(ranks, _launch(guessed, gpu.launch_latency))
    parameters = _parameters(basis)
    if basis.kernel != call.kernel:
        assert kernel.share is not None
        whole = KERNELS[basis.kernel].parameters(**kernel_table(basis).parameters)
        return kernel.share(gpu, call.format, whole, call.columns) * _launch(parameters, gpu.launch_latency)
    # A part of a layer that was timed by itself is one kernel; its parameters are those of the layer.
    alone = {} if kernel.share is not None else parameters
    return np.full(ranks, _launch(alone, gpu.launch_latency))


def _launch(parameters: dict[str, Any], least: float) -> float:
    """least: s of the least kernel, in which some families count"""
    if "launches" in parameters:
        return float(parameters["launches"]) * least
    return max(
        (float(parameters[name]) for name in ("launch", "lone_launch") if name in parameters), default=least
    )


@cache
def _parameters(basis: TableKey) -> dict[str, Any]:
    kernel = KERNELS[basis.kernel]
    return asdict(kernel.parameters(**kernel_table(basis).parameters))
