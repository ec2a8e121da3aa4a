"""`clustersim measure`: times the kernels of a GPU and leaves CSV files in the forms of the measured tables.

How a time is taken, so that it can stand beside the measured files:

cold      Every repetition reads another set of inputs. There are as many sets as push twice the L2 cache
          through it before one is used again, 256 at most: smaller inputs may stay in L2, where the launch
          is all they cost. So no time can lie under what HBM bandwidth allows.
random    Inputs are normal random numbers. Zeros draw less power and run faster than real data.
launch    Calls are recorded once in a CUDA graph and replayed: the gap between two kernels of a graph is
          in the time, the host is not. Where a kernel cannot be recorded, it is called, one call after the
          other between two events; the line's kernel_source or source then says "eager".
median    A replay holds enough calls to last half a millisecond; the time of a call is that of the replay
          by its calls. The row holds the median of the replays; cases.csv holds how far they spread.
clocks    Are left as they are: nothing is locked, so that long products are throttled as they are in
          service. machine.csv holds the clocks before and, where nothing broke off, after.

A row that beats the data sheet (more FLOP/s than the peak, or inputs read faster than HBM can) is not
written: the cache or the clock has been measured, not the kernel.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.spec.formats import rate_key
from clustersim.spec.hardware import Gpu
from clustersim.spec.reading import read_catalogue
from clustersim.spec.references import catalogue_name, not_in_catalogue
from clustersim.study.kernel_cases import (
    Case,
    Form,
    bytes_needed,
    form_of,
    key,
    least_seconds,
    row,
    title,
)
from clustersim.study.pack import read_csv
from clustersim.trace.csv import write_csv

#: Share of the free GPU memory that a case may take; the rest is for libraries' workspaces.
ROOM = 0.85
#: A measured time may lie under the data sheet's by this share: boost clocks, and event resolution.
SLACK = 0.02
#: Rows between two writings of a file: what a crash of the machine can cost.
_AT_ONCE = 20

CASES = "cases.csv"
MACHINE = "machine.csv"


class CannotRunError(Exception):
    """A case that this machine or its libraries cannot run; the text says why, in one line."""


class Backend(Protocol):
    """What times kernels: PyTorch on a GPU (`study.torch_timing`), or a fake in tests."""

    def machine(self) -> Machine:
        """What is measured, as it is now."""
        ...

    def run(self, case: Case) -> Timing:
        """Times one case; CannotRunError where that is impossible."""
        ...


@dataclass(frozen=True, slots=True)
class Machine:
    """What a measurement was made on.

    device     what the driver calls the GPU
    framework  library and version, as the column of that name has it: "torch 2.9.0"
    memory     GPU memory that is free, bytes
    cache      L2, bytes
    facts      anything else that may explain a time (driver, clocks), by name
    """

    device: str
    framework: str
    memory: float
    cache: float
    facts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Timing:
    """seconds: of one call, one per repetition; kernel_source: what was called."""

    seconds: Sequence[float]
    kernel_source: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one case.

    result       measured, kept (from an earlier session), no room, cannot run, or too fast
    why          for those not measured
    repetitions  how many there were; fastest, median and slowest are of them, s
    """

    case: Case
    result: str
    why: str = ""
    repetitions: int = 0
    fastest: float = 0.0
    median: float = 0.0
    slowest: float = 0.0


Row: TypeAlias = dict[str, str | float]


def gpu_name(device: str, wished: str = "") -> tuple[str, str]:
    """What to write into the column gpu, and a sentence of warning or "".

    device  what the driver says: a name or alias in the catalogue, or written as it is
    wished  the user's --gpu, which takes its place
    Raises  ClustersimError for a --gpu that no CSV cell should hold
    """
    name = wished.strip() or device
    if not name.isprintable() or set(name) & set('",;'):
        raise ClustersimError(f"--gpu: {name!r} is no name; write one of `clustersim catalogue`, or your own")
    found = catalogue_name("gpus", name)
    if found is not None:
        return found, ""
    return name, f"{not_in_catalogue('gpus', name)}; --gpu says what to write into the rows"


