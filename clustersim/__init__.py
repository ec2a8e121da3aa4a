"""clustersim: discrete-event simulator of GPU clusters for Mixture-of-Experts models.

Its face for notebooks and scripts:

    import clustersim

    result = clustersim.run("workloads/large_ep.toml", seed=1)
    result.summary["latency"]["tpot"]["mean"]
    result.trace["spans"].to_pandas()
"""

from clustersim.errors import ClustersimError, ResultError, ScenarioError
from clustersim.spec.scenario import Scenario
from clustersim.study.run import Result, load, run

__all__ = ["ClustersimError", "Result", "ResultError", "Scenario", "ScenarioError", "load", "run"]
__version__ = "0.1.0"
