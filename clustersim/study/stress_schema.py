"""What every key of stress.json means; docs/stress.md is printed from here."""

from __future__ import annotations

#: Changed whenever a key changes its meaning or goes away.
SCHEMA_VERSION = 1

#: Figures of one case: key → what it is.
FIGURES: dict[str, str] = {
    "tokens_per_second": "input and output tokens from the first arrival to the last finish, 1/s",
    "steps": "forward passes",
    "latency.<kind>": "distributions of step, token_batch, tpot, ttft and request as in summary.json, s",
    "imbalance": "largest / mean tokens over the EP ranks of one layer of one token batch: mean and max",
    "queue_wait": "time a token stood in its expert's queue: mean, p50, p99 and max, s",
    "dropped": "choices dropped because of a capacity factor, as in summary.json; null without one",
    "exposed_exchange": "time per step and GPU that exchanges take or are waited for with nothing computed "
    "meanwhile, s",
    "token": "time between output tokens of a sequence, stops for weights included, s; null without",
    "rebalancing": "what moving experts cost, the keys as in summary.json; null where none was to move",
    "cause": "what holds the run up, in one line; null where nothing costs 2 % of a step",
    "worst_gpu.gpu": "the GPU that others waited for longest; `worst_gpu` is null if nobody waited",
    "worst_gpu.rank": "its rank",
    "worst_gpu.share": "the part of all waiting that goes to its account",
    "worst_gpu.busy": "share of the run that it computed or exchanged",
    "hottest.ep_rank": "the EP rank that got the most tokens; `hottest` is null without experts",
    "hottest.rank": "its rank, and `hottest.gpu` its GPU, in the layer named here",
    "hottest.load": "its tokens / the mean of the EP ranks, over the run",
    "hottest.layer": "the layer in which it got the most tokens, and `hottest.layer_load` the ratio there",
    "hottest.expert": "the expert that brought most of these, and `hottest.share` its part of them",
}

#: key → what it is. `[]` is every entry of a list, `<x>` a key that depends on the run.
SCHEMA: dict[str, str] = {
    "schema_version": "version of this page that the file follows",
    "question": "stress, or map",
    "name": "name of the scenario",
    "file": "its file, as it was named",
    "scenario_hash": "hash of the resolved scenario as it was run",
    "seed": "of every random stream, the same in all cases",
    "decode_steps.run": "decode steps of each case, and `decode_steps.in_file` those the file states",
    "parts[]": "which parts are answered: those of this call, and with --resume those of earlier ones",
    "slo.text": "the bound that is wished",
    "slo.subject": "what is bounded, and `slo.limit` where, s or 1/s",
    "slo.stated": "whether the user wished it; else it follows from the balanced case",
    "suite[].case": "name of the case; `balanced` is what all are held against",
    "suite[].what": "what is done to the deployment",
    "suite[].overrides[]": "what to put after --set of `clustersim run` to get this case",
    "suite[].applies": "whether it can be done to this deployment",
    "suite[].error": "why it was not run or failed; empty if it ran",
    "suite[].against_balanced": "tokens_per_second, p50_step and p99_step / those of the balanced case",
    "suite[].missed": "whether it misses the bound; null if it did not run",
    "suite[].figures": "what it gave, as listed below; null if it did not run",
    "breaking[].cause": "what is made worse until the bound is missed, and `what` in words",
    "breaking[].lacking": "why it cannot be made worse here; empty if it can",
    "breaking[].low": "the mildest value tried, and `high` the worst",
    "breaking[].precision": "how far the answer may be off: absolute, or a share if `precision_is_ratio`",
    "breaking[].verdict": "breaks; never: kept in the whole range; always: missed at its mildest; failed",
    "breaking[].said": "the answer as a sentence",
    "breaking[].kept_at": "the last value before the break at which the bound is kept",
    "breaking[].missed_at": "the smallest value at which it is missed",
    "breaking[].probes[]": "every run: at, value of what is bounded, missed, error",
    "breaking[].doubts[]": "what speaks against one single breaking point",
    "breaking[].overrides[]": "as in the suite, at the break, or at the worst value if there is none",
    "breaking[].figures": "what that run gave",
    "help.placements[].placement": "expert policy and spare places per rank, and `overrides` for it; `help` "
    "is null where experts have no choice of ranks",
    "help.rows[].case": "a case of the suite, and `what` it is",
    "help.rows[].cells[]": "that case under each placement: placement, error, missed, against_balanced (the "
    "balanced case of the file's own placement), p99_step, tokens_per_second, imbalance (mean)",
    "help.summary[]": "of each placement: in how many cases it `ran`, was `not_run` and `kept` the bound, "
    "`worst` and `mean` p99 step / balanced, and the first error",
    "help.moving": "cases whose load moves, with experts placed anew `every` so many of the run's `steps` by "
    "the loads of a `window` of steps; null where no load moves",
    "help.moving.rows[]": "case, placement, transfer (stop or background), overrides, error and the `gain` "
    "in tokens/s of placing them anew, its bill included",
    "help.moving.rows[].once": "the experts left alone: throughput against_balanced (a ratio), p99_token (as "
    "`token` of the figures, s) and imbalance; `help.moving.rows[].anew` placed anew",
    "help.moving.rows[].bill": "planned, moved, finished, copies, bytes, moving, stopped and stopped_share "
    "as `rebalancing` in summary.json",
    "map.x": "what changes from column to column: name, what, values; `map.y` from row to row",
    "map.a": "the first deployment: name, file, overrides, hash and `what` it is; `map.b` the second",
    "map.cells[]": "row by row: x, y, tokens_per_second and p99_step of a and b, the error of either, the "
    "`ratio` of their throughputs (a / b) and which is better",
    "notes[]": "sentences on what stands out",
}

_HEAD = f"""# stress.json

Schema version {SCHEMA_VERSION}. Printed from `clustersim/study/stress_schema.py`; do not edit it.

`clustersim stress` leaves it. All quantities are SI, shares fractions of one; what there is no data for is
`null`. `[]` stands for every entry of a list, `<x>` for a key that depends on the run. `suite`, `breaking`
and `help` belong to the question `stress`, `map` to `map`. Beside it lie `cases.jsonl`, one line of figures
per case, from which `--resume` goes on, and the drawings.

"""


def stress_page() -> str:
    """docs/stress.md: every key with its meaning."""
    return f"{_HEAD}{_table(SCHEMA)}\n## Figures of a case\n\n{_table(FIGURES)}"


def _table(meanings: dict[str, str]) -> str:
    rows = "".join(f"| `{key}` | {meaning} |\n" for key, meaning in meanings.items())
    return f"| key | what it is |\n|---|---|\n{rows}"
