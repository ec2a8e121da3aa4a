"""One question: what did a run that lies in a result folder leave behind? Nothing is run again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustersim.analysis.schema import SCHEMA_VERSION, difference, misfit
from clustersim.analysis.summary import summarize
from clustersim.errors import ResultError, nearest
from clustersim.trace import files
from clustersim.trace.plain import check_regular, plain
from clustersim.trace.record import Trace
from clustersim.trace.results import SCENARIO, SUMMARY, TRACE, newest, read_summary

RESULTS = Path("results")

_FOLDER = re.compile(r"(.+)-[0-9a-f]{12}")
#: Keys of a summary that are no property of the trace.
_BESIDE = ("wall_seconds", "beside")
#: Names of results that a message lists at most.
_LISTED = 8


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """A result folder, of which tables are read as they are used.

    folder         where it lies
    summary        the content of summary.json
    scenario_text  the resolved scenario, TOML
    trace          what happened
    """

    folder: Path
    summary: dict[str, Any]
    scenario_text: str
    trace: Trace


def open_result(name: str | None, root: Path = RESULTS) -> Opened:
    """The result of that name.

    name     path of a result folder; name of a folder in `root`; name of a scenario, of which the newest
             result is meant; None: the newest of all
    root     where results lie
    Raises   ResultError where there is none of that name, with the nearest ones; where the folder holds
             something else, the run failed, or a part is missing, damaged or of another version
    """
    return _opened(find_result(name, root))


@contextmanager
def telling(opened: Opened) -> Iterator[None]:
    """For what tells of a stored summary: what fails because of a damaged one is said to be damage.

    Raises   ResultError where the summary has not the form of one that is reckoned anew from the trace
    """
    try:
        yield
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        beside = {key: opened.summary[key] for key in _BESIDE if key in opened.summary}
        wrong = difference(plain(summarize(opened.trace)) | beside, opened.summary)
        if not wrong:
            raise
        raise ResultError(f"{opened.folder / SUMMARY}: damaged: {wrong}") from None


def find_result(name: str | None, root: Path = RESULTS) -> Path:
    """The folder that a name means; otherwise as `open_result`."""
    if name is None:
        found = _newest_of_all(root)
        if found is None:
            raise ResultError(f"{root}: holds no result; `clustersim run FILE` leaves one")
        return found
    path = Path(name)
    # A folder of that name that is no result must not hide a scenario's results.
    for folder in (path, root / name):
        if (folder / SUMMARY).is_file():
            return folder
    found = newest(root, name)
    if found is not None:
        return found
    if path.is_dir():
        return path
    if path.is_file():
        if path.suffix == ".toml":
            raise ResultError(f"{name}: is a scenario and not a result; did you mean `{path.stem}`?")
        raise ResultError(f"{name}: is a file; a result is a folder, such as {root / 'large_ep-...'}")
    raise ResultError(f'"{name}" is no result{_near(name, root)}{_listing(root)}')


def is_result(name: str, root: Path = RESULTS) -> bool:
    """Whether some folder goes by that name."""
    try:
        find_result(name, root)
    except ResultError:
        return False
    return True


def _opened(folder: Path) -> Opened:
    if not (folder / SUMMARY).is_file():
        raise ResultError(f"{folder}: is not a result: there is no {SUMMARY} in it{_inside(folder)}")
    summary = read_summary(folder)
    if "error" in summary:
        raise ResultError(f"{folder}: the run failed, so there is nothing to look at: {summary['error']}")
    if summary.get("schema_version") == SCHEMA_VERSION and (wrong := misfit(summary)):
        raise ResultError(f"{folder / SUMMARY}: damaged: {wrong}")
    if not (folder / TRACE).is_dir():
        raise ResultError(f"{folder}: has no folder {TRACE}/, so what happened is not known")
    trace = files.read(folder / TRACE)
    ours, theirs = trace.facts.get("scenario_hash"), summary.get("scenario_hash")
    if ours != theirs:
        raise ResultError(
            f"{folder}: {SUMMARY} tells of scenario {theirs}, {TRACE}/ of {ours}: parts of two results"
        )
    return Opened(folder, _today(summary, trace), _scenario(folder), trace)


def _today(summary: dict[str, Any], trace: Trace) -> dict[str, Any]:
    """The summary in this version's form: one of another version is reckoned anew from the trace."""
    if summary.get("schema_version") == SCHEMA_VERSION:
        return summary
    beside: dict[str, Any] = {key: summary[key] for key in _BESIDE if key in summary}
    return {**summarize(trace), **beside}


def _scenario(folder: Path) -> str:
    path = folder / SCENARIO
    check_regular(path)
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ResultError(f"{path}: missing; the result is not whole") from None
    except (OSError, ValueError) as error:
        raise ResultError(f"{path}: damaged: {error}") from error


def _inside(folder: Path) -> str:
    """` (did you mean ...?)` where a folder of results, or a part of a result, was named."""
    if folder.name == TRACE and (folder.parent / SUMMARY).is_file():
        return f" (did you mean {folder.parent}?)"
    inner = _newest_of_all(folder)
    return "" if inner is None else f" (did you mean {inner}?)"


def _results(root: Path) -> Iterator[Path]:
    """Folders with a summary, by name."""
    try:
        inside = sorted(root.iterdir())
    except OSError:
        return
    yield from (path for path in inside if not path.name.startswith(".") and (path / SUMMARY).is_file())


def _newest_of_all(root: Path) -> Path | None:
    """The folder whose summary was written last and tells of no failure."""
    dated = sorted(((path / SUMMARY).stat().st_mtime_ns, path.name, path) for path in _results(root))
    return next((path for _, _, path in reversed(dated) if _whole(path)), None)


def _whole(folder: Path) -> bool:
    try:
        return "error" not in read_summary(folder) and (folder / TRACE).is_dir()
    except ResultError:
        return False


def _names(root: Path) -> list[str]:
    """What results may be called: scenarios and folders."""
    folders = [path.name for path in _results(root)]
    scenarios = [match.group(1) for folder in folders if (match := _FOLDER.fullmatch(folder))]
    return list(dict.fromkeys([*scenarios, *folders]))


def _near(name: str, root: Path) -> str:
    return nearest(Path(name).name, _names(root))


def _listing(root: Path) -> str:
    names = _names(root)
    if not names:
        return f"; {root} holds none"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"; {root} holds {', '.join(names[:_LISTED])}{more}"
