"""The rate at which a GPU computes in a number format."""

from __future__ import annotations

from clustersim.errors import ClustersimError
from clustersim.spec.hardware import Gpu

#: Formats without a rate of their own → the one whose arithmetic they use: fp8 with a scale for every block
#: of 128 numbers multiplies in fp8 and applies the scales beside it.
SAME_RATE = {"fp8_block": "fp8"}
#: The same of weights that are unpacked first, which every GPU can and none is said to have.
UNPACKED = {"w4a16": "bf16"}


def multiplied_as(gpu: Gpu, fmt: str) -> str:
    """How a GPU multiplies weights held in a format: fp4 as w4a16 where it has no rate for fp4.

    Source   vLLM and SGLang serve gpt-oss on Hopper so (Marlin and Triton kernels for MXFP4)
    """
    return "w4a16" if fmt == "fp4" and "fp4" not in gpu.flop_rate else fmt


def rate_key(fmt: str) -> str:
    """The key of `Gpu.flop_rate` under which a format's rate stands."""
    return (SAME_RATE | UNPACKED).get(fmt, fmt)


def flop_rate_of(gpu: Gpu, fmt: str) -> float:
    """Dense FLOP/s of the GPU in a number format.

    Raises   ClustersimError that names GPU, format and what the GPU has
    """
    if rate_key(fmt) not in gpu.flop_rate:
        raise ClustersimError(missing_format(gpu, fmt))
    return gpu.flop_rate[rate_key(fmt)]


def missing_format(gpu: Gpu, fmt: str) -> str:
    """The sentence for a format in which the GPU does not compute."""
    return f'"{fmt}" has no flop_rate on {gpu.name}; it has {", ".join(formats_of(gpu))}'


def formats_of(gpu: Gpu) -> list[str]:
    """The formats the GPU computes in, with those that share another one's rate."""
    return sorted([*gpu.flop_rate, *(fmt for fmt, other in SAME_RATE.items() if other in gpu.flop_rate)])
