"""One question: how often, and with how many spare places, is placing experts anew worth it here?

Every answer is simulated. Within a seed the same tokens choose the same experts whenever and wherever these
move, so that cases are compared seed by seed; several seeds say how far a gain can be relied on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clustersim.analysis.latency import token_gaps
from clustersim.analysis.rebalancing import IDLE
from clustersim.errors import ClustersimError, nearest
from clustersim.spec.deployment import BY_LOAD, HELD_ONCE, SPARING
from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import scenario_hash, toml_value
from clustersim.study.cases import Base, Bench, Case, Outcome, Tell, variant
from clustersim.study.gains import fastest, gain_over, mean_of, most_gained, verdict_on
from clustersim.study.run import run_scenario
from clustersim.study.stress import folder_of
from clustersim.units import show

_EXPERTS = "deployment.experts"
#: By default one planning in this many parts of the run, besides never.
_PARTS = (32, 16, 8, 4)
_SPARE = (0, 1, 2)
_SEEDS = 3
#: Largest number of steps or places that can be meant.
_MOST = 10_000_000
#: What places by load where the scenario's own policy does not: never worse than the published one.
_DEFAULT_POLICY = "packed"
#: A run shorter than so many times what popularity needs to move on says little about following it.
_AGES = 2
#: Policies that look at no load → the nearest that does: each expert once, copies, or free.
_NEAREST = {
    "contiguous": "balanced",
    "round_robin": "balanced",
    "random": "balanced",
    "replicated": "eplb",
    "explicit": "packed",
}


@dataclass(frozen=True, slots=True)
class Asked:
    """What is tried; empty tuples and names, and no seeds, leave the choice to `sweep`.

    every   steps from one planning to the next; 0, never, is always tried
    spare   further places per EP rank
    policy  of expert placement
    seeds   how many, from the scenario's own on
    """

    every: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()
    policy: str = ""
    seeds: int = 0


@dataclass(frozen=True, slots=True)
class Cell:
    """One row of the table.

    policy, every, spare  of the placement
    stated                the placement as the file states it, never placed anew, where that is another
    cases                 one per seed
    """

    policy: str
    every: int
    spare: int
    stated: bool
    cases: tuple[Case, ...]


@dataclass(frozen=True, slots=True)
class Question:
    """What is run, and what is known before.

    scenario  as it stands, but for what is traced
    asked  with what was left open filled in
    cells  all that is run
    head   JSON values of the answer that need no run
    notes  what is to be said before anything is run
    """

    scenario: Scenario
    asked: Asked
    cells: tuple[Cell, ...]
    head: Mapping[str, Any]
    notes: tuple[str, ...]

    @property
    def cases(self) -> list[Case]:
        """Those of all cells, seed by seed: an interrupted call has compared all of them by some seeds."""
        return [cell.cases[n] for n in range(self.asked.seeds) for cell in self.cells]


def question(file: str, overrides: Sequence[str] = (), asked: Asked = Asked()) -> Question:
    """Lays out what has to be run.

    overrides  "key.path=value" texts that hold for all
    Raises     ScenarioError where the scenario itself is wrong; ClustersimError where no case can be run
    """
    base = Base(file, (*overrides, "trace.level=sums"))
    scenario = base.scenario()
    if not scenario.model.experts:
        raise ClustersimError(f"{file}: {scenario.model.name} has no experts to be placed anew")
    try:
        chosen = sweep(scenario, asked)
    except ClustersimError as error:
        raise ClustersimError(f"{file}: {error}") from error
    cells = tuple(_cells(base, scenario, chosen))
    problem = next((cell.cases[0].problem for cell in cells if not cell.stated), "")
    if all(case.problem for cell in cells if not cell.stated for case in cell.cases):
        raise ClustersimError(f"{file}: nothing can be tried: {problem}")
    return Question(scenario, chosen, cells, _head(base, scenario, chosen), tuple(_notes(scenario, chosen)))


def rebalance(asked: Question, bench: Bench, tell: Tell = lambda done, all_: None) -> dict[str, Any]:
    """Runs all that was asked; the answer as in `answer`."""
    return answer(asked, dict(bench.run(asked.cases, tell)))


def folder_for(asked: Question, out: Path | None) -> Path:
    """Where the answer lies: `out`, or results/<name>-rebalance-<hash>."""
    return folder_of(asked.scenario, out, repr(asked.asked), question="rebalance")


def sweep(scenario: Scenario, asked: Asked) -> Asked:
    """What is tried, with what was left open filled in by the scenario.

    Raises   ClustersimError where the policy does not place by load, or has no spare places
    """
    own = scenario.deployment.experts
    policy = asked.policy or (own.policy if own.policy in BY_LOAD else _DEFAULT_POLICY)
    if policy not in BY_LOAD:
        raise ClustersimError(_no_policy(policy))
    if any(asked.spare) and policy not in SPARING:
        raise ClustersimError(
            f'--spare {",".join(map(str, asked.spare))}: policy "{policy}" holds every expert once; '
            f"{_listed(SPARING)} have spare places"
        )
    wishes = {*_SPARE, own.spare} if policy in SPARING else {0}
    steps = steps_of(scenario)
    every = asked.every or (*(steps // part for part in _PARTS if steps // part), own.rebalance.every)
    return Asked(
        tuple(sorted({0, *every})), tuple(sorted(set(asked.spare or wishes))), policy, asked.seeds or _SEEDS
    )


def steps_of(scenario: Scenario) -> int:
    """Forward steps of a run, those of all batches."""
    w = scenario.workload
    return w.batches * (w.decode_steps + (w.phase != "decode"))


def _no_policy(policy: str) -> str:
    """What is said of a policy that cannot be meant."""
    known = _listed(BY_LOAD)
    if policy in _NEAREST:
        return (
            f'--policy: "{policy}" looks at no load, so nothing would ever move; {known} do, the nearest is '
            f'"{_NEAREST[policy]}"'
        )
    near = nearest(policy, BY_LOAD) or f' (the usual one is "{_DEFAULT_POLICY}")'
    return f'--policy: "{policy}" is no policy that places by load{near}; there are {known}'


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers between commas; none of an empty text.

    Raises   ClustersimError naming the option and the word that is none
    """
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    for word in words:
        if not (word.isascii() and word.isdigit() and int(word) <= _MOST):
            raise ClustersimError(f'{option}: "{word}" is no whole number from 0 to {_MOST:,}; such as 0,1,2')
    return tuple(map(int, words))


