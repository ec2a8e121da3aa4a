"""clustersim: discrete-event simulator of GPU clusters for Mixture-of-Experts models.

Its face for notebooks and scripts:

    import clustersim

    result = clustersim.run("workloads/large_ep.toml", seed=1)
    result.summary["latency"]["tpot"]["mean"]
    result.trace["spans"].to_pandas()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clustersim.errors import ClustersimError, ResultError, ScenarioError
    from clustersim.spec.scenario import Scenario
    from clustersim.study.run import Result, load, run

__all__ = ["ClustersimError", "Result", "ResultError", "Scenario", "ScenarioError", "load", "run"]
__version__ = "0.1.0"

_HOMES = {
    "ClustersimError": "clustersim.errors",
    "ResultError": "clustersim.errors",
    "ScenarioError": "clustersim.errors",
    "Scenario": "clustersim.spec.scenario",
    "Result": "clustersim.study.run",
    "load": "clustersim.study.run",
    "run": "clustersim.study.run",
}


def __getattr__(name: str) -> Any:
    """What the face shows, loaded when it is first asked for: `--help` and a replay need little of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """The names that the face shows, loaded or not."""
    return sorted({*globals(), *__all__})
