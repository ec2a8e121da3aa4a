"""Tokens counted once per NVLink domain: counted from draws, expected from counts, and sent as bytes."""

from __future__ import annotations

from math import comb
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import parallel, rail_tree, single_server, table, tiny, trace_of

from clustersim.plan import distinct
from clustersim.plan.builder import load_of
from clustersim.plan.distinct import counted, expected
from clustersim.plan.gating import CHOICES, GATINGS, expert_counts, popularity
from clustersim.plan.layout import lay_out
from clustersim.plan.lowering import gated, lower
from clustersim.plan.popularity import settled
from clustersim.plan.stepgraph import Exchange, StepGraph
from clustersim.seeds import stream
from clustersim.spec.batch import Piece, batch_of
from clustersim.spec.scenario import Scenario
from clustersim.spec.workload import Gating


def shares(experts: int, exponent: float, top_k: int = 1) -> np.ndarray:
    return popularity(Gating(skew="zipf", exponent=exponent), experts, 0, 1, 0, top_k)


def taken(skew: str, tokens: list[int], share: np.ndarray, top_k: int) -> list[tuple[int, list[int]]]:
    """Every token: its source and its experts."""
    blocks = CHOICES[skew](np.array(tokens), share, top_k, stream(3, "test"))
    return [
        (int(owner), experts.tolist())
        for owners, chosen, times in blocks
        for owner, experts, often in zip(owners, chosen, times, strict=True)
        for _ in range(often)
    ]


@pytest.mark.parametrize("skew", CHOICES)
@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 40), min_size=1, max_size=5),
    experts=st.integers(1, 12),
    top_k=st.integers(1, 6),
    domains=st.integers(1, 4),
    exponent=st.floats(0, 3),
)
def test_choices_are_those_behind_the_counts_and_each_token_counts_once_per_domain(
    skew: str, tokens: list[int], experts: int, top_k: int, domains: int, exponent: float
) -> None:
    share, top_k = shares(experts, exponent), min(top_k, experts)
    chosen = taken(skew, tokens, share, top_k)
    counts = np.zeros((len(tokens), experts), dtype=int)
    # Every source sees the experts in other domains.
    home = (np.arange(experts) + np.arange(len(tokens))[:, None]) % domains
    once = np.zeros((len(tokens), domains), dtype=int)
    for source, its in chosen:
        assert len(set(its)) == top_k
        counts[source, its] += 1
        once[source, sorted(set(home[source, its].tolist()))] += 1
    assert np.array_equal(counts, GATINGS[skew](np.array(tokens), share, top_k, stream(3, "test")))
    blocks = CHOICES[skew](np.array(tokens), share, top_k, stream(3, "test"))
    assert np.array_equal(counted(blocks, home, domains), once)


@pytest.mark.parametrize(
    "experts, top_k, domains, exponent",
    [
        (16, 2, 2, 0.0),
        (16, 2, 2, 1.2),
        (64, 8, 8, 1.2),
        (64, 6, 16, 2.0),
        (256, 8, 4, 1.5),
        (256, 8, 32, 1.0),
    ],
)
def test_what_is_expected_of_counts_is_what_draws_give(
    experts: int, top_k: int, domains: int, exponent: float
) -> None:
    tokens, share = np.full(2, 20_000), shares(experts, exponent)
    home = np.arange(experts) * domains // experts
    blocks = CHOICES["zipf"](tokens, share, top_k, stream(0))
    drawn = counted(blocks, np.tile(home, (2, 1)), domains)
    counts = GATINGS["zipf"](tokens, share, top_k, stream(0))
    found = expected(counts, np.arange(experts), home, top_k)
    assert found == approx(drawn, rel=0.025)
    # Counting every choice would be far off where domains hold several experts of a token.
    plain = counts @ (home[:, None] == np.arange(domains))
    assert plain.sum() > drawn.sum()


