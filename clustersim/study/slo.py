"""A wished bound as people write it: `p99 step < 60 ms`, `tokens/s > 400000`.

A small grammar with tables of what it knows: nothing of the text is ever executed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clustersim.errors import ClustersimError, UnitError, nearest
from clustersim.units import parse, show

_FORM = re.compile(r"\s*([^<>=]+?)\s*([<>]=?)\s*([^<>=]+?)\s*")
_NUMBER = re.compile(r"\d+(?:\.\d*)?(?:[eE][+-]?\d+)?")

#: What a bound may be on: name, in lower case → key among the latencies of a case's figures.
LATENCIES: Mapping[str, str] = {
    "step": "step",
    "token batch": "token_batch",
    "tpot": "tpot",
    "ttft": "ttft",
    "request": "request",
}
#: Rates, whose names hold their unit.
RATES: Mapping[str, str] = {"tokens/s": "tokens_per_second"}
STATISTICS = ("mean", "p50", "p90", "p95", "p99", "max")

_EXAMPLES = '"p99 step < 60 ms" or "tokens/s > 400000"'


@dataclass(frozen=True, slots=True)
class Slo:
    """A bound that a run keeps or misses.

    statistic  of STATISTICS; empty for a rate
    metric     a value of LATENCIES or RATES
    most       whether `limit` is the most allowed, else the least
    strict     whether `limit` itself is a miss
    limit      s, or 1/s
    """

    statistic: str
    metric: str
    most: bool
    strict: bool
    limit: float

    def value(self, figures: Mapping[str, Any] | None) -> float | None:
        """What the bound is on, from `cases.figures_of`; None where the run has no such thing."""
        if figures is None:
            return None
        found = figures["latency"].get(self.metric) if self.statistic else figures
        value = found[self.statistic or self.metric] if found else None
        return None if value is None else float(value)

    def missed(self, value: float) -> bool:
        """Whether a run with this value misses the bound."""
        beyond = value > self.limit if self.most else value < self.limit
        return beyond or (self.strict and value == self.limit)

    def said(self) -> str:
        """The bound in one way of writing, which `parse_slo` reads."""
        sign = ("<" if self.most else ">") + ("" if self.strict else "=")
        return f"{self.subject()} {sign} {self.said_value(self.limit)}"

    def subject(self) -> str:
        """What is bounded, as people call it."""
        names = LATENCIES if self.statistic else RATES
        name = next(name for name, key in names.items() if key == self.metric)
        name = name.upper() if name in ("tpot", "ttft") else name
        return f"{self.statistic} {name}".strip()

    def said_value(self, value: float) -> str:
        """A value of the metric with its unit."""
        return show(value, "time", 4) if self.statistic else f"{value:.6g}"


def parse_slo(text: str) -> Slo:
    """A bound from text: [statistic] metric < or > quantity.

    Raises   ClustersimError that says what is allowed
    """
    match = _FORM.fullmatch(text) if len(text) <= 100 else None
    if match is None:
        raise ClustersimError(f'--slo: "{text[:100]}" is not a bound; write for instance {_EXAMPLES}')
    subject, sign, quantity = match.groups()
    statistic, name = _subject(" ".join(subject.split()).lower(), text)
    most, strict = sign[0] == "<", len(sign) == 1
    rate = not statistic
    if rate == most:
        way = f"a bound on {name} is a least value: write >" if rate else "a latency has a most: write <"
        raise ClustersimError(f'--slo: "{text}": {way}')
    limit = (_rate if rate else _time)(quantity, text)
    return Slo(statistic, (RATES if rate else LATENCIES)[name], most, strict, limit)


def _subject(words: str, text: str) -> tuple[str, str]:
    """Statistic and name of the metric."""
    if words in RATES:
        return "", words
    first, _, rest = words.partition(" ")
    if words in LATENCIES:
        raise ClustersimError(
            f'--slo: "{text}": which {words}? Put {_listed(STATISTICS)} before it, such as "p99 {words}"'
        )
    if first in STATISTICS and rest in LATENCIES:
        return first, rest
    if first in STATISTICS and rest in RATES:
        raise ClustersimError(f'--slo: "{text}": a run has one {rest}; leave "{first}" out')
    wrong, known = (rest, LATENCIES) if first in STATISTICS else (words, {**LATENCIES, **RATES})
    if rest in LATENCIES:
        raise ClustersimError(
            f'--slo: "{text}": "{first}" is not known{nearest(first, STATISTICS)}; '
            f"there are {_listed(STATISTICS)}"
        )
    raise ClustersimError(
        f'--slo: "{text}": "{wrong}" is not known{nearest(wrong, known)}; bounds are on '
        f"{_listed(LATENCIES)}, each with {_listed(STATISTICS)} before it, or on {_listed(RATES)}"
    )


def _time(quantity: str, text: str) -> float:
    try:
        return parse(quantity, "time")
    except UnitError as error:
        raise ClustersimError(f'--slo: "{text}": {error}') from error


def _rate(quantity: str, text: str) -> float:
    number = quantity.removesuffix("tokens/s").strip()
    if not _NUMBER.fullmatch(number) or not math.isfinite(float(number)):
        raise ClustersimError(f'--slo: "{text}": "{quantity}" is not a number of tokens per second')
    return float(number)


def _listed(names: Mapping[str, str] | tuple[str, ...]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def default_slo(balanced: Mapping[str, Any], factor: float) -> Slo:
    """At most `factor` times the p99 step of the balanced case."""
    return Slo("p99", "step", True, False, factor * float(balanced["latency"]["step"]["p99"]))
