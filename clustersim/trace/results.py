"""The result folder of one run: whole or not there at all.

`<name>-<first 12 hex digits of the scenario's hash>/` holds scenario.toml, summary.json and trace/.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clustersim.errors import ResultError
from clustersim.trace import files
from clustersim.trace.plain import json_text, read_json
from clustersim.trace.record import Trace

SUMMARY = "summary.json"
SCENARIO = "scenario.toml"
TRACE = "trace"

_ATTEMPTS = 5


def write_result(folder: Path, scenario_toml: str, summary: Mapping[str, Any], trace: Trace | None) -> None:
    """Writes a result folder beside its place and moves it there when it is whole.

    folder         where it shall lie; an older result there is replaced
    scenario_toml  the resolved scenario
    summary        content of summary.json; what is not finite is written as null
    trace          what happened, or None for a run that failed
    Raises         ResultError if something else than a result lies at `folder`, or nothing can be
                   written there
    """
    try:
        refuse_foreign(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        # The dot keeps `newest` and people from taking it for a result.
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as workplace:
            fresh = Path(workplace) / "fresh"
            _fill(fresh, scenario_toml, summary, trace)
            _replace(folder, fresh, Path(workplace))
    except OSError as error:
        raise ResultError(f"{folder}: cannot be written: {error.strerror or error}") from error


def _fill(fresh: Path, scenario_toml: str, summary: Mapping[str, Any], trace: Trace | None) -> None:
    fresh.mkdir()
    (fresh / SCENARIO).write_text(scenario_toml, encoding="utf-8")
    if trace is not None:
        files.write(trace, fresh / TRACE)
    (fresh / SUMMARY).write_text(json_text(summary), encoding="utf-8")


def check_place(folder: Path) -> None:
    """Raises ResultError if a result could not be written there; leaves nothing behind."""
    refuse_foreign(folder)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=beside(folder)):
            pass
    except OSError as error:
        raise ResultError(f"{folder}: cannot be written: {error.strerror or error}") from error


def beside(folder: Path) -> Path:
    """The folder above it, or above that, which is there already."""
    return next(parent for parent in folder.absolute().parents if parent.exists())


def refuse_foreign(folder: Path) -> None:
    """Raises ResultError if something else than a result lies there."""
    if folder.is_dir():
        if not (folder / SUMMARY).is_file() and any(folder.iterdir()):
            raise ResultError(
                f"{folder}: holds files but no {SUMMARY}, so it is not a result and is not replaced"
            )
    elif folder.exists() or folder.is_symlink():
        raise ResultError(f"{folder}: is not a folder; a result cannot be written there")


def _replace(folder: Path, fresh: Path, workplace: Path) -> None:
    """Puts `fresh` in the place of `folder`, whose old content goes with the workplace.

    Another run of the same scenario may put its result there between the two moves, hence the attempts.
    """
    for attempt in range(_ATTEMPTS):
        old = workplace / f"old{attempt}"
        try:
            if folder.exists():
                folder.rename(old)
            fresh.rename(folder)
            return
        except BaseException as error:
            if old.exists() and not folder.exists():
                old.rename(folder)
            if not isinstance(error, OSError) or attempt == _ATTEMPTS - 1:
                raise


def read_summary(folder: Path) -> dict[str, Any]:
    """The content of the folder's summary.json.

    Raises   ResultError if there is none or it is damaged
    """
    return read_json(folder / SUMMARY, "missing, so its folder is not a result")


def newest(results_root: Path, name: str) -> Path | None:
    """The folder of the scenario's newest whole result, or None if it has none.

    name     of the scenario; `large_ep` does not find `large_ep_prefill-…`
    A result is whole if its summary can be read and does not tell of a failure.
    """
    if not results_root.is_dir():
        return None
    pattern = re.compile(re.escape(name) + r"-[0-9a-f]{12}")
    found = [path for path in results_root.iterdir() if pattern.fullmatch(path.name)]
    dated = sorted(((_written(path), path.name, path) for path in found), reverse=True)
    return next((path for written, _, path in dated if written and _is_whole(path)), None)


def _written(folder: Path) -> int:
    """When the summary was written, ns since 1970; 0 if there is none."""
    try:
        return (folder / SUMMARY).stat().st_mtime_ns
    except OSError:
        return 0


def _is_whole(folder: Path) -> bool:
    try:
        return "error" not in read_summary(folder)
    except ResultError:
        return False