def test_equal_experts_follow_the_hypergeometric_law() -> None:
    # 3 of 12 experts; a domain holds 4: none of them with chance C(8, 3) / C(12, 3) = 56 / 220.
    found = expected(np.full((1, 12), 25), np.arange(12), np.arange(12) // 4, 3)
    assert found == approx(np.full((1, 3), 100 * (1 - comb(8, 3) / comb(12, 3))))


@given(counts=st.lists(st.integers(0, 50), min_size=4, max_size=12), domains=st.integers(1, 4))
def test_with_one_expert_per_token_nothing_is_counted_twice(counts: list[int], domains: int) -> None:
    home = np.arange(len(counts)) % domains
    found = expected(np.array([counts]), np.arange(len(counts)), home, 1)
    assert found[0] == approx(np.bincount(home, counts, domains))


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 60), min_size=1, max_size=4),
    top_k=st.integers(1, 5),
    copies=st.lists(st.integers(0, 7), min_size=0, max_size=8),
    domains=st.integers(1, 5),
    exponent=st.floats(0, 6),
    seed=st.integers(0, 1000),
)
def test_distinct_tokens_lie_between_the_largest_experts_and_all_choices(
    tokens: list[int], top_k: int, copies: list[int], domains: int, exponent: float, seed: int
) -> None:
    # Eight experts, some of them several times; a token goes to any one copy of each.
    rng = np.random.default_rng(seed)
    held = np.concatenate([np.arange(8), np.array(copies, dtype=int)])
    counts = GATINGS["zipf"](np.array(tokens), shares(8, exponent), top_k, rng)
    spread = np.zeros((len(tokens), len(held)), dtype=int)
    for expert in range(8):
        places = np.flatnonzero(held == expert)
        for row in range(len(tokens)):
            spread[row, places] = rng.multinomial(counts[row, expert], np.full(len(places), 1 / len(places)))
    home = np.concatenate([np.arange(domains), rng.integers(0, domains, len(held))])[: len(held)]
    found = expected(spread, held, home, top_k)
    for d in range(found.shape[1]):
        here = home == d
        assert (found[:, d] <= spread[:, here].sum(axis=1) * (1 + 1e-9)).all()
        assert (found[:, d] <= np.array(tokens) * (1 + 1e-9)).all()
        for expert in range(8):
            assert (found[:, d] >= spread[:, here & (held == expert)].sum(axis=1) * (1 - 1e-9)).all()
    if domains == 1:
        assert found[:, 0] == approx(np.array(tokens))


