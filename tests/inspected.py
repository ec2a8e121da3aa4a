"""A small result on disk for the tests of views: four GPUs in two boxes, uneven experts, two decode steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scenarios import parallel, rail_tree, tiny

from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import scenario_hash
from clustersim.study.inspecting import Opened, open_result
from clustersim.study.run import run_scenario


def small(level: str = "spans", **sections: Any) -> Scenario:
    """TP = 2, DP = 2, EP = 4 on two boxes of two GPUs; what is not said is as in scenarios.tiny."""
    return tiny(
        rail_tree(2, 2),
        **{
            "deployment": parallel(tp=2, dp=2),
            "gating": {"skew": "zipf"},
            "workload": {"decode_steps": 2},
            "trace": {"level": level},
            **sections,
        },
    )


def saved(root: Path, scenario: Scenario | None = None) -> Path:
    """The folder of its result, named as `clustersim run` names it."""
    scenario = scenario or small()
    return run_scenario(scenario).save(root / f"{scenario.name}-{scenario_hash(scenario)}")


def opened(root: Path, scenario: Scenario | None = None) -> Opened:
    """Its result, opened from disk."""
    return open_result(str(saved(root, scenario)))
