"""What a scenario means before anything runs: sizes, memory, groups, operators, lower bounds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from clustersim.errors import pick
from clustersim.physics.bounds import Work, lower_bounds, work_of
from clustersim.physics.exchanges import Routes
from clustersim.physics.pricing import left_out, measured
from clustersim.plan.experts import copies_of
from clustersim.plan.layout import Layout, expected_load, where_of
from clustersim.plan.lowering import gated, lower
from clustersim.plan.memory import needs, weights_held
from clustersim.plan.packing import imbalance
from clustersim.plan.parameters import (
    active_parameters,
    attention_parameters,
    expert_parameters,
    total_parameters,
)
from clustersim.plan.stepgraph import StepGraph
from clustersim.plan.topology import summary as topology_summary
from clustersim.serving.arrivals import requests
from clustersim.serving.batching import Pass, microbatches
from clustersim.serving.router import ROUTERS
from clustersim.spec.deployment import SPARING
from clustersim.spec.formats import multiplied_as
from clustersim.spec.model import Model
from clustersim.spec.placement_checks import EXPERT_CHECKS
from clustersim.spec.reading import read_catalogue
from clustersim.spec.scenario import Scenario
from clustersim.spec.schema import json_schema
from clustersim.study.idle import idle

#: Expert policies beside the scenario's own that a preview reckons.
_COMPARED = ("contiguous", "balanced", "eplb", "eplb_hierarchical", "packed")

#: A stated size further than this from what the dimensions give is a contradiction, not a rounding.
_ROUNDING = 0.05


def schema() -> dict[str, Any]:
    """The JSON Schema of scenario files."""
    return json_schema()


def preview(scenario: Scenario, layout: Layout) -> dict[str, Any]:
    """Everything `clustersim preview` shows, as JSON values in SI units.

    Returns  name, model, memory, groups, placement (of experts: what imbalance it and others leave;
             None without experts), topology, phases (operators and bounds of the first step of each), notes
    """
    passes = first_steps(scenario)
    routes = Routes(layout, measured(layout.topology, scenario.network.startup))
    return {
        "name": scenario.name,
        "model": _model(scenario),
        "memory": [
            {"stage": stage, "parts": need.parts(), "total": need.total}
            for stage, need in enumerate(needs(scenario))
        ],
        "memory_limit": layout.topology.gpu.memory * scenario.deployment.memory_fraction,
        "gpu": layout.topology.gpu.name,
        "groups": _groups(scenario, layout),
        "placement": _placement(scenario, layout),
        "topology": topology_summary(layout.topology),
        "phases": {phase: _step(scenario, layout, routes, chosen) for phase, chosen in passes.items()},
        "notes": _notes(scenario, layout),
    }


def _model(scenario: Scenario) -> dict[str, Any]:
    model, d = scenario.model, scenario.deployment
    held = [weights_held(model, d, stage) for stage in range(d.pipeline_parallel)]
    return {
        "name": model.name,
        "total_parameters": total_parameters(model),
        "active_parameters": active_parameters(model),
        "parameters_per_gpu": [sum(by_format.values()) for by_format in held],
        "attention_parameters_per_layer": attention_parameters(model),
        "expert_parameters": expert_parameters(model),
        "stated_parameters": model.stated_parameters or None,
        "same_in_catalogue": _same_in_catalogue(model),
    }


def _same_in_catalogue(model: Model) -> dict[str, Any] | None:
    """Name and stated size of the catalogue's model of the same dimensions, for a model from elsewhere."""
    aside = {"name", "source", "stated_parameters", "format", "expert_format", "kv_format"}
    for entry in read_catalogue("models").values():
        assert isinstance(entry, Model)
        if entry.source == model.source:
            return None
        if entry.model_dump(exclude=aside) == model.model_dump(exclude=aside):
            return {"name": entry.name, "stated_parameters": entry.stated_parameters or None}
    return None


def _groups(scenario: Scenario, layout: Layout) -> list[dict[str, Any]]:
    """Kind, how many, size, and the first group's ranks."""
    groups = layout.groups
    among_experts = (("EP", groups.ep), ("ETP", groups.etp)) if scenario.model.experts else ()
    found = []
    for name, ranks in (("pipeline stage", groups.stage), ("TP", groups.tp), *among_experts):
        flat = ranks.reshape(-1, ranks.shape[-1])
        servers = max(len(np.unique(layout.topology.server[row])) for row in flat)
        found.append(
            {
                "group": name,
                "count": len(flat),
                "size": flat.shape[1],
                "first": flat[0].tolist(),
                "servers": servers,
            }
        )
    return found


def first_steps(scenario: Scenario) -> dict[str, list[Pass]]:
    """The passes of the first step of every phase."""
    shards = scenario.deployment.data_parallel
    batch = next(requests(scenario.workload, scenario.seed))
    router = pick(ROUTERS, scenario.workload.router, "workload.router")
    placed = list(zip(batch, router(batch, np.zeros(shards, dtype=np.int64)), strict=True))
    found: dict[str, dict[int, list[Pass]]] = {}
    for chain in microbatches(placed, scenario.workload, shards):
        for one in chain:
            found.setdefault(one.phase, {}).setdefault(one.index, []).append(one)
    return {phase: steps[min(steps)] for phase, steps in found.items()}


