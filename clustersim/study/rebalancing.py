"""One question: how often, and with how many spare places, is placing experts anew worth it here?

Every answer is simulated, with the same random numbers: the same tokens choose the same experts whenever and
wherever these move.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clustersim.errors import ClustersimError, nearest
from clustersim.spec.deployment import BY_LOAD, HELD_ONCE, SPARING
from clustersim.spec.scenario import Scenario
from clustersim.spec.writing import toml_value
from clustersim.study.cases import Base, Bench, Case, Outcome, Tell, variant
from clustersim.study.run import run_scenario

_EXPERTS = "deployment.experts"
#: By default one planning in this many parts of the run, besides never.
_PARTS = (32, 16, 8, 4)
_SPARE = (0, 1, 2)
#: Largest number of steps or places that can be meant.
_MOST = 10_000_000
#: What places by load where the scenario's own policy does not: never worse than the published one.
_DEFAULT_POLICY = "packed"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is tried; empty tuples and names leave the choice to `sweep`.

    every   steps from one planning to the next; 0, never, is always tried
    spare   further places per EP rank
    policy  of expert placement
    """

    every: tuple[int, ...] = ()
    spare: tuple[int, ...] = ()
    policy: str = ""


def rebalance(
    file: str,
    overrides: Sequence[str] = (),
    asked: Asked = Asked(),
    tell: Tell = lambda done, all_: None,
    workers: int = 0,
) -> dict[str, Any]:
    """Runs a scenario for every interval and number of spare places.

    overrides  "key.path=value" texts that hold for all
    tell       called after every run with (done, all)
    workers    processes; 0: one per core
    Returns    JSON values: what was tried (`cases`), the `best`, whether moving is `worth` it, `sentences`
    Raises     ScenarioError where the scenario itself is wrong; ClustersimError where no case can be run
    """
    base = Base(file, (*overrides, "trace.level=sums"))
    scenario = base.scenario()
    if not scenario.model.experts:
        raise ClustersimError(f"{file}: {scenario.model.name} has no experts to be placed anew")
    chosen = sweep(scenario, asked)
    pairs = [(every, spare) for spare in chosen.spare for every in chosen.every]
    cases = [_case(base, scenario, chosen.policy, every, spare) for every, spare in pairs]
    if all(case.problem for case in cases):
        raise ClustersimError(f"{file}: {cases[0].name}: {cases[0].problem}")
    with Bench(workers, work=bill_of) as bench:
        outcomes = bench.all(cases, tell)
    return _found(scenario, chosen, pairs, outcomes)


