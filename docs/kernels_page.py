"""The page about kernel prices: what they are worth for shapes that nobody has timed.

python docs/kernels_page.py

fits all tables without each shape in turn, which takes minutes, and writes what it found to
docs/data/validation_kernels.json and docs/validation-kernels.svg. `python docs/make.py` prints the page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clustersim.report.kernel_validation import (
    CLASSES,
    said_by,
    sentences,
    skew_rows,
    skew_sentences,
    verdict,
)
from clustersim.study.validate_kernels import drawing, kernel_predictions, validate_kernels

Found = Mapping[str, Any]

DOCS = Path(__file__).resolve().parent
DATA = DOCS / "data" / "validation_kernels.json"
DRAWING = DOCS / "validation-kernels.svg"

_ERRORS = ("calls", "median", "p90", "ratio")

_ADDING = """\
## To add a measurement

A measurement is a CSV file with a `gpu` column and a `source` for every row.

1. Give it a line in `MEASURED` of `clustersim/study/measured.py` and pack it with the others:
   `python -m clustersim.study.pack FOLDER`. Where it comes from and its licence go to
   `clustersim/catalogue/measured/README.md`.
2. If its columns are those of a file that is read already, name that file's reader for it in the `READERS` of
   its family (`clustersim/study/gemm_rows.py`, `attention_rows.py`, `mla_rows.py`, `expert_layer_rows.py`,
   `elementwise_rows.py`). Otherwise write a reader: from columns to `Rows`.
3. `python -m clustersim.study.fit kernels` fits it; `clustersim validate kernels` judges it, this page
   lists it, and `clustersim price` reads files of its form.

To hold prices against rows of your own nothing has to be added: `clustersim price rows.csv --out priced.csv`.
Rows of several kernels fit in one file with a column `kernel` and one for each size, called as the flags of
[`clustersim price`](commands/price.md) are.
"""


def kernel_pages() -> dict[str, str]:
    """Page, as a path under docs/ → its text; none before anything was found."""
    if not DATA.is_file():
        return {}
    return {"validation-kernels.md": page(json.loads(DATA.read_text(encoding="utf-8")))}


def page(found: Found) -> str:
    """docs/validation-kernels.md."""
    parts = [
        "# Kernels: predicted against measured\n",
        "Printed from `docs/data/validation_kernels.json` by `python docs/make.py`; do not edit it.\n",
        "It holds what `clustersim validate kernels` finds; `python docs/kernels_page.py` finds it anew.\n",
        " ".join(sentences(found)) + "\n",
        "Errors are absolute and relative; `ratio` is the median of predicted / measured.\n",
        "![predicted against measured](validation-kernels.svg)\n",
        "## By file\n",
        _table(("file", "operator", *_ERRORS, "goal"), list(_judged(found))),
        "## By table\n",
        "`formula`: the fitted formula without its curve; `left out`: what is foretold of shapes left out;\n"
        "`under roofline`: calls that were timed quicker than the data sheet allows, as no price ever is.\n",
        _table(
            (
                *("kernel", "GPU", "format", "library", "calls", "formula", "p90", "left out", "p90"),
                "under roofline",
            ),
            list(_keys(found)),
        ),
    ]
    for what, title in CLASSES.items():
        rows = [(one["operator"], one[what], *_errors(one)) for one in found["classes"][what] if one[what]]
        parts += [f"## {title}\n", _table(("operator", what, *_ERRORS), rows)]
    if "skew" in found:
        head = ("uneven / even load", "class", "calls", "measured", *_ERRORS[1:], "within", "goal")
        parts += ["## What skew costs\n", "\n\n".join(skew_sentences(found)) + "\n"]
        parts += [_table(head, [[*row[:-1], row[-1].removeprefix("goal ")] for row in skew_rows(found)])]
    parts += [
        "## One GPU by another's measurements\n",
        "A GPU that nobody has timed is priced by its data sheet through what was measured of a relative.\n"
        "What that is worth: calls of one measured GPU priced by another's tables. No goal is set for it.\n",
        _table(("kernel", "format", "GPU", "priced by", *_ERRORS), list(_transfer(found))),
        "## Rows that no fit sees\n",
        _table(("file", "kernel", "rows", "why"), list(_not_fitted(found))),
        _ADDING,
    ]
    return "\n".join(parts)


def _errors(one: Found) -> tuple[str, ...]:
    if not one["rows"]:
        return "0", "", "", ""
    return f"{one['rows']:,}", f"{one['median']:.1%}", f"{one['p90']:.1%}", f"{one['ratio']:.2f}"


def _judged(found: Found) -> Iterator[tuple[str, ...]]:
    for one in found["judged"]:
        operator = f"{one['operator']} {one['load']}".strip()
        yield one["file"] or "all files", operator, *_errors(one), verdict(one).removeprefix("goal ")


def _keys(found: Found) -> Iterator[tuple[str, ...]]:
    for one in found["keys"]:
        formula, left_out = _errors(one["formula"]), _errors(one["left_out"])
        names = (one["kernel"], one["gpu"], one["format"], one["library"])
        yield *names, *formula[:3], *left_out[1:3], f"{one['under_roofline']}"


def _transfer(found: Found) -> Iterator[tuple[str, ...]]:
    for one in found["transfer"]:
        yield one["kernel"], one["format"], one["of"], said_by(one), *_errors(one)


def _not_fitted(found: Found) -> Iterator[tuple[str, ...]]:
    for one in found["not_fitted"]:
        yield one["file"], one["kernel"], f"{one['rows']}", one["why"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rounded(value: Any) -> Any:
    """To three digits: the rest differs from computer to computer."""
    if isinstance(value, float):
        return float(f"{value:.3g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def main() -> int:
    """Finds the errors and writes them; exit status 1 where a goal is missed without a stated reason."""
    found = validate_kernels()
    DATA.write_text(json.dumps(_rounded(found), indent=1) + "\n", encoding="utf-8")
    DRAWING.write_text(drawing(kernel_predictions(True)), encoding="utf-8")
    return 0 if found["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