def bill_of(scenario: Scenario) -> dict[str, Any]:
    """Runs a scenario and keeps what is compared: JSON values in SI units.

    `token` is the time between output tokens as in `token_gaps`; None where only prompts are read.
    """
    result = run_scenario(scenario)
    summary = result.summary
    bill = summary["rebalancing"] or {}
    gaps, latency, imbalance = (
        token_gaps(result.trace.raw),
        summary["latency"],
        summary["experts"]["imbalance"],
    )
    return {
        "seconds": summary["simulated_seconds"],
        "tokens_per_second": summary["throughput"]["total_tokens_per_second"],
        **{name: one and {key: one[key] for key in ("mean", "p99", "max")} for name, one in (
            ("token", gaps), ("ttft", latency["ttft"]), ("step", latency["step"])
        )},
        "imbalance": {"mean": imbalance["mean"], "max": imbalance["max"]},
        **{key: bill.get(key, 0) for key in ("planned", "moved", "finished", "copies")},
        **{key: bill.get(key, 0.0) for key in ("bytes", "moving", "stopped")},
        "idle": bill.get("idle", dict.fromkeys(IDLE, 0)),
        "offered": bill.get("offered", {"before": None, "wished": None}),
        "estimated_net": bill.get("net"),
    }  # fmt: skip


def _cells(base: Base, scenario: Scenario, chosen: Asked) -> Iterator[Cell]:
    own = scenario.deployment.experts

    def cell(policy: str, every: int, spare: int, stated: bool, wishes: Sequence[str]) -> Cell:
        name = f"{policy}, every {every}, {spare} spare"
        cases = tuple(
            variant(base, f"{name}, seed {seed}", [*wishes, f"seed={seed}"])
            for seed in _seeds(scenario, chosen)
        )
        return Cell(policy, every, spare, stated, cases)

    if own.policy != chosen.policy or own.spare not in chosen.spare:
        yield cell(own.policy, 0, own.spare, True, [f"{_EXPERTS}.rebalance.every=0"])
    for spare in chosen.spare:
        for every in chosen.every:
            wishes = _wishes(scenario, chosen.policy, every, spare)
            yield cell(chosen.policy, every, spare, False, wishes)


def _seeds(scenario: Scenario, chosen: Asked) -> list[int]:
    return list(range(scenario.seed, scenario.seed + chosen.seeds))


def _wishes(scenario: Scenario, policy: str, every: int, spare: int) -> list[str]:
    wishes = [f'{_EXPERTS}.policy="{policy}"', f"{_EXPERTS}.rebalance.every={every}"]
    own = scenario.deployment.experts
    if policy in SPARING or own.spare:
        wishes.append(f"{_EXPERTS}.spare={spare}")
    # What belongs to the scenario's own policy alone would be refused beside another one.
    return wishes + [
        f"{_EXPERTS}.{key}={toml_value(value)}"
        for key, value in HELD_ONCE.items()
        if key not in ("policy", "spare") and getattr(own, key) != value
    ]


