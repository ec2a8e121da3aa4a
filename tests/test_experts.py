"""Expert copies: every policy covers every expert, and every token finds a copy."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import parallel, rail_tree, tiny

from clustersim.plan.copy_choice import COPY_CHOICES, tokens_per_copy
from clustersim.plan.experts import EXPERT_POLICIES, Where, copies_of
from clustersim.plan.gating import even
from clustersim.plan.layout import lay_out
from clustersim.plan.memory import slots_of, weight_bytes
from clustersim.spec.deployment import SPARING, Deployment, Experts

#: (EP, experts)
SHAPES = [(1, 4), (2, 4), (4, 4), (4, 8), (8, 64)]


def deployment(policy: str, ranks: int, experts: int, spare: int = 0) -> Deployment:
    """Explicit: shifted by one place against `contiguous`; replicated: each expert twice, if it fits."""
    per_rank = experts // ranks
    wish: dict[str, object] = {"policy": policy}
    if policy == "replicated":
        wish["per_gpu"] = min(2 * per_rank, experts)
    if policy == "explicit":
        wish["slots"] = np.roll(np.arange(experts), 1).reshape(ranks, per_rank).tolist()
    if policy in SPARING:
        wish["spare"] = min(spare, experts - per_rank)
    return Deployment(data_parallel=ranks, expert_parallel=ranks, experts=Experts.model_validate(wish))


def popular(experts: int, layers: int, seed: int) -> np.ndarray:
    """float64[L, E]: loads of which some are many times others, and in every third layer all alike."""
    load = np.random.default_rng(seed).pareto(1.0, (layers, experts)) + 0.01
    load[::3] = 1.0
    return load


def two_domains(ranks: int) -> Where:
    """Ranks in two NVLink domains by turns, a model with as many groups as ranks, if these are even."""
    return Where(7, np.arange(ranks) % 2 if ranks % 2 == 0 else np.zeros(ranks, dtype=int), ranks)


@pytest.mark.parametrize("spare", [0, 1, 3])
@pytest.mark.parametrize("ranks, experts", SHAPES)
@pytest.mark.parametrize("policy", EXPERT_POLICIES)
def test_every_policy_covers_every_expert_in_every_layer(
    policy: str, ranks: int, experts: int, spare: int
) -> None:
    wish = deployment(policy, ranks, experts, spare)
    load = popular(experts, 5, seed=spare)
    copies = copies_of(load, wish, two_domains(ranks))
    assert copies.shape == (5, ranks * slots_of(wish, experts))
    assert copies.dtype == np.int32
    for layer in copies:
        assert set(layer.tolist()) == set(range(experts))
    assert np.array_equal(copies, copies_of(load, wish, two_domains(ranks))), "again the same"


@pytest.mark.parametrize("ranks, experts", SHAPES)
@pytest.mark.parametrize("policy", sorted(set(EXPERT_POLICIES) - set(SPARING)))
def test_no_rank_holds_an_expert_twice_that_others_lack(policy: str, ranks: int, experts: int) -> None:
    for layer in copies_of(popular(experts, 3, seed=1), deployment(policy, ranks, experts)):
        assert np.ptp(np.bincount(layer, minlength=experts)) == 0, "as often as any other"
        for held in layer.reshape(ranks, -1).tolist():
            assert len(set(held)) == len(held), "no rank holds an expert twice"


@pytest.mark.parametrize("policy", SPARING)
def test_spare_places_serve_experts_that_do_not_divide(policy: str) -> None:
    wish = deployment(policy, 8, 60, spare=1)
    copies = copies_of(popular(60, 4, seed=2), wish)
    assert copies.shape == (4, 8 * (7 + 1))
    assert all(set(layer) == set(range(60)) for layer in copies.tolist())


@pytest.mark.parametrize("policy", SPARING)
def test_spare_copies_fill_memory(policy: str) -> None:
    model = tiny(model={"expert_groups": 2}).model
    held = [weight_bytes(model, deployment(policy, 2, 4, spare), 0) for spare in (0, 1, 2)]
    one_copy = model.layers * 2 * 64 * 128 * 2.0  # two matrices in bf16
    assert np.diff(held).tolist() == [one_copy, one_copy]


@pytest.mark.parametrize("policy", SPARING)
@pytest.mark.parametrize("choice", COPY_CHOICES)
def test_spare_copies_share_their_experts_load_in_a_run(policy: str, choice: str) -> None:
    scenario = tiny(
        rail_tree(2, 2),
        model={"experts": 8, "expert_groups": 2},
        gating={"skew": "zipf"},
        deployment=parallel(dp=4, experts={"policy": policy, "spare": 1, "copy_choice": choice}),
    )
    layout = lay_out(scenario)
    assert layout.copies.shape == (2, 4 * 3)
    counts = np.random.default_rng(0).integers(0, 20, (4, 8))
    for layer in range(2):
        spread = layout.tokens_per_copy(counts, layer)[0].sum(axis=0)
        by_expert = np.bincount(layout.copies[layer], weights=spread, minlength=8)
        assert by_expert.tolist() == counts.sum(axis=0).tolist()


def test_a_random_placement_follows_the_seed_and_differs_by_layer() -> None:
    wish, load = deployment("random", 8, 64), np.ones((2, 64))
    one, same, other = (copies_of(load, wish, Where.anywhere(8, seed)) for seed in (1, 1, 2))
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other) and not np.array_equal(one[0], one[1])


def test_groups_stay_in_their_nvlink_domain_wherever_its_ranks_stand() -> None:
    # Eight groups of eight experts; ranks 0, 2, 4, 6 in one domain, the others in another.
    wish, where = deployment("eplb_hierarchical", 8, 64, spare=2), Where(0, np.arange(8) % 2, 8)
    for layer in copies_of(popular(64, 4, seed=3), wish, where).reshape(4, 8, -1):
        groups = [set((layer[side::2] // 8).ravel().tolist()) for side in (0, 1)]
        assert len(groups[0]) == len(groups[1]) == 4 and not groups[0] & groups[1]


@pytest.mark.parametrize("domain", [[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1, 2, 2]])
def test_by_groups_is_global_where_domains_are_not_alike(domain: list[int]) -> None:
    load, where = popular(64, 4, seed=4), Where(0, np.array(domain), 8)
    found = [copies_of(load, deployment(name, 8, 64, 1), where) for name in ("eplb_hierarchical", "eplb")]
    assert np.array_equal(*found)


def test_by_groups_is_global_where_domains_do_not_divide_the_groups() -> None:
    load, where = popular(60, 4, seed=5), Where(0, np.arange(9) // 3, 4)
    found = [copies_of(load, deployment(name, 9, 60, 1), where) for name in ("eplb_hierarchical", "eplb")]
    assert np.array_equal(*found)


def test_policies_place_by_hand() -> None:
    def placed(policy: str, **wish: object) -> list[list[int]]:
        about = Experts.model_validate({"policy": policy, **wish})
        copies = copies_of(np.ones((1, 4)), Deployment(data_parallel=2, expert_parallel=2, experts=about))
        return copies[0].reshape(2, -1).tolist()

    assert placed("contiguous") == [[0, 1], [2, 3]]
    assert placed("round_robin") == [[0, 2], [1, 3]]
    assert placed("replicated", per_gpu=4) == [[0, 1, 2, 3]] * 2
    assert placed("explicit", slots=[[3, 0], [1, 2]]) == [[3, 0], [1, 2]]


def test_a_placement_that_leaves_an_expert_out_is_refused() -> None:
    with pytest.raises(AssertionError, match="an expert stands nowhere"):
        copies_of(
            np.ones((1, 4)),
            deployment("explicit", 2, 4).model_copy(
                update={"experts": Experts(policy="explicit", slots=((0, 1), (2, 2)))}
            ),
        )


# ---- which copy serves whom ---------------------------------------------------------------------


@st.composite
def spreads(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts [N, E], copies [C] with every expert once or oftener, distances [N, C]."""
    sources, experts = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    more = draw(st.lists(st.integers(0, experts - 1), max_size=8))
    copies = np.array(draw(st.permutations([*range(experts), *more])))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    counts = rng.integers(0, draw(st.sampled_from([2, 50])), (sources, experts))
    return counts, copies, rng.integers(0, 3, (sources, len(copies)))


