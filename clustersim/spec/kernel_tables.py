"""Fitted kernel tables: catalogue/kernels.toml (parameters) and catalogue/kernels.npz (measured curves).

Both are written by `python -m clustersim.study.fit kernels`. A parameter stands there with the number of
rows and the files that speak about it; a curve is the ratio of measured to computed time on a grid of
log2 coordinates whose nodes go through every measured point.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, NamedTuple, TypeAlias

import numpy as np

#: Steps of `far` as stored: 1/8 octave.
FAR_STEP = 0.125


class TableKey(NamedTuple):
    """What a table speaks about.

    kernel   a key of physics.kernels.KERNELS
    gpu      a name of the catalogue
    format   of the operands, a key of spec.model.FORMAT_BYTES
    library  whose kernels were timed
    """

    kernel: str
    gpu: str
    format: str
    library: str


@dataclass(frozen=True, slots=True, eq=False)
class KernelTable:
    """A formula's parameters for one key and the measured curves laid over it.

    parameters  name → value, SI
    axes        per coordinate ascending float64 nodes, log2
    ratio       float64 grid: log(measured / computed) at the nodes
    far         float64 grid: octaves from a node to the nearest measured point, 0 at such a point
    """

    key: TableKey
    parameters: Mapping[str, float]
    axes: tuple[np.ndarray, ...]
    ratio: np.ndarray
    far: np.ndarray


Parameters: TypeAlias = Mapping[TableKey, Mapping[str, Mapping[str, Any]]]


@cache
def fitted_parameters() -> Parameters:
    """Key → parameter → {value, rows, residual, files} as in catalogue/kernels.toml."""
    file = resources.files("clustersim.catalogue").joinpath("kernels.toml")
    if not file.is_file():
        return {}
    found = tomllib.loads(file.read_text("utf-8"))
    return {
        TableKey(kernel, gpu, form, library): parameters
        for kernel, gpus in found.items()
        for gpu, forms in gpus.items()
        for form, libraries in forms.items()
        for library, parameters in libraries.items()
    }


@cache
def _curves() -> Mapping[str, np.ndarray]:
    file = resources.files("clustersim.catalogue").joinpath("kernels.npz")
    with resources.as_file(file) as path:
        # Kept open: the members are read one by one, as they are asked for.
        return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]


@cache
def kernel_table(key: TableKey) -> KernelTable:
    """The table of a key of `fitted_parameters`; read once."""
    name, curves = "/".join(key), _curves()
    ratio = curves[f"{name}/ratio"].astype(float)
    return KernelTable(
        key,
        {parameter: float(one["value"]) for parameter, one in fitted_parameters()[key].items()},
        tuple(curves[f"{name}/axis{d}"] for d in range(ratio.ndim)),
        ratio,
        curves[f"{name}/far"] * FAR_STEP,
    )


def packed(table: KernelTable) -> dict[str, np.ndarray]:
    """A table's curves as catalogue/kernels.npz holds them; `kernel_table` reads them back."""
    name = "/".join(table.key)
    stored = {f"{name}/axis{d}": axis for d, axis in enumerate(table.axes)}
    far = np.minimum(np.ceil(table.far / FAR_STEP), 255).astype(np.uint8)
    return {**stored, f"{name}/ratio": table.ratio.astype(np.float16), f"{name}/far": far}
