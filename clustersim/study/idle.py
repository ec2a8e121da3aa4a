"""What a scenario asks for and its own run never comes to, in sentences for the notes."""

from __future__ import annotations

from collections.abc import Iterator

from clustersim.plan.layout import Layout, hottest_ranks
from clustersim.plan.popularity import stand_ins
from clustersim.spec.scenario import Scenario


def steps_of(scenario: Scenario) -> int:
    """Forward passes that follow each other in a run, those of micro-batches counted once."""
    w = scenario.workload
    return w.batches * (w.decode_steps + (w.phase != "decode"))


def gating_notes(scenario: Scenario) -> list[str]:
    """On the gating alone: what stands for what, what was cut, and motion that the run does not reach."""
    if not scenario.model.experts:
        return []
    return [*stand_ins(scenario.gating, scenario.model), *_unmoved(scenario)]


def idle(scenario: Scenario, layout: Layout) -> list[str]:
    """On all that does nothing, or only so much, before anything is run."""
    return [
        *gating_notes(scenario),
        *_beside(scenario),
        *_never_planned(scenario),
        *_as_hot(scenario, layout),
    ]


def _beside(scenario: Scenario) -> Iterator[str]:
    if scenario.model.experts and scenario.beside is not None:
        for note in stand_ins(scenario.beside.gating, scenario.model):
            yield f"Of what is beside it: {note[0].lower()}{note[1:]}"


def _unmoved(scenario: Scenario) -> Iterator[str]:
    gating, steps = scenario.gating, steps_of(scenario)
    if gating.motion == "bursting" and steps <= gating.burst_every:
        yield (
            f"No burst comes: the first would begin after {_steps(gating.burst_every)} (burst_every), and "
            f"the run has {steps:,}."
        )
    if gating.motion == "rotating" and steps <= gating.rotate_every:
        yield (
            f"Popularity never moves on: it would after {_steps(gating.rotate_every)} (rotate_every), and "
            f"the run has {steps:,}."
        )


def _never_planned(scenario: Scenario) -> Iterator[str]:
    every, steps = scenario.deployment.experts.rebalance.every, steps_of(scenario)
    if scenario.model.experts and every and steps <= every:
        yield (
            f"Experts are never placed anew: rebalance.every is {_steps(every)}, and of the run's {steps:,} "
            "none comes after that."
        )


def _as_hot(scenario: Scenario, layout: Layout) -> Iterator[str]:
    if all(fault.gpu != "hottest" for fault in scenario.faults):
        return
    ranks = hottest_ranks(scenario, layout)
    if len(ranks) > 1:
        yield (
            f'gpu = "hottest": {len(ranks):,} ranks are expected to get as many tokens as each other; the '
            f"fault befalls the first of them, rank {ranks[0]}."
        )


def _steps(count: int) -> str:
    return f"{count:,} step{'s' * (count != 1)}"
