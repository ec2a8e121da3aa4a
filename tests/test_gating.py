"""Gating: what every entry of the table keeps, and the law by which tokens draw their experts."""

from __future__ import annotations

from collections import Counter
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import tiny

from clustersim.errors import ClustersimError
from clustersim.plan import gating
from clustersim.plan.gating import GATINGS, choose, drawn, even, expert_counts, popularity
from clustersim.seeds import stream
from clustersim.spec.model import Model
from clustersim.spec.workload import Gating

TOKENS = st.lists(st.integers(0, 60), min_size=1, max_size=6)


def model(experts: int, top_k: int, layers: int = 3) -> Model:
    return tiny(model={"experts": 4, "layers": layers}).model.model_copy(
        update={"experts": experts, "top_k": top_k}
    )


def counts_of(
    skew: str,
    tokens: list[int],
    experts: int,
    top_k: int,
    seed: int = 0,
    token_batch: int = 0,
    **about: float,
) -> np.ndarray:
    wish = Gating(skew=skew, **about)
    return expert_counts(np.array(tokens), model(experts, top_k), wish, seed, token_batch)


@pytest.mark.parametrize("skew", GATINGS)
@settings(deadline=None)
@given(
    tokens=TOKENS,
    experts=st.integers(1, 20),
    top_k=st.integers(1, 20),
    exponent=st.floats(0, 10),
    seed=st.integers(0, 2**40),
)
def test_every_token_goes_to_top_k_different_experts(
    skew: str, tokens: list[int], experts: int, top_k: int, exponent: float, seed: int
) -> None:
    top_k = min(top_k, experts)
    counts = counts_of(skew, tokens, experts, top_k, seed, exponent=exponent)
    assert counts.shape == (3, len(tokens), experts)
    assert (counts >= 0).all()
    assert (counts.sum(axis=2) == np.array(tokens) * top_k).all(), "tokens * top_k leave each source"
    assert (counts <= np.array(tokens)[:, None]).all(), "no token goes to an expert twice"


@given(tokens=TOKENS, experts=st.integers(1, 20), top_k=st.integers(1, 20))
def test_even_gating_is_even_to_within_one_token(tokens: list[int], experts: int, top_k: int) -> None:
    counts = even(np.array(tokens), np.ones(experts), min(top_k, experts), stream(0))
    assert np.ptp(counts, axis=1).max(initial=0) <= 1, "for every source"
    assert np.ptp(counts.sum(axis=0)) <= 1, "and for all together"


# ---- popularity ---------------------------------------------------------------------------------


@given(
    skew=st.sampled_from(sorted(GATINGS)),
    exponent=st.floats(0, 10),
    experts=st.integers(1, 300),
    layer=st.integers(0, 100),
)
def test_popularities_are_shares_of_one_and_the_same_in_every_order(
    skew: str, exponent: float, experts: int, layer: int
) -> None:
    shuffled = popularity(Gating(skew=skew, exponent=exponent), experts, layer, 7)
    plain = popularity(Gating(skew=skew, exponent=exponent, shuffle=False), experts, layer, 7)
    assert shuffled.sum() == approx(1)
    assert np.sort(shuffled)[::-1] == approx(plain)


def test_zipf_is_a_power_of_the_rank() -> None:
    share = popularity(Gating(skew="zipf", exponent=2.0, shuffle=False), 4, 0, 0)
    assert share / share[0] == approx([1, 1 / 4, 1 / 9, 1 / 16])


def test_every_layer_is_shuffled_in_its_own_way() -> None:
    shares = [popularity(Gating(skew="zipf"), 64, layer, 0) for layer in range(8)]
    assert len({share.tobytes() for share in shares}) == 8
    again = [popularity(Gating(skew="zipf"), 64, layer, 1) for layer in range(8)]
    assert all(not np.array_equal(a, b) for a, b in zip(shares, again, strict=True))


def test_zipf_with_exponent_zero_favours_nobody() -> None:
    assert popularity(Gating(skew="zipf", exponent=0.0), 8, 0, 0) == approx(np.full(8, 1 / 8))


# ---- the law of a draw --------------------------------------------------------------------------


def assert_frequent(found: int, draws: int, likely: float) -> None:
    """Within five standard deviations: one test in two million fails by chance, and seeds are fixed."""
    assert abs(found - draws * likely) <= 5 * np.sqrt(draws * likely * (1 - likely)) + 1e-9


def in_succession(share: np.ndarray, order: tuple[int, ...]) -> float:
    """How likely a token chooses these experts in this order: each by its share of what is left."""
    left, likely = 1.0, 1.0
    for expert in order:
        likely *= share[expert] / left
        left -= share[expert]
    return likely