def test_the_odds_are_scaled_until_the_counts_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = GATINGS["zipf"](np.full(3, 5000), shares(64, 1.5), 6, stream(0))
    usual = expected(counts, np.arange(64), np.arange(64) // 8, 6)
    monkeypatch.setattr(distinct, "_SCALINGS", 10_000)
    assert np.array_equal(expected(counts, np.arange(64), np.arange(64) // 8, 6), usual)


# ---- as bytes -----------------------------------------------------------------------------------


def lowered(scenario: Scenario, token_batch: int = 0) -> StepGraph:
    layout = lay_out(scenario)
    shards = scenario.deployment.data_parallel
    batch = batch_of("prefill", [Piece(shard, 30, 0, 1) for shard in range(shards)], shards)
    counts, once = gated(batch, scenario, layout, token_batch)
    alone = expert_counts(
        load_of(batch, layout).slices, scenario.model, settled(scenario), 0, token_batch, 0, shards
    )
    assert np.array_equal(counts, alone), "to ask for more moves no draw"
    return lower(batch, counts, layout, once)


def exchanges_of(graph: StepGraph, name: str) -> list[Exchange]:
    return [op.exchange for op in graph.operators if op.name == name and op.exchange is not None]


@pytest.mark.parametrize("all_to_all", ["hierarchical", "auto"])
@pytest.mark.parametrize("skew", GATINGS)
@pytest.mark.parametrize(
    "etp, experts",
    [(1, {}), (2, {}), (1, {"policy": "round_robin"}), (2, {"policy": "replicated", "per_gpu": 4})],
    ids=["contiguous", "shared", "dealt", "replicated"],
)
def test_bytes_across_the_network_are_counted_once_there_and_back(
    etp: int, experts: dict[str, Any], skew: str, all_to_all: str
) -> None:
    scenario = tiny(
        rail_tree(2, 4),
        model={"experts": 8, "top_k": 4},
        deployment=parallel(tp=2, dp=4, etp=etp, experts=experts, algorithms={"all_to_all": all_to_all}),
        gating={"skew": skew},
        workload={"sequences": 8},
    )
    graph, layout = lowered(scenario), lay_out(scenario)
    there, back = exchanges_of(graph, "dispatch"), exchanges_of(graph, "combine")
    for one, other in zip(there, back, strict=True):
        assert one.distinct is not None and other.distinct is not None
        assert np.array_equal(one.distinct, other.distinct)
        assert (one.back, other.back) == (False, True)
        domain = layout.topology.domain[one.groups]
        for group in range(len(one.groups)):
            for d in range(2):
                here = domain[group] == domain[group, 0] if d == 0 else domain[group] != domain[group, 0]
                plain = one.size[group][:, here]
                assert (one.distinct[group, :, d] <= plain.sum(axis=1) * (1 + 1e-9)).all()
                assert one.distinct[group, :, d].sum() < plain.sum() * 0.9
        # All tokens go somewhere, and with four experts on two servers most go to both.
        tokens = one.size.sum(axis=2) / 4
        assert (one.distinct.sum(axis=2) >= tokens * (1 - 1e-9)).all()
        assert (one.distinct.max(axis=2) <= tokens * (1 + 1e-9)).all()


def test_nobody_counts_what_nobody_asks_for() -> None:
    for topology, way in ((rail_tree(2, 2), "pairwise"), (single_server(4), "hierarchical")):
        scenario = tiny(topology, deployment=parallel(dp=4, algorithms={"all_to_all": way}))
        assert all(exchange.distinct is None for exchange in exchanges_of(lowered(scenario), "dispatch"))


def test_a_run_sends_fewer_bytes_over_the_network_when_tokens_cross_it_once() -> None:
    def carried(all_to_all: str) -> float:
        trace = trace_of(
            tiny(
                rail_tree(2, 4),
                model={"experts": 8, "top_k": 4},
                deployment=parallel(dp=8, algorithms={"all_to_all": all_to_all}),
                gating={"skew": "zipf"},
                workload={"sequences": 64, "decode_steps": 2},
            )
        )
        exchanges, links = table(trace, "exchanges"), table(trace, "links")
        assert set(exchanges["algorithm"][exchanges["kind"] == "all_to_all"]) == {all_to_all}
        return float(links["bytes"][links["tier"] == "gpu-nic"].sum())

    # Four different experts of eight, four of them there: all four are here with chance 1 / 70, and of
    # four choices two lie there in the mean.
    assert carried("hierarchical") / carried("pairwise") == approx((1 - 1 / 70) / 2, rel=0.05)


def test_even_load_says_nothing_about_which_experts_a_token_takes_together() -> None:
    # 8 experts in two domains of 4, top-2: both in the same one with 2 * C(4, 2) / C(8, 2) = 12 / 28.
    scenario = tiny(
        rail_tree(2, 2),
        deployment=parallel(dp=4, algorithms={"all_to_all": "hierarchical"}),
        model={"experts": 8, "top_k": 2},
        workload={"sequences": 4, "phase": "prefill", "prompt_tokens": 4000},
    )
    found = next(op for op in lowered(scenario).operators if op.name == "dispatch").exchange
    assert found is not None and found.distinct is not None
    tokens = found.size.sum() / 2
    assert found.distinct.sum() == approx(tokens * (1 + 16 / 28), rel=5e-3)
