"""One question: what does the deployment look like, node by node, and is the drawing sound?"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from clustersim.errors import ClustersimError, ResultError, pick
from clustersim.plan.dag import EXPERT, LAYER, Node, Part, Tensor, Wish
from clustersim.plan.dag_checks import Inspection
from clustersim.plan.dag_dot import dot_lines, to_svg
from clustersim.plan.dag_forms import drawn
from clustersim.plan.dag_levels import MODEL, STAGE, coarser
from clustersim.plan.layout import Layout
from clustersim.plan.lowering import gated, lower
from clustersim.plan.stepgraph import StepGraph
from clustersim.serving.batching import Pass
from clustersim.spec.scenario import Scenario
from clustersim.study.dag_claims import CLAIMS, judged
from clustersim.study.preview import first_steps
from clustersim.study.run import laid_out, read

#: Level → what a node is.
LEVELS = {
    MODEL: "a pipeline stage",
    STAGE: "a layer's attention, or its experts",
    LAYER: "an operator",
    EXPERT: "an operator; heads and experts one by one",
}
#: Scenarios of which documents claim something.
CLAIMED = tuple(dict.fromkeys(claim.scenario for claim in CLAIMS))
#: More nodes than this nobody reads, and laying them out takes minutes.
MOST_IN_SVG = 2000


@dataclass(frozen=True, slots=True, eq=False)
class Deployment:
    """A scenario and the pass of it that is drawn.

    shown   what the user calls the file
    graph   of the last micro-batch of the first step: with chunked prompts the one that reads most and ends
            with new tokens
    number  of the micro-batch, of `passes` of the step
    """

    shown: str
    scenario: Scenario
    layout: Layout
    graph: StepGraph
    phase: str
    number: int
    passes: tuple[StepGraph, ...]

    @property
    def title(self) -> str:
        """What is drawn, in a line."""
        d, tokens = self.scenario.deployment, self.graph.tokens
        parts = [
            f"TP {d.tensor_parallel} x DP {d.data_parallel} x PP {d.pipeline_parallel}",
            *(
                [f"EP {d.expert_parallel} x expert TP {d.expert_tensor_parallel}"]
                if self.scenario.model.experts
                else []
            ),
            f"{len(self.layout.topology.gpus):,} GPUs",
        ]
        batch = f", micro-batch {self.number + 1} of {len(self.passes)}" if len(self.passes) > 1 else ""
        tokens_of = f"{tokens:,} token{'' if tokens == 1 else 's'}"
        said = f"{self.scenario.model.name}, {', '.join(parts)}"
        return f"{self.scenario.name}: {said}; one {self.phase} pass of {tokens_of}{batch}"


def load_deployment(path: str | Path, overrides: Sequence[str] = ()) -> Deployment:
    """The deployment in a scenario file, with the first step of its first phase lowered.

    Raises   ScenarioError with every mistake of the file
    """
    scenario = read(path, overrides)
    layout = laid_out(scenario, str(path))
    phase, passes = next(iter(first_steps(scenario).items()))
    graphs = tuple(_lowered(scenario, layout, one, number) for number, one in enumerate(passes))
    return Deployment(str(path), scenario, layout, graphs[-1], phase, len(passes) - 1, graphs)


def _lowered(scenario: Scenario, layout: Layout, one: Pass, number: int) -> StepGraph:
    batch = one.batch(scenario.deployment.data_parallel, scenario.model.window)
    counts, distinct = gated(batch, scenario, layout, number)
    return lower(batch, counts, layout, distinct)


def wish_of(level: str, full: bool, layers: str, deployment: Deployment) -> Wish:
    """What the options ask for.

    layers   such as 0,2-4; empty: all
    Raises   ClustersimError for what there is not
    """
    pick(LEVELS, level, "--level")
    return Wish(EXPERT if level == EXPERT else LAYER, full, _layers(layers, deployment.scenario.model.layers))


def _layers(text: str, number: int) -> frozenset[int] | None:
    if not text.strip():
        return None
    found: set[int] = set()
    for word in text.split(","):
        first, dash, last = word.strip().partition("-")
        ends = [first, last if dash else first]
        if not all(end.strip().isdecimal() for end in ends):
            raise ClustersimError(
                f'--layers: "{word.strip()}" is not a layer; write numbers and ranges, such as 0,2-4'
            )
        begin, end = (int(end) for end in ends)
        if begin > end or end >= number:
            raise ClustersimError(f"--layers: {word.strip()}: the model has layers 0 to {number - 1}")
        found.update(range(begin, end + 1))
    return frozenset(found)


def parts_of(deployment: Deployment, level: str, wish: Wish) -> Iterator[Part]:
    """The nodes and edges at a level."""
    parts = drawn(deployment.graph, deployment.layout, wish)
    return coarser(parts, deployment.graph, level) if level in (MODEL, STAGE) else parts


class Tally:
    """What a drawing has: counted while it is written, which may be too large to be made twice."""

    def __init__(self) -> None:
        self.kinds: Counter[str] = Counter()
        self.edges = 0

    def over(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The same nodes and edges, each counted."""
        for part in parts:
            if isinstance(part, Node):
                self.kinds[part.kind] += 1
            else:
                self.edges += 1
            yield part

    def said(self, deployment: Deployment, level: str, wish: Wish) -> dict[str, Any]:
        """title, level, full, nodes, edges, kinds: kind → nodes."""
        about = {"title": deployment.title, "level": level, "full": wish.full}
        kinds = dict(sorted(self.kinds.items()))
        return {**about, "nodes": self.kinds.total(), "edges": self.edges, "kinds": kinds}


