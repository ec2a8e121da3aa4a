"""Rows of kernels that only move numbers: from timed layers to rows and bytes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from clustersim.spec.kernel_tables import TableKey
from clustersim.study import layer_profiles
from clustersim.study.kernel_rows import Rows
from clustersim.study.layer_profiles import MOVES, Profile, per_layer, rows_of_layers
from clustersim.study.least_squares import Parameter
from clustersim.study.measured import Table

#: Up to so many rows PyTorch takes another kernel for its look-up, whose threads walk all rows in turn: the
#: time grows with every row to 2 to 4 times that of 32 rows, and falls back there.
#: Source: indexSelectSmallIndex in PyTorch's aten/src/ATen/native/cuda/Indexing.cu.
_WALKED_ROWS = 16
_WALKED = "look-up of 2 to 16 rows walks them in turn"

#: Vidur's timer counts whole microseconds.
_TIMER = 1e-6
_COARSE = "no longer than the timer's step of 1 us"

#: Half the heads of Qwen3-32B, on the profile's rank, are as many as Qwen3-30B-A3B has; yet their norms take
#: twice as long. Which of the two is right the profile does not say.
_QWEN3_32B = 5120.0
_WHOLE_HEADS = "twice the time of the same heads of Qwen3-30B-A3B"


def moved(profile: Profile) -> list[Rows]:
    """The layers of a profile that only move numbers, kernel by kernel."""
    found: list[Rows] = []
    for layer, (kernel, work) in MOVES.items():
        if not (profile.layer == layer).any():
            continue
        here, rows, per_token = per_layer(profile, layer, work)
        tokens = profile.widths["tokens"]
        columns = {"tokens": tokens * rows, "bytes": tokens * per_token}
        number_format = np.full(len(here), "bf16")
        left_out = _left_out(profile, layer)
        found.append(rows_of_layers(profile, kernel, here, columns, format=number_format, left_out=left_out))
    return found


def _left_out(profile: Profile, layer: str) -> np.ndarray:
    """str[M] reasons; those of the source come first."""
    tokens, hidden = profile.widths["tokens"], profile.widths["hidden"]
    rules = (
        (layer == "embedding") & (tokens > 1) & (tokens <= _WALKED_ROWS),
        (profile.library == "vidur") & (profile.measured <= _TIMER),
        (layer == "norm_of_heads") & (hidden == _QWEN3_32B),
    )
    reasons = np.select(rules, [_WALKED, _COARSE, _WHOLE_HEADS], default="")
    return np.where(profile.doubt != "", profile.doubt, reasons)


def _reader(name: str) -> Callable[..., list[Rows]]:
    read_profile = layer_profiles.PROFILES[name]

    def read(table: Table, file: str = name) -> list[Rows]:
        """Rows of the layers in a table of this form. Raises ClustersimError with the line of a wrong row."""
        return moved(read_profile(table, file))

    return read


#: Measured table → its reader: (table, file) to rows, several per kernel where layers differ.
READERS = {name: _reader(name) for name in layer_profiles.PROFILES}


#: Kernels whose row is spread over many thread blocks: nothing waits for a single one.
_SPREAD = ("residual", "embedding", "sampling")


def _start(key: TableKey) -> Mapping[str, Parameter]:
    """Where the search begins. With one or two widths measured, what a launch takes, how long a row waits and
    what L2 is worth can hardly be told apart: those are held near what they are for kernels with many."""
    # Sampling is several kernels: a cast, a maximum, a copy.
    launch = 1e-5 if key.kernel == "sampling" else 2e-6
    return {
        "launch": Parameter(launch, 3e-7, 3e-5, prior=0.3),
        "row": Parameter(1e12 if key.kernel in _SPREAD else 1.2e10, 1e8, 1e14),
        "bandwidth": Parameter(0.7, 0.05, 0.97, prior=1.0),
        "near": Parameter(1.7, 1.0, 6.0, prior=1.0),
        "resident": Parameter(1.0, 0.3, 3.0, prior=0.3),
    }


#: Kernel → key of a table → where its search begins, and how far it may go.
STARTS = dict.fromkeys((kernel for kernel, _ in MOVES.values()), _start)
