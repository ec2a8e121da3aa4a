"""Variants of one scenario, run side by side on all cores; what is done is kept.

A case is a name and overrides of scenario keys. What it gave, its figures, is a small value: no trace and
no lists per GPU or link leave the process that ran it, so many cases need little memory. Results depend on
the cases alone, never on how many workers there are or who finishes first.

The pool of workers and the file of what is done are the state here: they last from the first question of a
study to its last.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from clustersim.analysis.cause import cause_notes
from clustersim.analysis.compare import exposed_exchange
from clustersim.analysis.culprits import hottest, worst_gpu
from clustersim.analysis.latency import token_gaps
from clustersim.errors import ClustersimError, ResultError, ScenarioError
from clustersim.plan.memory import does_not_fit
from clustersim.spec.reading import gpu_of
from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import scenario_hash
from clustersim.study.run import find, read, run_scenario
from clustersim.trace.plain import plain

Figures = dict[str, Any]
Tell = Callable[[int, int], None]

_PACKAGE = Path(__file__).resolve().parent.parent
#: What of the package decides results: code, and numbers with their sources.
_DECIDING = (".py", ".toml", ".npz")
_LATENCIES = ("step", "token_batch", "tpot", "ttft", "request")


@dataclass(frozen=True, slots=True)
class Base:
    """The scenario that all cases vary.

    file       as the user named it
    overrides  "key.path=value" texts that hold for every case
    """

    file: str
    overrides: tuple[str, ...] = ()

    def scenario(self, overrides: Sequence[str] = ()) -> Scenario:
        """The scenario with these overrides. Raises ScenarioError; whether it fits is not looked at."""
        return read(find(self.file), [*self.overrides, *overrides])


@dataclass(frozen=True, slots=True)
class Case:
    """One variant.

    name       unique among the cases it stands with
    overrides  what it lays over the base
    scenario   what results, or None where that is no scenario
    problem    why it cannot be run; empty if it can
    """

    name: str
    overrides: tuple[str, ...]
    scenario: Scenario | None
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case gave.

    figures  as `figures_of`, or None where there is an error
    error    why there are none; empty otherwise
    """

    figures: Figures | None
    error: str = ""


def variant(base: Base, name: str, overrides: Sequence[str] = ()) -> Case:
    """The case of that name. What is wrong with it, or does not fit into memory, is its problem."""
    try:
        scenario = base.scenario(overrides)
    except ScenarioError as error:
        told = "; ".join(f"{m.place}: {m.problem}" if m.place else m.problem for m in error.mistakes)
        return Case(name, tuple(overrides), None, told)
    lacking = does_not_fit(scenario, gpu_of(scenario.topology))
    problem = f"does not fit: {lacking[0].problem}" if lacking else ""
    return Case(name, tuple(overrides), scenario, problem)


def figures_of(scenario: Scenario) -> Figures:
    """Runs a scenario and keeps what is compared: JSON values in SI units.

    Returns  the keys of `stress_schema.FIGURES`
    """
    result = run_scenario(scenario)
    summary, trace = result.summary, result.trace.raw
    experts = summary["experts"] or {}
    steps = sum(phase["steps"] for phase in summary["phases"].values())
    found: Figures = plain(
        {
            "tokens_per_second": summary["throughput"]["total_tokens_per_second"],
            "steps": steps,
            "latency": {key: summary["latency"][key] for key in _LATENCIES},
            "imbalance": experts.get("imbalance"),
            "queue_wait": experts.get("queue_wait"),
            "dropped": experts.get("dropped"),
            "exposed_exchange": exposed_exchange(summary),
            "token": token_gaps(trace),
            "rebalancing": _bill(summary["rebalancing"]),
            "cause": next(cause_notes(summary["cause"]), None),
            "worst_gpu": worst_gpu(trace),
            "hottest": hottest(trace),
        }
    )
    return found


