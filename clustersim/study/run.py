"""One question: what happens when this scenario runs?"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any

from clustersim.analysis.summary import summarize
from clustersim.engine.faults import link_faults
from clustersim.engine.simulation import simulate
from clustersim.errors import ClustersimError, Mistake, ResultError, ScenarioError, StuckError
from clustersim.physics.fidelity import wait as wait
from clustersim.plan.layout import Layout, hottest_rank, lay_out
from clustersim.plan.memory import does_not_fit, pass_tokens, slots_of
from clustersim.spec.reading import gpu_of, read_scenario
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import Fault, TraceLevel
from clustersim.spec.writing import scenario_hash, to_toml, toml_value
from clustersim.study.idle import idle
from clustersim.trace.record import Recorder, Trace
from clustersim.trace.results import SCENARIO, beside, check_place, newest, read_summary, write_result
from clustersim.trace.spill import Spill
from clustersim.trace.tables import Tables

Tell = Callable[[int, int], None]

#: Rows of spans and flows that a trace may hold on disk: some 3 bytes each where times repeat, 40 at worst.
_MOST_WRITTEN = 500_000_000
#: Rows of expert queues: what the summary makes of so many takes 2 GB.
_MOST_QUEUES = 20_000_000
#: Operators of a layer on one rank, at most; so many more with latent attention, and with shared experts.
_OPERATORS = 22
_MORE = 4

#: Folders of examples that an installed package carries, and where it keeps them.
_EXAMPLES = ("workloads", "topologies")
_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True, eq=False)
class Result:
    """What a run gave.

    scenario  what was asked, every default filled in
    summary   the content of summary.json
    trace     tables by name: trace["spans"].to_pandas()
    """

    scenario: Scenario
    summary: dict[str, Any]
    trace: Tables

    def __repr__(self) -> str:
        return f"<Result of {self.scenario.name}: {self.summary['simulated_seconds']:.6g} s simulated>"

    def save(self, folder: str | Path) -> Path:
        """Writes the result folder whole or not at all.

        Raises   ResultError where the folder holds something that is not a result
        """
        target = Path(folder)
        write_result(target, to_toml(self.scenario), self.summary, self.trace.raw)
        return target


def find(path: str | Path) -> Path:
    """The file or folder; an installed package carries the examples, wherever one stands."""
    wished = Path(path)
    if wished.exists() or wished.is_absolute() or wished.parts[:1] not in {(e,) for e in _EXAMPLES}:
        return wished
    packaged = [folder / wished for folder in (_PACKAGE / "_data", _PACKAGE.parent)]
    return next((p for p in packaged if ".." not in wished.parts and p.exists()), wished)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Scenario:
    """A scenario file → Scenario, whether or not it fits into the GPUs' memory. Otherwise as `load`."""
    scenario = read_scenario(find(path), overrides)
    mistakes = too_long_to_record(scenario)
    if mistakes:
        raise ScenarioError(str(path), mistakes)
    return scenario


def load(path: str | Path, overrides: Sequence[str] = (), seed: int | None = None) -> Scenario:
    """A scenario file → Scenario.

    overrides  "key.path=value" texts, as after --set
    seed       replaces the scenario's seed
    Raises     ScenarioError with every mistake of the file, when it does not fit into the GPUs'
               memory, and when its trace would not fit into this computer's
    """
    scenario = read(path, overrides if seed is None else [*overrides, f"seed={seed}"])
    mistakes = does_not_fit(scenario, gpu_of(scenario.topology))
    if mistakes:
        raise ScenarioError(str(path), mistakes)
    return scenario