def _head(base: Base, scenario: Scenario, chosen: Asked) -> dict[str, Any]:
    how, model, d = scenario.deployment.experts.rebalance, scenario.model, scenario.deployment
    return {
        "question": "rebalance",
        "name": scenario.name,
        "file": base.file,
        "scenario_hash": scenario_hash(scenario),
        "seeds": _seeds(scenario, chosen),
        "steps": steps_of(scenario),
        "policy": chosen.policy,
        "own_policy": scenario.deployment.experts.policy,
        "motion": scenario.gating.motion,
        **{key: getattr(how, key) for key in ("plan", "transfer", "window", "threshold", "least_gain")},
        "planning_time": how.planning_time,
        "experts_per_rank": model.experts // d.expert_parallel,
    }


def _notes(scenario: Scenario, chosen: Asked) -> Iterator[str]:
    """What the user should know before anything is run."""
    own, gating = scenario.deployment.experts, scenario.gating
    if own.policy not in BY_LOAD:
        yield (
            f'The file\'s policy "{own.policy}" looks at no load and can follow no drift: '
            f'"{chosen.policy}" is tried in its place, and "{own.policy}" stands beside it as the file '
            f"states it. --policy names another of {_listed(BY_LOAD)}."
        )
    elif own.policy != chosen.policy:
        yield f'Policy "{chosen.policy}" is tried in place of the file\'s "{own.policy}".'
    if gating.motion == "still":
        yield (
            "Popularity stands still here (gating.motion), and places of the beginning know it: what moves "
            "follows chance."
        )
    span = {"drifting": gating.half_life, "bursting": gating.burst_every, "rotating": gating.rotate_every}
    steps = steps_of(scenario)
    if span.get(gating.motion, 0) * _AGES > steps:
        yield (
            f"The run has {steps:,} steps, and popularity takes {span[gating.motion]:,g} to move on: places "
            "of the beginning hardly age. A longer run (workload.decode_steps) says more."
        )


def answer(asked: Question, outcomes: Mapping[int, Outcome]) -> dict[str, Any]:
    """What was found, as JSON values.

    outcomes  position in `asked.cases` → what it gave; those that are missing were not run
    Returns   what was tried (`cases`, one per row, means over the seeds), the `best` that moves anything,
              the `verdict` on it, `sentences` of which the last answers the question
    """
    cells = asked.cells
    rows = [
        _row(cell, [outcomes.get(n * len(cells) + place) for n in range(asked.asked.seeds)])
        for place, cell in enumerate(cells)
    ]
    tried = [row for row in rows if not row["stated"]]
    never = [row for row in tried if not row["every"]]
    reference = fastest(never)
    for row in rows:
        row["gain"] = gain_over(row, reference)
        alike = next((other for other in never if other["spare"] == row["spare"]), None)
        row["gain_at_same_spare"] = gain_over(row, alike)
    best = most_gained(row for row in tried if row["moved"])
    found = {
        **asked.head,
        "complete": len(outcomes) == len(asked.cases),
        "never": reference and {"spare": reference["spare"], "token": reference["token"]},
        "best": best and {key: best[key] for key in ("every", "spare", "gain", "gain_at_same_spare")},
        "verdict": verdict_on(best and best["gain"]) if reference else None,
        "cases": rows,
        "notes": list(asked.notes),
    }
    said = " ".join((_answer(found, best, reference), *_stated(rows, best)))
    return {**found, "idle": list(_idle(found)), "answer": said}


_FIGURES = (
    *("seconds", "tokens_per_second", "token", "ttft", "step", "imbalance", "planned", "moved", "finished"),
    *("copies", "bytes", "moving", "stopped", "idle", "offered", "estimated_net"),
)


def _row(cell: Cell, got: Sequence[Outcome | None]) -> dict[str, Any]:
    """A cell with the mean over the seeds that were run."""
    runs = [one and one.figures for one in got]
    ran = [one for one in runs if one]
    errors = [one.error for one in got if one and one.error]
    return {
        **{key: getattr(cell, key) for key in ("policy", "every", "spare", "stated")},
        "error": errors[0] if errors else "",
        **(mean_of(ran) if ran else dict.fromkeys(_FIGURES)),
        "runs": runs,
    }


def _idle(found: Mapping[str, Any]) -> Iterator[str]:
    """Why rows that were to move something did not, those that have the same reason together."""
    alike: dict[tuple[int, str], list[int]] = {}
    for row in found["cases"]:
        if row["every"] and row["moved"] == 0:
            alike.setdefault((row["spare"], _why(row, found)), []).append(row["every"])
    for (spare, why), every in alike.items():
        yield f"Every {', '.join(f'{n:,}' for n in every)} with {_spare(spare)}: nothing moved. {why}"