def dot(deployment: Deployment, level: str, wish: Wish, tally: Tally | None = None) -> Iterator[str]:
    """The drawing as DOT, line by line."""
    parts = (tally or Tally()).over(parts_of(deployment, level, wish))
    return dot_lines(parts, deployment.title, boxes=level != MODEL)


def svg(deployment: Deployment, level: str, wish: Wish, tally: Tally | None = None) -> str:
    """The drawing as SVG.

    Raises   ClustersimError that offers smaller ones where it would be too large to be read
    """
    parts = (tally or Tally()).over(parts_of(deployment, level, wish))
    some: list[Part] = []
    nodes = 0
    for part in parts:
        some.append(part)
        nodes += isinstance(part, Node)
        if nodes > MOST_IN_SVG:
            raise ClustersimError(_too_large(deployment, level, wish))
    return to_svg(some, deployment.title, boxes=level != MODEL)


def _too_large(deployment: Deployment, level: str, wish: Wish) -> str:
    smaller = []
    if wish.full:
        smaller.append("without --full it is sampled")
    for other in list(LEVELS)[: list(LEVELS).index(level)][::-1]:
        asked = Wish(LAYER, False, wish.layers)
        nodes = sum(isinstance(part, Node) for part in islice(parts_of(deployment, other, asked), 100_000))
        if nodes <= MOST_IN_SVG:
            smaller.append(f"--level {other} draws {nodes:,}")
            break
    smaller += ["--layers draws some layers", "a .dot file may have any number"]
    too_many = f"the drawing has more than {MOST_IN_SVG:,} nodes, too many to read as SVG"
    return f"--out: {too_many}; {'; '.join(smaller)}"


def save(deployment: Deployment, level: str, wish: Wish, path: Path) -> dict[str, Any]:
    """Writes the drawing, as DOT or SVG by the ending of its name, whole or not at all.

    Returns  title, level, full, nodes, edges, kinds (kind → nodes), file
    Raises   ResultError where that is not possible
    """
    if path.suffix not in (".dot", ".gv", ".svg"):
        raise ResultError(f'--out {path}: ends neither in .dot nor in .svg, such as "deployment.svg"')
    tally = Tally()
    if path.suffix == ".svg":
        lines = iter([svg(deployment, level, wish, tally)])
    else:
        lines = dot(deployment, level, wish, tally)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.writelines(lines)
        os.replace(beside, path)
    except OSError as error:
        raise ResultError(f"--out {path}: cannot be written: {error.strerror or error}") from error
    finally:
        beside.unlink(missing_ok=True)
    return {**tally.said(deployment, level, wish), "file": str(path)}


def as_json(deployment: Deployment, level: str, wish: Wish) -> dict[str, Any]:
    """The drawing as JSON values.

    Returns  title, level, full, kinds; nodes: id, title, kind, operator, stage, layer, gpus, takes, gives,
             flop, sent, members, experts, note; edges: source, target, tensor, selection
    """
    nodes: list[dict[str, Any]] = []
    edges: list[dict[str, Any]] = []
    tally = Tally()
    for part in tally.over(parts_of(deployment, level, wish)):
        if isinstance(part, Node):
            nodes.append(_node(part))
        else:
            ends = {"source": part.source, "target": part.target}
            edges.append({**ends, "tensor": part.taken.name, "selection": part.selection})
    return {**tally.said(deployment, level, wish), "nodes": nodes, "edges": edges}


def _node(node: Node) -> dict[str, Any]:
    return {
        "id": node.id,
        "title": node.title,
        "kind": node.kind,
        "operator": node.name,
        "stage": node.stage,
        "layer": node.layer,
        "gpus": sorted(set(node.ranks.tolist())),
        "takes": [_tensor(tensor) for tensor in node.takes],
        "gives": [_tensor(tensor) for tensor in node.gives],
        "flop": node.flop,
        "sent": node.sent,
        "members": list(node.members),
        "experts": list(node.experts),
        "note": node.note,
    }


def _tensor(tensor: Tensor) -> dict[str, Any]:
    return {"tensor": tensor.name, "dims": [asdict(dim) for dim in tensor.dims]}


def check(deployment: Deployment, wish: Wish) -> dict[str, Any]:
    """Holds a drawing, and what the documents say of the deployment, against what runs.

    Returns  title, level, full, nodes, edges, good (whether every check holds), checks: check, good, found;
             claims: document, words, holds, found
    Raises   ClustersimError where layers are left out
    """
    if wish.layers is not None:
        raise ClustersimError(
            "--layers with --check: whether all is drawn cannot be seen where layers are left out"
        )
    inspection = Inspection(deployment.graph, deployment.layout).look(
        drawn(deployment.graph, deployment.layout, wish)
    )
    verdicts = inspection.verdicts()
    return {
        "title": deployment.title,
        "level": wish.level,
        "full": wish.full,
        "nodes": inspection.nodes,
        "edges": inspection.edges,
        "good": all(verdict.good for verdict in verdicts),
        "checks": [asdict(verdict) for verdict in verdicts],
        "claims": judged(deployment.scenario, deployment.layout, deployment.passes),
    }
