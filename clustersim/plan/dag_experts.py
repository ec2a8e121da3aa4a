"""How experts are drawn: the gate, the way of tokens to the copies of experts, each of them, the way back."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from clustersim.plan.builder import WIDTH
from clustersim.plan.dag import COMPUTATION, LAYER, REST, ROUTING, Node, Tensor
from clustersim.plan.dag_sheet import Sheet, before_and_after, said_groups
from clustersim.plan.lowering import CHOICE, SCORE
from clustersim.plan.stepgraph import Operator
from clustersim.spec.model import FORMAT_BYTES


def gate(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Scores of all experts for the tokens of this GPU's slice."""
    call = op.call
    assert call is not None
    c, experts = call.columns, sheet.model.experts
    for suffix, at in sheet.lanes:
        yield from own_slice(sheet, op, "x", c["m"], suffix, at)
        takes = [sheet.hidden("x", at, c["m"])]
        gives = [
            sheet.tensor("scores", at, ("tokens", c["m"], sheet.graph.tokens), ("experts", c["n"], experts))
        ]
        yield sheet.node(index, op, "Gate", suffix, at, takes, gives, ROUTING)


def own_slice(
    sheet: Sheet, op: Operator, name: str, tokens: np.ndarray, suffix: str, at: np.ndarray
) -> Iterator[Node]:
    """A view: where the TP ranks hold the same tokens, each goes on with its own slice of them."""
    held = sheet.registers.numbers(name, sheet.ranks[at])
    if np.allclose(held, (tokens * sheet.model.hidden)[at]):
        return
    whole = np.zeros(len(sheet.ranks))
    whole[at] = held / sheet.model.hidden
    takes, gives = [sheet.hidden(name, at, whole)], [sheet.hidden(name, at, tokens)]
    title = f"Own slice of the tokens (1 of {sheet.tp})"
    yield sheet.view(
        f"slice_{name}" if name != "x" else "slice", title, op.layer, suffix, at, takes, gives, ROUTING
    )


