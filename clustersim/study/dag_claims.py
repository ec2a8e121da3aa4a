"""What documents say of the deployments that are drawn, held against what runs.

The claims stand in a table with the documents' own words and numbers; whether each holds is reckoned anew
from the scenario, the layout and the StepGraphs of a step, whatever has been overridden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clustersim.plan.groups import layers_of
from clustersim.plan.layout import Layout
from clustersim.plan.parameters import expert_parameters, total_parameters
from clustersim.plan.stepgraph import Operator, StepGraph
from clustersim.spec.model import PLAIN
from clustersim.spec.scenario import Scenario


@dataclass(frozen=True, slots=True, eq=False)
class Facts:
    """What claims are held against.

    passes  the StepGraph of every micro-batch of the first step
    """

    scenario: Scenario
    layout: Layout
    passes: tuple[StepGraph, ...]

    @property
    def graph(self) -> StepGraph:
        """One pass: they differ in their tokens only."""
        return self.passes[-1]

    def layer(self, number: int | None = None) -> list[Operator]:
        """Operators of a layer; of the last one, if not said: it has experts in every model that has them."""
        wanted = self.scenario.model.layers - 1 if number is None else number
        return [op for op in self.graph.operators if op.layer == wanted]


Rule = Callable[[Facts], tuple[bool, str]]


@dataclass(frozen=True, slots=True)
class Claim:
    """One sentence of a document.

    scenario  name of the scenario that simulates it
    words     as they stand in the document
    rule      whether it holds, and what was found
    """

    scenario: str
    document: str
    words: str
    rule: Rule


def judged(scenario: Scenario, layout: Layout, passes: Sequence[StepGraph]) -> list[dict[str, Any]]:
    """Every claim about the scenario of this name: document, words, holds, found."""
    facts = Facts(scenario, layout, tuple(passes))
    found = []
    for claim in CLAIMS:
        if claim.scenario == scenario.name:
            holds, said = claim.rule(facts)
            found.append({"document": claim.document, "words": claim.words, "holds": holds, "found": said})
    return found


# ---- quantities -----------------------------------------------------------------------------------


def _parameters(facts: Facts) -> tuple[float, str]:
    model = facts.scenario.model
    found = total_parameters(model)
    experts = model.moe_layers * model.experts * expert_parameters(model)
    return found, f"{found / 1e9:,.4g} billion, {experts / 1e9:,.4g} of them in experts"


def _counted(facts: Facts, quantity: str) -> float:
    model, workload, d = facts.scenario.model, facts.scenario.workload, facts.scenario.deployment
    found: dict[str, float] = {
        "GPUs": len(facts.layout.topology.gpus),
        "experts in a layer": model.experts,
        "experts in all layers": model.experts * model.moe_layers,
        "layers": model.layers,
        "stages": d.pipeline_parallel,
        "heads": model.heads,
        "hidden": model.hidden,
        "sequences": workload.sequences,
        "tokens of a sequence": workload.prompt_tokens,
        "expert places on a GPU": facts.layout.slots,
        "GPUs of a stage": facts.graph.ranks.shape[1],
        "GPUs of an expert group": facts.layout.groups.ep.shape[2],
    }
    return found[quantity]


def counts(**stated: float) -> Rule:
    """Each quantity, with _ for spaces, is what is stated."""
    wanted = {name.replace("_", " "): value for name, value in stated.items()}

    def rule(facts: Facts) -> tuple[bool, str]:
        found = {name: _counted(facts, name) for name in wanted}
        return found == wanted, ", ".join(f"{value:,g} {name}" for name, value in found.items())

    return rule


def parameters(stated: float) -> Rule:
    """As many parameters as stated, within a twentieth."""

    def rule(facts: Facts) -> tuple[bool, str]:
        found, said = _parameters(facts)
        return abs(found / stated - 1) < 0.05, said

    return rule


# ---- where things are -------------------------------------------------------------------------------


def stages(layers: int, gpus: int) -> Rule:
    """Every stage has the next so many layers, on the next so many GPUs."""

    def rule(facts: Facts) -> tuple[bool, str]:
        ranks, model = facts.graph.ranks, facts.scenario.model
        held = [layers_of(model.layers, len(ranks), stage) for stage in range(len(ranks))]
        good = all(
            list(some) == list(range(stage * layers, (stage + 1) * layers))
            and row.tolist() == list(range(stage * gpus, (stage + 1) * gpus))
            for stage, (some, row) in enumerate(zip(held, ranks, strict=True))
        )
        said = [
            f"layers {some[0]}-{some[-1]} on GPUs {row[0]}-{row[-1]}"
            for some, row in zip(held, ranks, strict=True)
        ]
        return good, "; ".join(said if len(said) <= 2 else [said[0], "...", said[-1]])

    return rule


def experts_on(gpus: int) -> Rule:
    """Expert e of every layer stands once, on the e-th so many GPUs of its stage."""

    def rule(facts: Facts) -> tuple[bool, str]:
        etp, slots, copies = facts.layout.groups.etp, facts.layout.slots, facts.layout.copies
        good = slots == 1 and etp.shape[2] == gpus and bool((copies == np.arange(copies.shape[1])).all())
        first = [
            f"expert {copies[0, place]} on GPU{'s' if etp.shape[2] > 1 else ''} "
            + "-".join(map(str, dict.fromkeys((etp[0, place // slots, 0], etp[0, place // slots, -1]))))
            for place in (0, 1, copies.shape[1] - 1)
        ]
        return good, "; ".join(first)

    return rule


def replicas_in_all(stated: int) -> Rule:
    """So many experts in all, as copies on all GPUs."""

    def rule(facts: Facts) -> tuple[bool, str]:
        model, copies, ranks = facts.scenario.model, facts.layout.copies, facts.graph.ranks
        layers = model.moe_layers
        times = copies.shape[1] / model.experts
        said = (
            f"the {model.experts} experts of a layer stand in {copies.shape[1]} places, {times:g} times "
            f"each, on the {ranks.shape[1]} GPUs of its stage; {ranks.size} GPUs hold "
            f"{layers * copies.shape[1]:,} copies of {layers * model.experts:,} experts in {layers} layers"
        )
        return stated in (copies.shape[1], layers * copies.shape[1]), said

    return rule


def gpus_of_a_layer(stated: int) -> Rule:
    """So many GPUs work on the experts of a layer."""

    def rule(facts: Facts) -> tuple[bool, str]:
        model, slots = facts.scenario.model, facts.layout.slots
        op = next(op for op in facts.layer() if op.name == "expert_gemm_1")
        busy = int((op.flop > 0).sum())
        enough = -(-model.experts // slots)
        return busy == stated, f"{busy} GPUs work on a layer's experts; {enough} would hold each of them once"

    return rule


# ---- tensors ----------------------------------------------------------------------------------------


def step_input(sequences: int, tokens: int, hidden: int) -> Rule:
    """All passes of a step together read so many sequences."""

    def rule(facts: Facts) -> tuple[bool, str]:
        found = sum(graph.tokens for graph in facts.passes)
        times = len(facts.passes)
        passes = f"{times} passes of {found // times:,} tokens" if times > 1 else "one pass"
        said = f"{passes}: {found:,} tokens of {facts.scenario.model.hidden:,} numbers"
        return found == sequences * tokens and facts.scenario.model.hidden == hidden, said

    return rule


def qkv_output(heads: int, width: int) -> Rule:
    """Queries of so many heads of this width come from the projection, all TP ranks together."""

    def rule(facts: Facts) -> tuple[bool, str]:
        op = next(op for op in facts.layer() if op.name == "qkv")
        tp, model = facts.scenario.deployment.tensor_parallel, facts.scenario.model
        assert op.call is not None
        columns = float(op.call.columns["n"][0]) * tp
        good = columns == 3 * heads * width and (model.heads, model.head_dim) == (heads, width)
        return good, f"{columns:,g} columns over {tp} GPUs: 3 x {model.heads} heads of {model.head_dim}"

    return rule


def expert_width(kernel: str, hidden: int, ffn: int, gpus: int) -> Rule:
    """An expert's matrix between these widths, the inner one divided by so many GPUs."""

    def rule(facts: Facts) -> tuple[bool, str]:
        op = next(op for op in facts.layer() if op.name == kernel)
        assert op.call is not None
        inner, width = float(op.call.columns["inter"][0]), float(op.call.columns["hidden"][0])
        return (inner, width) == (ffn / gpus, hidden), f"{width:,g} and {inner:,g} on each GPU"

    return rule