def too_long_to_record(scenario: Scenario) -> list[Mistake]:
    """A mistake that says which level or length can be recorded, or nothing.

    Rows are written while a run goes on; this keeps them below 20 GB on disk, and what the summary makes
    of them below 2 GB of memory.
    """
    d, w, trace = scenario.deployment, scenario.workload, scenario.trace
    each = w.decode_steps + (w.phase != "decode")
    passes = w.batches * w.microbatches * each
    model = scenario.model
    slots = slots_of(d, model.experts)
    ranks = d.tensor_parallel * d.data_parallel
    alone = 3 * slots * _parts(scenario) if d.experts.service == "by_expert" else 0
    per_layer = _OPERATORS + _MORE * (bool(model.mla) + bool(model.shared_experts)) + alone
    flows = 2 * model.moe_layers * d.expert_parallel if trace.level == "flows" else 0
    per_pass = ranks * (model.layers * per_layer + flows)
    first, after = trace.steps or (0, w.batches * each)
    written = min(after - first, w.batches * each) * w.microbatches * per_pass
    # How much happens in a window is not known before.
    if written > _MOST_WRITTEN and trace.level != "sums" and trace.window is None:
        fits = _MOST_WRITTEN // (w.microbatches * per_pass)
        what = f'"{trace.level}" would write about {written:,} rows, at most {_MOST_WRITTEN:,} are written'
        few = f"choose at most {fits:,} of {w.batches * each:,} steps" if fits else "choose a window"
        remedy = f'{few} by trace.{"steps" if fits else "window"}, or set trace.level = "sums"'
        return [Mistake("trace.level", f"{what}; {remedy}")]
    queues = passes * model.moe_layers * ranks * slots
    if queues <= _MOST_QUEUES:
        return []
    what = f"about {queues:,} queues of experts would be written, at most {_MOST_QUEUES:,} are summed up"
    fits = passes * _MOST_QUEUES // queues
    return [Mistake("trace", f"{what}; take fewer batches or steps: {fits:,} of {passes:,} passes fit")]


def _parts(scenario: Scenario) -> int:
    """In how many chunks an expert is served whose load is even."""
    d, model, size = scenario.deployment, scenario.model, scenario.deployment.experts.chunk_tokens
    if not size or not model.experts:
        return 1
    choices = pass_tokens(scenario.workload, d, scenario.seed) * d.data_parallel * model.top_k
    return ceil(choices / model.experts / size)


def laid_out(scenario: Scenario, shown: str) -> Layout:
    """Scenario → Layout; what only the plan can see is a mistake of the file, too.

    shown    what the user calls the scenario
    """
    try:
        layout = lay_out(scenario)
        link_faults(scenario.faults, layout.topology.links)
        return layout
    except ClustersimError as error:
        raise ScenarioError(shown, [Mistake("", str(error))]) from error


def run_scenario(
    scenario: Scenario, shown: str = "", tell: Tell = lambda done, all_: None, folder: Path | None = None
) -> Result:
    """Simulates a scenario.

    shown    what the user calls it, for messages
    tell     called after every pass with (done, all)
    folder   where the result is to lie: beside it lies meanwhile what is too much for memory; None: that
             lies where the system keeps such, as long as the result is used
    Raises   StuckError where something waits for a link that never returns; ResultError where there is no
             room for the trace
    """
    started = time.perf_counter()
    layout = laid_out(scenario, shown or scenario.name)
    facts = {
        "name": scenario.name,
        "scenario_hash": scenario_hash(scenario),
        "seed": scenario.seed,
        "phase": scenario.workload.phase,
        "claimed": dict(scenario.claimed) if scenario.claimed else None,
        "scenario": to_toml(scenario),
        "idle": idle(scenario, layout),
    }
    spill = Spill(folder and beside(folder))
    try:
        trace = simulate(scenario, layout, facts, tell, Recorder(spill))
    except BaseException as error:
        spill.discard()
        if not isinstance(error, ClustersimError) or isinstance(error, StuckError | ResultError):
            raise
        raise ScenarioError(shown or scenario.name, [Mistake("", str(error))]) from error
    wall = time.perf_counter() - started
    # Wall time is no property of the scenario: it stands in the summary, never in the trace.
    summary = summarize(Trace(trace.tables, {**trace.facts, "wall_seconds": wall}))
    return Result(scenario, summary, Tables(trace))


#: What is set beside: number → where it stands in a summary.
_BESIDE = {
    "total_tokens_per_second": ("throughput", "total_tokens_per_second"),
    "tpot": ("latency", "tpot", "mean"),
    "ttft": ("latency", "ttft", "mean"),
    "step": ("latency", "step", "mean"),
    "imbalance": ("experts", "imbalance", "mean"),
    "dropped_share": ("throughput", "dropped_share"),
}


def with_beside(result: Result, shown: str = "", tell: Tell = lambda done, all_: None) -> Result:
    """The result with what the same scenario gives under the gating that it names for comparison.

    Arguments as for `run_scenario`; a scenario that names none stays as it is.
    """
    scenario = result.scenario
    if scenario.beside is None:
        return result
    changes = {
        "gating": scenario.beside.gating,
        "faults": _same_gpus(scenario),
        "beside": None,
        "trace": TraceLevel(level="sums"),
    }
    other = run_scenario(scenario.model_copy(update=changes), shown, tell).summary
    beside = set_beside(scenario.beside.label, result.summary, other)
    return replace(result, summary={**result.summary, "beside": beside})


