"""What a deployment is put under: every stress is a sentence and overrides of scenario keys, no more.

`clustersim run FILE --set ...` with the overrides of a case gives the same run. The numbers (half of the
choices on a few experts, a GPU at two thirds of its speed) are round ones that make cases comparable, not
measurements; `real_text` alone stands for what was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor

from clustersim.plan.layout import Layout, lay_out
from clustersim.spec.deployment import BY_LOAD, HELD_ONCE
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import burst_experts
from clustersim.spec.writing import toml_value
from clustersim.units import exact

#: Share of all choices that go to what is hot, in every case with something hot; or the most it can get.
HOT_SHARE = 0.5
#: How many times slower a slow GPU is, and a throttled one while it is throttled.
SLOW_GPU = 1.5
#: By what the bandwidth of a slow network card is divided.
SLOW_LINK = 4.0
#: Standard deviation of the logarithm of every GPU's own speed, and of the sources' shares.
SPREAD_GPUS = 0.05
RAGGED = 0.3
#: Gini coefficient of the tokens per expert under ordinary text: a round value, no measured one. It differs
#: by model and by text; `clustersim gating fit` finds it in measured counts.
REAL_GINI = 0.2


@dataclass(frozen=True, slots=True)
class Site:
    """What a case may need to know of the deployment.

    scenario  as stated
    experts   of a layer
    ep        ranks over which they are spread
    ep_rank   the EP rank on which trouble is put, and `rank`, its (first) GPU in the first stage
    link      vertex whose links a slow link is among: that GPU's network card, or the GPU where none is used
    steps     forward passes of one run
    step      how long one takes with even load, s
    """

    scenario: Scenario
    experts: int
    ep: int
    ep_rank: int
    rank: int
    link: str
    steps: int
    step: float

    @property
    def most_gini(self) -> float:
        """Hundredths below the largest Gini coefficient there is: `top_k` experts sharing all choices."""
        model = self.scenario.model
        return floor(95 * (1 - model.top_k / max(model.experts, 1))) / 100

    @property
    def each(self) -> int:
        """Experts that one rank holds when each stands once."""
        return max(self.experts // self.ep, 1)

    def hot_share(self, experts: int) -> float:
        """HOT_SHARE, or hundredths below what so many experts can get: a token takes none twice."""
        return min(HOT_SHARE, floor(100 * experts / max(self.scenario.model.top_k, 1)) / 100)

    @property
    def few(self) -> int:
        """Experts of a small hot set."""
        return max(self.experts // 32, 2)

    @property
    def spread(self) -> int:
        """Experts of a hot set that lies on many ranks."""
        return max(self.experts // 4, 2)


def site_of(scenario: Scenario, steps: int, step: float) -> Site:
    """Trouble is put on the EP rank in the middle: neither the first, which many defaults name, nor the last.

    step     how long a step takes with even load, s
    """
    layout = lay_out(scenario)
    ep_rank = scenario.deployment.expert_parallel // 2
    rank = int(layout.groups.ep[0, 0, min(ep_rank, layout.groups.ep.shape[2] - 1)])
    ep, experts = scenario.deployment.expert_parallel, scenario.model.experts
    return Site(scenario, experts, ep, ep_rank, rank, _link_of(layout, rank), steps, step)


def _link_of(layout: Layout, rank: int) -> str:
    topology = layout.topology
    gpu, server = topology.gpus[rank], int(topology.server[rank])
    vertices = topology.graph.nodes(data=True)
    cards = [name for name, about in vertices if about["kind"] == "nic" and about["server"] == server]
    if not cards or len(set(topology.domain.tolist())) == 1:
        return gpu
    place = [n for n, name in enumerate(topology.gpus) if topology.server[n] == server].index(rank)
    return str(cards[place * len(cards) // int((topology.server == server).sum())])


def with_fault(site: Site, **fault: object) -> str:
    """The override that adds a fault to those of the file."""
    own = [one.model_dump(exclude_none=True, exclude_defaults=True) for one in site.scenario.faults]
    return f"faults={toml_value([*own, fault])}"


EVEN = ("gating.skew=even", "gating.motion=still", "workload.shard_skew=0")
_STILL = "gating.motion=still"


def gini(value: float) -> tuple[str, ...]:
    """Overrides: experts' popularity of that Gini coefficient."""
    return ("gating.skew=gini", f"gating.gini={value:g}", _STILL, "workload.shard_skew=0")


