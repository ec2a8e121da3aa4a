"""Whether an expert policy's numbers fit the model and the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from math import gcd
from typing import TypeAlias

from clustersim.spec.deployment import Deployment
from clustersim.spec.dividing import does_not_divide
from clustersim.spec.documents import KeyPath
from clustersim.spec.model import Model

Findings: TypeAlias = Iterator[tuple[KeyPath, str]]


def check_spread(deployment: Deployment, model: Model) -> Findings:
    """Each expert once: every rank holds the same number."""
    if model.experts % deployment.expert_parallel:
        problem = does_not_divide(deployment.expert_parallel, model.experts, "experts")
        yield ("deployment", "expert_parallel"), problem + _uneven_ways(deployment, model)


def _uneven_ways(deployment: Deployment, model: Model) -> str:
    """Policies by which experts lie on ranks whose number does not divide theirs."""
    ranks, experts = deployment.expert_parallel, model.experts
    stage = deployment.tensor_parallel * deployment.data_parallel
    if ranks > experts or ranks * deployment.expert_tensor_parallel != stage:
        return ""
    least, even = -(-experts // ranks), experts // gcd(experts, ranks)
    return (
        '; or deployment.experts.policy = "eplb" or "packed" with spare = 1, '
        f'"explicit" with {least} experts on every rank, some of them copies, or "replicated" with '
        f"per_gpu = {even}, {even * ranks // experts} copies of each"
    )


def check_spare(deployment: Deployment, model: Model) -> Findings:
    """Every expert has a place, and no rank has more places than there are experts."""
    ranks, experts = deployment.expert_parallel, model.experts
    each, over = divmod(experts, ranks)
    spare = deployment.experts.spare
    if over and not spare:
        problem = does_not_divide(ranks, experts, "experts")
        yield ("deployment", "expert_parallel"), f"{problem}; any does with deployment.experts.spare = 1"
    elif each + spare > experts:
        yield (
            ("deployment", "experts", "spare"),
            f"{each} + {spare} slots per EP rank are more than the {experts} experts of a layer; "
            f"at most {experts - each} spare ones make sense",
        )


def check_groups(deployment: Deployment, model: Model) -> Findings:
    """As above, and the model has groups of experts."""
    yield from check_spare(deployment, model)
    place = ("deployment", "experts", "policy")
    if model.expert_groups < 1:
        yield (
            place,
            f'"eplb_hierarchical" needs groups of experts, and {model.name} has none; "eplb" works without',
        )
    elif model.experts % model.expert_groups:
        yield place, does_not_divide(model.expert_groups, model.experts, "experts; its groups must be alike")


def check_replicated(deployment: Deployment, model: Model) -> Findings:
    """Every expert gets the same number of copies, and none two on one rank."""
    place = ("deployment", "experts", "per_gpu")
    slots, ranks = deployment.experts.per_gpu, deployment.expert_parallel
    if not slots:
        yield place, 'policy "replicated" needs at least 1 slot per GPU'
    elif slots > model.experts:
        yield place, f"{slots} slots per GPU are more than the {model.experts} experts of a layer"
    elif slots * ranks % model.experts:
        yield (
            place,
            f"{slots} slots per GPU x expert_parallel {ranks} = {slots * ranks} "
            f"is not a multiple of {model.experts} experts",
        )


def check_explicit(deployment: Deployment, model: Model) -> Findings:
    """The lists cover every expert and fit the ranks."""
    wish, place = deployment.experts, ("deployment", "experts", "slots")
    if wish.slots_by_layer:
        if wish.slots:
            yield place, "is said by slots_file already; leave one of them out"
        yield from _check_layers(deployment, model)
        return
    if wish.slots_file:  # only a scenario that comes from no file has a name here that nobody read
        yield (*place[:2], "slots_file"), "is read with the file of a scenario only; give slots_by_layer"
        return
    slots, ranks = deployment.experts.slots, deployment.expert_parallel
    if len(slots) != ranks:
        yield place, f"has {len(slots)} lists; expert_parallel = {ranks} needs one per rank"
    if len({len(held) for held in slots}) > 1:
        lengths = [len(held) for held in slots]
        yield place, f"every rank must hold the same number of experts, not {min(lengths)} to {max(lengths)}"
    for rank, held in enumerate(slots):
        yield from _check_held(held, model.experts, (*place, rank))
    lacking = sorted(set(range(model.experts)).difference(*slots))
    if lacking:
        yield place, f"no rank holds expert{'s' if len(lacking) > 1 else ''} {_some(lacking)}"


def _check_layers(deployment: Deployment, model: Model) -> Findings:
    """One row per layer, per layer with experts, or for all; every row covers every expert."""
    place, ranks = ("deployment", "experts", "slots_by_layer"), deployment.expert_parallel
    rows = deployment.experts.slots_by_layer
    fitting = sorted({1, model.moe_layers, model.layers})
    if len(rows) not in fitting:
        yield (
            place,
            f"{len(rows)} layers, but {model.name} has {model.layers}, {model.moe_layers} of them with "
            f"experts; give {' or '.join(map(str, fitting))}",
        )
    for number, row in enumerate(rows):
        if len(row) % ranks or len(row) != len(rows[0]):
            yield (
                (*place, number),
                f"{len(row)} places; every layer needs equally many, a multiple of expert_parallel = {ranks}",
            )
        beyond = sorted({expert for expert in row if expert >= model.experts})
        if beyond:
            yield (
                (*place, number),
                f"there is no expert {_some(beyond)}; a layer has 0 to {model.experts - 1}",
            )
        lacking = sorted(set(range(model.experts)).difference(row))
        if lacking:
            yield (*place, number), f"no rank holds expert{'s' if len(lacking) > 1 else ''} {_some(lacking)}"


def _check_held(held: Sequence[int], experts: int, place: KeyPath) -> Findings:
    beyond = sorted({expert for expert in held if expert >= experts})
    if beyond:
        yield place, f"there is no expert {_some(beyond)}; a layer has 0 to {experts - 1}"
    twice = sorted(expert for expert, count in Counter(held).items() if count > 1)
    if twice:
        yield place, f"holds expert {_some(twice)} more than once"


def _some(numbers: Sequence[int]) -> str:
    return ", ".join(str(n) for n in numbers[:5]) + (" ..." if len(numbers) > 5 else "")


#: expert policy → check of its numbers
EXPERT_CHECKS: dict[str, Callable[[Deployment, Model], Findings]] = {
    "contiguous": check_spread,
    "round_robin": check_spread,
    "random": check_spread,
    "replicated": check_replicated,
    "explicit": check_explicit,
    "balanced": check_spread,
    "eplb": check_spare,
    "eplb_hierarchical": check_groups,
    "packed": check_spare,
}