def sweep(scenario: Scenario, asked: Asked) -> Asked:
    """What is tried, with what was left open filled in by the scenario.

    Raises   ClustersimError where the policy does not place by load
    """
    own = scenario.deployment.experts
    policy = asked.policy or (own.policy if own.policy in BY_LOAD else _DEFAULT_POLICY)
    if policy not in BY_LOAD:
        known = ", ".join(f'"{name}"' for name in BY_LOAD)
        raise ClustersimError(
            f'--policy: "{policy}" does not place by load{nearest(policy, BY_LOAD)}; {known} do'
        )
    wishes = _SPARE if policy in SPARING else (0,)
    w = scenario.workload
    steps = w.batches * (w.decode_steps + (w.phase != "decode"))
    every = asked.every or tuple(steps // part for part in _PARTS if steps // part)
    return Asked(tuple(sorted({0, *every})), tuple(sorted(set(asked.spare or wishes))), policy)


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
    """Runs a scenario and keeps what is compared: JSON values in SI units."""
    summary = run_scenario(scenario).summary
    bill = summary["rebalancing"] or {}
    step, imbalance = summary["latency"]["step"], summary["experts"]["imbalance"]
    return {
        "seconds": summary["simulated_seconds"],
        "tokens_per_second": summary["throughput"]["total_tokens_per_second"],
        "step": {key: step[key] for key in ("mean", "p99", "max")},
        "imbalance": {"mean": imbalance["mean"], "max": imbalance["max"]},
        "planned": bill.get("planned", 0),
        "moved": bill.get("moved", 0),
        "copies": bill.get("copies", 0),
        "bytes": bill.get("bytes", 0.0),
        "moving": bill.get("moving", 0.0),
        "stopped": bill.get("stopped", 0.0),
        "estimated_net": bill.get("net"),
    }


def _case(base: Base, scenario: Scenario, policy: str, every: int, spare: int) -> Case:
    wishes = [f'{_EXPERTS}.policy="{policy}"', f"{_EXPERTS}.rebalance.every={every}"]
    if policy in SPARING:
        wishes.append(f"{_EXPERTS}.spare={spare}")
    # What belongs to the scenario's own policy alone would be refused beside another one.
    wishes += [
        f"{_EXPERTS}.{key}={toml_value(value)}"
        for key, value in HELD_ONCE.items()
        if key not in ("policy", "spare") and getattr(scenario.deployment.experts, key) != value
    ]
    name = f"every {every}, {spare} spare"
    if spare and policy not in SPARING:
        return Case(name, tuple(wishes), None, f'policy "{policy}" has no spare places')
    return variant(base, name, wishes)


def _found(
    scenario: Scenario, chosen: Asked, pairs: Sequence[tuple[int, int]], outcomes: Sequence[Outcome]
) -> dict[str, Any]:
    cases: list[dict[str, Any]] = []
    for (every, spare), outcome in zip(pairs, outcomes, strict=True):
        cases.append({"every": every, "spare": spare, **(outcome.figures or {}), "error": outcome.error})
    never = {case["spare"]: case for case in cases if not case["every"] and not case["error"]}
    for case in cases:
        case["gain"] = _gain(case, never.get(case["spare"]))
    done = [case for case in cases if not case["error"]]
    best = max(done, key=lambda case: case["tokens_per_second"], default=None)
    how = scenario.deployment.experts.rebalance
    found = {
        "name": scenario.name,
        "seed": scenario.seed,
        "policy": chosen.policy,
        "own_policy": scenario.deployment.experts.policy,
        "motion": scenario.gating.motion,
        "plan": how.plan,
        "transfer": how.transfer,
        "window": how.window,
        "planning_time": how.planning_time,
        "cases": cases,
        "best": best and {key: best[key] for key in ("every", "spare", "tokens_per_second", "gain")},
        "worth": bool(best and best["every"]),
    }
    return {**found, "sentences": list(_sentences(found))}


def _gain(case: Mapping[str, Any], never: Mapping[str, Any] | None) -> float | None:
    """Tokens per second more than with as many spare places and no move, as a share; None if not known."""
    if case["error"] or never is None:
        return None
    return float(case["tokens_per_second"] / never["tokens_per_second"] - 1)


def _sentences(found: Mapping[str, Any]) -> list[str]:
    """What the table says, in words."""
    best = found["best"]
    if best is None:
        return ["No case could be run."]
    said = []
    tried = [case for case in found["cases"] if case["gain"] is not None and case["moved"]]
    rate = f"{best['tokens_per_second']:,.0f} tokens/s"
    if found["worth"]:
        said.append(
            f"Best: a plan every {best['every']:,} steps with {best['spare']} spare places per rank, {rate}: "
            f"{best['gain']:+.1%} against never with as many spare places."
        )
    else:
        said.append(f"Not worth it: never, with {best['spare']} spare places per rank, is best with {rate}.")
        if tried:
            least = max(tried, key=lambda case: case["gain"])
            said.append(
                f"Of all that move anything, every {least['every']:,} steps with {least['spare']} spare "
                f"places does best against never: {least['gain']:+.1%}."
            )
    if found["motion"] == "still":
        said.append(
            "Popularity stands still here (gating.motion), and places of the beginning know it: what moves "
            "follows chance."
        )
    if found["policy"] != found["own_policy"]:
        said.append(
            f'The scenario\'s policy "{found["own_policy"]}" looks at no load: "{found["policy"]}" was taken.'
            if found["own_policy"] not in BY_LOAD
            else f'Policy "{found["policy"]}" was taken instead of the scenario\'s "{found["own_policy"]}".'
        )
    return said