def top_k(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Which experts a token goes to, and how much each of them counts."""
    assert op.call is not None
    tokens, moved = op.call.columns["tokens"], op.call.columns["bytes"]
    k = sheet.model.top_k
    scores = (moved - CHOICE * k * tokens) / SCORE
    experts = np.divide(scores, tokens, out=np.zeros_like(scores), where=tokens > 0)
    first = ("tokens", tokens, sheet.graph.tokens)
    for suffix, at in sheet.lanes:
        takes = [sheet.tensor("scores", at, first, ("experts", experts, float(experts.max())))]
        gives = [sheet.tensor("choices", at, first, ("experts of a token", k, k))]
        yield sheet.node(index, op, f"Top-{k} selection", suffix, at, takes, gives, ROUTING)


def permute(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """A copy of each token for each of its experts, in the order of the experts."""
    copies, tokens = _copied(sheet, op)
    dropped = copies - _sent(sheet, index)
    for suffix, at in sheet.lanes:
        takes = [sheet.hidden("x", at, tokens), _choices(sheet, at, tokens)]
        gives = [sheet.hidden("copies", at, copies - dropped, float((copies - dropped).sum()))]
        note = f"{dropped[at].sum():,.0f} dropped: their experts are full" if dropped[at].any() else ""
        yield sheet.node(
            index, op, "Tokens in order of their experts", suffix, at, takes, gives, ROUTING, note=note
        )


def _copied(sheet: Sheet, op: Operator) -> tuple[np.ndarray, np.ndarray]:
    """Copies and tokens on each GPU, from the bytes that are moved: each token once and its copies."""
    assert op.call is not None
    tokens = op.call.columns["tokens"]
    return op.call.columns["bytes"] / (WIDTH * sheet.model.hidden) - tokens, tokens


def _sent(sheet: Sheet, index: int) -> np.ndarray:
    """float64[N] copies that the next dispatch takes from each GPU: fewer, where experts were full."""
    operators = sheet.graph.operators
    dispatch = next(op for op in operators[index:] if op.name == "dispatch")
    assert dispatch.exchange is not None
    return before_and_after(dispatch.exchange, sheet.ranks, _width(dispatch))[0] / sheet.model.hidden


def _choices(sheet: Sheet, at: np.ndarray, tokens: np.ndarray) -> Tensor:
    k = sheet.model.top_k
    return sheet.tensor(
        "choices", at, ("tokens", tokens, sheet.graph.tokens), ("experts of a token", k, k), selects=True
    )


def _width(op: Operator) -> float:
    """Bytes of a number in an all-to-all among experts."""
    assert op.exchange is not None and op.exchange.copies is not None
    return FORMAT_BYTES[op.exchange.copies.sent_as(op.exchange.back)]


def dispatch(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """Tokens go to the GPUs of their experts."""
    yield from sheet.swapped(
        index, op, "Dispatch: all-to-all", "copies", "arrived", _width(op), _copies_in_all(op, sheet)
    )


def combine(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """What experts made of tokens goes back to whom the tokens came from."""
    yield from sheet.swapped(
        index, op, "Combine: all-to-all", "back", "returned", _width(op), _copies_in_all(op, sheet)
    )


def _copies_in_all(op: Operator, sheet: Sheet) -> float:
    assert op.exchange is not None
    return float(op.exchange.size.sum()) / _width(op) / sheet.model.hidden


def unpermute(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """What the experts of a token made of it is added up, as much as the gate says that each counts."""
    copies, tokens = _copied(sheet, op)
    for suffix, at in sheet.lanes:
        ranks = sheet.ranks[at]
        lost = np.zeros(len(sheet.ranks))
        if sheet.graph.dropped:
            lost[at] = copies[at] - sheet.registers.numbers("returned", ranks) / sheet.model.hidden
        came = copies - lost
        takes = [sheet.hidden("returned", at, came, float(came.sum())), _choices(sheet, at, tokens)]
        yield sheet.node(
            index,
            op,
            "Aggregation of experts",
            suffix,
            at,
            takes,
            [sheet.hidden("delta", at, tokens)],
            ROUTING,
        )


def shared_sum(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """What the shared experts made is added."""
    assert op.call is not None
    tokens = op.call.columns["bytes"] / (3 * WIDTH * sheet.model.hidden)
    for suffix, at in sheet.lanes:
        takes = [sheet.hidden("delta", at, tokens), sheet.hidden("shared", at, tokens)]
        gives = [sheet.hidden("delta", at, tokens)]
        yield sheet.node(index, op, "Sum with shared experts", suffix, at, takes, gives, ROUTING)


def product(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """One of the kernels of an expert, for every copy by itself."""
    assert op.call is not None
    taken, given, title = _KERNELS[op.call.kernel]
    inner = op.call.columns["inter"]
    wide = inner * (1 + op.call.columns["gated"])
    widths = {"hidden": op.call.columns["hidden"], "up": wide, "acted": inner}
    title = title or said_activation(sheet)
    etp = sheet.d.expert_tensor_parallel
    divided = {"columns": " (column parallel)", "rows": " (row parallel)"} if etp > 1 else {}
    title += divided.get({"expert_up": "columns", "expert_down": "rows"}.get(op.call.kernel, ""), "")

    def sized(name: str, width: str, at: np.ndarray, rows: np.ndarray, key: object) -> Tensor:
        # The ranks that share a copy hold the same tokens and their own columns.
        whole = float(widths[width].max()) * (1 if width == "hidden" else etp)
        dims = (("tokens", rows, float(rows[at].sum()) / etp), (_WORDS[width], widths[width], whole))
        return sheet.tensor(name, at, *dims, key=key)

    for part, at, rows in _copies(sheet, op):
        # What is served together is a part of what came, unless all of it is.
        key = None if sheet.wish.level == LAYER and op.slot < 0 else (op.slot, _chunk(sheet, index), part)
        takes = [sized(taken, _WIDTH_OF[taken], at, rows, key)]
        if taken == "arrived" and etp == 1:
            takes = [Tensor(t.name, t.ranks, t.numbers, t.dims, t.key, selects=True) for t in takes]
        yield _expert_node(
            sheet, index, op, title, at, rows, part, takes, [sized(given, _WIDTH_OF[given], at, rows, key)]
        )


def said_activation(sheet: Sheet) -> str:
    """What stands between the two products of a feed-forward network."""
    return "Gate and activation" if sheet.model.ffn_kind == "gated" else "GELU"


def _expert_node(
    sheet: Sheet, index: int, op: Operator, title: str, at: np.ndarray, rows: np.ndarray,
    part: tuple[int, ...], takes: list[Tensor], gives: list[Tensor],
) -> Node:  # fmt: skip
    assert op.call is not None
    work = op.call.columns["counts"].sum(axis=1)
    share = np.divide(rows, work, out=np.zeros_like(rows), where=work > 0)[at]
    experts = tuple(dict.fromkeys(sheet.layout.copies[op.layer][list(part)].tolist()))
    split = sheet.wish.level != LAYER
    suffix, kind = "", COMPUTATION
    if split and len(part) == 1:
        suffix, kind = f".c{part[0]}", COMPUTATION
        named, times = f"Expert {experts[0]}", int((sheet.layout.copies[op.layer] == experts[0]).sum())
        title = (
            f"{named}{f' (copy {_which(sheet, op.layer, part[0])} of {times})' if times > 1 else ''}: {title}"
        )
    elif split:
        suffix, kind = f".c{part[0]}-{part[-1]}", REST
        things = "experts" if sheet.layout.copies.shape[1] == sheet.model.experts else "expert copies"
        title = f"… {len(part):,} more {things}: {title}"
    return sheet.node(index, op, title, suffix, at, takes, gives, kind, share, members=part, experts=experts)


def _which(sheet: Sheet, layer: int, place: int) -> int:
    copies = sheet.layout.copies[layer]
    return int((copies[: place + 1] == copies[place]).sum())


def _copies(sheet: Sheet, op: Operator) -> Iterator[tuple[tuple[int, ...], np.ndarray, np.ndarray]]:
    """Copies of a node, places of its GPUs, and float64[N] the tokens of these copies on each GPU."""
    assert op.call is not None
    counts, slots, etp = op.call.columns["counts"], sheet.layout.slots, sheet.d.expert_tensor_parallel
    for part in sheet.wish.copies(sheet.layout.copies.shape[1]):
        rows, on = np.zeros(len(sheet.ranks)), np.zeros(len(sheet.ranks), dtype=bool)
        mine = [copy for copy in part if op.slot in (-1, copy % slots)]
        for copy in mine:
            at = np.arange(copy // slots * etp, (copy // slots + 1) * etp)
            rows[at] += counts[at, copy % slots if op.slot < 0 else 0]
            on[at] = True
        if mine:
            yield tuple(mine), np.flatnonzero(on), rows


def _chunk(sheet: Sheet, index: int) -> int:
    """Which of the chunks of a slot it is, counted over the operators of its layer."""
    operators, op = sheet.graph.operators, sheet.graph.operators[index]
    count, at = 0, index - 1
    while at >= 0 and operators[at].layer == op.layer and op.slot >= 0:
        count += operators[at].name == op.name and operators[at].slot == op.slot
        at -= 1
    return count


def among_sharers(sheet: Sheet, index: int, op: Operator) -> Iterator[Node]:
    """What the ranks that share experts do together, before and after the products."""
    exchange = op.exchange
    assert exchange is not None
    gathers = exchange.kind == "all_gather"
    width = FORMAT_BYTES[sheet.model.sent_as] if gathers else WIDTH
    title, name = (
        ("Tokens of the group: all-gather", "arrived")
        if gathers
        else ("Sums of the group: reduce-scatter", "back")
    )
    before, after = (n / sheet.model.hidden for n in before_and_after(exchange, sheet.ranks, width))
    each = before if gathers else after  # what every GPU has for itself
    for groups, rest in _sharers(sheet, exchange.groups):
        at = np.searchsorted(sheet.ranks, exchange.groups[groups].ravel())
        whole = float(each[at].sum())
        first, last = groups[0], groups[-1]
        said = f"… {len(groups):,} more groups: {title.partition(': ')[2]}" if rest else title
        yield sheet.node(
            index, op, said, f".e{first}-{last}" if rest else f".e{first}", at,
            [sheet.hidden(name, at, before, whole, selects=gathers)], [sheet.hidden(name, at, after, whole)],
            REST if rest else "",
            sent=float(exchange.size[groups].sum()), note=said_groups(exchange.groups[groups]),
        )  # fmt: skip


def _sharers(sheet: Sheet, groups: np.ndarray) -> list[tuple[list[int], bool]]:
    """Groups by node, and whether these are those left out: as the copies that they hold."""
    if sheet.wish.level == LAYER:
        return [(list(range(len(groups))), False)]
    parts = sheet.wish.copies(sheet.layout.copies.shape[1])
    single = sorted({copy // sheet.layout.slots for part in parts if len(part) == 1 for copy in part})
    rest = [n for n in range(len(groups)) if n not in set(single)]
    found = [([n], False) for n in single if not rest or n < rest[0]]
    return [
        *found,
        *([(rest, True)] if rest else []),
        *(([n], False) for n in single if rest and n > rest[0]),
    ]


#: Kernel → what it takes, what it gives, what it is.
_KERNELS = {
    "expert_up": ("arrived", "up", "GEMM 1"),
    "expert_activation": ("up", "acted", ""),
    "expert_down": ("acted", "back", "GEMM 2"),
}
_WIDTH_OF = {"arrived": "hidden", "up": "up", "acted": "acted", "back": "hidden"}
_WORDS = {"hidden": "hidden", "up": "ffn", "acted": "ffn"}