def measure(
    cases: Iterable[Case],
    backend: Backend,
    folder: Path,
    gpu: str,
    resume: bool = False,
    tell: Callable[[int, int], None] = lambda done, all_: None,
) -> list[Outcome]:
    """Times the cases and writes one CSV per form, cases.csv and machine.csv.

    gpu      what to write into the column gpu
    resume   keep the rows that lie in the folder, and measure what they lack
    tell     is told how many cases are done, of how many
    Returns  what came of each case, in their order
    Raises   ClustersimError before anything is measured if the folder holds rows and `resume` is off, or
             rows of another GPU or library. Interrupted or not, every file written is whole.
    """
    cases = list(dict.fromkeys(cases))
    machine = backend.machine()
    sheets = _sheets(cases, folder, gpu, machine.framework, resume)
    _make(folder)
    log, outcomes = _Log(folder, resume), []
    limit = _least(gpu)
    _write_machine(folder / MACHINE, gpu, machine, {})
    try:
        for done, case in enumerate(cases):
            tell(done, len(cases))
            outcome = _one(case, backend, machine, sheets[form_of(case).file], limit)
            outcomes.append(outcome)
            log.add(outcome)
        tell(len(cases), len(cases))
    finally:
        for sheet in sheets.values():
            sheet.write()
        log.write()
    _write_machine(folder / MACHINE, gpu, machine, backend.machine().facts)
    return outcomes


def _one(case: Case, backend: Backend, machine: Machine, sheet: _Sheet, limit: _Limit) -> Outcome:
    if sheet.has(case):
        return Outcome(case, "kept")
    needed, room = bytes_needed(case, machine.cache), ROOM * machine.memory
    if needed > room:
        return Outcome(case, "no room", f"takes {needed / 2**30:.1f} GiB of {room / 2**30:.1f} GiB")
    try:
        timing = backend.run(case)
    except CannotRunError as error:
        return Outcome(case, "cannot run", str(error))
    seconds = np.sort(np.asarray(timing.seconds, dtype=float))
    if not len(seconds) or not np.all(np.isfinite(seconds)) or seconds[0] <= 0:
        return Outcome(case, "cannot run", "no time came back that is above zero")
    median = float(np.median(seconds))
    spread = (len(seconds), float(seconds[0]), median, float(seconds[-1]))
    if median < (1 - SLACK) * (least := limit(case)):
        why = f"{median * 1e6:.4g} us, where the data sheet allows {least * 1e6:.4g} us"
        return Outcome(case, "too fast", why, *spread)
    sheet.add(case, median, timing.kernel_source)
    return Outcome(case, "measured", "", *spread)


_Limit: TypeAlias = Callable[[Case], float]


def _least(gpu: str) -> _Limit:
    """The data sheet's bound of a case; 0 for a GPU that is not in the catalogue."""
    sheet = read_catalogue("gpus").get(gpu)
    if not isinstance(sheet, Gpu):
        return lambda case: 0.0
    fastest = max(sheet.flop_rate.values())

    def least(case: Case) -> float:
        rate = sheet.flop_rate.get(rate_key(getattr(case, "format", "bf16")), fastest)
        return least_seconds(case, rate, sheet.memory_bandwidth)

    return least


class _Sheet:
    """The rows of one CSV file: those that lay there, then those that are measured."""

    def __init__(self, path: Path, form: Form, identity: Mapping[str, str], rows: list[Row]) -> None:
        self.path, self.form, self.identity = path, form, identity
        self.rows = rows
        self.unwritten = 0
        self.keys: set[tuple[str, ...]] | None = None

    def has(self, case: Case) -> bool:
        """Whether a row of the case is there."""
        if self.keys is None:
            names = tuple(form_of(case).cells(case))
            self.keys = {tuple(str(row[name]) for name in names) for row in self.rows}
        return key(case) in self.keys

    def add(self, case: Case, seconds: float, kernel_source: str) -> None:
        """Notes a measured case, and writes the file now and then."""
        source = f"clustersim measure: {kernel_source}, {self.identity['framework']}"
        identity = {**self.identity, "kernel_source": kernel_source, "source": source}
        self.rows.append(row(case, seconds, identity))
        assert self.keys is not None
        self.keys.add(key(case))
        self.unwritten += 1
        if self.unwritten >= _AT_ONCE:
            self.write()

    def write(self) -> None:
        """Puts the file in its place, whole; leaves it alone where nothing is new."""
        if self.unwritten:
            _write(self.path, self.rows, self.form.columns)
            self.unwritten = 0


def _sheets(cases: Sequence[Case], folder: Path, gpu: str, framework: str, resume: bool) -> dict[str, _Sheet]:
    identity = {"gpu": gpu, "framework": framework}
    forms = {form_of(case).file: form_of(case) for case in cases}
    sheets: dict[str, _Sheet] = {}
    for file, form in forms.items():
        path = folder / file
        if path.exists() and not resume:
            raise ClustersimError(
                f"{path}: is there already; --resume keeps its rows, --out names another place"
            )
        sheets[file] = _Sheet(path, form, identity, _kept(path, form, identity) if path.exists() else [])
    return sheets


