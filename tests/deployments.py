"""Deployments for laws that hold of any: the seed examples cut short, and small ones drawn at random."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st
from scenarios import parallel, rail_tree, single_server, tiny

from clustersim.spec.scenario import Scenario

#: The seed examples, short enough for a test: what repeats is the step.
EXAMPLES = {
    "large_ep": ("workload.decode_steps=2",),
    "baseline_tp8_pp2": ("workload.decode_steps=2",),
    "moe_1024": ("workload.microbatches=4",),
}
ALL_TO_ALL = ("pairwise", "one_sided", "low_latency", "hierarchical")


@st.composite
def deployments(draw: st.DrawFn) -> Scenario:
    """Up to eight GPUs, one micro-batch or two, two decode steps or a prefill; perhaps a slow GPU."""
    tp, dp, pp = (draw(st.sampled_from((1, 2))) for _ in range(3))
    ranks = tp * dp * pp
    service = draw(st.sampled_from(("grouped", "by_expert")))
    experts: dict[str, Any] = {"service": service}
    if service == "by_expert":
        experts["order"] = draw(st.sampled_from(("arrival", "longest_first", "as_listed")))
        experts["start"] = draw(st.sampled_from(("all_arrived", "expert_complete")))
    machine = {"latency": draw(st.sampled_from((0.0, 1e-6))), "launch": draw(st.sampled_from((0.0, 2e-6)))}
    scattered = ranks % 2 == 0 and draw(st.booleans())
    topology = rail_tree(2, ranks // 2, **machine) if scattered else single_server(ranks, **machine)
    prefill = draw(st.booleans())
    faults = [{"kind": "slow_gpu", "gpu": 0, "factor": 2.0}] if draw(st.booleans()) else []
    return tiny(
        topology,
        deployment=parallel(
            tp, pp, dp, experts=experts, algorithms={"all_to_all": draw(st.sampled_from(ALL_TO_ALL))}
        ),
        workload={
            "phase": "prefill" if prefill else "decode",
            "microbatches": draw(st.sampled_from((1, 2))),
            **({} if prefill else {"decode_steps": 2}),
        },
        gating=draw(st.sampled_from(({"skew": "even"}, {"skew": "zipf", "exponent": 1.0}))),
        faults=faults,
    )
