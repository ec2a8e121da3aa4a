"""The permanent examples: run, kept small, and set beside what their documents claim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clustersim.study.run import find, load, run_scenario, with_beside
from clustersim.trace.plain import json_text, read_json
from clustersim.units import show

#: The examples, the claimed phase of each document first → how to read the result; no numbers here,
#: they are filled in from the run.
EXAMPLES = {
    "large_ep": "HBM decides. Every step reads the KV cache of all sequences, and with as many key/value "
    "heads as query heads that cache is large; the weights of the one expert per GPU come next, read "
    "whole for the few tokens that reach it. Dispatch and combine cost what a library needs to begin "
    "them, with sends to 15 peers each, and hardly any bandwidth; kernels made for few tokens are quicker "
    "(`--set deployment.algorithms.all_to_all=low_latency`).",
    "baseline_tp8_pp2": "HBM decides here, too: each stage holds every expert four times, and with so few "
    "tokens each GPU reads all its copies whole for every micro-batch. That is most of the distance to large "
    "EP: with each expert held once (`--set deployment.experts.policy=contiguous --set "
    "deployment.experts.per_gpu=0`) this deployment is as fast, within a twentieth.",
    "large_ep_prefill": "Arithmetic decides: the experts' products and the attention's projections run near "
    "the peak rate of the data sheet. Dispatch and combine are exposed, because nothing computes while "
    "they run, and half of their bytes cross a network card.",
    "baseline_tp8_pp2_prefill": "Arithmetic again, but the TP all-reduce and all-gather move every token "
    "through NVLink in every layer, and the two stages stand idle while the pipeline fills and drains. "
    "All expert traffic stays inside a server.",
    "moe_1024": "Chunks of prompt are too small for this many GPUs: the pipeline's fill and drain and the "
    "dispatch and combine take more time than the arithmetic: 64 peers, each with a send of its own. A "
    "larger batch would raise the throughput; more FLOP/s alone would not.",
    "moe_1024_decode": "A handful of tokens per shard: every step reads weights and pays launches and "
    "latencies for almost no work, and with two micro-batches in eight stages most GPUs wait for their "
    "turn most of the time.",
}
#: Relative difference above which a kept number is stale; below it is rounding between machines.
_ROUNDING = 1e-6
#: Kept for nobody: as long as the machine is wide, or different on every computer.
_LEFT_OUT = ("gpus", "links", "wall_seconds")
_PAGE = "README.md"
_COMMAND = "clustersim examples"


def regenerate(folder: Path) -> list[Path]:
    """Runs the examples and writes their summaries and the page. Returns the files written."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: small_summary(name) for name in EXAMPLES}
    written = []
    for name, summary in found.items():
        path = folder / f"{name}.json"
        path.write_text(json_text(summary), encoding="utf-8")
        written.append(path)
    page = folder / _PAGE
    page.write_text(page_of(found), encoding="utf-8")
    return [*written, page]


def differences(folder: Path, names: Sequence[str] = tuple(EXAMPLES)) -> list[str]:
    """What lies in the folder but is not what a run gives now; nothing if all is current.

    names    examples to run again; the page is checked against the files either way
    """
    kept = {name: read_json(folder / f"{name}.json", f"missing; run `{_COMMAND}`") for name in EXAMPLES}
    stale = []
    for name in names:
        stale += [f"{name}: {what}" for what in _unlike(small_summary(name), kept[name], "")]
    page = folder / _PAGE
    if not page.is_file() or page.read_text(encoding="utf-8") != page_of(kept):
        stale.append(f"{page} does not follow from the summaries beside it")
    return stale


def small_summary(name: str) -> dict[str, Any]:
    """The summary of an example without its lists per GPU and link."""
    summary = with_beside(run_scenario(load(find(f"workloads/{name}.toml")))).summary
    return {key: value for key, value in summary.items() if key not in _LEFT_OUT}


