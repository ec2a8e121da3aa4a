"""The picture of a drawn deployment, docs/deployment.svg, and the page about it.

Laying a graph out depends on the fonts of the machine. So the page is printed with the others, and the
picture only by `python docs/dag_page.py`; a test says whether it still shows what runs.
"""

from __future__ import annotations

from pathlib import Path

from clustersim.study.dag import CLAIMED, check, load_deployment, save, wish_of

DOCS = Path(__file__).resolve().parent
PICTURE = DOCS / "deployment.svg"
#: What is drawn: one layer, all others as a box.
SHOWN = ("workloads/moe_1024.toml", "expert", "0")


def dag_pages() -> dict[str, str]:
    """Page, as a path under docs/ → its text."""
    return {"deployment.md": page()}


def page() -> str:
    """docs/deployment.md."""
    file, level, layers = SHOWN
    parts = [
        "# A deployment, drawn\n",
        "Printed by `python docs/make.py`; do not edit it. `python docs/dag_page.py` makes the picture:\n",
        f"    clustersim dag {file} --level {level} --layers {layers} --out deployment.svg\n",
        "Ellipses are communication, boxes computation, parallelograms routing and aggregation. Dashed\n"
        "arrows are what a gate has selected, grey ones the residual stream. Sizes are those on one GPU,\n"
        "and after the slash those of all GPUs together, what several hold alike counted once. Of many\n"
        "heads and experts the first, middle and last are drawn, the rest as one dashed box. Shards of the\n"
        "attention are drawn together.\n",
        "![one layer of moe_1024](deployment.svg)\n",
        "What is drawn is the StepGraph that runs: the last micro-batch of the first step. `--check` holds\n"
        "the drawing against it, and what documents say of these deployments against both.\n",
    ]
    for name in CLAIMED:
        deployment = load_deployment(f"workloads/{name}.toml")
        found = check(deployment, wish_of(level, False, "", deployment))
        parts.append(f"## {name}\n")
        parts.append(f"{found['nodes']:,} nodes and {found['edges']:,} edges, sampled.\n")
        parts.append("| check | holds | found |\n| --- | --- | --- |")
        parts += [f"| {one['check']} | {_said(one['good'])} | {one['found']} |" for one in found["checks"]]
        parts.append(f'\n"{found["claims"][0]["document"]}" says:\n')
        parts.append("| claim | holds | found |\n| --- | --- | --- |")
        parts += [f"| {one['words']} | {_said(one['holds'])} | {one['found']} |" for one in found["claims"]]
        parts.append("")
    return "\n".join(parts)


def _said(holds: bool) -> str:
    return "yes" if holds else "**no**"


def main() -> None:
    """Draws the picture."""
    file, level, layers = SHOWN
    deployment = load_deployment(file)
    save(deployment, level, wish_of(level, False, layers, deployment), PICTURE)


if __name__ == "__main__":
    main()
