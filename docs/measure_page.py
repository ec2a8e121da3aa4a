"""The page about measuring one's own GPU: how times are taken, and what is measured."""

from __future__ import annotations

from collections.abc import Sequence
from inspect import cleandoc

from clustersim.study import measure
from clustersim.study.kernel_cases import FORMS, KERNELS, Case, Form, form_of
from clustersim.study.measure_plan import plan

_USE = """
On a machine with an NVIDIA GPU:

    pip install 'clustersim[measure]'
    clustersim measure --quick --out measured         # a look, some minutes
    clustersim measure --out measured --resume        # all of it, about an hour
    clustersim measure --model qwen3_235b_a22b --tp 4 --ep 8 --out measured --resume

The last line measures the shapes of one model alone. A session may be broken off at any time: every file is
whole, and `--resume` goes on. It refuses rows of another GPU or another PyTorch. The times given here are
reckoned from the plan; no session has been timed on a GPU yet. [All options](commands/measure.md).
"""

_LIMITS = """
Plain PyTorch has no product in fp8 with block scales or in fp4, no attention over an fp8 cache, and no MLA or
expert kernel of its own: MLA runs as products and softmax or as scaled_dot_product_attention, an expert layer
as grouped products between index operations. Their rows name it, and such a layer may well take longer than
an engine's own kernel. Chunked prefill over earlier KV has no column in these forms and is not measured.
"""


def measure_pages() -> dict[str, str]:
    """Page, as a path under docs/ → its text."""
    return {"measure.md": page()}


def page() -> str:
    """docs/measure.md."""
    parts = [
        "# Measuring your own GPU\n",
        "Printed from `clustersim/study/` by `python docs/make.py`; do not edit it.\n",
        _USE.strip() + "\n",
        "## What is measured\n",
        _table(("kernel", "cases", "with --quick", "file"), _kernels()),
        "## Columns\n",
        "Those of the measured files, so that one reader serves both.\n",
        _table(("file", "columns"), [(f"`{form.file}`", _columns(form.columns)) for form in _files()]),
        "## How a time is taken\n",
        _told(cleandoc(measure.__doc__ or "").split("\n\n", 1)[1]),
        "## What is not\n",
        _LIMITS.strip() + "\n",
    ]
    return "\n".join(parts)


def _kernels() -> list[tuple[str, ...]]:
    whole, quick = plan(), plan(quick=True)
    files = {form.kernel: form.file for form in FORMS.values()}
    return [(f"`{k}`", _count(whole, k), _count(quick, k), f"`{files[k]}`") for k in KERNELS]


def _count(cases: Sequence[Case], kernel: str) -> str:
    return f"{sum(form_of(case).kernel == kernel for case in cases)}"


def _files() -> list[Form]:
    return list({form.file: form for form in FORMS.values()}.values())


def _columns(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _told(text: str) -> str:
    """The words at the head of the module as a list: what begins at the margin and goes on indented."""
    lines = []
    for line in text.splitlines():
        word, gap, rest = line.partition("  ")
        if word and gap:
            lines.append(f"- **{word}**: {rest.strip()}")
        else:
            lines.append(f"  {line.strip()}" if line.startswith(" ") else line)
    return "\n".join(lines) + "\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