def _unlike(now: Any, kept: Any, place: str) -> Iterator[str]:
    if isinstance(now, Mapping) and isinstance(kept, Mapping):
        for key in [*now, *(k for k in kept if k not in now)]:
            yield from _unlike(now.get(key), kept.get(key), f"{place}.{key}" if place else key)
    elif isinstance(now, list) and isinstance(kept, list) and len(now) == len(kept):
        for i, pair in enumerate(zip(now, kept, strict=True)):
            yield from _unlike(*pair, f"{place}.{i}")
    elif isinstance(now, int | float) and isinstance(kept, int | float):
        if abs(now - kept) > _ROUNDING * max(abs(now), abs(kept)):
            yield f"{place} is {now:g}, not {kept:g}"
    elif now != kept:
        yield f"{place} has changed"


def page_of(found: Mapping[str, Mapping[str, Any]]) -> str:
    """The page that sets found beside claimed and says what decides each result."""
    lines = [
        "# The seed deployments: found beside claimed",
        "",
        f"Written by `{_COMMAND}` from the summaries beside this page; a test says when it is stale. "
        "Operators cost what was measured of their kernels, exchanges what was measured of the libraries "
        "that do them; what lies beyond measurements each run says.",
        "",
        "| scenario | tokens/s found | claimed | TPOT found | claimed | step | largest lower bound |",
        "|---|---|---|---|---|---|---|",
        *(_row(name, summary) for name, summary in found.items()),
        "",
        *_ratio(found),
    ]
    for name, summary in found.items():
        lines += ["", f"## {name}", "", EXAMPLES[name], ""]
        lines += [*_decided(summary), *(f"- {note}" for note in summary["notes"])]
    return "\n".join(lines) + "\n"


def _row(name: str, summary: Mapping[str, Any]) -> str:
    claim = summary["claimed"] or {}
    rate, tpot = claim.get("total_tokens_per_second"), claim.get("tpot")
    times, bounds = summary["latency"], summary["bounds"]
    cells = (
        f"`{name}`",
        f"{summary['throughput']['total_tokens_per_second']:,.0f}",
        f"{rate['claimed']:,.0f}" if rate else "–",
        _time(times["tpot"] and times["tpot"]["mean"]),
        _time(tpot["claimed"] if tpot else None),
        _time(times["step"]["mean"]),
        f"{bounds['bound_by']} {_time(bounds[bounds['bound_by']])}",
    )
    return f"| {' | '.join(cells)} |"


def _ratio(found: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    for one, other in (("large_ep", "baseline_tp8_pp2"), ("large_ep_prefill", "baseline_tp8_pp2_prefill")):
        if one in found and other in found:
            rates = [found[name]["throughput"]["total_tokens_per_second"] for name in (one, other)]
            yield (
                f"`{one}` : `{other}` = {rates[0] / rates[1]:.2f} in tokens/s; "
                f"the document claims {450_000 / 120_000:.2f}."
            )


def _decided(summary: Mapping[str, Any]) -> Iterator[str]:
    """Which bound, which operators, which exchange, which queue."""
    for phase, about in summary["phases"].items():
        step, period, bounds = about["step"]["mean"], about["period"], about["bounds"]
        floor = bounds[bounds["bound_by"]]
        yield (
            f"- A {phase} step takes {_time(step)}; the {bounds['bound_by']} bound alone is "
            f"{_time(floor)}, {floor / step:.0%} of it."
        )
        parts = sorted(about["parts"], key=lambda part: -(part["busy"] + part["wait"]))
        most = [f"{p['operator']} {(p['busy'] + p['wait']) / period:.0%}" for p in parts[:4]]
        exchanges = [p for p in parts if p["kind"] == "exchange" and p.get("stream", "compute") == "compute"]
        busy = sum(p["busy"] for p in exchanges)
        wait = sum(p["wait"] for p in exchanges)
        yield f"- Where a GPU's time goes: {', '.join(most)}."
        if exchanges:
            yield (
                f"- Exchanges take {busy / period:.1%} of the time, waiting for peers {wait / period:.1%}, "
                f"most of all {exchanges[0]['operator']}."
            )
    experts = summary["experts"]
    if experts:
        yield (
            f"- Experts: the busiest rank gets {experts['imbalance']['mean']:.2f} x the mean; tokens wait "
            f"{_time(experts['queue_wait']['mean'])} in their expert's queue "
            f"(p99 {_time(experts['queue_wait']['p99'])})."
        )


def _time(seconds: float | None) -> str:
    return "–" if seconds is None else show(seconds, "time")