@pytest.mark.parametrize("choice", COPY_CHOICES)
@settings(deadline=None)
@given(case=spreads())
def test_all_tokens_of_a_source_for_an_expert_go_to_its_copies(
    choice: str, case: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> None:
    counts, copies, near = case
    spread = tokens_per_copy(counts, copies, near, choice)
    assert spread.shape == near.shape
    assert (spread >= 0).all()
    for expert in range(counts.shape[1]):
        assert np.array_equal(spread[:, copies == expert].sum(axis=1), counts[:, expert])


@given(case=spreads())
def test_round_robin_spreads_every_source_to_within_one_token(
    case: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    counts, copies, near = case
    spread = tokens_per_copy(counts, copies, near, "round_robin")
    for expert in range(counts.shape[1]):
        assert np.ptp(spread[:, copies == expert], axis=1).max() <= 1


@given(case=spreads())
def test_local_first_serves_nobody_from_afar_who_has_a_nearer_copy(
    case: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    counts, copies, near = case
    spread = tokens_per_copy(counts, copies, near, "local_first")
    for expert in range(counts.shape[1]):
        mine = copies == expert
        nearest = near[:, mine].min(axis=1, keepdims=True)
        assert (spread[:, mine][near[:, mine] > nearest] == 0).all()
        for distance, served in zip(near[:, mine], spread[:, mine], strict=True):
            assert np.ptp(served[distance == distance.min()]) <= 1, "the nearest take turns"


def test_what_is_left_over_goes_to_another_copy_for_every_source() -> None:
    # Four sources with one token each for the one expert, which stands in four places.
    spread = tokens_per_copy(
        np.ones((4, 1), dtype=int), np.zeros(4, dtype=int), np.full((4, 4), 2), "round_robin"
    )
    assert (spread.sum(axis=0) == 1).all()


@given(case=spreads())
def test_no_choice_can_leave_the_busiest_rank_fewer_tokens_than_least_loaded(
    case: tuple[np.ndarray, np.ndarray, np.ndarray],
) -> None:
    counts, copies, near = case
    rank = np.arange(len(copies)) // max(len(copies) // len(counts), 1)
    share = tokens_per_copy(counts, copies, near, "least_loaded").sum(axis=0)
    ranks = int(rank.max()) + 1
    held = [frozenset(rank[copies == expert].tolist()) for expert in range(counts.shape[1])]
    # What stands on some ranks alone must be served there, whoever chooses (Hall's theorem).
    least = max(
        -(-sum(int(counts[:, e].sum()) for e, on in enumerate(held) if on <= set(some)) // len(some))
        for size in range(1, ranks + 1)
        for some in combinations(range(ranks), size)
    )
    assert np.bincount(rank, weights=share).max() == least


def test_least_loaded_by_hand() -> None:
    # Rank 0 holds experts 0 and 1, rank 1 holds 0 and 2, rank 2 holds 0 and 3: 12 tokens for expert 0,
    # 6, 0 and 3 for the others: 21 in all, 7 on each. So 1, 7 and 4 of expert 0.
    counts = np.array([[4, 2, 0, 1]] * 3)
    copies = np.array([0, 1, 0, 2, 0, 3])
    spread = tokens_per_copy(counts, copies, np.full((3, 6), 2), "least_loaded")
    assert spread.sum(axis=0).tolist() == [1, 6, 7, 0, 4, 3]
    # Expert 0's tokens in a row, source by source: 4 4 4, cut after 1 and 8.
    assert spread[:, [0, 2, 4]].tolist() == [[1, 3, 0], [0, 4, 0], [0, 0, 4]]


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), skew=st.floats(0.0, 2.0), tokens=st.integers(1, 200), data=st.data())
def test_least_loaded_is_never_above_the_other_choices(
    seed: int, skew: float, tokens: int, data: st.DataObject
) -> None:
    rng = np.random.default_rng(seed)
    share = rng.permutation(np.arange(1, 33) ** -skew)
    policy = data.draw(st.sampled_from(["eplb", "packed", "at random"]))
    copies = rng.permutation(np.r_[np.arange(32), rng.integers(0, 32, 16)])
    if policy != "at random":
        copies = copies_of(rng.permutation(share)[None], deployment(policy, 8, 32, 2))[0]
    counts = rng.poisson(tokens * share, (8, 32))
    near = np.where(np.arange(8)[:, None] == np.arange(48) // 6, 0, 1)
    peak = {
        name: tokens_per_copy(counts, copies, near, name).sum(axis=0).reshape(8, -1).sum(axis=1).max()
        for name in COPY_CHOICES
    }
    assert peak["least_loaded"] <= min(peak.values())


@pytest.mark.parametrize("policy, spare", [("packed", 1), ("packed", 3), ("eplb", 1), ("eplb", 3)])
def test_under_even_load_least_loaded_reads_no_copy_more_than_there_are_experts(
    policy: str, spare: int
) -> None:
    copies = copies_of(np.ones((1, 16)), deployment(policy, 16, 16, spare))[0]
    near = np.where(np.arange(16)[:, None] == np.arange(len(copies)) // (1 + spare), 0, 1)
    share = tokens_per_copy(np.ones((16, 16), dtype=int), copies, near, "least_loaded").sum(axis=0)
    assert share[share > 0].tolist() == [16] * 16
    assert (share.reshape(16, -1).sum(axis=1) == 16).all()


@pytest.mark.parametrize("choice, away", [("local_first", 0), ("round_robin", 3 / 4)])
def test_with_every_expert_on_every_gpu_local_tokens_need_not_leave(choice: str, away: float) -> None:
    scenario = tiny(
        rail_tree(2, 2),
        deployment=parallel(dp=4, experts={"policy": "replicated", "per_gpu": 4, "copy_choice": choice}),
    )
    layout = lay_out(scenario)
    spread = layout.tokens_per_copy(np.full((4, 4), 8), 0)
    by_rank = spread[0].reshape(4, 4, 4).sum(axis=2)
    assert by_rank.sum() == 4 * 4 * 8
    assert 1 - np.trace(by_rank) / by_rank.sum() == away


def test_near_is_the_same_rank_the_same_nvlink_domain_or_neither() -> None:
    # Two servers of two GPUs, one expert each.
    layout = lay_out(tiny(rail_tree(2, 2), deployment=parallel(dp=4)))
    assert layout.near.tolist() == [[[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]]]


def test_ranks_that_share_an_expert_dispatch_among_their_likes() -> None:
    # EP 2 x ETP 2: ranks 0 and 1 share experts 0 and 1; rank 0 sends to 0 and 2, rank 1 to 1 and 3.
    layout = lay_out(tiny(rail_tree(2, 2), deployment=parallel(dp=4, etp=2)))
    assert layout.groups.ep.tolist() == [[[0, 2], [1, 3]]]
    assert layout.groups.etp.tolist() == [[[0, 1], [2, 3]]]
    counts = np.arange(16).reshape(4, 4)
    assert layout.tokens_per_copy(counts, 0).tolist() == [counts[[0, 2]].tolist(), counts[[1, 3]].tolist()]


@pytest.mark.parametrize("microbatches", [1, 2, 4, 8, 16])
def test_few_tokens_do_not_pile_up_on_the_first_copies(microbatches: int) -> None:
    # 16 experts on eight ranks of eight slots: four copies each, and ever fewer tokens for them.
    copies = copies_of(
        np.full((1, 16), 1 / 16),
        Deployment.model_validate(
            {"tensor_parallel": 8, "expert_parallel": 8, "experts": {"policy": "replicated", "per_gpu": 8}}
        ),
    )[0]
    counts = even(np.full(8, 16 // microbatches), np.full(16, 1 / 16), 2, np.random.default_rng(0))
    spread = tokens_per_copy(counts, copies, np.full((8, 64), 1), "round_robin")
    per_rank = spread.sum(axis=0).reshape(8, 8).sum(axis=1)
    assert np.ptp(per_rank) <= 1 or per_rank.max() <= 1.25 * per_rank.mean(), per_rank
