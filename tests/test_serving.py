"""Serving: batches keep every token, arrivals come in order, shards and KV blocks add up."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx
from scenarios import parallel, rail_tree, table, tiny, trace_of

from clustersim.plan.memory import needs
from clustersim.seeds import stream
from clustersim.serving.arrivals import ARRIVALS, requests
from clustersim.serving.batching import Pass, microbatches
from clustersim.serving.kvcache import KvPool
from clustersim.serving.request import Request
from clustersim.serving.router import ROUTERS
from clustersim.spec.batch import Piece, batch_of
from clustersim.spec.checks import check_batch
from clustersim.spec.deployment import Deployment
from clustersim.spec.shards import sequences_per_shard
from clustersim.spec.workload import Workload


def workload(**about: Any) -> Workload:
    return Workload(**{"phase": "decode", "sequences": 4, "prompt_tokens": 10, "decode_steps": 1} | about)


def placed(sequences: int, prompt: int, steps: int, shards: int) -> list[tuple[Request, int]]:
    return [(Request(i, 0, 0.0, prompt, steps), i % shards) for i in range(sequences)]


# ---- batches ------------------------------------------------------------------------------------


@st.composite
def batches(draw: st.DrawFn) -> tuple[Workload, int]:
    """A workload that the scenario's checks let through, and its shards."""
    phase = draw(st.sampled_from(["prefill", "decode", "both"]))
    shards, parts, each = draw(st.integers(1, 4)), draw(st.integers(1, 6)), draw(st.integers(1, 4))
    prompt = draw(st.integers(1, 30))
    if phase == "prefill" and draw(st.booleans()):
        prompt *= parts  # then chunks come out even, though sequences do not
    else:
        each *= parts
    steps = 0 if phase == "prefill" else draw(st.integers(1, 3))
    work = workload(
        phase=phase,
        sequences=each * shards,
        prompt_tokens=prompt,
        decode_steps=steps,
        microbatches=parts,
    )
    assert not list(check_batch(work, Deployment(data_parallel=shards)))
    return work, shards


def in_order(chains: list[list[Pass]]) -> list[Pass]:
    """All passes, in the order in which the stages see them."""
    passes = [one for chain in chains for one in chain]
    return sorted(passes, key=lambda one: one.index)


@settings(deadline=None)
@given(case=batches())
def test_every_prompt_is_read_once_and_in_order(case: tuple[Workload, int]) -> None:
    work, shards = case
    chains = microbatches(placed(work.sequences, work.prompt_tokens, work.decode_steps, shards), work, shards)
    assert len(chains) == work.microbatches
    read = dict.fromkeys(range(work.sequences), 0 if work.phase != "decode" else work.prompt_tokens)
    made: Counter[int] = Counter()
    for one in in_order(chains):
        for number, piece in zip(one.requests, one.pieces, strict=True):
            assert piece.shard == number % shards, "a sequence stays where its KV blocks are"
            assert piece.past == read[number], "nothing is read twice or left out"
            assert piece.new >= 1
            read[number] += piece.new
            made[number] += piece.makes
    steps = work.decode_steps
    assert set(read.values()) == {work.prompt_tokens + steps}
    assert {made[number] for number in read} == {steps + (work.phase != "decode")}


@settings(deadline=None)
@given(case=batches())
def test_micro_batches_are_of_one_size_on_every_shard(case: tuple[Workload, int]) -> None:
    work, shards = case
    chains = microbatches(placed(work.sequences, work.prompt_tokens, work.decode_steps, shards), work, shards)
    for passes in zip(*chains, strict=True):
        tokens = np.array([one.batch(shards).tokens for one in passes])
        assert (tokens == tokens[0, 0]).all()
        assert len({(one.index, one.phase) for one in passes}) == 1


@settings(deadline=None)
@given(case=batches())
def test_a_prompts_pairs_do_not_depend_on_how_it_is_cut(case: tuple[Workload, int]) -> None:
    # Every token looks at those before it and at itself.
    work, shards = case
    chains = microbatches(placed(work.sequences, work.prompt_tokens, work.decode_steps, shards), work, shards)
    pairs = sum(one.batch(shards).pairs.sum() for one in in_order(chains))
    first = 0 if work.phase != "decode" else work.prompt_tokens
    seen = sum(range(first + 1, work.prompt_tokens + work.decode_steps + 1))
    assert pairs == work.sequences * seen


def test_pieces_are_summed_per_shard_by_hand() -> None:
    # Three new after two: 3 + 4 + 5 pairs; one new after nine: 10.
    batch = batch_of("prefill", [Piece(0, 3, 2, 1), Piece(2, 1, 9, 1), Piece(2, 2, 0, 0)], 3)
    assert batch.tokens.tolist() == [3, 0, 3]
    assert batch.pairs.tolist() == [12, 0, 13]
    assert batch.context.tolist() == [5, 0, 12]
    assert batch.outputs.tolist() == [1, 0, 1]