def _same_gpus(scenario: Scenario) -> tuple[Fault, ...]:
    """The faults, those of the hottest GPU on the one that is it here.

    Under another gating it may be another GPU, and two machines would be compared.
    """
    if all(fault.gpu != "hottest" for fault in scenario.faults):
        return scenario.faults
    rank = hottest_rank(scenario, lay_out(scenario))
    return tuple(
        fault.model_copy(update={"gpu": rank}) if fault.gpu == "hottest" else fault
        for fault in scenario.faults
    )


def set_beside(label: str, summary: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """What another run of that label gave, and this run's numbers / its own: `beside` of the summary."""
    here, there = ({key: _at(s, path) for key, path in _BESIDE.items()} for s in (summary, other))
    ratio = {
        key: ours / theirs if ours is not None and theirs else None
        for (key, ours), theirs in zip(here.items(), there.values(), strict=True)
    }
    return {"label": label, "found": there, "ratio": ratio}


def _at(summary: Mapping[str, Any], path: Sequence[str]) -> float | None:
    value: Any = summary
    for key in path:
        value = None if value is None else value[key]
    return None if value is None else float(value)


def run(
    path: str | Path | Scenario,
    overrides: str | Sequence[str] | Mapping[str, object] = (),
    *,
    seed: int | None = None,
    out: str | Path | None = None,
    alone: bool = False,
    tell: Tell = lambda done, all_: None,
) -> Result:
    """Runs a scenario: a file, or what `load` made of one.

    overrides  of a file: one or several "key.path=value" texts, or a mapping of key paths to values
    seed       replaces the scenario's seed
    out        result folder to write; by default nothing is written
    alone      leave out what the scenario is to be compared with
    Returns    Result with .summary and .trace
    Raises     ScenarioError with all mistakes of the input; ResultError where `out` cannot be written
    """
    if isinstance(overrides, Mapping):
        overrides = [f"{key}={toml_value(value)}" for key, value in overrides.items()]
    elif isinstance(overrides, str):
        overrides = [overrides]
    if isinstance(path, Scenario):
        if overrides or seed is not None:
            raise ClustersimError("overrides and seed are for a file: give them to load")
        scenario, path = path, path.name
    else:
        scenario = load(path, overrides, seed)
    result = run_scenario(scenario, str(path), tell, None if out is None else Path(out))
    if not alone:
        result = with_beside(result, str(path), tell)
    if out is not None:
        result.save(out)
    return result


def result_folder(scenario: Scenario, out: Path | None = None) -> Path:
    """Where a scenario's result is to lie: `out`, or results/<name>-<hash>.

    Raises   ResultError where something else lies: before a long run, not after it
    """
    folder = out if out is not None else Path("results") / f"{scenario.name}-{scenario_hash(scenario)}"
    check_place(folder)
    return folder


def save_failure(scenario: Scenario, folder: Path, error: BaseException) -> None:
    """Leaves a result folder that says why there is no result; an older result there stays what it is."""
    if (folder / "trace").exists():
        folder = folder.with_name(f"{folder.name}-failed")
    about = {"name": scenario.name, "seed": scenario.seed, "error": f"{type(error).__name__}: {error}"}
    write_result(folder, to_toml(scenario), about, None)


def peers(scenario: Scenario, folder: Path) -> dict[str, dict[str, Any]]:
    """The newest result of the scenario that this one's claim is set against, if there is one.

    folder   where this result lies; the other is looked for beside it, then in results/
    Returns  how to call it → its summary; a result of another workload says so
    """
    against = scenario.claimed.against if scenario.claimed else None
    found = [newest(root, against) for root in (folder.parent, Path("results")) if against]
    for other in filter(None, found):
        alike = _same_work(scenario, other)
        return {f"{against}{'' if alike else ' (other work)'}": read_summary(other)}
    return {}


def _same_work(scenario: Scenario, other: Path) -> bool:
    """Whether a result is about the same model and sequences, however they were cut."""
    try:
        theirs = read_scenario(other / SCENARIO)
    except ScenarioError:
        return False
    cut = {"microbatches": 1}
    return theirs.model == scenario.model and (
        theirs.workload.model_copy(update=cut) == scenario.workload.model_copy(update=cut)
    )
