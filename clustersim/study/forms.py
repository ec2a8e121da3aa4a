"""Which form a file of kernel rows has: that of the measured table whose columns it shares.

What was measured, and what a source tells beside it, plays no part: rows to be priced need not have it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from functools import cache

from clustersim.errors import ClustersimError
from clustersim.study.kernel_families import READERS
from clustersim.study.measured import measured

#: Columns that say what was measured, on what, and by whom; a GPU may also be named beside the file.
TOLD = frozenset(
    (
        *("gpu", "framework", "kernel_source", "source", "suspect", "trust", "note"),
        *("time_us", "gate_up_us", "down_us", "grouped_gemm_us"),
        *("tflops", "tflops_causal", "mfu", "up_mfu", "down_mfu", "kv_GBps"),
    )
)
#: Share of a form's columns that a file must have to be taken for one: with fewer, the message about what
#: is missing would help nobody.
_LEAST = 0.5


@cache
def headers() -> dict[str, tuple[str, ...]]:
    """Form, named as its measured table → its columns."""
    return {name: tuple(measured(name)) for name in READERS}


def known_columns() -> frozenset[str]:
    """Every column of any form but those that only tell a source, in small letters."""
    names = {name.casefold() for header in headers().values() for name in header}
    return frozenset(names - {"source", "note", "trust"})


def asked(form: str) -> tuple[str, ...]:
    """The columns of a form that say what is to be computed."""
    return tuple(name for name in headers()[form] if name not in TOLD)


def forms_of(header: Collection[str]) -> list[str]:
    """The forms that a file with such columns may have, the likeliest first.

    Several where their columns are the same: the words in them tell, and each reader knows its own.

    Raises   ClustersimError that lists the forms where the file resembles none
    """
    here = set(header)
    share = {form: len(here.intersection(asked(form))) / len(asked(form)) for form in headers()}
    best = max(share.values(), default=0.0)
    if best < _LEAST:
        raise ClustersimError(
            f"its columns are those of no kernel: {_listed(header)}. Known are, by any name of the file,\n"
            + "\n".join(f"  {form}: {_listed(asked(form))}" for form in headers())
        )
    likely = [form for form in headers() if share[form] == best]
    return sorted(likely, key=lambda form: -len(here.intersection(headers()[form])))


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