def test_prompts_are_cut_where_there_are_more_micro_batches_than_sequences() -> None:
    # Two prompts of six tokens in four chunks of three; the last chunk of each makes a token.
    work = workload(phase="prefill", sequences=2, prompt_tokens=6, decode_steps=0, microbatches=4)
    chains = microbatches(placed(2, 6, 0, 1), work, 1)
    assert [(p.requests, [(q.new, q.past, q.makes) for q in p.pieces]) for (p,) in chains] == [
        ((0,), [(3, 0, 0)]),
        ((0,), [(3, 3, 1)]),
        ((1,), [(3, 0, 0)]),
        ((1,), [(3, 3, 1)]),
    ]


def test_a_chunk_may_end_one_prompt_and_begin_the_next() -> None:
    # Two prompts of three tokens in three chunks of two.
    work = workload(phase="prefill", sequences=2, prompt_tokens=3, decode_steps=0, microbatches=3)
    chains = microbatches(placed(2, 3, 0, 1), work, 1)
    assert [(p.requests, [(q.new, q.past, q.makes) for q in p.pieces]) for (p,) in chains] == [
        ((0,), [(2, 0, 0)]),
        ((0, 1), [(1, 2, 1), (1, 0, 0)]),
        ((1,), [(2, 1, 1)]),
    ]


# ---- arrivals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARRIVALS)
@given(batches=st.integers(1, 50), interval=st.floats(1e-9, 1e3), seed=st.integers(0, 1000))
def test_batches_come_in_order_and_the_first_at_time_zero(
    name: str, batches: int, interval: float, seed: int
) -> None:
    times = ARRIVALS[name](batches, interval, stream(seed))
    assert times.shape == (batches,)
    assert times[0] == 0
    assert (np.diff(times) >= 0).all() and np.isfinite(times).all()


def test_arrivals_by_hand() -> None:
    assert ARRIVALS["together"](3, 0.0, stream(0)).tolist() == [0, 0, 0]
    assert ARRIVALS["uniform"](3, 0.5, stream(0)).tolist() == [0, 0.5, 1.0]


def test_poisson_gaps_are_exponential() -> None:
    gaps = np.diff(ARRIVALS["poisson"](20_001, 3.0, stream(0)))
    # Mean and deviation are the interval; within five standard errors.
    assert gaps.mean() == approx(3, abs=5 * 3 / np.sqrt(20_000))
    assert gaps.std() == approx(3, abs=5 * 3 * np.sqrt(2 / 20_000))
    assert (gaps > 3).mean() == approx(np.exp(-1), abs=5 * 0.5 / np.sqrt(20_000))


def test_requests_are_numbered_in_order_of_arrival() -> None:
    work = workload(batches=3, arrivals="poisson", interval="2 s", prompt_tokens=7, decode_steps=5)
    came = list(requests(work, seed=1))
    assert [r.number for batch in came for r in batch] == list(range(12))
    assert [[r.batch for r in batch] for batch in came] == [[b] * 4 for b in range(3)]
    arrival = [r.arrival for batch in came for r in batch]
    assert arrival == sorted(arrival)
    assert all((r.prompt_tokens, r.decode_steps) == (7, 5) for batch in came for r in batch)
    assert list(requests(work, seed=1)) == came
    assert list(requests(work, seed=2)) != came


# ---- shards and blocks --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROUTERS)
@given(
    count=st.integers(0, 30),
    held=st.lists(st.integers(0, 100), min_size=1, max_size=6),
)
def test_every_request_gets_a_shard_and_nobodys_count_is_changed(
    name: str, count: int, held: list[int]
) -> None:
    before = np.array(held)
    shards = ROUTERS[name]([r for r, _ in placed(count, 10, 1, 1)], before)
    assert len(shards) == count
    assert all(0 <= shard < len(held) for shard in shards)
    assert before.tolist() == held


@pytest.mark.parametrize("name", ROUTERS)
@given(each=st.integers(1, 5), shards=st.integers(1, 6))
def test_equal_requests_on_equal_shards_are_dealt_evenly(name: str, each: int, shards: int) -> None:
    got = ROUTERS[name]([r for r, _ in placed(each * shards, 10, 1, 1)], np.zeros(shards, dtype=int))
    assert (np.bincount(got, minlength=shards) == each).all()


def test_the_least_loaded_shard_is_the_one_with_the_fewest_tokens() -> None:
    # Shards hold 25, 0, 12; requests of 11 tokens: 0 -> 11, 11 -> 22, 12 -> 23, 22 -> 33, then 23.
    got = ROUTERS["least_loaded"]([r for r, _ in placed(5, 10, 1, 1)], np.array([25, 0, 12]))
    assert got == [1, 1, 2, 1, 2]
    assert ROUTERS["round_robin"]([r for r, _ in placed(5, 10, 1, 1)], np.array([25, 0, 12])) == [
        0,
        1,
        2,
        0,
        1,
    ]


