"""Gating: what every entry of the table keeps, and the law by which tokens draw their experts."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import tiny

from clustersim.errors import ClustersimError
from clustersim.plan import gating
from clustersim.plan.conditional import capped, choose, counts, log_odds, suffixes
from clustersim.plan.distinct import counted, expected
from clustersim.plan.gating import CHOICES, GATINGS, drawn, even, expert_counts, popularity
from clustersim.plan.popularity import LAWS as LAWS_BY_RANK
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
    found = counts_of(skew, tokens, experts, top_k, seed, exponent=exponent)
    assert found.shape == (3, len(tokens), experts)
    assert (found >= 0).all()
    assert (found.sum(axis=2) == np.array(tokens) * top_k).all(), "tokens * top_k leave each source"
    assert (found <= np.array(tokens)[:, None]).all(), "no token goes to an expert twice"


@given(tokens=TOKENS, experts=st.integers(1, 20), top_k=st.integers(1, 20))
def test_even_gating_is_even_to_within_one_token(tokens: list[int], experts: int, top_k: int) -> None:
    found = even(np.array(tokens), np.ones(experts), min(top_k, experts), stream(0))
    assert np.ptp(found, axis=1).max(initial=0) <= 1, "for every source"
    assert np.ptp(found.sum(axis=0)) <= 1, "and for all together"


def test_even_gating_sends_from_every_place_of_a_server_to_every_server_alike() -> None:
    # 8 tokens to 8 of 256 experts each: a quarter of the experts per source, so which quarter matters.
    found = even(np.full(128, 8), np.ones(256), 8, stream(0))
    by_place = found.reshape(16, 8, 16, 16).sum(axis=(0, 3))
    assert by_place.sum() == 128 * 64
    assert by_place.max() <= 1.5 * by_place.mean(), "places in a server x servers"


# ---- popularity ---------------------------------------------------------------------------------


@given(
    skew=st.sampled_from(sorted(LAWS_BY_RANK)),
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


def law_of(share: np.ndarray, top_k: int) -> np.ndarray:
    return suffixes(log_odds(share[None], top_k), top_k)[0]


def likely_sets(share: np.ndarray, top_k: int) -> dict[tuple[int, ...], float]:
    """Chance of every set of experts, proportional to the product of its odds, by enumeration."""
    odds = np.exp(log_odds(share[None], top_k)[0])
    weight = {one: float(np.prod(odds[list(one)])) for one in combinations(range(len(share)), top_k)}
    return {one: w / sum(weight.values()) for one, w in weight.items()}


LAWS = pytest.mark.parametrize(
    "experts, top_k, skew, number",
    [(4, 2, "zipf", 1.0), (4, 4, "zipf", 0.5), (5, 3, "zipf", 2.5), (6, 2, "gini", 0.6), (6, 1, "zipf", 3.0)],
)


def share_of(experts: int, top_k: int, skew: str, number: float) -> np.ndarray:
    about = {"exponent" if skew == "zipf" else "gini": number}
    return popularity(Gating(skew=skew, **about), experts, 0, 3, 0, top_k)


@LAWS
def test_an_expert_is_taken_as_often_as_its_share_says(
    experts: int, top_k: int, skew: str, number: float
) -> None:
    share = share_of(experts, top_k, skew, number)
    sets = likely_sets(share, top_k)
    for expert in range(experts):
        found = sum(chance for one, chance in sets.items() if expert in one)
        assert found == approx(share[expert] * top_k, abs=1e-8)


@LAWS
def test_sets_of_experts_are_drawn_in_proportion_to_their_odds(
    experts: int, top_k: int, skew: str, number: float
) -> None:
    share = share_of(experts, top_k, skew, number)
    draws = 100_000
    chosen = choose(draws, law_of(share, top_k), stream(2, "test"))
    found = Counter(map(tuple, chosen.tolist()))
    sets = likely_sets(share, top_k)
    assert set(found) <= set(sets)
    for one, chance in sets.items():
        assert_frequent(found[one], draws, chance)


@given(
    experts=st.integers(2, 300),
    top_k=st.integers(1, 16),
    exponent=st.floats(0, 10),
    dead=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60)
def test_odds_are_found_for_whatever_shares(experts: int, top_k: int, exponent: float, dead: int) -> None:
    top_k = min(top_k, experts)
    share = np.arange(1, experts + 1, dtype=float) ** -exponent
    share[experts - min(dead, experts - top_k) :] = 0.0
    share = capped(share / share.sum(), top_k)
    assert share.sum() == approx(1) and share.max() <= (1 + 1e-9) / top_k
    law = law_of(share, top_k)
    chosen = choose(50, law, stream(0, "test"))
    assert (np.diff(chosen, axis=1) > 0).all() and chosen.min() >= 0 and chosen.max() < experts
    tokens = np.array([2000, 0, 7])
    found = counts(tokens, law, stream(1, "test"))
    assert (found.sum(axis=1) == tokens * top_k).all() and (found <= tokens[:, None]).all()
    assert (found[:, share == 0] == 0).all()
    off = np.abs(found[0] - 2000 * top_k * share)
    assert (off <= 6 * np.sqrt(2000 * top_k * share * (1 - top_k * share).clip(0)) + 6).all()


def chi_square(found: np.ndarray, likely: np.ndarray) -> float:
    """Of counts against chances, in standard deviations beyond its mean; rare outcomes are put together."""
    expected = likely * found.sum()
    # Ranges of outcomes, each of which is to be expected at least five times.
    starts = [0]
    while expected[starts[-1] :].sum() >= 10:
        reach = starts[-1] + 1 + int(np.searchsorted(np.cumsum(expected[starts[-1] :]), 5))
        if expected[reach:].sum() < 5:
            break
        starts.append(reach)
    cells, means = np.add.reduceat(found, starts), np.add.reduceat(expected, starts)
    freedom = len(cells) - 1
    if not freedom:
        return 0.0
    return float((((cells - means) ** 2 / means).sum() - freedom) / np.sqrt(2 * freedom))


@pytest.mark.parametrize("experts, top_k, wished", [(8, 2, 0.3), (6, 3, 0.4), (16, 4, 0.5), (64, 8, 0.4)])
def test_counts_without_tokens_have_the_law_of_tokens(experts: int, top_k: int, wished: float) -> None:
    share = share_of(experts, top_k, "gini", wished)
    law, tokens, draws = law_of(share, top_k), 40, 4000
    source = np.full(draws, tokens)
    fast = counts(source, law, stream(3, "test"))
    chosen = choose(tokens * draws, law, stream(6, "test"))
    cells = np.repeat(np.arange(draws), tokens)[:, None] * experts + chosen
    slow = np.bincount(cells.ravel(), minlength=draws * experts).reshape(draws, experts)
    # An expert's tokens are binomial, as every token takes it or not: chi-square over how many.
    from_tokens, scores = [], []
    for expert in range(experts):
        chance = float(share[expert] * top_k)
        likely = np.array(
            [comb(tokens, n) * chance**n * (1 - chance) ** (tokens - n) for n in range(tokens + 1)]
        )
        scores.append(chi_square(np.bincount(fast[:, expert], minlength=tokens + 1), likely))
        from_tokens.append(chi_square(np.bincount(slow[:, expert], minlength=tokens + 1), likely))
    for found in (scores, from_tokens):
        assert max(found) < 5, "an expert's tokens are not binomial"
        assert abs(np.mean(found)) < 3 / np.sqrt(experts)
    # Which experts are taken together shows in the covariances.
    spread = np.sqrt(2 * np.outer(fast.var(axis=0), fast.var(axis=0)) / draws)
    assert (np.abs(np.cov(fast.T) - np.cov(slow.T)) <= 6 * spread + 1e-9).all()


@pytest.mark.parametrize(
    "experts, top_k, domains, wished", [(16, 2, 2, 0.3), (64, 8, 8, 0.5), (256, 8, 16, 0.2)]
)
def test_tokens_counted_once_per_domain_agree_however_they_were_drawn(
    experts: int, top_k: int, domains: int, wished: float
) -> None:
    share, tokens = share_of(experts, top_k, "gini", wished), np.full(4, 20_000)
    home = np.arange(experts) * domains // experts
    blocks = CHOICES["gini"](tokens, share, top_k, stream(0))
    one_by_one = counted(blocks, np.tile(home, (4, 1)), domains)
    of_counts = expected(counts(tokens, law_of(share, top_k), stream(1)), np.arange(experts), home, top_k)
    # Two draws of a binomial number each.
    chance = one_by_one / 20_000
    assert (np.abs(of_counts - one_by_one) <= 5 * np.sqrt(2 * 20_000 * chance * (1 - chance)) + 1).all()
    assert of_counts.sum() == approx(one_by_one.sum(), rel=0.003)


def test_many_tokens_are_drawn_in_portions_without_losing_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gating, "_DRAWN_TOGETHER", 7)
    found = drawn(np.array([5, 0, 16, 3]), np.full(6, 1 / 6), 2, stream(0, "test"))
    assert found.sum(axis=1).tolist() == [10, 0, 32, 6]


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