def _step(scenario: Scenario, layout: Layout, routes: Routes, passes: Sequence[Pass]) -> dict[str, Any]:
    graphs = [_graph(scenario, layout, one, number) for number, one in enumerate(passes)]
    works = [_work(graph, routes) for graph in graphs]
    bounds = lower_bounds(works, layout.topology.gpu, layout.topology.links.bandwidth)
    first = graphs[0]
    return {
        "microbatches": len(passes),
        "tokens": sum(graph.tokens for graph in graphs),
        "flop": sum(graph.flop for graph in graphs),
        "operators": dict(Counter(op.name for op in first.operators)),
        "operators_per_rank": [
            sum(op.stage == stage for op in first.operators) for stage in range(len(first.ranks))
        ],
        "algorithms": _algorithms(first, routes),
        "bounds": {"compute": bounds.compute, "memory": bounds.memory, "network": bounds.network},
    }


def _graph(scenario: Scenario, layout: Layout, one: Pass, number: int) -> StepGraph:
    batch = one.batch(scenario.deployment.data_parallel, scenario.model.window)
    counts, distinct = gated(batch, scenario, layout, number)
    return lower(batch, counts, layout, distinct)


def _placement(scenario: Scenario, layout: Layout) -> dict[str, Any] | None:
    """What the expected popularity gives under the scenario's policy, and would under others.

    Returns  policy, spare; imbalance: policy -> load of the busiest rank over the mean: mean and max of
             the layers; of those policies that fit the model and the ranks without further numbers
    """
    model, d = scenario.model, scenario.deployment
    if not model.experts:
        return None
    routed = np.array([model.has_experts(layer) for layer in range(model.layers)])
    load, ranks = expected_load(scenario)[routed], d.expert_parallel
    found: dict[str, np.ndarray] = {d.experts.policy: imbalance(load, layout.copies[routed], ranks)}
    for policy in _COMPARED:
        spare = max(d.experts.spare, 1) if policy in SPARING else 0
        wish = d.experts.held_once().model_copy(update={"policy": policy, "spare": spare})
        other = d.model_copy(update={"experts": wish})
        if policy not in found and not list(EXPERT_CHECKS[policy](other, model)):
            copies = copies_of(load, other, where_of(scenario, layout.ep_domain))
            found[policy] = imbalance(load, copies, ranks)
    return {
        "policy": d.experts.policy,
        "spare": max(d.experts.spare, 1),
        "imbalance": {name: {"mean": float(f.mean()), "max": float(f.max())} for name, f in found.items()},
    }


def _work(graph: StepGraph, routes: Routes) -> Work:
    return work_of(
        graph, [routes.of(op.exchange).carried for op in graph.operators if op.exchange is not None]
    )


def _algorithms(graph: StepGraph, routes: Routes) -> dict[str, dict[str, float]]:
    """Kind of exchange → algorithm → its share of the exchanges of this kind in one pass."""
    found: dict[str, Counter[str]] = {}
    for op in graph.operators:
        if op.exchange is not None:
            found.setdefault(op.exchange.kind, Counter())[routes.of(op.exchange).algorithm] += 1
    return {kind: {name: n / ways.total() for name, n in ways.items()} for kind, ways in found.items()}


def _unpacked(model: Model, layout: Layout) -> list[str]:
    """What is said of weights in a format that the GPU has no rate for."""
    gpu = layout.topology.gpu
    held = [fmt for fmt in model.formats if multiplied_as(gpu, fmt) != fmt]
    return [
        f"{gpu.name} does not compute in {fmt}: weights in {fmt} are unpacked and multiplied as bf16 "
        f"({multiplied_as(gpu, fmt)})."
        for fmt in held
    ]


def _notes(scenario: Scenario, layout: Layout) -> list[str]:
    model = scenario.model
    found, stated = total_parameters(model), model.stated_parameters
    notes = []
    if stated and abs(found / stated - 1) > _ROUNDING:
        experts = model.moe_layers * model.experts * expert_parameters(model)
        share = (
            f", {experts / 1e9:,.4g} billion of them in {model.moe_layers} x {model.experts} experts"
            if experts
            else ""
        )
        notes.append(
            f"The source calls this model {stated / 1e9:,.3g}B, but its dimensions give "
            f"{found / 1e9:,.4g} billion parameters{share}; the dimensions are what is simulated."
        )
    if model.expert_groups > 1:
        notes.append(
            f"Routers of this model choose {model.groups_chosen} of {model.expert_groups} groups of experts "
            "first. Here every expert is chosen by itself: tokens go to more GPUs than they would."
        )
    notes += _unpacked(model, layout)
    if model.mtp_layers:
        notes.append(
            f"The model predicts further tokens with {model.mtp_layers} more layers; they are neither run "
            "nor counted among its parameters."
        )
    falls = any(f.kind in ("down_link", "flapping_link") and f.factor is None for f in scenario.faults)
    if falls and scenario.network.on_down == "reroute":
        notes.append(
            "Links go down in this scenario, and flows then take other paths; the network bound is that of "
            "the usual paths. A run reckons each step's bound from the paths that were taken."
        )
    notes += idle(scenario, layout)
    return [*notes, *filter(None, [left_out(layout.topology, scenario.network.startup)])]
