"""What `clustersim price` is asked for: a kernel by its name, or a file of rows."""

from __future__ import annotations

from pathlib import Path

from clustersim.errors import ClustersimError, nearest
from clustersim.physics.kernels import AUTO, KERNELS, LIBRARIES
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


def check_library(name: str) -> None:
    """Raises ClustersimError where no table is of that library."""
    known = dict.fromkeys((AUTO, *LIBRARIES, *(key.library for key in fitted_parameters())))
    if name not in known:
        raise ClustersimError(
            f'--library: "{name}" is not known{nearest(name, known)}; there are {", ".join(known)}'
        )