def _bill(found: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What moving experts cost; None where none was to move."""
    return None if found is None else {key: found[key] for key in _BILL}


_BILL = ("planned", "moved", "finished", "copies", "bytes", "moving", "stopped", "stopped_share")


@cache
def code_digest() -> str:
    """Hash of what decides results besides the scenario: another version's results are not gone on with."""
    digest = hashlib.sha256()
    for path in sorted(p for p in _PACKAGE.rglob("*") if p.suffix in _DECIDING):
        digest.update(path.relative_to(_PACKAGE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def key_of(scenario: Scenario) -> str:
    """Under which a case's outcome is kept: equal only for equal scenarios and the same program."""
    return f"{scenario_hash(scenario)}-{code_digest()}"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Work = Callable[[Scenario], Figures]


class Bench:
    """Runs cases; a context, at whose end its workers are gone.

    workers  processes; with one, cases run in this process
    kept     JSON lines of outcomes: every finished case is appended at once, so that one who is interrupted
             loses only what was under way; None keeps nothing
    resume   take what lies in `kept` as done; otherwise it is begun anew
    work     what is done with a scenario
    study    what the cases are cases of, in words: those of another study are not gone on with; the name of
             the work where it is empty
    anew     called before the first outcome is kept, where nothing was resumed; until then all that lies
             there stays as it was, so that a call that is refused takes nothing away
    Raises   ResultError where what lies in `kept` is another study's or cannot be read
    """

    def __init__(
        self,
        workers: int = 0,
        kept: Path | None = None,
        resume: bool = False,
        work: Work = figures_of,
        study: str = "",
        anew: Callable[[], None] = lambda: None,
    ) -> None:
        self._workers = workers or cores()
        self._kept = kept
        self._anew = None if resume else anew
        self._begun = False
        self._work = work
        self._pool: ProcessPoolExecutor | None = None
        self._strangers = {child.pid for child in multiprocessing.active_children()}
        # Figures of another work would be others of the same scenarios.
        self._study = study or getattr(work, "__name__", type(work).__name__)
        found = read_kept(kept, self._study) if resume and kept else Kept({})
        self._done = dict(found.done)
        self._resumed = frozenset(self._done)
        self._asked: set[str] = set()
        self.unreadable, self.outdated = found.unreadable, found.outdated
        # Faults of ours and deaths of processes: told in this call's answer, and tried again by the next.
        self._passing: set[str] = set()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and (self._begun or self.unreadable or self.outdated):
            self._rewrite()
        self._stop()

    @property
    def done(self) -> int:
        """How many cases have been run or were kept."""
        return len(self._done)

    def has(self, key: str) -> bool:
        """Whether the case of that key is done."""
        return key in self._done

    @property
    def resumed(self) -> int:
        """How many of the cases that were asked for so far had been kept."""
        return len(self._asked & self._resumed)

    @property
    def ran(self) -> int:
        """How many of the cases that were asked for so far were run."""
        return len(self._asked & self._done.keys()) - self.resumed

    def run(
        self, cases: Sequence[Case], tell: Tell = lambda done, all_: None
    ) -> Iterator[tuple[int, Outcome]]:
        """Position and outcome of every case, as they come.

        tell  called after every case with (done, all)
        """
        waiting: dict[str, list[int]] = {}
        finished: list[tuple[int, Outcome]] = []
        for position, case in enumerate(cases):
            if case.scenario is None or case.problem:
                finished.append((position, Outcome(None, case.problem)))
                continue
            key = key_of(case.scenario)
            self._asked.add(key)
            if key in self._done:
                finished.append((position, self._done[key][1]))
            else:
                # Equal scenarios, whatever their names, are run once.
                waiting.setdefault(key, []).append(position)
        done = len(finished)
        tell(done, len(cases))
        yield from finished
        firsts = {key: cases[positions[0]] for key, positions in waiting.items()}
        for key, outcome in self._outcomes(firsts):
            done += len(waiting[key])
            tell(done, len(cases))
            yield from ((position, outcome) for position in waiting[key])

    def all(self, cases: Sequence[Case], tell: Tell = lambda done, all_: None) -> list[Outcome]:
        """The outcomes in the order of the cases."""
        found = dict(self.run(cases, tell))
        return [found[position] for position in range(len(cases))]

    def _outcomes(self, cases: Mapping[str, Case]) -> Iterator[tuple[str, Outcome]]:
        ways = self._alone(cases) if self._workers == 1 else self._together(cases)
        for key, (outcome, lasting) in ways:
            self._done[key] = (cases[key].name, outcome)
            if lasting:
                self._keep(key)
            else:
                self._passing.add(key)
            yield key, outcome

    def _alone(self, cases: Mapping[str, Case]) -> Iterator[tuple[str, tuple[Outcome, bool]]]:
        for key, case in cases.items():
            assert case.scenario is not None
            yield key, attempt(self._work, case.scenario)

    def _together(self, cases: Mapping[str, Case]) -> Iterator[tuple[str, tuple[Outcome, bool]]]:
        if self._pool is None and cases:
            self._pool = _pool_of(self._workers)
        running: dict[Future[tuple[Outcome, bool]], str] = {}
        with _uninterrupted():
            for key, case in cases.items():
                assert self._pool is not None and case.scenario is not None
                running[self._pool.submit(attempt, self._work, case.scenario)] = key
        broken = []
        for future in as_completed(running):
            try:
                yield running[future], future.result()
            except BrokenProcessPool:
                broken.append(running[future])
        if broken:
            self._stop()
        # A worker that dies takes the others' work along; one by one, only the culprit fails.
        for key in sorted(broken, key=list(cases).index):
            yield key, self._by_itself(cases[key])

    def _by_itself(self, case: Case) -> tuple[Outcome, bool]:
        assert case.scenario is not None
        with _pool_of(1) as pool:
            try:
                return pool.submit(attempt, self._work, case.scenario).result()
            except BrokenProcessPool:
                return Outcome(None, "its process died; perhaps this computer has too little memory"), False

    def _stop(self) -> None:
        if self._pool is None:
            return
        pool, self._pool = self._pool, None
        with _uninterrupted():
            # What still runs would be waited for; nobody wants its result. The workers go first: a pool that
            # is told to go without waiting is no longer waited for, and closes its pipes while Python ends.
            for child in multiprocessing.active_children():
                if child.pid not in self._strangers:
                    child.terminate()
            pool.shutdown(wait=True, cancel_futures=True)

    def _keep(self, key: str) -> None:
        if self._kept is None:
            return
        if not self._begun:
            self._begun = True
            if self._anew is not None:
                self._anew()
            # Whole: what cannot be used any more goes, and a line that was cut short is not gone on with.
            self._rewrite()
            return
        try:
            self._kept.parent.mkdir(parents=True, exist_ok=True)
            with self._kept.open("a", encoding="utf-8") as file:
                file.write(self._line(key))
        except OSError as error:
            raise ResultError(f"{self._kept}: cannot be written: {error.strerror or error}") from error

    def _line(self, key: str) -> str:
        name, outcome = self._done[key]
        entry = {"key": key, "study": self._study, "case": name}
        entry |= {"figures": outcome.figures, "error": outcome.error}
        return _dumped(entry | {"check": _check(entry)}) + "\n"

    def _rewrite(self) -> None:
        """In the order of the keys, so that equal studies leave equal bytes whoever finished first."""
        assert self._kept is not None
        lasting = sorted(self._done.keys() - self._passing)
        write_whole(self._kept, "".join(self._line(key) for key in lasting))


def attempt(work: Work, scenario: Scenario) -> tuple[Outcome, bool]:
    """What the work gives, or why it fails; and whether trying again would give the same."""
    try:
        return Outcome(work(scenario)), True
    except ClustersimError as error:
        return Outcome(None, " ".join(str(error).split())), True
    except Exception as error:
        # One case of many: it becomes an entry, and the others go on.
        return Outcome(None, f"internal error: {type(error).__name__}: {error}"), False


def write_whole(path: Path, text: str) -> None:
    """Writes a file whole or not at all.

    Raises   ResultError where that is not possible
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise ResultError(f"{path}: cannot be written: {error.strerror or error}") from error


def _pool_of(workers: int) -> ProcessPoolExecutor:
    # Spawned, not forked: a fork in a process with threads may hang, and not every system has it.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_ignore_interrupt)


def _ignore_interrupt() -> None:
    """Ctrl-C goes to all processes of a terminal; the one that keeps results answers it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Ctrl-C comes at the end. Processes that are begun meanwhile never see it, not even while they load."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@dataclass(frozen=True, slots=True)
class Kept:
    """What an earlier call left.

    done        key → name of the case and its outcome
    unreadable  numbers of lines, from 1 on, that are damaged
    outdated    how many lines another version of the program wrote
    """

    done: Mapping[str, tuple[str, Outcome]]
    unreadable: tuple[int, ...] = ()
    outdated: int = 0


def read_kept(path: Path, study: str) -> Kept:
    """What an earlier call of the same study left.

    Raises   ResultError where it is that of another study, or cannot be read at all
    """
    done, unreadable, outdated = {}, [], 0
    for number, entry in enumerate(_entries(path), 1):
        if entry is None:
            unreadable.append(number)
        elif entry["study"] != study:
            raise ResultError(
                f"{path}: line {number}: holds cases of {entry['study']}, and this call is {study}; name "
                "another folder with --out, or leave --resume out to begin anew"
            )
        elif entry["key"].endswith(code_digest()):
            done[entry["key"]] = (entry["case"], Outcome(entry["figures"], entry["error"]))
        else:
            outdated += 1
    return Kept(done, tuple(unreadable), outdated)


def studies_in(path: Path) -> set[str]:
    """The studies of which a file holds cases.

    Raises   ResultError where it cannot be read at all
    """
    return {entry["study"] for entry in _entries(path) if entry is not None}


def _entries(path: Path) -> Iterator[dict[str, Any] | None]:
    """Line by line what a file holds; None for a damaged one."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ResultError(f"{path}: cannot be resumed: {error.strerror or error}") from error
    for line in lines:
        try:
            entry = json.loads(line)
            whole = entry.pop("check") == _check(entry)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            whole = False
        yield entry if whole else None


def _dumped(entry: Mapping[str, Any]) -> str:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False)


def _check(entry: Mapping[str, Any]) -> int:
    """Checksum of a line without it: one that is cut short or was written into is seen."""
    return zlib.crc32(_dumped(entry).encode())
