"""The machine with work placed on it: topology, paths, groups and expert copies; memory per rank."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from clustersim.errors import ClustersimError
from clustersim.plan.collectives import AUTO, COLLECTIVES, check_algorithms
from clustersim.plan.copy_choice import tokens_per_copy
from clustersim.plan.experts import Where, copies_of
from clustersim.plan.groups import Groups, layers_of, process_groups
from clustersim.plan.paths import Paths
from clustersim.plan.popularity import load_shares, settled
from clustersim.plan.rounds import domains_of
from clustersim.plan.topology import Topology, build
from clustersim.spec.deployment import Deployment
from clustersim.spec.model import Model
from clustersim.spec.scenario import Scenario


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """Where everything is. A new placement of experts is a new Layout.

    copies  int32[L, C] logical expert in each place; place c on EP rank c // slots
    near    int[ETP, EP, C] how far copy c is from a source: 0 same rank, 1 same NVLink domain, 2 else
    ep_domain  int64[S, ETP, EP] NVLink domains of the EP groups' members, numbered in every group
    """

    model: Model
    deployment: Deployment
    topology: Topology
    paths: Paths
    groups: Groups
    copies: np.ndarray
    near: np.ndarray
    ep_domain: np.ndarray

    @property
    def deduplicates(self) -> bool:
        """Whether it matters to an all-to-all how many tokens go to a domain, each counted once."""
        name = self.deployment.algorithms.all_to_all
        entry = COLLECTIVES["all_to_all"].get(name)
        return bool(self.ep_domain.any()) and (
            name == AUTO or (entry is not None and entry.deduplicated is not None)
        )

    @property
    def slots(self) -> int:
        """Expert places per EP rank."""
        return int(self.copies.shape[1]) // self.deployment.expert_parallel

    def tokens_per_copy(self, counts: np.ndarray, layer: int) -> np.ndarray:
        """Tokens of every source for every copy of a layer.

        counts   int64[N, E] of the ranks of the layer's stage
        Returns  int64[ETP, EP, C]
        """
        d = self.deployment
        by_group = counts.reshape(d.expert_parallel, d.expert_tensor_parallel, -1).transpose(1, 0, 2)
        choice = d.experts.copy_choice
        return np.stack(
            [
                tokens_per_copy(group, self.copies[layer], near, choice)
                for group, near in zip(by_group, self.near, strict=True)
            ]
        )


def lay_out(scenario: Scenario) -> Layout:
    """Scenario → Layout.

    Raises   ClustersimError where the topology is not connected or a name is not known
    """
    topology = build(scenario.topology)
    deployment = scenario.deployment
    check_algorithms(deployment.algorithms)
    groups = process_groups(deployment)
    _check_switches(deployment, groups, topology)
    ep_domain = np.stack([domains_of(ep, topology.domain) for ep in groups.ep])
    copies = np.zeros((scenario.model.layers, 0), dtype=np.int32)
    if scenario.model.experts:
        copies = copies_of(expected_load(scenario), deployment, where_of(scenario, ep_domain))
    return Layout(
        model=scenario.model,
        deployment=deployment,
        topology=topology,
        paths=Paths(topology),
        groups=groups,
        copies=copies,
        near=_near(groups.ep[0], topology.domain, copies.shape[1] // deployment.expert_parallel),
        ep_domain=ep_domain,
    )


def where_of(scenario: Scenario, ep_domain: np.ndarray) -> Where:
    """What a placement knows beside the load. ep_domain: as in `Layout`; its first group serves for all."""
    model = scenario.model
    routed = np.flatnonzero([model.has_experts(layer) for layer in range(model.layers)])
    return Where(scenario.seed, ep_domain[0, 0], model.expert_groups, routed)


_ANYWHERE = f"ring, double_binary_tree, hierarchical and {AUTO} work anywhere"


def _check_switches(deployment: Deployment, groups: Groups, topology: Topology) -> None:
    """Raises ClustersimError where switches are to add up what members of other domains send."""
    name = deployment.algorithms.all_reduce
    needs = "anything" if name == AUTO else COLLECTIVES["all_reduce"][name].needs
    if needs == "anything" or deployment.tensor_parallel == 1:
        return
    if needs == "domain":
        _check_one_domain(name, groups, topology)
        return
    kinds = set(dict(topology.graph.nodes(data="kind")).values())
    members = topology.domain[groups.tp.reshape(-1, groups.tp.shape[-1])]
    if "nvswitch" in kinds and not topology.switch_reduces:
        raise ClustersimError(
            f'deployment.algorithms.all_reduce: "{name}" needs an NVSwitch that adds up, and those of this '
            f"machine do not (switch_reduces = false); {_ANYWHERE}"
        )
    alone = (members[:, :, None] == members[:, None, :]).sum(axis=2).min() == 1
    if alone or "nvswitch" not in kinds:
        lacks = "stands alone in its NVLink domain" if alone else "is joined to its peers without NVSwitch"
        raise ClustersimError(
            f'deployment.algorithms.all_reduce: "{name}" needs an NVSwitch between ranks, but a rank of a TP '
            f"group of {deployment.tensor_parallel} {lacks}; {_ANYWHERE}"
        )


def _check_one_domain(name: str, groups: Groups, topology: Topology) -> None:
    domain = topology.domain[groups.tp.reshape(-1, groups.tp.shape[-1])]
    if (domain != domain[:, :1]).any():
        raise ClustersimError(
            f'deployment.algorithms.all_reduce: "{name}" writes into the memory of peers over NVLink, but a '
            f"TP group of {domain.shape[1]} reaches over several NVLink domains; {_ANYWHERE}"
        )


def expected_load(scenario: Scenario, step: int = 0) -> np.ndarray:
    """Share of a layer's choices per expert, float64[L, E]: what a placement may know beforehand.

    step     steps of the run that came before
    """
    return load_shares(settled(scenario), scenario.model, scenario.seed, step)


def hottest_rank(scenario: Scenario, layout: Layout) -> int:
    """The first of `hottest_ranks`; 0 for a model without experts."""
    return next(iter(hottest_ranks(scenario, layout)), 0)


def hottest_ranks(scenario: Scenario, layout: Layout) -> list[int]:
    """The ranks whose experts are expected to get most tokens over all layers, copies of an expert an equal
    share each; several where these tie, none for a model without experts."""
    if not scenario.model.experts:
        return []
    load = expected_load(scenario)
    stages = scenario.deployment.pipeline_parallel
    share = np.zeros((stages, scenario.deployment.expert_parallel))
    for stage in range(stages):
        for layer in layers_of(len(load), stages, stage):
            if scenario.model.has_experts(layer):
                held = layout.copies[layer]
                each = load[layer] / np.bincount(held, minlength=load.shape[1])
                share[stage] += each[held].reshape(-1, layout.slots).sum(axis=1)
    # What is dealt evenly differs in its last bits only.
    hottest = np.flatnonzero(share > share.max() * (1 - 1e-9))
    found: list[int] = layout.groups.ep[:, 0].ravel()[hottest].tolist()
    return found


def _near(ep: np.ndarray, domain: np.ndarray, slots: int) -> np.ndarray:
    holder = np.repeat(ep, slots, axis=1)
    same_rank = ep[:, :, None] == holder[:, None, :]
    same_domain = domain[ep][:, :, None] == domain[holder][:, None, :]
    return np.where(same_rank, 0, np.where(same_domain, 1, 2))