def _why(row: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Why nothing moved in a row."""
    idle, offered = row["idle"], row["offered"]
    if not row["planned"]:
        return f"No planning was due: the run has {found['steps']:,} steps, and the last needs no plan."
    if found["experts_per_rank"] + row["spare"] == 1:
        return "Every rank has one place, so no placement is better than another."
    said = []
    if idle["below_threshold"]:
        said.append(
            f"The imbalance was below deployment.experts.rebalance.threshold = {found['threshold']:g}."
        )
    if idle["nothing_better"]:
        offer = (
            ""
            if offered["before"] is None
            else f": it was {offered['before']:.2f} x and would have been {offered['wished']:.2f} x"
        )
        said.append(
            f"By the loads of the last {found['window']} steps no layer's imbalance would have fallen by "
            f"{found['least_gain']:.0%} (least_gain){offer}."
        )
    if idle["too_late"]:
        said.append("The run was over before a plan could be carried out.")
    return " ".join(said)


def _answer(found: Mapping[str, Any], best: Mapping[str, Any] | None, never: Mapping[str, Any] | None) -> str:
    """How often, with how many spare places, is it worth it? In one plain sentence, or two."""
    if never is None:
        if not found["complete"]:
            return "Too little is finished for an answer: no row that never moves anything."
        return "No answer: no row that never moves anything could be run."
    so_far = "" if found["complete"] else "So far: "
    leave = f"leave the experts where they are, with {_spare(never['spare'])}"
    if best is None:
        return f"{so_far}Not worth it: {leave}; nothing that was tried moves anything."
    gain = best["gain"]
    how = f"a plan every {best['every']:,} steps with {_spare(best['spare'])}"
    against = f"against never with {_spare(never['spare'])}"
    alike = best["gain_at_same_spare"]
    if best["spare"] != never["spare"] and alike is not None:
        against += f" (the fastest that moves nothing), {alike['mean']:+.1%} against never with as many"
    cost = f"{_bill(best)}; {_tail(best, never)}"
    if found["verdict"] == "worth":
        return f"{so_far}Worth it: {how} gives {_gain(gain)} tokens/s {against}. The bill of a run: {cost}."
    if found["verdict"] == "open":
        return (
            f"{so_far}Not to be told: {how} is best of what moves anything and gives {_gain(gain)} tokens/s "
            f"{against}, within what seeds differ by; more --seeds or a longer run would tell. The bill of a "
            f"run: {cost}."
        )
    return (
        f"{so_far}Not worth it: {leave}. The best of what moves anything is {how}: {_gain(gain)} tokens/s "
        f"{against}. The bill of a run: {cost}."
    )


def _stated(rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any] | None) -> Iterator[str]:
    """Where the placement of the file is better than whatever was tried: what nobody should miss."""
    most = max([0.0, *([best["gain"]["mean"]] if best else [])])
    for row in rows:
        if row["stated"] and row["gain"] and row["gain"]["mean"] > most:
            yield (
                f'But the file\'s own placement, "{row["policy"]}" with {_spare(row["spare"])}, is faster '
                f"than all of these: {_gain(row['gain'])} against the same."
            )


def _spare(spare: int) -> str:
    return f"{spare or 'no'} spare place{'' if spare == 1 else 's'} per rank"


def _gain(gain: Mapping[str, Any]) -> str:
    runs = len(gain["each"])
    if gain["margin"] is None:
        return f"{gain['mean']:+.1%} (one seed, so that nothing is known of its uncertainty)"
    return f"{gain['mean']:+.1%} ± {gain['margin']:.1%} (95 %, {runs} seeds)"


def _bill(row: Mapping[str, Any]) -> str:
    """What moving cost."""
    stopped = f"passes stopped for {show(row['stopped'], 'time')} ({row['stopped'] / row['seconds']:.1%})"
    beside = f"moved beside the passes for {show(row['moving'], 'time')}"
    return f"{show(row['bytes'], 'size')} of weights, {stopped if row['stopped'] else beside}"


def _tail(row: Mapping[str, Any], never: Mapping[str, Any]) -> str:
    """What it did to the slowest tokens."""
    kind, name = ("token", "token") if row["token"] else ("ttft", "first token")
    one, other = ({key: show(of[kind][key], "time") for key in ("p99", "max")} for of in (row, never))
    longest = f", the longest {one['max']} instead of {other['max']}"
    same = one["p99"] == one["max"] and other["p99"] == other["max"]
    return f"the p99 {name} takes {one['p99']} instead of {other['p99']}{'' if same else longest}"
