"""What `clustersim price` is asked for: a kernel by its name, or a file of rows."""

from __future__ import annotations

from pathlib import Path

from clustersim.errors import ClustersimError, nearest
from clustersim.physics.kernels import AUTO, KERNELS, LIBRARIES
from clustersim.spec.formats import formats_of, rate_key
from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import fitted_parameters


def kernel_asked(what: str) -> str:
    """The kernel of that name, with "-" or "_"; "" where a file is meant.

    Raises   ClustersimError where it is neither
    """
    name = what.replace("-", "_")
    if name in KERNELS:
        return name
    if Path(what).suffix or Path(what).exists():
        return ""
    kernels = [kernel.replace("_", "-") for kernel in KERNELS]
    raise ClustersimError(
        f'"{what}" is no kernel{nearest(what, kernels)} and no file; kernels are {", ".join(kernels)}'
    )


def check_format(gpu: Gpu, form: str, where: str) -> None:
    """Raises ClustersimError where a GPU does not compute in a format.

    where   what asked for it, for the message
    """
    if rate_key(form) not in gpu.flop_rate:
        raise ClustersimError(
            f'{where}: {gpu.name} does not compute in "{form}"; it has {", ".join(formats_of(gpu))}'
        )


def check_library(name: str) -> None:
    """Raises ClustersimError where no table is of that library."""
    known = dict.fromkeys((AUTO, *LIBRARIES, *(key.library for key in fitted_parameters())))
    if name not in known:
        raise ClustersimError(
            f'--library: "{name}" is not known{nearest(name, known)}; there are {", ".join(known)}'
        )
