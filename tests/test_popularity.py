"""How popular experts are: laws by rank, orders, motions, topics, measured counts, capacity and groups."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import parallel, rail_tree, table, tiny, trace_of

from clustersim.plan.gating import expert_counts, within_capacity
from clustersim.plan.layout import expected_load
from clustersim.plan.popularity import gini, popularity, settled
from clustersim.spec.model import Model
from clustersim.spec.routing import Routing, packed
from clustersim.spec.workload import Gating, LayerCurve
from clustersim.study.gating_fit import rank_correlation


def model(experts: int, top_k: int, layers: int = 3, **about: int) -> Model:
    update = {"experts": experts, "top_k": top_k, "layers": layers, **about}
    return tiny(model={"experts": 4}).model.model_copy(update=update)


def share(experts: int = 64, layer: int = 0, step: int = 0, top_k: int = 1, **wish: Any) -> np.ndarray:
    return popularity(Gating(**wish), experts, layer, 7, step, top_k)


# ---- laws ---------------------------------------------------------------------------------------


def test_gini_is_half_the_mean_difference_over_the_mean() -> None:
    load = np.array([1.0, 4.0, 0.0, 7.0])
    differences = np.abs(load[:, None] - load[None, :]).mean()
    assert gini(load) == approx(differences / (2 * load.mean()))
    assert gini(np.ones(5)) == approx(0) and gini(np.array([0, 0, 0, 9])) == approx(3 / 4)


@settings(deadline=None, max_examples=60)
@given(experts=st.integers(2, 300), top_k=st.integers(1, 8), part=st.floats(0, 0.98))
def test_a_wished_gini_is_met_to_a_billionth(experts: int, top_k: int, part: float) -> None:
    top_k = min(top_k, experts - 1)
    wished = part * (1 - top_k / experts)
    found = share(experts, top_k=top_k, skew="gini", gini=wished)
    assert gini(found) == approx(wished, abs=1e-9)
    assert found.sum() == approx(1) and found.max() <= (1 + 1e-9) / top_k


@settings(deadline=None, max_examples=60)
@given(
    experts=st.integers(4, 128),
    peak=st.floats(1.05, 6.0),
    part=st.floats(0.05, 0.95),
    bend=st.floats(-1.5, 1.5),
)
def test_a_fitted_layer_has_the_gini_and_the_busiest_expert_that_it_was_given(
    experts: int, peak: float, part: float, bend: float
) -> None:
    # Between one expert above all others alike, and as many as possible beside the busiest.
    peak = min(peak, experts * 0.9)
    least = gini(np.array([peak] + [(experts - peak) / (experts - 1)] * (experts - 1)))
    whole = int(experts // peak)
    most = gini(np.array(([peak] * whole + [experts - whole * peak] + [0.0] * experts)[:experts]))
    wished = float(least + part * (most - least))
    curve = LayerCurve(layer=0, gini=wished, peak=peak, bend=bend)
    found = share(experts, skew="fitted", layers=[curve])
    assert gini(found) == approx(wished, abs=1e-6)
    assert found.max() * experts == approx(peak, rel=1e-6)


def test_other_layers_take_the_nearest_one_that_was_fitted() -> None:
    curves = [LayerCurve(layer=2, gini=0.1, peak=1.5), LayerCurve(layer=9, gini=0.5, peak=5.0)]
    found = [gini(share(layer=layer, skew="fitted", layers=curves)) for layer in (0, 5, 6, 30)]
    assert found == approx([0.1, 0.1, 0.5, 0.5], abs=1e-6)


def test_hot_experts_share_what_they_were_told() -> None:
    found = np.sort(share(skew="hot", hot_experts=4, hot_share=0.5))[::-1]
    assert found[:4] == approx(0.5 / 4) and found[4:] == approx(0.5 / 60)


def test_a_hot_rank_is_the_one_that_a_contiguous_placement_makes_hot() -> None:
    scenario = tiny(
        rail_tree(2, 2),
        deployment=parallel(dp=4),
        model={"experts": 8, "top_k": 2},
        gating={"skew": "hot_rank", "hot_rank": 2, "hot_share": 0.7},
    )
    by_rank = expected_load(scenario).reshape(-1, 4, 2).sum(axis=2)
    assert by_rank[:, 2] == approx(0.7) and by_rank[:, [0, 1, 3]] == approx(0.1)


def test_what_no_expert_can_get_goes_to_the_others() -> None:
    found = share(8, top_k=2, skew="hot", hot_experts=1, hot_share=0.9, shuffle=False)
    assert found == approx([0.5] + [0.5 / 7] * 7)


# ---- orders and motions -------------------------------------------------------------------------


def orders(experts: int, steps: list[int], layers: int = 40, **wish: Any) -> np.ndarray:
    """Rank correlation with the first of the steps, mean over layers."""
    first = [share(experts, layer, steps[0], skew="gini", **wish) for layer in range(layers)]
    return np.array(
        [
            np.mean(
                [rank_correlation(first[n], share(experts, n, s, skew="gini", **wish)) for n in range(layers)]
            )
            for s in steps
        ]
    )


@pytest.mark.parametrize("half_life", [3.0, 50.0, 1000.0])
@pytest.mark.parametrize("start", [0, 12_345])
def test_half_of_the_rank_correlation_is_gone_after_a_half_life(half_life: float, start: int) -> None:
    steps = [start, start + int(half_life), start + 2 * int(half_life)]
    found = orders(256, steps, motion="drifting", half_life=half_life)
    # 40 layers of 256 experts: a standard deviation of 0.01.
    assert found[1] == approx(0.5, abs=0.05)
    assert found[2] == approx(0.26, abs=0.05)


def test_a_drift_keeps_how_uneven_the_load_is() -> None:
    found = [gini(share(step=step, skew="gini", gini=0.3, motion="drifting")) for step in (0, 7, 1000)]
    assert found == approx([0.3] * 3, abs=1e-9)


def test_any_step_can_be_asked_for_without_those_before() -> None:
    wish = {"skew": "gini", "motion": "drifting", "half_life": 5.0}
    alone = share(step=77, **wish)
    for step in range(5):
        share(step=step, **wish)
    assert np.array_equal(share(step=77, **wish), alone)


@pytest.mark.parametrize("correlation, low, high", [(0.0, -0.08, 0.08), (0.5, 0.4, 0.56), (1.0, 1.0, 1.0)])
def test_layers_rank_their_experts_as_alike_as_they_were_told(
    correlation: float, low: float, high: float
) -> None:
    shares = [share(256, layer, skew="gini", correlation=correlation) for layer in range(12)]
    found = [rank_correlation(a, b) for i, a in enumerate(shares) for b in shares[:i]]
    assert low <= np.mean(found) <= high


def test_a_burst_comes_and_goes_and_takes_its_share() -> None:
    wish = {"skew": "uniform", "motion": "bursting", "burst_every": 10, "burst_steps": 3, "burst_share": 0.4}
    found = [share(step=step, **wish) for step in range(24)]
    bursting = [step for step, one in enumerate(found) if gini(one) > 1e-9]
    assert bursting == [10, 11, 12, 20, 21, 22]
    hot = np.sort(found[10])[-8:].sum()
    assert hot == approx(0.4 + 0.6 / 8), "one expert in eight"
    assert not np.array_equal(found[10], found[20]), "another topic every time"


def test_a_rotating_hot_spot_moves_on_by_as_many_experts_as_are_hot() -> None:
    wish = {"skew": "hot_rank", "hot_experts": 4, "motion": "rotating", "rotate_every": 5}
    hottest = [int(share(16, step=step, **wish).argmax()) for step in (0, 4, 5, 10, 19, 20)]
    assert hottest == [0, 0, 4, 8, 12, 0]


def test_steps_of_a_run_move_its_popularity() -> None:
    wish = {"skew": "hot_rank", "hot_share": 1.0, "motion": "rotating", "rotate_every": 1}
    scenario = tiny(
        rail_tree(2, 2),
        deployment=parallel(dp=4),
        model={"experts": 8, "top_k": 2},
        gating=wish,
        workload={"sequences": 8, "decode_steps": 4, "phase": "decode"},
    )
    rows = table(trace_of(scenario), "experts")
    for token_batch in range(4):
        some = (rows["token_batch"] == token_batch) & (rows["tokens"] > 0)
        assert set(rows["ep_rank"][some]) == {token_batch}


# ---- topics -------------------------------------------------------------------------------------


def test_what_a_source_sends_follows_its_requests() -> None:
    wish = Gating(skew="topics", topics=6, topic_requests=1, gini=0.8)
    found = expert_counts(np.full(24, 4000), model(32, 2), wish, 0, 0, 0, 12).astype(float)[0]
    same = [rank_correlation(found[i], found[i + 1]) for i in range(0, 24, 2)]
    assert min(same) > 0.9, "both ranks of a shard have its request"
    others = np.corrcoef(found[::2])
    likes = others[np.triu_indices(12, 1)]
    assert likes.min() < 0.3 and likes.max() > 0.99, "shards differ, unless they have the same topic"


def test_topics_together_have_the_popularity_that_is_said() -> None:
    wish = Gating(skew="topics", topics=4, topic_requests=1, gini=0.6)
    found = expert_counts(np.full(400, 50), model(16, 2), wish, 3, 0)[1].sum(axis=0)
    expected = popularity(wish, 16, 1, 3, 0, 2)
    # 400 requests: their topics make the spread.
    assert found / found.sum() == approx(expected, abs=0.03)


# ---- measured -----------------------------------------------------------------------------------


def measured_tokens() -> Routing:
    ids = np.array([[[0, 1], [2, 3]], [[0, 2], [3, 1]], [[0, 1], [2, 0]]], dtype=np.uint8)
    counts = np.stack([np.bincount(ids[:, layer].ravel(), minlength=4) for layer in range(2)])
    return Routing("three tokens", 2, (0, 1), counts, ids)


def test_replayed_counts_have_the_measured_shares() -> None:
    counts = np.array([[50, 30, 15, 5], [10, 20, 30, 40]])
    content = packed(Routing("two layers", 2, (0, 4), counts))
    for layer, row in ((0, 0), (1, 0), (3, 1), (9, 1)):
        assert share(4, layer, top_k=2, skew="replayed", content=content) == approx(counts[row] / 100)


def test_replayed_tokens_take_the_experts_that_a_measured_token_took() -> None:
    wish = Gating(skew="replayed", content=packed(measured_tokens()))
    found = expert_counts(np.array([1] * 60), model(4, 2, 2), wish, 0, 0)
    seen = {tuple(map(tuple, found[:, source])) for source in range(60)}
    patterns = measured_tokens().ids
    assert patterns is not None
    whole = {tuple(tuple(np.bincount(layer, minlength=4)) for layer in token) for token in patterns}
    assert seen == whole, "in all layers the same token"


# ---- capacity and groups ------------------------------------------------------------------------


@settings(deadline=None)
@given(
    tokens=st.lists(st.integers(0, 60), min_size=4, max_size=4),
    factor=st.floats(0.1, 4.0),
    sharers=st.sampled_from([1, 2]),
    exponent=st.floats(0, 4),
)
def test_no_expert_takes_more_than_its_capacity_and_drops_hit_all_sources_alike(
    tokens: list[int], factor: float, sharers: int, exponent: float
) -> None:
    came = expert_counts(np.array(tokens), model(8, 2), Gating(skew="zipf", exponent=exponent), 1, 0)
    kept = within_capacity(came, factor, sharers)
    assert (kept >= 0).all() and (kept <= came).all()
    for group in range(sharers):
        before, after = came[:, group::sharers].sum(axis=1), kept[:, group::sharers].sum(axis=1)
        capacity = np.ceil(factor * sum(tokens[group::sharers]) * 2 / 8 - 1e-9)
        assert (after == np.minimum(before, capacity)).all()
        ratio = np.divide(after, before, out=np.ones(before.shape), where=before > 0)[:, None, :]
        assert (np.abs(kept[:, group::sharers] - came[:, group::sharers] * ratio) <= 1).all()
    assert np.array_equal(within_capacity(came, 0.0, sharers), came)


@pytest.mark.parametrize("skew", ["gini", "topics", "hot_rank"])
def test_choices_of_a_run_are_served_or_dropped_and_the_drops_are_counted(skew: str) -> None:
    scenario = tiny(
        rail_tree(2, 2),
        deployment=parallel(dp=4),
        model={"experts": 8, "top_k": 2},
        gating={"skew": skew, "gini": 0.6, "capacity_factor": 1.0},
        workload={"sequences": 64, "decode_steps": 2, "phase": "decode"},
    )
    trace = trace_of(scenario)
    batches, served = table(trace, "token_batches"), table(trace, "experts")
    for number, tokens, dropped in zip(
        batches["token_batch"], batches["tokens"], batches["dropped"], strict=True
    ):
        came = served["tokens"][served["token_batch"] == number].sum()
        assert dropped > 0
        assert came + dropped == tokens * 2 * scenario.model.layers
    assert served["tokens"].max() <= 64 * 2 // 8


@pytest.mark.parametrize("skew", ["uniform", "gini", "zipf"])
def test_node_limited_tokens_stay_within_as_many_groups_as_they_may(skew: str) -> None:
    limited = model(16, 4, expert_groups=4, groups_chosen=2)
    wish = Gating(skew=skew, gini=0.5, node_limited=True)
    found = expert_counts(np.ones(300, dtype=int), limited, wish, 0, 0)
    assert (found.sum(axis=2) == 4).all() and found.max() == 1
    groups = (found.reshape(3, 300, 4, 4).sum(axis=3) > 0).sum(axis=2)
    assert groups.max() == 2
    free = expert_counts(np.ones(300, dtype=int), limited, Gating(skew=skew, gini=0.5), 0, 0)
    assert (free.reshape(3, 300, 4, 4).sum(axis=3) > 0).sum(axis=2).max() > 2


def test_without_a_limit_that_binds_scores_give_nearly_the_popularity() -> None:
    every = model(16, 4, expert_groups=4, groups_chosen=4)
    wish = Gating(skew="gini", gini=0.4, node_limited=True)
    found = expert_counts(np.array([40_000]), every, wish, 0, 0)[0, 0] / 160_000
    assert found == approx(popularity(wish, 16, 0, 0, 0, 4), rel=0.15)
    assert gini(found) == approx(0.4, abs=0.03)


def test_only_a_hot_rank_needs_to_know_the_deployment() -> None:
    scenario = tiny(gating={"skew": "zipf"})
    assert settled(scenario) is scenario.gating
