"""Other people's traffic: a folder with links.csv and flows.csv becomes a Traffic value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clustersim.errors import ClustersimError, Mistake, ScenarioError
from clustersim.physics.replay import Traffic
from clustersim.trace.csv import Lists, Sheet, read_csv
from clustersim.trace.record import Text

LINKS = {"link_id": "id", "name": "text", "bw_GBps": "number", "lat_us": "number"}
FLOWS = {
    "flow_id": "id",
    "src": "text",
    "dst": "text",
    "bytes": "number",
    "start_us": "number",
    "after": "ids",
    "path": "ids",
}
#: Column → least and most that is allowed; with these no time can overflow.
_ALLOWED = {
    "bw_GBps": (1e-9, 1e9),
    "lat_us": (0.0, 1e9),
    "bytes": (0.0, 1e18),
    "start_us": (0.0, 1e12),
}
MOST_LINKS_OF_A_PATH = 256
#: Flows times links of the longest path: the paths are held as one table.
MOST_CELLS = 1 << 27
_GB = 1e9
_US = 1e-6
_CIRCLE_SHOWN = 8


@dataclass(frozen=True, eq=False, slots=True)
class Case:
    """Traffic, and what its files call things.

    traffic   flows and links in the order of their files
    flow      int64[F] id of each flow
    source    label per flow
    target    label per flow
    link      int64[K] id of each link
    name      of each link
    """

    traffic: Traffic
    flow: np.ndarray
    source: Text
    target: Text
    link: np.ndarray
    name: Text


def read_case(folder: Path) -> Case:
    """Reads links.csv and flows.csv, or the same with `.gz`; where both are there, the plain one.

    Raises   ScenarioError with the mistakes of the first file that has any
    """
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "there is no such folder"
        raise ClustersimError(f"{folder}: {problem}; a case is a folder with links.csv and flows.csv")
    links_file, flows_file = (_file(folder, name) for name in ("links.csv", "flows.csv"))
    links = read_csv(links_file, LINKS)
    _check_values(links, "link_id")
    flows = read_csv(flows_file, FLOWS)
    _check_values(flows, "flow_id")
    path = flows.lists("path")
    on_path = _known(flows, "path", path, links)
    after = flows.lists("after")
    waited_for = _known(flows, "after", after, flows)
    flows.check()
    table = _table(flows, path, on_path)
    _check_circles(flows, after, waited_for)
    latency = np.append(links.numbers("lat_us") * _US, 0.0)
    traffic = Traffic(
        bandwidth=links.numbers("bw_GBps") * _GB,
        size=flows.numbers("bytes"),
        start=flows.numbers("start_us") * _US,
        latency=latency[table].sum(axis=1),
        links=table,
        after_first=after.first,
        after=waited_for,
    )
    ends = flows.text("src"), flows.text("dst")
    return Case(traffic, flows.numbers("flow_id"), *ends, links.numbers("link_id"), links.text("name"))


def _file(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise ScenarioError(str(folder / name), [Mistake("", f"there is no such file, nor {name}.gz beside it")])


def _check_values(sheet: Sheet, ids: str) -> None:
    """Ids stand once; numbers lie in what is allowed."""
    for column, (least, most) in _ALLOWED.items():
        if column in sheet.columns:
            values = sheet.numbers(column)

            def problem(row: int, column: str = column, least: float = least, most: float = most) -> str:
                said = sheet.said(column, row)
                if column == "bw_GBps" and sheet.numbers(column)[row] <= 0:
                    return f"{said} is not a bandwidth; it must be more than 0, at least {least:g}"
                return f"{said} is not allowed; it must be at least {least:g} and at most {most:g}"

            # NaN is told of already, as no number.
            sheet.refuse(column, ((values < least) | (values > most)) & np.isfinite(values), problem)
    numbers = sheet.numbers(ids)
    if (np.diff(numbers) <= 0).any():
        order = np.argsort(numbers, kind="stable")
        again = order[1:][np.diff(numbers[order]) == 0]

        def where(row: int) -> str:
            first = int(np.flatnonzero(numbers == numbers[row])[0])
            return f"{numbers[row]} stands in row {sheet.line(first)} already; each id stands once"

        sheet.refuse(ids, np.sort(again), where)
    sheet.check()


def _known(sheet: Sheet, column: str, wanted: Lists, others: Sheet) -> np.ndarray:
    """int64[all] the rows of `others` that the ids of a column of lists mean; notes the unknown ones."""
    ids = others.numbers("link_id" if column == "path" else "flow_id")
    order = None if (np.diff(ids) > 0).all() else np.argsort(ids, kind="stable")
    ordered = ids if order is None else ids[order]
    at = np.minimum(np.searchsorted(ordered, wanted.values), len(ids) - 1)
    unknown = ordered[at] != wanted.values

    def problem(row: int) -> str:
        cells = slice(wanted.first[row], wanted.first[row + 1])
        bad = wanted.values[cells][unknown[cells]][0]
        near = ordered[max(at[cells][unknown[cells]][0] - 1, 0) :][:2]
        nearest = near[np.argmin(np.abs(near.astype(float) - float(bad)))]
        what = "link" if column == "path" else "flow"
        return (
            f"there is no {what} {bad} in {others.path.name} (did you mean {nearest}?); "
            f"its {len(ids):,} ids lie between {ordered[0]} and {ordered[-1]}"
        )

    if unknown.any():
        sheet.refuse(column, np.unique(wanted.rows()[unknown]), problem)
    elif column == "after":
        myself = np.unique(wanted.rows()[_places(at, order) == wanted.rows()])
        sheet.refuse(column, myself, lambda row: f"flow {ids[row]} waits for itself; it would never begin")
    return _places(at, order)


def _places(at: np.ndarray, order: np.ndarray | None) -> np.ndarray:
    return at if order is None else order[at]


def _table(sheet: Sheet, path: Lists, on_path: np.ndarray) -> np.ndarray:
    """int32[F, P] the paths side by side, padded with -1."""
    lengths = np.diff(path.first)
    longest = max(int(lengths.max()), 1)
    sheet.refuse(
        "path",
        lengths > MOST_LINKS_OF_A_PATH,
        lambda row: f"{lengths[row]:,} links; a path has at most {MOST_LINKS_OF_A_PATH}",
    )
    if len(lengths) * longest > MOST_CELLS and longest <= MOST_LINKS_OF_A_PATH:
        problem = f"{len(lengths):,} flows with paths of up to {longest} links do not fit into memory"
        at_most = f"at most {MOST_CELLS:,} for flows times links of the longest path"
        sheet.refuse("path", lengths == longest, lambda _: f"{problem}; {at_most}")
    sheet.check()
    table = np.full((len(lengths), longest), -1, dtype=np.int32)
    table[np.arange(longest) < lengths[:, None]] = on_path
    ordered = np.sort(table, axis=1)
    twice = ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)).any(axis=1)
    sheet.refuse(
        "path",
        twice,
        lambda row: f"{sheet.said('path', row)} crosses a link twice; a flow takes each link once",
    )
    sheet.check()
    return table


def _check_circles(sheet: Sheet, after: Lists, waited_for: np.ndarray) -> None:
    """Refuses flows that wait for each other in a circle."""
    rows = after.rows()
    # Where everybody waits for earlier rows only, which is usual, there can be no circle.
    if (waited_for < rows).all():
        return
    waiting = _never_released(after, rows, waited_for)
    if waiting is None:
        return
    row = int(np.flatnonzero(waiting)[0])
    seen: dict[int, int] = {}
    while row not in seen:
        seen[row] = len(seen)
        awaited = waited_for[after.first[row] : after.first[row + 1]]
        row = int(awaited[waiting[awaited]][0])
    circle = list(seen)[seen[row] :]
    ids = sheet.numbers("flow_id")
    named = [str(ids[flow]) for flow in circle]
    if len(named) > _CIRCLE_SHOWN:
        named = [*named[: _CIRCLE_SHOWN - 1], f"... ({len(named) - _CIRCLE_SHOWN + 1:,} more)"]
    told = " waits for ".join([*named, str(ids[row])])
    sheet.refuse("after", np.array([row]), lambda _: f"flows wait in a circle: {told}; none would ever begin")
    sheet.check()


def _never_released(after: Lists, rows: np.ndarray, waited_for: np.ndarray) -> np.ndarray | None:
    """bool[F] flows that wait for a circle or stand in one; None if there is no circle."""
    flows = len(after.first) - 1
    followers = rows[np.argsort(waited_for, kind="stable")].tolist()
    first = np.concatenate([[0], np.cumsum(np.bincount(waited_for, minlength=flows))]).tolist()
    missing = np.diff(after.first).tolist()
    ready = [flow for flow, count in enumerate(missing) if not count]
    for flow in ready:
        for follower in followers[first[flow] : first[flow + 1]]:
            missing[follower] -= 1
            if not missing[follower]:
                ready.append(follower)
    return None if len(ready) == flows else np.array(missing) > 0
