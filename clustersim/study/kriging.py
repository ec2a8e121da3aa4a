"""Between measured points: a Gaussian process with an exponential covariance, by its textbook formulas.

Source   Rasmussen, Williams: Gaussian Processes for Machine Learning, 2006, eq. 2.25 (prediction), 5.12
         (points left out). The exponential covariance makes no more of the points than that nearby calls
         behave alike: in one dimension it is nearly a straight line from point to point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Octaves over which curves stay alike, along the shape's coordinates and along the size's, that are
#: tried; and how much of the spread is taken for noise. The best at points left out is taken.
SCALES = ((1.5, 2.0), (3.0, 2.0), (3.0, 4.0), (6.0, 2.0), (6.0, 4.0), (12.0, 4.0))
NOISE = (0.01, 0.05, 0.2)

#: Points per block when many are asked for, to bound memory.
_BLOCK = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Surface:
    """What is known at measured points.

    at       float64[P, D] coordinates, octaves
    weights  float64[P]; scales float64[D], octaves
    inverse  float64[P, P] of the covariance
    values   float64[P] as given
    """

    at: np.ndarray
    values: np.ndarray
    scales: np.ndarray
    inverse: np.ndarray
    weights: np.ndarray


def surface(at: np.ndarray, values: np.ndarray, scales: np.ndarray, noise: float) -> Surface:
    """The process through values float64[P] at float64[P, D], with a mean of 0 far away."""
    covariance = _covariance(at / scales, at / scales)
    inverse = np.linalg.inv(covariance + noise * np.eye(len(at)))
    return Surface(at, values, scales, inverse, inverse @ values)


def best_surface(at: np.ndarray, values: np.ndarray, shapes: int, groups: np.ndarray) -> Surface:
    """The surface whose error at left-out groups is least.

    shapes  how many leading coordinates belong to the shape
    groups  int64[P] shape of each point
    """
    best, least = None, np.inf
    for along_shape, along_size in SCALES:
        scales = np.where(np.arange(at.shape[1]) < shapes, along_shape, along_size)
        for noise in NOISE:
            tried = surface(at, values, scales, noise)
            error = np.abs(left_out(tried, groups) - values)
            score = float(np.median(error) + 0.5 * np.quantile(error, 0.9))
            if score < least - 1e-9:
                best, least = tried, score
    assert best is not None
    return best


def predict(known: Surface, at: np.ndarray) -> np.ndarray:
    """float64[Q] at coordinates float64[Q, D]."""
    there = known.at / known.scales
    blocks: Sequence[np.ndarray] = [
        _covariance(at[start : start + _BLOCK] / known.scales, there) @ known.weights
        for start in range(0, len(at), _BLOCK)
    ]
    return np.concatenate(blocks) if blocks else np.zeros(0)


def left_out(known: Surface, groups: np.ndarray) -> np.ndarray:
    """float64[P] what the other groups foretell about the points of each group."""
    told = np.empty(len(groups))
    for group in np.unique(groups):
        here = np.flatnonzero(groups == group)
        own = np.linalg.solve(known.inverse[np.ix_(here, here)], known.weights[here])
        told[here] = known.values[here] - own
    return told


def _covariance(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """float64[Q, P] from coordinates in units of the scales."""
    square = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None] - 2.0 * one @ other.T
    return np.asarray(np.exp(-np.sqrt(np.maximum(square, 0.0))))
