"""Robust least squares of log errors: few positive parameters, many measured times.

Levenberg-Marquardt over the logarithms of the parameters with Huber weights. Plain numpy: the
problems are small, and whoever validates needs nothing else installed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from clustersim.units import show

#: Errors beyond this, as log ratio, count linearly: rows of odd configurations do not rule.
_HUBER = 0.1
_ROUNDS = 60
#: A row speaks about a parameter if its time grows or shrinks by at least this share of the
#: parameter's own small change.
_SPEAKS = 0.05
_NUDGE = 1e-4
#: Log-scale spread of a prior that only keeps a parameter where it is about which no row speaks.
FREE = 30.0


@dataclass(frozen=True, slots=True)
class Parameter:
    """One number to be fitted.

    start      where the search begins, SI; stays where no row speaks about it
    low, high  bounds, SI; both positive
    dimension  a key of units.UNITS, or "" for a plain number
    prior      log-scale spread around `start` beyond which the fit is held back; the default only
               keeps a parameter that nothing speaks about where it is
    """

    start: float
    low: float
    high: float
    dimension: str = ""
    prior: float = FREE


@dataclass(frozen=True, slots=True)
class Fitted:
    """A fitted number and where it comes from.

    value     as in a scenario: text with a unit, or a plain number; three digits
    rows      how many rows speak about it
    residual  median |log(predicted / measured)| of these rows
    files     measured tables they stand in
    """

    value: str | float
    rows: int
    residual: float
    files: tuple[str, ...]


def inline(one: Fitted) -> str:
    """As one line of a catalogue file."""
    value = f'"{one.value}"' if isinstance(one.value, str) else repr(one.value)
    files = ", ".join(f'"{file}"' for file in one.files)
    return f"{{ value = {value}, rows = {one.rows}, residual = {one.residual!r}, files = [{files}] }}"


def fit(
    parameters: Mapping[str, Parameter],
    model: Callable[[Mapping[str, float]], np.ndarray],
    measured: np.ndarray,
    files: np.ndarray,
    weight: np.ndarray | None = None,
) -> dict[str, Fitted]:
    """The parameters for which the model is nearest to what was measured.

    model     parameters, SI → float64[N] s
    measured  float64[N] s
    files     str[N] table of each row
    weight    float64[N] how much a row counts; default 1
    """
    names = list(parameters)
    start = np.log([parameters[name].start for name in names])
    low = np.log([parameters[name].low for name in names])
    high = np.log([parameters[name].high for name in names])
    held = 1.0 / np.array([parameters[name].prior for name in names])
    root = np.sqrt(np.ones(len(measured)) if weight is None else weight)

    def errors(at: np.ndarray) -> np.ndarray:
        values: np.ndarray = np.log(model(dict(zip(names, np.exp(at), strict=True))) / measured)
        return values

    at = _minimise(errors, start, low, high, held, root) if len(measured) else start
    return _told(parameters, names, at, errors, files)


def _minimise(
    errors: Callable[[np.ndarray], np.ndarray],
    start: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    held: np.ndarray,
    root: np.ndarray,
) -> np.ndarray:
    at, damping = start.copy(), 1e-2
    found = errors(at)
    cost = _cost(found, root, at - start, held)
    for _ in range(_ROUNDS):
        jacobian = _jacobian(errors, at, found, low, high)
        weight = root**2 * np.minimum(1.0, _HUBER / np.maximum(np.abs(found), 1e-12))
        normal = jacobian.T @ (weight[:, None] * jacobian) + np.diag(held**2)
        slope = jacobian.T @ (weight * found) + held**2 * (at - start)
        better = False
        while damping < 1e8 and not better:
            step = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), slope)
            tried = np.clip(at - step, low, high)
            tried_errors = errors(tried)
            tried_cost = _cost(tried_errors, root, tried - start, held)
            better = tried_cost < cost
            damping = damping / 5 if better else damping * 5
        if not better:
            break
        gain = (cost - tried_cost) / cost
        at, found, cost = tried, tried_errors, tried_cost
        if gain < 1e-6:
            break
    return at


def _cost(errors: np.ndarray, root: np.ndarray, moved: np.ndarray, held: np.ndarray) -> float:
    size = np.abs(errors)
    huber = np.where(size <= _HUBER, 0.5 * size**2, _HUBER * (size - 0.5 * _HUBER))
    return float((root**2 * huber).sum() + 0.5 * ((held * moved) ** 2).sum())


def _jacobian(
    errors: Callable[[np.ndarray], np.ndarray],
    at: np.ndarray,
    found: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
) -> np.ndarray:
    columns = []
    for k in range(len(at)):
        moved = at.copy()
        moved[k] += _NUDGE if at[k] + _NUDGE <= high[k] else -_NUDGE
        columns.append((errors(moved) - found) / (moved[k] - at[k]))
    return np.stack(columns, axis=1)


def _told(
    parameters: Mapping[str, Parameter],
    names: Sequence[str],
    at: np.ndarray,
    errors: Callable[[np.ndarray], np.ndarray],
    files: np.ndarray,
) -> dict[str, Fitted]:
    found = errors(at) if len(files) else np.empty(0)
    told = {}
    for k, name in enumerate(names):
        moved = at.copy()
        moved[k] += _NUDGE
        speaks = np.abs(errors(moved) - found) >= _SPEAKS * _NUDGE if len(files) else np.zeros(0, dtype=bool)
        residual = float(np.median(np.abs(found[speaks]))) if speaks.any() else 0.0
        told[name] = Fitted(
            _rounded(float(np.exp(at[k])), parameters[name].dimension),
            int(speaks.sum()),
            round(residual, 4),
            tuple(sorted(set(files[speaks].tolist()))),
        )
    return told


def _rounded(value: float, dimension: str) -> str | float:
    return show(value, dimension).replace(",", "") if dimension else float(f"{value:.3g}")
