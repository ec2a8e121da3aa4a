"""What must hold inside of the gating, and between it, the model and the deployment."""

from __future__ import annotations

from collections.abc import Iterator

from clustersim.spec.choices import IDLE
from clustersim.spec.deployment import Deployment
from clustersim.spec.documents import DocumentError, KeyPath
from clustersim.spec.model import Model
from clustersim.spec.routing import unpacked
from clustersim.spec.workload import Beside, Gating, burst_experts

#: Shares above what can be by less than this are roundings.
_ROUNDING = 1e-9
#: Of a fitted curve, whose numbers are written in five digits.
_WRITTEN = 1e-3


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
    if gating.skew in IDLE[gating.motion]:
        moving = [motion for motion, skews in IDLE.items() if gating.skew not in skews]
        problem = f'"{gating.motion}" would move nothing under skew "{gating.skew}"'
        yield ("gating", "motion"), f"{problem}; {' and '.join(moving)} can be, or another skew"
    if gating.motion == "bursting" and gating.burst_steps > gating.burst_every:
        yield (
            ("gating", "burst_steps"),
            f"{gating.burst_steps} are more than the {gating.burst_every} from one burst to the next",
        )


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
    if gating.skew == "hot" and gating.hot_experts:
        hot = gating.hot_experts
        yield from _check_share("hot_share", gating.hot_share, hot, f"hot_experts = {hot}", model)
    if gating.motion == "bursting":
        hot = burst_experts(model.experts)
        yield from _check_share("burst_share", gating.burst_share, hot, f"the hot ones ({hot})", model)
    if gating.skew == "fitted":
        yield from _check_fitted(gating, model)
    if gating.skew == "replayed" and gating.content:
        yield from _check_content(gating, model)
    if gating.node_limited:
        yield from _check_groups(model)


def _check_share(key: str, share: float, hot: int, said: str, model: Model) -> Iterator[tuple[KeyPath, str]]:
    """No expert gets more than one choice of every token."""
    most = hot / model.top_k
    if share > most + _ROUNDING:
        yield (
            ("gating", key),
            f"{share:g} cannot be: a token takes top_k = {model.top_k} different experts, so that {said} can "
            f"get at most {most:.4g} of all choices",
        )


def _check_fitted(gating: Gating, model: Model) -> Iterator[tuple[KeyPath, str]]:
    """The curves are those of as many experts."""
    if gating.fitted_experts not in (0, model.experts):
        yield (
            ("gating", "fitted_experts"),
            f"the layers were fitted to {gating.fitted_experts} experts; {model.name} has {model.experts}: "
            "fit counts of a model with as many",
        )
        return
    most = model.experts / model.top_k
    for at, curve in enumerate(gating.layers):
        if curve.peak > most * (1 + _WRITTEN):
            yield (
                ("gating", "layers", at, "peak"),
                f"{curve.peak:g} cannot be: with top_k = {model.top_k} of {model.experts} experts none gets "
                f"more than {most:.4g} times the mean",
            )


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
        return
    held = model.experts // deployment.expert_parallel
    hot = max(gating.hot_experts or held, 1)
    said = f"the {hot} on EP rank {gating.hot_rank}" if hot == held else f"hot_experts = {hot}"
    yield from _check_share("hot_share", gating.hot_share, hot, said, model)
