"""What skew costs: latency of the hottest rank under uneven load / under even load, measured and predicted.

Skew is free, or even wins, while few tokens use fewer experts; beyond some batch it costs severalfold. A
price may be off by the same factor on both sides of that and still foretell it, or be right on average and
miss it; so the ratio is judged by itself. Every measured ratio holds the random draws of its own rows, which
scatter by 3 to 8 % each: no prediction comes nearer than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.study.measured import measured

Told = Mapping[str, np.ndarray]

#: |relative error| of the ratio that the median of a class should keep within.
GOAL = 0.15
#: Tokens of the whole group up to which a class goes, and its name.
BATCHES = ((64, "up to 64 tokens"), (512, "65 to 512 tokens"), (np.inf, "over 512 tokens"))
#: EP up to which a class goes, and its name.
GROUPS = ((8, "EP 1 to 8"), (np.inf, "EP 16 to 256"))
#: A skew is felt from here on: the ratio at which batches are told from which on skew costs.
FELT = 1.1
#: Layers with such a batch below which nothing is said of it.
FEWEST = 5

_FUSED, _WIDE = "moe_kernels", "wideep_moe_skew_trtllm_h100"


@dataclass(frozen=True, slots=True)
class Side:
    """Rows on one side of a ratio: of a file, with a load pattern, and as many places for experts."""

    file: str
    load: str
    slots: int = 0


@dataclass(frozen=True, slots=True)
class Ratio:
    """Uneven load / even load; the layer, EP and tokens of both are the same.

    kernels  whether both sides are one library's kernels: otherwise the ratio also holds how these differ
    remark   what is known of its misses
    """

    name: str
    uneven: Side
    even: Side
    kernels: bool = True
    remark: str = ""


RATIOS = (
    Ratio("power law 1.2 / balanced, fused layers", Side(_FUSED, "powerlaw_a1.2"), Side(_FUSED, "balanced")),
    Ratio(
        "power law 1.2 / the same after EPLB without spare copies",
        Side(_WIDE, "power_law_1.2", 256),
        Side(_WIDE, "power_law_1.2_eplb", 256),
    ),
    Ratio(
        "power law 1.2 / the same after EPLB with 32 spare copies",
        Side(_WIDE, "power_law_1.2", 256),
        Side(_WIDE, "power_law_1.2_eplb", 288),
        remark="With 32 spare copies and few tokens the benchmark spread tokens over copies otherwise than "
        "we think: on EP 2 a single token took 196 us, as eight experts on one rank do (201 us), where even "
        "copies leave four of them there (127 us without spare copies). Ratios of up to 4 tokens are off by "
        "up to a factor of two.",
    ),
    *(
        Ratio(
            f"{name} / balanced of the fused layer", Side(_WIDE, load, slots), Side(_FUSED, "balanced"), False
        )
        for name, load, slots in (
            ("power law 1.01", "power_law_1.01", 256),
            ("power law 1.2", "power_law_1.2", 256),
            ("power law 1.2 after EPLB without spare copies", "power_law_1.2_eplb", 256),
            ("power law 1.2 after EPLB with 32 spare copies", "power_law_1.2_eplb", 288),
        )
    ),
)


def skew_checks(told: Told, by: str) -> dict[str, Any]:
    """How far predicted ratios are off, by batch and by EP, and from which batch on skew costs.

    told     calls with their prices, study.validate_kernels.kernel_predictions
    by       column of the prices that are judged
    Returns  {goal, felt, ratios, crossings, remarks, kept}: ratios: name, kernels, class, rows, measured
             (median ratio), median and p90 of |relative error|, ratio (median predicted / measured), within
             (share of rows within the goal), goal (whether the class has one), met; crossings: see
             `_crossings`; kept: whether all goals are met
    """
    found: list[dict[str, Any]] = []
    crossings = []
    for ratio in RATIOS:
        pairs = _pairs(told, ratio, by)
        if not len(pairs["measured"]):
            continue
        found += _classes(ratio, pairs)
        crossings += list(_crossings(ratio, pairs))
    names = {one["name"] for one in found}
    return {
        "goal": GOAL,
        "felt": FELT,
        "ratios": found,
        "crossings": crossings,
        "remarks": [ratio.remark for ratio in RATIOS if ratio.remark and ratio.name in names],
        "kept": all(one["met"] for one in found if one["goal"]),
    }


def _pairs(told: Told, ratio: Ratio, by: str) -> dict[str, np.ndarray]:
    """Both sides of a ratio joined: measured and predicted ratio, tokens, ep: float64[N]; layer: int64[N]."""
    above, below = (_side(told, side, ratio.kernels) for side in (ratio.uneven, ratio.even))
    rows: list[tuple[int, int, tuple[Any, ...]]] = [
        (place, below[key], key) for key, place in above.items() if key in below
    ]
    uneven, even = (np.array([row[side] for row in rows], dtype=np.int64) for side in (0, 1))
    layers = {layer: number for number, layer in enumerate(dict.fromkeys(row[2][:-1] for row in rows))}
    return {
        "measured": told["measured"][uneven] / told["measured"][even],
        "predicted": told[by][uneven] / told[by][even],
        "ep": np.array([float(key[0]) for _, _, key in rows]),
        "tokens": np.array([float(key[-1]) for _, _, key in rows]),
        "layer": np.array([layers[key[:-1]] for _, _, key in rows], dtype=np.int64),
    }


def _side(told: Told, side: Side, kernels: bool) -> dict[tuple[Any, ...], int]:
    """(EP, what else makes a layer, tokens) → place in `told`."""
    table = measured(side.file)
    here = np.flatnonzero((told["file"] == side.file) & (told["kernel"] == "experts"))
    row = told["row"][here]
    chosen = table["distribution"][row].astype(str) == side.load
    if side.slots:
        chosen &= table["num_slots"][row].astype(float) == side.slots
    here, row = here[chosen], row[chosen]
    names = ["hidden_size", "inter_size", "topk", "num_experts"]
    ep = table["ep" if "ep" in table else "moe_ep"][row].astype(float)
    tp = table["moe_tp"][row].astype(float) if "moe_tp" in table else np.ones(len(row))
    # Of two libraries each has kernels of its own; the fused layer beside the wide one is TensorRT-LLM's.
    library = told["library"][here] if kernels else np.full(len(here), "")
    keep = np.ones(len(here), dtype=bool) if kernels else np.char.startswith(told["library"][here], "trtllm")
    columns = [table[name][row].astype(float).tolist() for name in names]
    about = [told[name][here].tolist() for name in ("gpu", "format")]
    tokens = table["num_tokens_global"][row].astype(float)
    keys = zip(ep.tolist(), tp.tolist(), library.tolist(), *columns, *about, tokens.tolist(), strict=True)
    return {key: int(at) for key, at, kept in zip(keys, here, keep, strict=True) if kept}


def _classes(ratio: Ratio, pairs: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    for column, classes in (("tokens", BATCHES), ("ep", GROUPS)):
        which = np.searchsorted([most for most, _ in classes[:-1]], pairs[column])
        for number, (_, name) in enumerate(classes):
            chosen = which == number
            if chosen.any():
                yield _judged(ratio, name, pairs, chosen, goal=column == "tokens")


def _judged(
    ratio: Ratio, name: str, pairs: Mapping[str, np.ndarray], chosen: np.ndarray, goal: bool
) -> dict[str, Any]:
    off = pairs["predicted"][chosen] / pairs["measured"][chosen] - 1.0
    median = float(np.median(np.abs(off)))
    return {
        "name": ratio.name,
        "kernels": ratio.kernels,
        "class": name,
        "rows": int(chosen.sum()),
        "measured": float(np.median(pairs["measured"][chosen])),
        "median": median,
        "p90": float(np.quantile(np.abs(off), 0.9)),
        "ratio": float(1.0 + np.median(off)),
        "within": float((np.abs(off) <= GOAL).mean()),
        "goal": goal,
        "met": median <= GOAL,
    }


def _crossings(ratio: Ratio, pairs: Mapping[str, np.ndarray]) -> Iterator[dict[str, Any]]:
    """From which batch on skew costs more than FELT, over all layers and EP of a ratio of one library.

    Returns  name; lines: how many cross within what was measured, both measured and predicted; octaves:
             median of |log2 of predicted / measured tokens|; bias: median of the log2; one_sided: lines
             of which only one of both crosses
    """
    if not ratio.kernels:
        return
    apart, one_sided = [], 0
    for layer in np.unique(pairs["layer"]):
        mine = np.flatnonzero(pairs["layer"] == layer)
        mine = mine[np.argsort(pairs["tokens"][mine])]
        at = [_crossing(pairs["tokens"][mine], pairs[which][mine]) for which in ("measured", "predicted")]
        if None not in at:
            apart.append(float(np.log2(at[1] / at[0])))  # type: ignore[operator]
        elif at != [None, None]:
            one_sided += 1
    if len(apart) >= FEWEST:
        yield {
            "name": ratio.name,
            "lines": len(apart),
            "octaves": float(np.median(np.abs(apart))),
            "bias": float(np.median(apart)),
            "one_sided": one_sided,
        }


def _crossing(tokens: np.ndarray, ratio: Sequence[float] | np.ndarray) -> float | None:
    """The batch from which on the ratio stays above FELT, between two that were timed; None without."""
    over = np.asarray(ratio) > FELT
    if over.all() or not over[-1]:
        return None
    last = int(np.flatnonzero(~over)[-1])
    logs = np.log(np.asarray(ratio)[last : last + 2])
    share = (np.log(FELT) - logs[0]) / (logs[1] - logs[0])
    return float(tokens[last] * (tokens[last + 1] / tokens[last]) ** share)
