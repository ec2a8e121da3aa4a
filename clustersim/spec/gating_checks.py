"""What must hold inside of the gating, and between it, the model and the deployment."""

from __future__ import annotations

from collections.abc import Iterator

from clustersim.spec.deployment import Deployment
from clustersim.spec.documents import DocumentError, KeyPath
from clustersim.spec.model import Model
from clustersim.spec.routing import unpacked
from clustersim.spec.workload import Beside, Gating

#: Skews whose experts stand where they were told to: nothing shuffles them, so nothing can drift.
_PLACED = ("hot_rank", "replayed")


def check_gating(
    gating: Gating, model: Model | None, deployment: Deployment | None
) -> Iterator[tuple[KeyPath, str]]:
    """Every contradiction."""
    yield from _check_motion(gating)
    if gating.skew == "fitted" and not gating.layers:
        yield ("gating", "layers"), 'skew "fitted" needs at least one; `clustersim gating fit` writes them'
    if gating.skew == "replayed" and not gating.counts and not gating.content:
        yield ("gating", "counts"), 'skew "replayed" needs a file of measured counts'
    if model and model.experts:
        yield from _check_experts(gating, model)
    if model and model.experts and deployment and gating.skew == "hot_rank":
        yield from _check_hot_rank(gating, model, deployment)


def check_beside(
    beside: Beside, model: Model | None, deployment: Deployment | None
) -> Iterator[tuple[KeyPath, str]]:
    """Every contradiction of a gating that another is compared with."""
    for place, problem in check_gating(beside.gating, model, deployment):
        yield ("beside", *place), problem


def _check_motion(gating: Gating) -> Iterator[tuple[KeyPath, str]]:
    if gating.motion == "drifting" and not gating.shuffle:
        yield ("gating", "shuffle"), 'motion "drifting" shuffles; leave it out'
    if gating.motion == "drifting" and gating.skew in _PLACED:
        yield ("gating", "motion"), f'skew "{gating.skew}" has its places; use rotating, bursting or still'
    if gating.motion == "bursting" and gating.burst_steps > gating.burst_every:
        yield (
            ("gating", "burst_steps"),
            f"{gating.burst_steps} are more than the {gating.burst_every} from one burst to the next",
        )
    if gating.motion != "still" and gating.skew == "even":
        yield ("gating", "motion"), 'skew "even" has nothing that could move; choose another skew'


def _check_experts(gating: Gating, model: Model) -> Iterator[tuple[KeyPath, str]]:
    if gating.skew in ("hot", "hot_rank") and gating.hot_experts > model.experts:
        yield ("gating", "hot_experts"), f"{gating.hot_experts} are more than the {model.experts} of a layer"
    most = 1.0 - model.top_k / model.experts
    if gating.skew in ("gini", "topics") and gating.gini > max(most - 1e-6, 0.0):
        yield (
            ("gating", "gini"),
            f"{gating.gini:g} cannot be: with top_k = {model.top_k} of {model.experts} experts at least "
            f"{model.top_k} share the choices, which is a Gini coefficient of {most:.4g}",
        )
    if gating.skew == "replayed" and gating.content:
        yield from _check_content(gating, model)
    if gating.node_limited:
        yield from _check_groups(model)


def _check_content(gating: Gating, model: Model) -> Iterator[tuple[KeyPath, str]]:
    try:
        measured = unpacked(gating.content)
    except DocumentError as error:
        yield ("gating", "content"), error.problem
        return
    experts = measured.counts.shape[1]
    # Of single tokens only those experts are known that somebody took.
    if experts > model.experts or (experts < model.experts and measured.ids is None):
        yield ("gating", "counts"), f"has {experts} experts; {model.name} has {model.experts}"


def _check_groups(model: Model) -> Iterator[tuple[KeyPath, str]]:
    groups, chosen = model.expert_groups, model.groups_chosen
    if not groups or not chosen:
        yield ("gating", "node_limited"), f"{model.name} has no expert_groups and groups_chosen"
    elif model.experts % groups:
        yield ("gating", "node_limited"), f"{groups} expert_groups do not divide {model.experts} experts"
    elif chosen > groups or chosen * (model.experts // groups) < model.top_k:
        yield (
            ("gating", "node_limited"),
            f"groups_chosen = {chosen} of {groups} do not hold the top_k = {model.top_k} experts of a token",
        )


def _check_hot_rank(gating: Gating, model: Model, deployment: Deployment) -> Iterator[tuple[KeyPath, str]]:
    if gating.hot_rank >= deployment.expert_parallel:
        yield (
            ("gating", "hot_rank"),
            f"there is no EP rank {gating.hot_rank}; there are 0 to {deployment.expert_parallel - 1}",
        )
