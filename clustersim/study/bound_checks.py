"""One question: do the bounds of a trace hold? Asked by running what they take away without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clustersim.analysis.what_if import bounds
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import Fault, Gating
from clustersim.spec.writing import scenario_hash
from clustersim.study.run import Result, Tell, load, run_scenario

#: By which share of its bound a run may be shorter. A bound keeps how flows shared links; a run shares anew.
TOLERANCE = 0.02
#: The same for faster links: on them a run also chooses other algorithms and protocols, which cost less to
#: start. Found by the seed examples: 3.8 % at most.
_OF_LINKS = 0.05
#: How many times the bandwidth of "infinite" links is what it was.
_WIDER = 1000.0
#: What is put into a scenario that has nothing of what a bound takes away.
_GINI = 0.2
_SLOW = 1.5

#: Bandwidths of a server and of what joins servers that are no NVLink.
_OF_CARDS = ("nic_bandwidth", "pcie_bandwidth")
_OF_FABRIC = ("uplink_bandwidth", "local_bandwidth", "global_bandwidth")

#: Scenario → with what a bound takes away; and without it, None where no scenario can say it; how, in words;
#: tolerance.
Check = tuple[Callable[[Scenario], Scenario], Callable[[Scenario], Scenario | None], str, float]


def check_bounds(
    file: Path, overrides: Sequence[str] = (), tell: Tell = lambda done, all_: None
) -> list[dict[str, Any]]:
    """Runs a scenario with and without each of CHECKS and holds the mean steps against the bounds.

    Returns   per check name, how, recorded, bound and run (mean step, s), tolerance, holds: whether the run
              is not shorter than the bound by more than the tolerance
    Raises    ScenarioError for a wrong file or override
    """
    scenario = load(file, [*overrides, 'trace.level="spans"'])
    ran: dict[str, Result] = {}

    def run(one: Scenario) -> Result:
        key = scenario_hash(one)
        if key not in ran:
            ran[key] = run_scenario(one)
        return ran[key]

    found = []
    for done, (name, (with_it, without, how, tolerance)) in enumerate(CHECKS.items()):
        tell(done, len(CHECKS))
        recorded = with_it(scenario)
        changed = without(recorded)
        if changed is not None:
            found.append(_check(name, run(recorded), _mean_step(run(changed)), tolerance) | {"how": how})
    tell(len(CHECKS), len(CHECKS))
    return found


def _check(name: str, recorded: Result, took: float, tolerance: float) -> dict[str, Any]:
    bound = next(one for one in bounds(recorded.trace.raw) if one.name == name)
    return {
        "name": name,
        "recorded": _mean_step(recorded),
        "bound": bound.seconds,
        "run": took,
        "tolerance": tolerance,
        "holds": took >= bound.seconds * (1 - tolerance),
    }


def _mean_step(result: Result) -> float:
    return float(result.summary["latency"]["step"]["mean"])


def _as_it_is(scenario: Scenario) -> Scenario:
    return scenario


def _skewed(scenario: Scenario) -> Scenario:
    if scenario.gating.skew != "even":
        return scenario
    return scenario.model_copy(update={"gating": Gating(skew="gini", gini=_GINI)})


def _even(scenario: Scenario) -> Scenario:
    return scenario.model_copy(update={"gating": Gating(skew="even")})


def _on_gpus(fault: Fault) -> bool:
    return fault.link is None


def _with_slow_gpu(scenario: Scenario) -> Scenario:
    if any(_on_gpus(fault) for fault in scenario.faults):
        return scenario
    slow = Fault(kind="slow_gpu", gpu=0, factor=_SLOW)
    return scenario.model_copy(update={"faults": (*scenario.faults, slow)})


def _without_gpu_faults(scenario: Scenario) -> Scenario:
    kept = tuple(fault for fault in scenario.faults if not _on_gpus(fault))
    return scenario.model_copy(update={"faults": kept})


def _wider(of_server: Sequence[str], of_fabric: Sequence[str]) -> Callable[[Scenario], Scenario | None]:
    def widened(scenario: Scenario) -> Scenario | None:
        topology: Any = scenario.topology
        server = getattr(topology, "server", None)
        if server is None:
            return None
        changes: dict[str, Any] = {"server": server.model_copy(update=_times(server, of_server))}
        changes |= _times(topology, of_fabric)
        return scenario.model_copy(update={"topology": topology.model_copy(update=changes)})

    return widened


def _times(value: Any, names: Sequence[str]) -> dict[str, float]:
    return {name: getattr(value, name) * _WIDER for name in names if getattr(value, name, None)}


def _without_startup(scenario: Scenario) -> Scenario | None:
    topology: Any = scenario.topology
    server = getattr(topology, "server", None)
    if server is None:
        return None
    gpu = server.gpu.model_copy(update={"launch_latency": 0.0})
    server = server.model_copy(update={"gpu": gpu})
    network = scenario.network.model_copy(update={"startup": "none"})
    return scenario.model_copy(
        update={"topology": topology.model_copy(update={"server": server}), "network": network}
    )


#: Name of a bound → what is run. Perfect overlap is none: no scenario can say it.
CHECKS: Mapping[str, Check] = {
    "no_imbalance": (
        _skewed,
        _even,
        f"gating.skew = even, against the file's own skew or a Gini of {_GINI}",
        TOLERANCE,
    ),
    "no_straggler": (
        _with_slow_gpu,
        _without_gpu_faults,
        f"no faults of GPUs, against the file's own or GPU 0 {_SLOW:g} times as slow",
        TOLERANCE,
    ),
    "infinite_nvlink": (
        _as_it_is,
        _wider(("nvlink_bandwidth",), ()),
        f"NVLink {_WIDER:,.0f} times as fast",
        _OF_LINKS,
    ),
    "infinite_network": (
        _as_it_is,
        _wider(_OF_CARDS, _OF_FABRIC),
        f"cards and network {_WIDER:,.0f} times as fast",
        _OF_LINKS,
    ),
    "no_launch": (
        _as_it_is,
        _without_startup,
        "network.startup = none and no least launch: exchanges alone, measured kernels keep their launches",
        TOLERANCE,
    ),
}