def precision(stated: str) -> Rule:
    """Everything is multiplied in this format."""

    def rule(facts: Facts) -> tuple[bool, str]:
        used = sorted({op.call.format for op in facts.graph.operators if op.call is not None} | {PLAIN})
        return used == [stated], ", ".join(used)

    return rule


# ---- communication ----------------------------------------------------------------------------------


def exchange_between(first: str, second: str, kind: str) -> Rule:
    """In every layer that has both operators an exchange of this kind runs between them."""

    def rule(facts: Facts) -> tuple[bool, str]:
        names = [op.name for op in facts.layer()]
        between = facts.layer()[names.index(first) + 1 : names.index(second)]
        kinds = [op.exchange.kind for op in between if op.exchange is not None]
        said = ", ".join(one.replace("_", "-") for one in kinds) or "nothing is sent"
        return (
            kind in kinds,
            f"between {_words(first)} and {_words(second)}: {said}{_why(facts, first, second, kinds)}",
        )

    return rule


def _words(name: str) -> str:
    return name.replace("_", " ")


def _why(facts: Facts, first: str, second: str, kinds: Sequence[str]) -> str:
    if (first, second) == ("qkv", "attention") and not kinds:
        return "; the columns of a GPU are whole heads, which need no others"
    if (first, second) == ("expert_gemm_1", "expert_activation") and not kinds:
        return (
            "; an activation acts on each column by itself; the tokens are gathered before the first product"
        )
    if "reduce_scatter" in kinds:
        return "; each GPU gets the sums of those tokens that it has to send back"
    return ""