@given(
    blocks=st.integers(0, 50),
    wishes=st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20), st.booleans()), max_size=30),
)
def test_blocks_used_and_free_are_all_there_are(blocks: int, wishes: list[tuple[int, int, bool]]) -> None:
    pool, held, mine = KvPool(2, blocks, 16), [], np.zeros(2, dtype=np.int64)
    for first, second, give in wishes:
        wanted = np.array([first, second])
        assert pool.fits(wanted) == bool((mine + wanted <= blocks).all())
        if pool.fits(wanted):
            pool.take(wanted)
            held.append(wanted)
            mine += wanted
        elif give and held:
            back = held.pop(0)
            pool.give_back(back)
            mine -= back
        assert np.array_equal(pool.used, mine)
        assert (pool.used >= 0).all() and (pool.used <= pool.blocks).all()
    for wanted in held:
        pool.give_back(wanted)
    assert (pool.used == 0).all()


def test_a_pool_refuses_what_it_does_not_have_and_what_it_never_gave() -> None:
    pool = KvPool(2, 5, 16)
    pool.take(np.array([5, 0]))
    with pytest.raises(AssertionError, match="not there"):
        pool.take(np.array([1, 0]))
    with pytest.raises(AssertionError, match="not taken"):
        pool.give_back(np.array([0, 1]))
    assert pool.used.tolist() == [5, 0]


def test_a_block_that_is_begun_is_a_whole_one() -> None:
    pool = KvPool(1, 5, 16)
    assert [pool.blocks_for(tokens) for tokens in (0, 1, 16, 17)] == [0, 1, 1, 2]


def test_the_smallest_scenario_deals_its_sequences_to_two_shards() -> None:
    scenario = tiny()
    (batch,) = requests(scenario.workload, scenario.seed)
    assert ROUTERS[scenario.workload.router](batch, np.zeros(2, dtype=int)) == [0, 1, 0, 1]


# ---- ragged sources -----------------------------------------------------------------------------


@given(
    sequences=st.integers(1, 60),
    shards=st.integers(1, 9),
    parts=st.integers(1, 4),
    prompt=st.integers(1, 12),
    prefill=st.booleans(),
    skew=st.floats(0.0, 10.0),
    seed=st.integers(0, 5),
)
def test_ragged_sources_send_as_many_sequences_as_even_ones_in_parts_that_stay_even(
    sequences: int, shards: int, parts: int, prompt: int, prefill: bool, skew: float, seed: int
) -> None:
    batch = sequences * shards * parts
    workload = Workload(
        phase="prefill" if prefill else "decode",
        sequences=batch,
        prompt_tokens=prompt,
        decode_steps=0 if prefill else 1,
        microbatches=parts,
        shard_skew=skew,
    )
    held = sequences_per_shard(workload, shards, seed)
    assert held.sum() == batch and (held >= 0).all()
    assert (held * (prompt if prefill else 1) % parts == 0).all()
    if not skew:
        assert (held == sequences * parts).all()


def test_a_larger_skew_of_the_shards_fills_the_same_shards_more() -> None:
    def most(skew: float) -> tuple[int, int]:
        work = Workload(phase="decode", sequences=4096, prompt_tokens=1, decode_steps=1, shard_skew=skew)
        held = sequences_per_shard(work, 16, seed=7)
        return int(held.argmax()), int(held.max())

    found = [most(skew) for skew in (0.1, 0.3, 1.0, 3.0)]
    assert len({shard for shard, _ in found}) == 1
    assert [size for _, size in found] == sorted(size for _, size in found) and found[0][1] > 256


def test_memory_and_blocks_follow_the_fullest_shard() -> None:
    def run(skew: float) -> tuple[float, np.ndarray, np.ndarray]:
        scenario = tiny(workload={"sequences": 40, "shard_skew": skew})
        trace = trace_of(scenario)
        memory, requests = table(trace, "memory"), table(trace, "requests")
        kv = memory["bytes"][memory["part"] == "kv"]
        return needs(scenario)[0].kv, kv, np.bincount(requests["shard"], minlength=2)

    even, ragged = run(0.0), run(2.0)
    assert even[2].tolist() == [20, 20] and ragged[2].sum() == 40 and ragged[2].max() > 20
    for needed, held, shard in (even, ragged):
        assert held.max() == needed, "what is checked beforehand is what the fullest shard takes"
        assert np.allclose(held / held.max(), shard / shard.max())


def test_a_run_goes_on_where_shards_have_nothing_to_do() -> None:
    for phase in ("prefill", "decode"):
        scenario = tiny(
            rail_tree(2, 4),
            deployment=parallel(tp=2, dp=4),
            model={"experts": 8},
            workload={"sequences": 16, "shard_skew": 10.0, "phase": phase},
        )
        requests = table(trace_of(scenario), "requests")
        assert len(set(requests["shard"])) < 4 and np.isfinite(requests["finish"]).all()