@pytest.mark.parametrize("exponent", [0.0, 1.0, 3.0])
def test_first_choices_follow_the_popularity(exponent: float) -> None:
    share = popularity(Gating(skew="zipf", exponent=exponent), 16, 0, 5)
    first = choose(100_000, share, 3, stream(1, "test"))[:, 0]
    for expert, found in enumerate(np.bincount(first, minlength=16)):
        assert_frequent(int(found), 100_000, float(share[expert]))


@pytest.mark.parametrize("rejections", [0, 1, 8], ids="{} rejections".format)
@pytest.mark.parametrize("experts, top_k, exponent", [(4, 2, 1.0), (4, 4, 0.5), (5, 3, 2.5), (3, 2, 6.0)])
def test_choices_follow_one_another_as_draws_without_repetition(
    experts: int, top_k: int, exponent: float, rejections: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However often a repetition is drawn again before the rest is drawn at once, the law is the same.
    monkeypatch.setattr(gating, "_REJECTIONS", rejections)
    share = popularity(Gating(skew="zipf", exponent=exponent), experts, 0, 3)
    draws = 100_000
    found = Counter(map(tuple, choose(draws, share, top_k, stream(2, "test")).tolist()))
    orders = list(permutations(range(experts), top_k))
    assert sum(in_succession(share, order) for order in orders) == approx(1)
    assert set(found) <= set(orders)
    for order in orders:
        assert_frequent(found[order], draws, in_succession(share, order))


def test_counts_are_those_of_the_choices() -> None:
    # An expert's expected tokens: how likely it is among the two chosen.
    share = popularity(Gating(skew="zipf", exponent=1.5, shuffle=False), 4, 0, 0)
    likely = np.zeros(4)
    for order in permutations(range(4), 2):
        likely[list(order)] += in_succession(share, order)
    counts = drawn(np.array([60_000, 40_000]), share, 2, stream(4, "test"))
    for source, tokens in enumerate((60_000, 40_000)):
        for expert in range(4):
            assert_frequent(int(counts[source, expert]), tokens, likely[expert])


class CountingDraws:
    """A generator that counts how often it is asked."""

    def __init__(self, rng: Any) -> None:
        self._rng = rng
        self.draws = 0

    def __getattr__(self, name: str) -> Any:
        self.draws += 1
        return getattr(self._rng, name)


@pytest.mark.parametrize("top_k", [2, 8, 256])
def test_extreme_popularity_still_gives_different_experts_in_few_draws(top_k: int) -> None:
    share = popularity(Gating(skew="zipf", exponent=10.0), 256, 0, 0)
    rng = CountingDraws(stream(0, "test"))
    chosen = choose(2000, share, top_k, rng)
    # Rejection gives up after some rounds per choice; without that it would go on for ever here.
    assert rng.draws <= 9 * top_k
    assert all(len(set(row)) == top_k for row in chosen.tolist())
    assert chosen.min() >= 0 and chosen.max() < 256
    assert np.bincount(chosen[:, 0], minlength=256).argmax() == share.argmax()


def test_many_tokens_are_drawn_in_portions_without_losing_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gating, "_DRAWN_TOGETHER", 7)
    counts = drawn(np.array([5, 0, 16, 3]), np.full(6, 1 / 6), 2, stream(0, "test"))
    assert counts.sum(axis=1).tolist() == [10, 0, 32, 6]


# ---- seeds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("skew", GATINGS)
def test_the_same_draw_is_the_same_whatever_was_drawn_before(skew: str) -> None:
    tokens = [9, 4, 7]
    alone = counts_of(skew, tokens, 8, 2, seed=3, token_batch=5)
    for other in (4, 6, 5):
        counts_of(skew, [50], 8, 3, seed=other, token_batch=other)
    assert np.array_equal(counts_of(skew, tokens, 8, 2, seed=3, token_batch=5), alone)


def test_every_seed_token_batch_and_layer_draws_its_own() -> None:
    draws = [
        counts_of("zipf", [200] * 4, 16, 2, seed, token_batch, shuffle=False)[layer]
        for seed in (0, 1)
        for token_batch in (0, 1)
        for layer in (0, 1, 2)
    ]
    assert len({draw.tobytes() for draw in draws}) == len(draws)
    assert {int(draw.sum()) for draw in draws} == {200 * 4 * 2}


def test_a_layer_more_shifts_no_draw() -> None:
    wish = Gating(skew="zipf")
    few, many = (expert_counts(np.array([30, 30]), model(8, 2, n), wish, 0, 0) for n in (2, 4))
    assert np.array_equal(few, many[:2])


def test_an_unknown_skew_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ClustersimError, match=r'gating.skew: "zpif".*did you mean "zipf"'):
        expert_counts(np.array([1]), model(4, 2), Gating().model_copy(update={"skew": "zpif"}), 0, 0)