def hand_overs() -> Rule:
    """Each stage sends to the next one, and to no other."""

    def rule(facts: Facts) -> tuple[bool, str]:
        ranks = facts.graph.ranks
        size = ranks.shape[1]
        pairs = []
        for op in facts.graph.operators:
            if op.exchange is not None and op.exchange.kind == "point_to_point":
                pairs += np.unique(op.exchange.groups // size, axis=0).tolist()
        said = ", ".join(f"{a} to {b}" for a, b in pairs)
        return pairs == [[stage, stage + 1] for stage in range(len(ranks) - 1)], f"stage {said}"

    return rule


def hierarchical() -> Rule:
    """Groups within a stage reach over several NVLink domains, so that there are levels to speak of."""

    def rule(facts: Facts) -> tuple[bool, str]:
        domain = facts.layout.topology.domain
        inside = [
            op.exchange
            for op in facts.graph.operators
            if op.exchange is not None and op.name != "stage_transfer"
        ]
        most = max(len(np.unique(domain[group])) for exchange in inside for group in exchange.groups)
        if most > 1:
            return True, f"groups of a stage lie in up to {most} NVLink domains"
        return False, "every group of a stage lies in one NVLink domain: there are no levels within it"

    return rule


def balanced() -> Rule:
    """No GPU of a stage has more to compute than the mean, and no expert more tokens, within a hundredth."""

    def rule(facts: Facts) -> tuple[bool, str]:
        op = next(op for op in facts.layer() if op.name == "expert_gemm_1")
        ratio = float(op.flop.max() / op.flop.mean())
        return ratio < 1.01, f"the busiest GPU has {ratio:.3g} times the mean of the experts' work"

    return rule


def claimed_speed() -> Rule:
    """The scenario's own [claimed]: tokens per second times seconds per token are the sequences in flight."""

    def rule(facts: Facts) -> tuple[bool, str]:
        claim, had = facts.scenario.claimed, facts.scenario.workload.sequences
        if claim is None or not claim.total_tokens_per_second or not claim.tpot:
            return True, "nothing is claimed"
        needed = claim.total_tokens_per_second * claim.tpot
        said = f"both together need {needed:,.4g} sequences in flight, the batch has {had}"
        return abs(needed / had - 1) < 0.1, said

    return rule


def aggregates() -> Rule:
    """In every layer with experts their outputs are added up."""

    def rule(facts: Facts) -> tuple[bool, str]:
        number = sum(op.name == "unpermute" for op in facts.graph.operators)
        return number == facts.scenario.model.moe_layers, f"{number} of them, one in each layer with experts"

    return rule


_BIG = "Complete MoE 30B Model Deployment DAG Summary"
_SMALL = "Model Deployment DAGs Summary"
_TPOT = "Throughput: {} TPS, Latency: {} TPOT"

CLAIMS: tuple[Claim, ...] = tuple(
    Claim(scenario, document, words, rule)
    for scenario, document, said in (
        ("moe_1024", _BIG, (
            ("Model Size: 30B parameters", parameters(30e9)),
            ("hybrid parallelism across 1024 GPUs", counts(GPUs=1024)),
            ("64 experts per layer", counts(experts_in_a_layer=64)),
            ("8 pipeline stages", counts(stages=8)),
            ("2 layers per stage (16 total layers)", counts(layers=16, stages=8)),
            ("Pipeline Stage 0: GPUs 0-127 ... Pipeline Stage 7: GPUs 896-1023", stages(2, 128)),
            ("64 experts x 2 tensor parallel GPUs = 128 GPUs per stage",
             counts(experts_in_a_layer=64, GPUs_of_a_stage=128)),
            ("Expert 0: GPUs 0-1, Expert 1: GPUs 2-3, ..., Expert 63: GPUs 126-127", experts_on(2)),
            ("Multi-Head Attention (32 heads)", counts(heads=32)),
            ("Input: [batch_size=128, seq_len=1024, hidden_size=4096]", step_input(128, 1024, 4096)),
            ("QKV Output: [batch_size=128, seq_len=1024, heads=32, d_k=128]", qkv_output(32, 128)),
            ("All-Gather: For column-parallel operations (QKV, ...)",
             exchange_between("qkv", "attention", "all_gather")),
            ("All-Reduce: For row-parallel operations (Attention output, ...)",
             exchange_between("attention_output", "attention_residual", "all_reduce")),
            ("MLP Layer 1 (Column Parallel): hidden_size -> ffn_hidden_size/2",
             expert_width("expert_gemm_1", 4096, 16384, 2)),
            ("TP All-Gather: Combine tensor parallel outputs (before GELU)",
             exchange_between("expert_gemm_1", "expert_activation", "all_gather")),
            ("MLP Layer 2 (Row Parallel): ffn_hidden_size -> hidden_size",
             expert_width("expert_gemm_2", 4096, 16384, 2)),
            ("TP All-Reduce: Synchronize tensor parallel outputs (after MLP Layer 2)",
             exchange_between("expert_gemm_2", "combine", "all_reduce")),
            ("Expert routing: All-to-all communication for token assignment",
             exchange_between("permute", "expert_gemm_1", "all_to_all")),
            ("Expert aggregation: Combining outputs from selected experts", aggregates()),
            ("Load balancing through expert router nodes", balanced()),
            ("Pipeline communication between stages 0-1-2-3-4-5-6-7", hand_overs()),
        )),
        ("large_ep", _SMALL, (
            ("16-layer MoE with 16 experts per layer", counts(layers=16, experts_in_a_layer=16)),
            ("Token dimension: 4096", counts(hidden=4096)),
            ("Sequence length: 10,000 tokens; Batch size: 128 sequences",
             counts(sequences=128, tokens_of_a_sequence=10_000)),
            ("Precision: BF16", precision("bf16")),
            ("Total GPUs: 16 H100 GPUs", counts(GPUs=16)),
            ("16 experts x 16 layers = 256 total experts", counts(experts_in_all_layers=256)),
            ("GPU mapping: Expert 0-15 on GPU 0-15 respectively", experts_on(1)),
            ("16 experts per layer perfectly matches 16 GPUs (1:1 mapping)",
             counts(experts_in_a_layer=16, GPUs=16, expert_places_on_a_GPU=1)),
            ("All-to-all communication for expert routing across 16 GPUs",
             counts(GPUs_of_an_expert_group=16)),
            ("Uniform expert distribution ensures balanced GPU utilization", balanced()),
            (_TPOT.format("450,000", "2.2ms"), claimed_speed()),
        )),
        ("baseline_tp8_pp2", _SMALL, (
            ("TP=8, PP=2, 8 experts per GPU", counts(stages=2, expert_places_on_a_GPU=8)),
            ("8 experts per GPU x 16 GPUs = 128 experts total (replicated)", replicas_in_all(128)),
            ("16 experts distributed as 8 per GPU, requiring 2 GPUs per layer", gpus_of_a_layer(2)),
            ("Stage 0: Layers 0-7 on GPUs 0-7; Stage 1: Layers 8-15 on GPUs 8-15", stages(8, 8)),
            ("Hierarchical communication within pipeline stages", hierarchical()),
            ("Uniform expert distribution ensures balanced GPU utilization", balanced()),
            (_TPOT.format("120,000", "8.3ms"), claimed_speed()),
        )),
    )
    for words, rule in said
)  # fmt: skip
