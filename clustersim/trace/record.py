"""The third paper: what happened, as tables of columns that the engine appends to.

Every table and column is described here, next to its definition; documentation is printed from here.
Times are seconds of simulated time, sizes bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

Columns = Mapping[str, "np.ndarray | Text"]


@dataclass(frozen=True, slots=True)
class Text:
    """A column of repeated words: `words[codes[i]]` stands in row i.

    codes  int32[rows]
    words  the distinct words, in a fixed order
    """

    codes: np.ndarray
    words: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, rows: slice) -> Text:
        return Text(self.codes[rows], self.words)

    def rows(self) -> np.ndarray:
        """The words row by row, object[rows]."""
        words: np.ndarray = np.array(self.words, dtype=object)[self.codes]
        return words


#: table → column → (dtype, what it is). dtype "text" is a column of repeated words.
TABLES: dict[str, dict[str, tuple[str, str]]] = {
    "requests": {
        "request": ("int32", "request number, in order of arrival"),
        "batch": ("int32", "batch the request arrived in"),
        "shard": ("int32", "shard of the replica that holds its KV blocks"),
        "arrival": ("float64", "when it arrived, s"),
        "started": ("float64", "when its first step started, s"),
        "first_token": ("float64", "when its first output token was there, s; NaN if none was made"),
        "finish": ("float64", "when its last step ended, s"),
        "input_tokens": ("int32", "prompt tokens read in this run"),
        "output_tokens": ("int32", "tokens made in this run"),
    },
    "steps": {
        "step": ("int32", "step number, in order of start"),
        "batch": ("int32", "batch it belongs to"),
        "index": ("int32", "how many steps of the batch came before"),
        "phase": ("text", "prefill or decode"),
        "start": ("float64", "when its first micro-batch started at stage 0, s"),
        "end": ("float64", "when its last micro-batch left the last stage, s"),
        "input_tokens": ("int64", "prompt tokens read"),
        "output_tokens": ("int64", "tokens made"),
        "flop": ("float64", "useful FLOP over all ranks"),
        "bound_compute": ("float64", "no step can be faster: FLOP of the busiest rank at peak rate, s"),
        "bound_memory": ("float64", "no step can be faster: HBM bytes of the busiest rank, s"),
        "bound_network": ("float64", "no step can be faster: bytes over the busiest link, s"),
    },
    "token_batches": {
        "token_batch": ("int32", "number of this pass of a micro-batch through all stages"),
        "step": ("int32", "step it is part of"),
        "microbatch": ("int32", "micro-batch of the batch"),
        "ready": ("float64", "when it could have begun at stage 0, s"),
        "start": ("float64", "when the first rank of stage 0 began with it, s"),
        "end": ("float64", "when it left the last stage, s"),
        "tokens": ("int64", "tokens in it, over all shards"),
        "dropped": ("int64", "choices for experts that had no capacity left, over all layers"),
    },
    "spans": {
        "span": ("int64", "span number"),
        "token_batch": ("int32", "token batch it served"),
        "rank": ("int32", "rank it ran on"),
        "stage": ("int32", "pipeline stage of the rank"),
        "stream": ("text", "in-order queue of the GPU it ran on"),
        "operator": ("text", "which operator"),
        "kind": ("text", "compute or exchange"),
        "algorithm": ("text", "how an exchange is done, from plan/collectives.py; empty for compute"),
        "layer": ("int32", "layer, -1 outside the layers"),
        "group": ("int32", "number of the exchange's group within the stage; -1 for compute"),
        "start": ("float64", "when the rank was ready for it, s"),
        "met": ("float64", "when all it had to meet were there (compute: the start), s"),
        "end": ("float64", "when it was done, s"),
        "priced": ("float64", "what it would have taken as priced, without faults, s; NaN for exchanges"),
        "after": (
            "int64",
            "span whose end released it; -1 for none. What it waits for from that end to `met` is under "
            "way: tokens for an expert, weights that move",
        ),
    },
    "span_links": {
        "span": ("int64", "span of an exchange in which bytes were sent to or from its rank"),
        "link": ("int32", "of the flow that ended last for the rank: the link with least room on its path"),
        "own": ("float64", "what flows of the rank, both ways, put on that link in this exchange, bytes"),
        "all": ("float64", "what the whole exchange, all groups of the stage, put on it, bytes"),
        "payload": (
            "float64",
            "of `all`, what is not added by protocols, bytes; NaN where it was not written",
        ),
    },
    "sums": {
        "rank": ("int32", "rank"),
        "stream": ("text", "in-order queue of the GPU"),
        "operator": ("text", "which operator"),
        "phase": ("text", "prefill or decode"),
        "kind": ("text", "compute or exchange"),
        "count": ("int64", "spans"),
        "busy": ("float64", "time computing or exchanging, s"),
        "wait": ("float64", "time waiting for others before it could begin, s"),
        "waited_for": ("int32", "rank most waited for, -1 for none"),
    },
    "waits": {
        "operator": ("text", "exchange in which others waited"),
        "phase": ("text", "prefill or decode"),
        "layer": ("int32", "layer, -1 outside the layers"),
        "rank": ("int32", "rank they waited for: the last to come"),
        "seconds": ("float64", "how long, summed over those that waited, s"),
    },
    "flows": {
        "token_batch": ("int32", "token batch it served; -1 for weights of experts that move"),
        "operator": ("text", "exchange it was part of"),
        "layer": ("int32", "layer, -1 outside the layers"),
        "source": ("int32", "sending rank"),
        "target": ("int32", "receiving rank"),
        "via": ("text", "peer; up: from the source to a switch only; down: from there to the target"),
        "bytes": ("float64", "bytes sent"),
        "wire": ("float64", "bytes that crossed the links for them, protocol counted, bytes"),
        "start": ("float64", "when it was handed to the network, s"),
        "end": ("float64", "when its last byte arrived, s"),
    },
    "exchanges": {
        "operator": ("text", "which operator"),
        "phase": ("text", "prefill or decode"),
        "kind": ("text", "all_reduce, all_gather, reduce_scatter, broadcast, all_to_all or point_to_point"),
        "algorithm": ("text", "how it was done"),
        "count": ("int64", "how often, all groups of a stage counted as one"),
        "bytes": ("float64", "bytes sent, all rounds"),
    },
    "prices": {
        "operator": ("text", "which operator"),
        "phase": ("text", "prefill or decode"),
        "kernel": ("text", "GPU kernel it calls, from physics/kernels.py"),
        "format": ("text", "number format"),
        "basis": ("text", "measured table: gpu, format, library; empty for the data sheet alone"),
        "origin": ("text", "measured, interpolated, extrapolated or formula"),
        "count": ("int64", "operators so priced, over all ranks"),
        "seconds": ("float64", "their durations, added up over all ranks, s"),
        "outside": ("float64", "the furthest beyond what was measured, octaves"),
        "launch": ("float64", "of these seconds, those of launches by the kernels' formulas, s"),
    },
    "links": {
        "link": ("int32", "link number"),
        "source": ("text", "vertex it leaves"),
        "target": ("text", "vertex it enters"),
        "tier": ("text", "kinds of the two vertices, e.g. gpu-nvswitch"),
        "bandwidth": ("float64", "nominal capacity, bytes/s"),
        "latency": ("float64", "s"),
        "bytes": ("float64", "bytes carried, what protocols put on the wire counted"),
        "offered": ("float64", "capacity over the whole run, faults counted, bytes"),
    },
    "link_use": {
        "link": ("int32", "link number; rows only for intervals in which it carried something"),
        "start": ("float64", "beginning of an interval, s; all are equally long, a power of two"),
        "end": ("float64", "end of the interval, s"),
        "bytes": (
            "float64",
            "bytes carried in it, protocol counted; those of an exchange are spread "
            "evenly from its first start to its last end",
        ),
    },
    "queues": {
        "link": ("int32", "link number; rows only where links have queues, that is under chunked"),
        "start": ("float64", "beginning of an interval, s; those of a link follow each other from 0 on"),
        "end": ("float64", "end of the interval, s"),
        "mean": ("float64", "mean over the interval of what waits for the link, bytes"),
        "max": ("float64", "the most that waited at once, bytes"),
    },
    "experts": {
        "token_batch": ("int32", "token batch it served"),
        "layer": ("int32", "layer"),
        "rank": ("int32", "rank that holds the copy"),
        "ep_rank": ("int32", "its place in expert parallelism; ranks that share an expert (ETP) share it"),
        "slot": ("int32", "slot of the rank"),
        "expert": ("int32", "logical expert"),
        "tokens": ("int64", "tokens that came for this copy"),
        "first_arrival": ("float64", "when the first of them stood in the queue, s; NaN if none came"),
        "last_arrival": ("float64", "when the last of them stood in the queue, s; NaN if none came"),
        "served": ("float64", "when the rank began to serve the queue, s"),
        "done": ("float64", "when it had served it, s"),
        "length": ("int64", "tokens in the queue when service began"),
        "wait": ("float64", "time in the queue summed over its tokens, token-seconds"),
        "behind": (
            "float64",
            "of this, the time when all was there that is served together and the rank did other work "
            "first, token-seconds; before that, tokens wait for those still to come",
        ),
        "wait_p50": ("float64", "half of its tokens waited at most this, s; NaN if none came"),
        "wait_p99": ("float64", "99 in 100 of its tokens waited at most this, s; NaN if none came"),
        "wait_max": ("float64", "the longest that one of its tokens waited, s; NaN if none came"),
    },
    "token_waits": {
        "phase": ("text", "prefill or decode"),
        "wait": (
            "float64",
            "time tokens stood in an expert's queue, s; such that differ by less than 0.1 % "
            "are one row with their mean",
        ),
        "tokens": ("int64", "tokens that waited so long, over all queues of the run"),
    },
    "rebalances": {
        "rebalance": ("int32", "number of the planning, in order"),
        "observed": ("float64", "when the first step began whose loads it went by, s"),
        "planned": ("float64", "when planning began, with the loads of the steps done by then, s"),
        "ready": ("float64", "when the plan was there, s; NaN: the run was over before"),
        "outcome": (
            "text",
            "moved: weights began to move; below_threshold: nothing was planned, as the imbalance was small; "
            "nothing_better: no layer gained least_gain by the plan; too_late: the run was over before",
        ),
        "began": ("float64", "when the first weights began to move, s; NaN: nothing moved"),
        "ended": ("float64", "when the last layer stood at its new places, s; NaN: it never did"),
        "layers": ("int32", "layers that came to stand at new places"),
        "copies": ("int64", "expert copies that came to another rank for them"),
        "bytes": ("float64", "weights that came over links, all shares of an expert counted"),
        "stopped": ("float64", "time in which passes waited for the weights and none was under way, s"),
        "before": (
            "float64",
            "imbalance of the places as they were, under the observed loads: largest / "
            "mean tokens over the EP ranks, mean over layers; copies share their expert's tokens alike",
        ),
        "wished": (
            "float64",
            "the same of what the policy would have, layers that gain too little to move among it; NaN: it "
            "was not asked",
        ),
        "foreseen": ("float64", "the same of the places as planned"),
        "after": ("float64", "the same under the loads of as many steps after the move; NaN: none came"),
        "unmoved": ("float64", "imbalance of the old places under these later loads; NaN: none came"),
    },
    "placements": {
        "token_batch": ("int32", "token batch; rows only where experts may be placed anew"),
        "layer": ("int32", "layer"),
        "mean": ("float64", "tokens that came to an EP rank in the mean"),
        "busiest": ("int64", "tokens of the EP rank that got most"),
        "first": ("int64", "tokens of the EP rank that would have got most at the first places"),
    },
    "memory": {
        "rank": ("int32", "rank"),
        "part": ("text", "weights, kv, activations, exchange buffers or rebalancing buffers"),
        "bytes": ("float64", "HBM it takes at most"),
    },
    "kv_use": {
        "time": ("float64", "when what it holds changed, s; before the first row it is nothing"),
        "shard": ("int32", "shard of the replica"),
        "bytes": (
            "float64",
            "KV blocks given out from then on, on each rank of the fullest stage, bytes",
        ),
    },
    "ranks": {
        "rank": ("int32", "rank"),
        "gpu": ("text", "vertex of the topology"),
        "server": ("int32", "server it sits in"),
        "stage": ("int32", "pipeline stage"),
        "shard": ("int32", "shard of the attention"),
        "flop_rate": ("float64", "peak FLOP/s in the model's number format"),
        "memory_bandwidth": ("float64", "HBM bytes/s"),
        "memory": ("float64", "HBM bytes"),
        "flop": ("float64", "useful FLOP it did in this run"),
        "moved": ("float64", "HBM bytes it read and wrote in this run"),
        "priced": ("float64", "what its compute operators would have taken as priced, without faults, s"),
    },
    "faults": {
        "kind": ("text", "slow_gpu, throttled_gpu, spread_gpus, slow_link, down_link or flapping_link"),
        "place": ("text", "rank, all ranks, link or vertex"),
        "start": ("float64", "s"),
        "end": ("float64", "s; inf: never"),
        "factor": ("float64", "how many times slower; inf: down; NaN: each GPU its own"),
    },
    "outages": {
        "link": ("int32", "link that was slow or down"),
        "start": ("float64", "from when on, s"),
        "end": ("float64", "when that was over, or the run, s"),
        "bandwidth": ("float64", "what it carried meanwhile, bytes/s; 0: down"),
        "noticed": ("float64", "when flows were first sent around it, s; NaN: never"),
        "moved": ("int64", "flows under way that left it for another path"),
        "moved_bytes": ("float64", "what these had still to send, bytes"),
        "avoided": ("int64", "flows that began on another path because of it"),
        "avoided_bytes": ("float64", "their bytes"),
        "stranded": ("int64", "flows that found no other path and waited"),
    },
}


@dataclass(frozen=True, slots=True)
class Trace:
    """All tables of one run, and the facts that belong to no row.

    tables  table → column → array of equal length; columns as in TABLES
    facts   JSON values: name, scenario_hash, seed, simulated_seconds, operators, events, startup, prices,
            scenario (its resolved TOML text), claimed, idle (sentences on what the run never comes to)
    """

    tables: Mapping[str, Columns]
    facts: Mapping[str, Any]


class Store(Protocol):
    """Where a recorder puts rows that are too many for memory."""

    #: Rows of one table that a recorder keeps before it hands them on.
    rows: int

    def take(self, table: str, columns: Columns) -> Columns:
        """Writes the first rows of those that came. Returns the others, to be kept."""
        ...

    def finish(self, table: str, columns: Columns) -> Columns:
        """Given the last rows of a table, returns all of it."""
        ...


class Recorder:
    """Takes blocks of rows and keeps them as columns; the engine's only way out.

    store   takes what is too much for memory; None: everything is kept
    """

    def __init__(self, store: Store | None = None) -> None:
        self._store = store
        self._blocks: dict[str, list[Mapping[str, np.ndarray]]] = {table: [] for table in TABLES}
        self._rows = dict.fromkeys(TABLES, 0)
        self._words: dict[tuple[str, str], dict[str, int]] = {}

    def code(self, table: str, column: str, word: str) -> int:
        """The code of a word in a text column; new words get the next code."""
        words = self._words.setdefault((table, column), {})
        return words.setdefault(word, len(words))

    def rows(self, table: str, **columns: Any) -> None:
        """Appends a block of rows.

        columns  every column of the table: an array, or a scalar that holds for the whole block;
                 text columns as words or as codes from `code`. Arrays must not be changed afterwards
        """
        expected = TABLES[table]
        assert columns.keys() == expected.keys(), (table, columns.keys() ^ expected.keys())
        length = max((len(v) for v in columns.values() if np.ndim(v)), default=1)
        block = {}
        for name, value in columns.items():
            dtype = expected[name][0]
            if dtype == "text":
                value = self._encoded(table, name, value)
                dtype = "int32"
            array = np.asarray(value, dtype=dtype)
            block[name] = np.broadcast_to(array, (length,)) if array.ndim == 0 else array
        self._blocks[table].append(block)
        self._rows[table] += length
        if self._store is not None and self._rows[table] >= self._store.rows:
            self._keep(table, self._store.take(table, self._joined(table)))

    def _encoded(self, table: str, column: str, value: Any) -> Any:
        if isinstance(value, str):
            return self.code(table, column, value)
        if np.ndim(value) and len(value) and isinstance(value[0], str):
            return [self.code(table, column, word) for word in value]
        return value

    def _keep(self, table: str, columns: Columns) -> None:
        """Puts these rows in the place of all that were kept."""
        block = {name: c.codes if isinstance(c, Text) else c for name, c in columns.items()}
        self._rows[table] = len(next(iter(block.values())))
        self._blocks[table] = [block] if self._rows[table] else []

    def finish(self, facts: Mapping[str, Any]) -> Trace:
        """The trace so far; blocks are joined in the order in which they came."""
        tables = {table: self._joined(table) for table in TABLES}
        if self._store is not None:
            tables = {table: self._store.finish(table, columns) for table, columns in tables.items()}
        return Trace({table: _without_unused(columns) for table, columns in tables.items()}, facts)

    def _joined(self, table: str) -> Columns:
        joined: dict[str, np.ndarray | Text] = {}
        for column, (dtype, _) in TABLES[table].items():
            kind = "int32" if dtype == "text" else dtype
            parts = [block[column] for block in self._blocks[table]]
            array = np.concatenate(parts) if parts else np.empty(0, dtype=kind)
            words = tuple(self._words.get((table, column), {}))
            joined[column] = Text(array, words) if dtype == "text" else array
        return joined


def _without_unused(columns: Columns) -> Columns:
    """Without words behind the last that stands in a row: a file does not know them either."""
    if not isinstance(columns, dict):
        return columns
    return {
        name: Text(column.codes, column.words[: int(column.codes.max()) + 1])
        if isinstance(column, Text) and len(column)
        else column
        for name, column in columns.items()
    }
