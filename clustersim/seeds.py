"""One named random stream per subsystem, so that a new draw in one place shifts no number elsewhere."""

from __future__ import annotations

import hashlib

import numpy as np


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """An independent generator for this seed and these names.

    seed     the scenario's seed, >= 0
    names    what draws, e.g. ("gating", layer)
    Returns  a generator that depends on nothing else: not on call order, not on PYTHONHASHSEED
    """
    words = [int.from_bytes(hashlib.sha256(repr(name).encode()).digest()[:8], "little") for name in names]
    return np.random.default_rng(np.random.SeedSequence([seed, *words]))
