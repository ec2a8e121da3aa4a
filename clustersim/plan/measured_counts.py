"""Measured counts and token-level expert ids that a scenario replays, unpacked."""

from __future__ import annotations

import numpy as np


def measured_shares(content: str, experts: int, layer: int) -> np.ndarray:
    """Shares of a layer's choices as they were measured, float64[E]."""
    raise NotImplementedError
