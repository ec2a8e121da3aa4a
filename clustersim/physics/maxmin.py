"""Max-min fair rates of flows that share links, from nothing: progressive filling in plain numpy."""

from __future__ import annotations

import numpy as np

#: Links whose fair share differs by less are filled together; it bounds the error of the rates, and
#: keeps roundoff among the equal ports of a symmetric exchange from being shared out port by port.
_SAME = 1e-12


def max_min_rates(
    weight: np.ndarray, links: np.ndarray, capacity: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The max-min fair rates of flows that share links.

    weight    float64[F] share weights, > 0
    links     int[F, P] the links each flow crosses, padded with -1
    capacity  float64[K] bytes/s, >= 0
    Returns   float64[F] bytes/s, inf for an empty path, and int[F] for each flow a full link on
              which no flow has a larger rate per weight, -1 for an empty path
    Source    progressive filling: Bertsekas, Gallager, Data Networks, 2nd ed., section 6.5.2
    """
    table = np.where(links < 0, len(capacity), links).T
    rate, bottleneck = np.full(len(weight), np.inf), np.full(len(weight), -1)
    rows = np.flatnonzero((links >= 0).any(axis=1))
    _fill(weight, table, np.append(capacity, np.inf), rows, rate, bottleneck)
    return rate, bottleneck


def _fill(
    weight: np.ndarray,
    table: np.ndarray,
    room: np.ndarray,
    rows: np.ndarray,
    rate: np.ndarray,
    bottleneck: np.ndarray,
) -> None:
    """Sets rate and bottleneck of those rows that are not shared out yet.

    table  int[P, F] links, padded with K
    room   float64[K + 1] what the other flows leave; the last entry is no link
    rows   int[O] flows with at least one link

    All links that are the smallest to every one of their flows are filled in one go: the number of
    rounds is the depth of who waits for whom, not the number of distinct rates.
    """
    bins = len(room)
    if len(rows) < len(weight):
        weight, table = weight[rows], table[:, rows]
    with np.errstate(divide="ignore", invalid="ignore"):
        while len(rows):
            load = _on_links(table, weight, bins)
            share = np.where(load > 0, room / load, np.inf)
            share[-1] = np.inf
            level = share[table]
            lowest = level.min(axis=0)
            full = load > 0
            full[table[lowest * (1 + _SAME) < level]] = False
            full[-1] = False
            crossed = full[table]
            settled = crossed.any(axis=0)
            done, rest = settled.nonzero()[0], (~settled).nonzero()[0]
            filled = weight[done] * lowest[done]
            rate[rows[done]] = filled
            bottleneck[rows[done]] = table[crossed.argmax(axis=0)[done], done]
            if not len(rest):
                return
            room = np.maximum(room - _on_links(table[:, done], filled, bins), 0.0)
            rows, weight, table = rows[rest], weight[rest], table[:, rest]


def _on_links(table: np.ndarray, amount: np.ndarray, bins: int) -> np.ndarray:
    """The sum of float64[F] amounts on each link, float64[bins]."""
    return np.bincount(table.ravel(), np.concatenate((amount,) * len(table)), bins)
