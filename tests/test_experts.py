"""Expert copies: every policy covers every expert, and every token finds a copy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenarios import parallel, rail_tree, tiny

from clustersim.plan.copy_choice import COPY_CHOICES, tokens_per_copy
from clustersim.plan.experts import EXPERT_POLICIES, copies_of
from clustersim.plan.gating import even
from clustersim.plan.layout import lay_out
from clustersim.plan.memory import slots_of
from clustersim.spec.deployment import Deployment, Experts

#: (EP, experts) and slots where the policy wants them
SHAPES = [(1, 4), (2, 4), (4, 4), (4, 8), (8, 64)]


def deployment(policy: str, ranks: int, experts: int) -> Deployment:
    """Explicit: shifted by one place against `contiguous`; replicated: each expert twice, if it fits."""
    per_rank = experts // ranks
    wish: dict[str, object] = {"policy": policy}
    if policy == "replicated":
        wish["per_gpu"] = min(2 * per_rank, experts)
    if policy == "explicit":
        wish["slots"] = np.roll(np.arange(experts), 1).reshape(ranks, per_rank).tolist()
    return Deployment(data_parallel=ranks, expert_parallel=ranks, experts=Experts.model_validate(wish))


@pytest.mark.parametrize("ranks, experts", SHAPES)
@pytest.mark.parametrize("policy", EXPERT_POLICIES)
def test_every_policy_covers_every_expert_in_every_layer(policy: str, ranks: int, experts: int) -> None:
    wish = deployment(policy, ranks, experts)
    copies = copies_of(np.full((3, experts), 1 / experts), wish)
    assert copies.shape == (3, ranks * slots_of(wish, experts))
    for layer in copies:
        assert set(layer.tolist()) == set(range(experts))
        assert np.ptp(np.bincount(layer, minlength=experts)) == 0, "as often as any other"
        for held in layer.reshape(ranks, -1).tolist():
            assert len(set(held)) == len(held), "no rank holds an expert twice"


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
