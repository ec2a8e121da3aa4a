"""What `clustersim price` is asked for: a kernel by its name, or a file of rows."""

from __future__ import annotations

from pathlib import Path

from clustersim.errors import ClustersimError, nearest
from clustersim.physics.kernels import AUTO, LIBRARIES
from clustersim.spec.formats import formats_of, multiplied_as, rate_key
from clustersim.spec.hardware import Gpu
from clustersim.spec.kernel_tables import fitted_parameters
from clustersim.study.kernel_flags import FLAGS

#: Instead of a file's name: standard input.
STANDARD_INPUT = "-"
#: s: a kernel that takes longer is a mistake in its sizes.
LONGEST = 1e6
TOO_LONG = f"would take more than {LONGEST:g} s; no kernel is so large"


def kernel_asked(what: str) -> str:
    """The kernel of that name, with "-" or "_"; "" where a file is meant.

    Raises   ClustersimError where it is neither
    """
    name = what.replace("-", "_")
    if name in FLAGS:
        return name
    if what == STANDARD_INPUT or Path(what).suffix or Path(what).exists():
        return ""
    kernels = [kernel.replace("_", "-") for kernel in FLAGS]
    raise ClustersimError(
        f'"{what}" is no kernel{nearest(what, kernels)} and no file; kernels are {", ".join(kernels)}'
    )


def lacks_format(gpu: Gpu, form: str) -> str:
    """Why a GPU does not compute in a format, and what it does instead; "" where it does."""
    if rate_key(form) in gpu.flop_rate:
        return ""
    there = f'{gpu.name} does not compute in "{form}"; it has {", ".join(formats_of(gpu))}'
    other = multiplied_as(gpu, form)
    return there if other == form else f"{there}; weights in {form} are multiplied as bf16 there: {other}"


def check_library(name: str) -> None:
    """Raises ClustersimError where no table is of that library."""
    known = dict.fromkeys((AUTO, *LIBRARIES, *(key.library for key in fitted_parameters())))
    if name not in known:
        raise ClustersimError(
            f'--library: "{name}" is not known{nearest(name, known)}; there are {", ".join(known)}'
        )