def _hot(site: Site, experts: int) -> tuple[str, ...]:
    return (
        "gating.skew=hot",
        f"gating.hot_experts={experts}",
        f"gating.hot_share={site.hot_share(experts):g}",
        _STILL,
        "workload.shard_skew=0",
    )


def _hot_rank(site: Site, share: float) -> tuple[str, ...]:
    rank = f"gating.hot_rank={site.ep_rank}"
    held = f"gating.hot_experts={site.each}"
    return (
        "gating.skew=hot_rank",
        rank,
        held,
        f"gating.hot_share={share:g}",
        _STILL,
        "workload.shard_skew=0",
    )


def _hot_set(site: Site) -> tuple[str, ...]:
    return _hot(site, site.few)


def _hot_spread(site: Site) -> tuple[str, ...]:
    return _hot(site, site.spread)


def _rotating(site: Site) -> tuple[str, ...]:
    every = f"gating.rotate_every={max(site.steps // 4, 1)}"
    return (*_hot_set(site)[:3], "gating.motion=rotating", every, "workload.shard_skew=0")


def _burst(site: Site) -> tuple[str, ...]:
    every = max(site.steps // 3, 1)
    return (
        *gini(REAL_GINI)[:2],
        "gating.motion=bursting",
        f"gating.burst_every={every}",
        f"gating.burst_steps={max(every // 2, 1)}",
        f"gating.burst_share={site.hot_share(burst_experts(site.experts)):g}",
        "workload.shard_skew=0",
    )


def slow_gpu(site: Site, factor: float) -> str:
    """Override: the GPU under trouble is so many times slower."""
    return with_fault(site, kind="slow_gpu", gpu=site.rank, factor=factor)


def slow_link(site: Site, factor: float) -> str:
    """Override: the links under trouble have so many times less bandwidth."""
    return with_fault(site, kind="slow_link", link=site.link, factor=factor)


def _throttled(site: Site) -> str:
    period = exact(max(4 * site.step, 1e-5), "time")
    return with_fault(
        site, kind="throttled_gpu", gpu=site.rank, factor=SLOW_GPU, period=period, duty=0.5, timing="regular"
    )


@dataclass(frozen=True, slots=True)
class Stress:
    """One kind of trouble.

    what       a sentence with `{}` places for the fields of the site and shares of all choices
    overrides  what it changes
    needs      keys of NEEDS: without these it would be no trouble
    """

    what: str
    overrides: Callable[[Site], Sequence[str]]
    needs: tuple[str, ...] = ()

    def lacking(self, site: Site) -> str:
        """Why it does not apply here; empty if it does."""
        return next((why for need in self.needs if (why := NEEDS[need](site))), "")

    def said(self, site: Site) -> str:
        """The sentence for this deployment."""
        share = {
            name: f"{site.hot_share(experts):.0%}"
            for name, experts in (
                ("few", site.few),
                ("spread", site.spread),
                ("each", site.each),
                ("burst", burst_experts(site.experts)),
            )
        }
        return self.what.format(site=site, share=share)


#: Without what a stress does not apply → why not, empty where it does.
NEEDS: Mapping[str, Callable[[Site], str]] = {
    "experts": lambda site: "" if site.experts > 1 else "the model has no experts",
    "ranks": lambda site: "" if site.ep > 1 else "all experts stand on one rank",
    "shards": lambda site: "" if site.scenario.deployment.data_parallel > 1 else "there is one source only",
    "steps": lambda site: "" if site.steps > 2 else f"with {site.steps} steps nothing moves",
}

#: Names of the case that all others are held against, and of the file's own.
BALANCED = "balanced"
AS_STATED = "as_stated"

#: Name → what is done to the deployment.
STRESSES: Mapping[str, Stress] = {
    "real_text": Stress(
        f"experts' popularity with a Gini coefficient of {REAL_GINI}, shuffled per layer: a round value",
        lambda site: gini(REAL_GINI),
        ("experts",),
    ),
    **{
        f"gini_{value}": Stress(
            f"the same with a Gini coefficient of {value}, or the most that top-k allows",
            lambda site, value=value: gini(min(value, site.most_gini)),  # type: ignore[misc]
            ("experts",),
        )
        for value in (0.4, 0.6)
    },
    "hot_set": Stress(
        "{site.few} of {site.experts} experts, others in every layer, take {share[few]} of all choices",
        _hot_set,
        ("experts", "ranks"),
    ),
    "hot_rank": Stress(
        "the experts on EP rank {site.ep_rank} take {share[each]} of all choices in every layer",
        lambda site: _hot_rank(site, site.hot_share(site.each)),
        ("experts", "ranks"),
    ),
    "hot_spread": Stress(
        "{site.spread} experts, on many ranks, take {share[spread]} of all choices",
        _hot_spread,
        ("experts", "ranks"),
    ),
    "ragged_sources": Stress(
        f"sequences come to the shards by lognormal shares with a spread of {RAGGED}, experts being alike",
        lambda site: (*EVEN[:2], f"workload.shard_skew={RAGGED}"),
        ("shards",),
    ),
    "idle_rank": Stress(
        "nobody wants the experts of EP rank {site.ep_rank}",
        lambda site: _hot_rank(site, 0.0),
        ("experts", "ranks"),
    ),
    "rotating": Stress(
        "the hot set moves on to other experts during the run",
        _rotating,
        ("experts", "ranks", "steps"),
    ),
    "burst": Stress(
        "real text, and now and then a hot topic with {share[burst]} of all choices",
        _burst,
        ("experts", "ranks", "steps"),
    ),
    "slow_gpu": Stress(
        f"GPU {{site.rank}} takes {SLOW_GPU:g} times as long; experts are evenly liked",
        lambda site: (*EVEN, slow_gpu(site, SLOW_GPU)),
    ),
    "throttled_gpu": Stress(
        f"GPU {{site.rank}} takes {SLOW_GPU:g} times as long for two of every four steps",
        lambda site: (*EVEN, _throttled(site)),
    ),
    "spread_gpus": Stress(
        f"every GPU has a speed of its own, with a spread of {SPREAD_GPUS:.0%}",
        lambda site: (*EVEN, with_fault(site, kind="spread_gpus", spread=SPREAD_GPUS)),
    ),
    "slow_link": Stress(
        f"{{site.link}} has a {SLOW_LINK:g}th of its bandwidth; experts are evenly liked",
        lambda site: (*EVEN, slow_link(site, SLOW_LINK)),
    ),
    "hot_on_slow_gpu": Stress(
        "hot_rank and slow_gpu at once: what most tokens want stands on the slow GPU",
        lambda site: (*_hot_rank(site, site.hot_share(site.each)), slow_gpu(site, SLOW_GPU)),
        ("experts", "ranks"),
    ),
}


def placed(scenario: Scenario, policy: str, spare: int = 0) -> tuple[str, ...]:
    """Overrides: that expert policy with so many spare places per rank, whatever the file's own holds.

    Where there are copies, `least_loaded` chooses among them: what a placement can give, not what senders
    make of it, and without reading copies that are not needed.
    """
    experts = scenario.deployment.experts
    stated = {key: value for key, value in HELD_ONCE.items() if key not in ("policy", "spare")}
    own = any(getattr(experts, key) != value for key, value in stated.items())
    values = {**(stated if own else {}), "policy": policy}
    if spare or experts.spare:
        values |= {"spare": spare}
    if spare:
        values |= {"copy_choice": "least_loaded"}
    if experts.rebalance.every and policy not in BY_LOAD:
        # A policy that looks at no load would be refused beside it.
        values |= {"rebalance.every": 0}
    return tuple(f"deployment.experts.{key}={toml_value(value)}" for key, value in values.items())


def placements_of(site: Site) -> dict[str, tuple[str, ...]]:
    """The file's own placement and those of PLACEMENTS that the model allows, as overrides."""
    groups = site.scenario.model.expert_groups
    fitting = {
        name: placed(site.scenario, policy, spare)
        for name, (policy, spare) in PLACEMENTS.items()
        if groups or policy != "eplb_hierarchical"
    }
    return {AS_STATED: (), **fitting}


#: What may help: name → expert policy and spare places per rank.
PLACEMENTS: Mapping[str, tuple[str, int]] = {
    "contiguous": ("contiguous", 0),
    "round_robin": ("round_robin", 0),
    "random": ("random", 0),
    "balanced": ("balanced", 0),
    "eplb + 1": ("eplb", 1),
    "eplb + 2": ("eplb", 2),
    "eplb by groups + 1": ("eplb_hierarchical", 1),
    "eplb by groups + 2": ("eplb_hierarchical", 2),
    "packed": ("packed", 0),
    "packed + 1": ("packed", 1),
    "packed + 2": ("packed", 2),
}