def _kept(path: Path, form: Form, identity: Mapping[str, str]) -> list[Row]:
    """The rows of an earlier session; ClustersimError if they are of another form, GPU or library."""
    columns = read_csv(path)
    if tuple(columns) != form.columns:
        wanted = ",".join(form.columns)
        raise ClustersimError(f"{path}: cannot be resumed: its heading is not {wanted}")
    rows: list[Row] = [
        {name: values[k].item() for name, values in columns.items()} for k in range(len(columns["time_us"]))
    ]
    for number, old in enumerate(rows, 2):
        for name in ("gpu", "framework"):
            if name in old and str(old[name]) != identity[name]:
                raise ClustersimError(
                    f"{path}: row {number}, {name}: cannot be resumed: it was measured with "
                    f'"{old[name]}", this is "{identity[name]}"; name another folder with --out'
                )
    return rows


class _Log:
    """cases.csv: what came of every case, with the spread of its repetitions."""

    columns = ("case", "result", "why", "repetitions", "fastest_us", "median_us", "slowest_us")

    def __init__(self, folder: Path, resume: bool) -> None:
        self.path = folder / CASES
        self.rows: dict[str, Row] = {}
        if resume and self.path.exists():
            columns = read_csv(self.path)
            if tuple(columns) != self.columns:
                raise ClustersimError(
                    f"{self.path}: cannot be resumed: it is not a log of `clustersim measure`"
                )
            for k, name in enumerate(columns["case"]):
                self.rows[str(name)] = {c: values[k].item() for c, values in columns.items()}

    def add(self, outcome: Outcome) -> None:
        """The newest word on a case; a row that was kept keeps its spread, too."""
        name = title(outcome.case)
        if outcome.result == "kept" and name in self.rows:
            return
        values = (outcome.fastest, outcome.median, outcome.slowest)
        times = [float(f"{value * 1e6:.5g}") for value in values]
        cells: tuple[str | float, ...] = (name, outcome.result, outcome.why, outcome.repetitions, *times)
        self.rows[name] = dict(zip(self.columns, cells, strict=True))

    def write(self) -> None:
        """Puts the file in its place, whole."""
        if self.rows:
            _write(self.path, list(self.rows.values()), self.columns)


def _write_machine(path: Path, gpu: str, before: Machine, after: Mapping[str, str]) -> None:
    facts = {
        "gpu": gpu,
        "device": before.device,
        "framework": before.framework,
        "L2, bytes": f"{before.cache:.0f}",
        "free memory, bytes": f"{before.memory:.0f}",
        **{f"{name}, before": value for name, value in before.facts.items()},
        **{f"{name}, after": value for name, value in after.items()},
    }
    _write(path, [{"fact": name, "value": value} for name, value in facts.items()], ("fact", "value"))


def _write(path: Path, rows: Sequence[Row], columns: Sequence[str]) -> None:
    write_csv(path, {name: np.array([row[name] for row in rows]) for name in columns})


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClustersimError(f"{folder}: cannot be made: {error.strerror or error}") from error


def summary(outcomes: Sequence[Outcome], folder: Path) -> dict[str, Any]:
    """What a session did: counts by kernel and result, why cases are missing, the least steady ones.

    spread is slowest / fastest - 1 of a case's repetitions.
    """
    by_kernel: dict[str, Counter[str]] = {}
    missing: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        kernel = form_of(outcome.case).kernel
        by_kernel.setdefault(kernel, Counter())[outcome.result] += 1
        if outcome.result not in ("measured", "kept"):
            missing.setdefault((kernel, outcome.result), []).append(outcome)
    measured = [o for o in outcomes if o.result == "measured"]
    unsteady = sorted(measured, key=lambda o: o.fastest / o.slowest)[:5]
    return {
        "folder": str(folder),
        "files": sorted({form_of(o.case).file for o in outcomes if o.result in ("measured", "kept")}),
        "kernels": {kernel: dict(counts) for kernel, counts in by_kernel.items()},
        "missing": [
            {
                "kernel": kernel,
                "result": result,
                "cases": len(some),
                "example": title(some[0].case),
                "why": some[0].why,
            }
            for (kernel, result), some in missing.items()
        ],
        "least_steady": [
            {"case": title(o.case), "spread": o.slowest / o.fastest - 1, "repetitions": o.repetitions}
            for o in unsteady
        ],
    }
