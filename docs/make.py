"""Prints the pages of docs/ that come from the code, and the README's real output.

python docs/make.py
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from inspect import cleandoc
from pathlib import Path
from textwrap import indent
from typing import Any

import click
from dag_page import dag_pages
from kernels_page import kernel_pages
from measure_page import measure_pages
from network_page import network_pages
from pydantic import TypeAdapter
from pydantic.fields import FieldInfo

from clustersim.analysis.compare_schema import compare_page
from clustersim.analysis.schema import schema_page
from clustersim.analysis.view_schema import views_page
from clustersim.cli import cli
from clustersim.plan.parameters import active_parameters, total_parameters
from clustersim.report.validation import boundary_sentence, fitted_share, rows_sentence
from clustersim.spec.hardware import Gpu, Server
from clustersim.spec.model import Model
from clustersim.spec.quantities import Value
from clustersim.spec.reading import read_catalogue
from clustersim.spec.schema import TABLES as SCENARIO_TABLES
from clustersim.spec.schema import meanings
from clustersim.spec.writing import toml_value
from clustersim.study.kernel_flags import FLAGS, MEANINGS
from clustersim.study.price_flags import usage
from clustersim.study.stress_schema import stress_page
from clustersim.study.validate import drawing, validate_network
from clustersim.trace.record import TABLES
from clustersim.units import UNITS, show

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"

#: A command of ours as the README shows it, and the lines of its output under it.
SHOWN = re.compile(r"^\$ (?P<command>clustersim .*)\n(?P<output>(?:(?!\$ |```).*\n)*)", re.M)
CUT = "…"


def pages() -> dict[str, str]:
    """Page, as a path under docs/ → its text."""
    return {
        "summary.md": schema_page(),
        "stress.md": stress_page(),
        "compare.md": compare_page(),
        "views.md": views_page(),
        "trace.md": trace_page(),
        "scenario.md": scenario_page(),
        "catalogue.md": catalogue_page(),
        "validation-network.md": validation_page(),
        "validation-network.svg": drawing(),
        **network_pages(),
        **dag_pages(),
        **kernel_pages(),
        **measure_pages(),
        **{f"commands/{name}.md": command_page(name, command) for name, command in cli.commands.items()},
    }


def command_page(name: str, command: click.Command) -> str:
    """One command as `--help` tells it, and those under it."""
    return "\n".join(
        [
            f"# clustersim {name}\n",
            _printed_from("clustersim/cli/"),
            *_told(name, command),
            *([] if name != "price" else sizes_of_kernels()),
        ]
    )


def _told(name: str, command: click.Command) -> list[str]:
    context = click.Context(command, info_name=name)
    usage = " ".join(command.collect_usage_pieces(context))
    options = [p for p in command.params if isinstance(p, click.Option)]
    rows = [(", ".join(f"`{spelling}`" for spelling in _spellings(p)), _meaning(p)) for p in options]
    under = command.commands if isinstance(command, click.Group) else {}
    parts = [f"    clustersim {name} {usage}\n", f"{_blocks_indented(cleandoc(command.help or ''))}\n"]
    if rows:
        parts.append(_table(("option", "what it does"), rows))
    elif not under:
        parts.append("It has no options.\n")
    for word, below in under.items():
        parts += [f"## clustersim {name} {word}\n", *_told(f"{name} {word}", below)]
    return parts


def _blocks_indented(text: str) -> str:
    """What click is told not to wrap, as code."""
    return re.sub(r"^\x08\n((?:.+\n?)+)", lambda found: indent(found[1], "    "), text, flags=re.M)


def sizes_of_kernels() -> list[str]:
    """The flags of every kernel that `price` knows, and what they mean."""
    asked: dict[str, list[str]] = {}
    for name, flags in FLAGS.items():
        asked.setdefault(usage(flags), []).append(f"`{name.replace('_', '-')}`")
    meant = [(f"`--{flag}`", said.replace("<", "&lt;")) for flag, said in MEANINGS.items()]
    return [
        "## What each kernel is asked by\n",
        "In brackets what may be left out, and what it is then. The columns of lists of kernels have\n"
        "the same names, with `_` for `-`.\n",
        _table(("kernel", "flags"), [(", ".join(names), f"`{words}`") for words, names in asked.items()]),
        _table(("flag", "what it means"), meant),
    ]


def _spellings(option: click.Option) -> list[str]:
    value = "" if option.is_flag else f" {option.metavar or option.type.name.removesuffix(' range').upper()}"
    return [f"{spelling}{value}" for spelling in option.opts]


def _meaning(option: click.Option) -> str:
    said = option.help or ""
    return f"{said} Default: `{option.default}`." if option.show_default else said


#: Where in a file each table stands.
PLACES = {
    "Scenario": "top level",
    "SingleServer": '[topology] with family = "single_server"',
    "RailFatTree": '[topology] with family = "rail_fat_tree"',
    "FatTree": '[topology] with family = "fat_tree"',
    "Nvl72": '[topology] with family = "nvl72"',
    "Dragonfly": '[topology] with family = "dragonfly"',
    "VertexByVertex": '[topology] with family = "explicit"',
    "Vertex": "[[topology.vertices]]",
    "Cable": "[[topology.cables]]",
    "Server": "[topology.server]",
    "Gpu": "[topology.server.gpu]",
    "Model": "[model]",
    "Mla": "[model.mla]",
    "Deployment": "[deployment]",
    "Experts": "[deployment.experts]",
    "Rebalance": "[deployment.experts.rebalance]",
    "Algorithms": "[deployment.algorithms]",
    "Workload": "[workload]",
    "Gating": "[gating]",
    "LayerCurve": "[[gating.layers]]",
    "Beside": "[beside]",
    "Network": "[network]",
    "TraceLevel": "[trace]",
    "Fault": "[[faults]]",
    "Claimed": "[claimed]",
}


def scenario_page() -> str:
    """Every table and key of a scenario file."""
    parts = [
        "# Scenario files\n",
        _printed_from("clustersim/spec/"),
        "TOML. `clustersim run FILE --set KEY=VALUE` overrides any key by its dotted path, for instance\n"
        "`--set gating.skew=zipf`. Quantities are text with a unit. An unknown key is an error.\n\n"
        "`model`, `topology.server` and its `gpu` may be a name from the [catalogue](catalogue.md), or a\n"
        'table with `from = "name"` and the keys that differ. `model` may also be the path of a\n'
        "`config.json` of Hugging Face. `topology` may be a TOML file, or a table\n"
        'with `from = "file.toml"`. `extends = "other.toml"` at top level lays a scenario over another one.\n'
        "Files that are referred to lie in the folder above the scenario's own, or below: copy the examples\n"
        "beside your own scenarios to extend them.\n",
    ]
    for name, place in PLACES.items():
        value = SCENARIO_TABLES[name]
        about = cleandoc(value.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        said = meanings(value)
        rows = [
            (f"`{key}`", _wanted(field), _default(field), said.get(key, "").replace("|", "\\|"))
            for key, field in value.model_fields.items()
        ]
        parts += [f"## `{place}`\n", f"{about}\n", _table(("key", "value", "default", "what it is"), rows)]
    return "\n".join(parts)


def _wanted(field: FieldInfo) -> str:
    """What a key's value may be."""
    annotation = TypeAdapter(field.rebuild_annotation()).json_schema(mode="validation")
    options = annotation.get("anyOf", [annotation])
    return " or ".join(dict.fromkeys(filter(None, map(_kind, options))))


def _kind(schema: Mapping[str, Any]) -> str:
    if "const" in schema:
        return f'`"{schema["const"]}"`'
    if "enum" in schema:
        return ", ".join(f'`"{word}"`' for word in schema["enum"])
    if "examples" in schema:
        return f'{schema["description"]}, such as `"{schema["examples"][0]}"`'
    kinds = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    kinds |= {"array": "list", "object": "table", "null": ""}
    return kinds.get(schema.get("type", "object"), "table")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.default
    if default is None or default == () or isinstance(default, Value):
        return ""
    for dimension in UNITS:
        if _wanted(field).startswith(f"a {dimension},"):
            return f"`{show(default, dimension, digits=6)}`"
    return f"`{toml_value(default)}`"


def trace_page() -> str:
    """Every table and column of a trace."""
    parts = [
        "# trace/\n",
        _printed_from("clustersim/trace/record.py"),
        "One Parquet file per table, and `facts.json` with what belongs to no row. Times are seconds of\n"
        "simulated time, sizes bytes. A column of type `text` is stored as a dictionary of words.\n",
    ]
    for table, columns in TABLES.items():
        rows = [(f"`{name}`", dtype, meaning) for name, (dtype, meaning) in columns.items()]
        parts += [f"## {table}\n", _table(("column", "type", "what it is"), rows)]
    return "\n".join(parts)


def catalogue_page() -> str:
    """GPUs, servers and models that a scenario can name, each with its source."""
    return "\n".join(
        [
            "# Catalogue\n",
            _printed_from("clustersim/catalogue/"),
            "What a scenario can name. Rates are dense, bandwidths one way. The comments in the files say\n"
            "which numbers are guesses and why.\n",
            "## GPUs\n",
            _table(
                ("name", "FLOP rate", "HBM", "HBM bandwidth", "SMs", "launch latency", "source"),
                [_gpu_row(entry) for entry in read_catalogue("gpus").values() if isinstance(entry, Gpu)],
            ),
            "## Servers\n",
            _table(
                ("name", "GPUs", "NVLink", "latency", "cards", "latency", "PCIe", "source"),
                [
                    _server_row(entry)
                    for entry in read_catalogue("servers").values()
                    if isinstance(entry, Server)
                ],
            ),
            "## Models\n",
            _table(
                ("name", "layers", "hidden", "heads", "experts", "FFN", "vocab", "parameters", "source"),
                [
                    _model_row(entry)
                    for entry in read_catalogue("models").values()
                    if isinstance(entry, Model)
                ],
            ),
        ]
    )


def _gpu_row(gpu: Gpu) -> tuple[str, ...]:
    rates = ", ".join(f"{fmt} {show(rate, 'flop rate')}" for fmt, rate in gpu.flop_rate.items())
    memory, bandwidth = f"{gpu.memory / 2**30:g} GiB", show(gpu.memory_bandwidth, "bandwidth")
    return f"`{gpu.name}`", rates, memory, bandwidth, f"{gpu.sms}", _time(gpu.launch_latency), gpu.source


def _server_row(server: Server) -> tuple[str, ...]:
    return (
        f"`{server.name}`",
        f"{server.gpus} x {server.gpu.name}",
        show(server.nvlink_bandwidth, "bandwidth"),
        _time(server.nvlink_latency),
        f"{server.nics} x {show(server.nic_bandwidth, 'bandwidth')}",
        _time(server.nic_latency),
        show(server.pcie_bandwidth, "bandwidth"),
        server.source,
    )


def _model_attention(model: Model) -> str:
    if model.mla:
        return f"{model.heads}, latent {model.mla.kv_lora_rank} + {model.mla.qk_rope_head_dim}"
    near = f", window {model.window} in {model.windowed_layers} layers" if model.window else ""
    return f"{model.heads} of {model.head_dim}, {model.kv_heads} KV{near}"


def _model_experts(model: Model) -> str:
    if not model.experts:
        return "none"
    shared = f", {model.shared_experts} shared" if model.shared_experts else ""
    dense = model.layers - model.moe_layers
    return f"{model.experts}, top {model.top_k}{shared}" + (f"; {dense} dense layers" if dense else "")


def _model_networks(model: Model) -> str:
    widths = [str(model.ffn)] if model.experts else []
    widths += [f"shared {model.shared_ffn}"] if model.shared_ffn else []
    widths += [f"dense {model.dense_ffn}"] if model.dense_ffn else []
    return f"{', '.join(widths)} {model.ffn_kind}"


def _model_row(model: Model) -> tuple[str, ...]:
    total, active = total_parameters(model) / 1e9, active_parameters(model) / 1e9
    stated = f"; stated {model.stated_parameters / 1e9:g} billion" if model.stated_parameters else ""
    return (
        f"`{model.name}`",
        f"{model.layers}",
        f"{model.hidden}",
        _model_attention(model),
        _model_experts(model),
        _model_networks(model),
        f"{model.vocab}",
        f"{total:.3g} billion, {active:.3g} billion active{stated}",
        model.source,
    )


def _time(seconds: float) -> str:
    return show(seconds, "time")


def validation_page() -> str:
    """Predicted against measured times of exchanges."""
    found = validate_network()
    parts = [
        "# Network: predicted against measured\n",
        "Printed from `clustersim validate network` by `python docs/make.py`; do not edit it.\n",
        f"{boundary_sentence(found)} Errors are absolute and relative; `ratio` is the median of predicted / "
        "measured. `python -m clustersim.study.fit network` fits the parameters anew; they stand in\n"
        "`clustersim/catalogue/network.toml`, the measurements in `clustersim/catalogue/measured/`.\n",
        "![predicted against measured](validation-network.svg)\n",
        "## By file\n",
        "`fitted` is the share of times that the fit has seen: their errors say how well few parameters\n"
        "describe many rows. What a forecast is worth is said by the next table.\n",
        _table(("file", "ruled by", *_ERRORS, "fitted", "goal"), list(_judged_rows(found))),
        "## Leave one file out\n",
        "The fit is done again without the file: its errors with and without it, and by how much the\n"
        "predictions of all other files move.\n",
        _table(
            ("file", "median", "p90", "median without it", "p90 without it", "others move, median", "p90"),
            [_left_out_row(one) for one in found["leave_one_out"]],
        ),
    ]
    for file in found["files"]:
        classes = [(one["kind"], one["ruled"], one["gpus"], *_errors(one)) for one in file["classes"]]
        parts += [f"## {file['file']}\n", f"{rows_sentence(file)}.\n"]
        parts += [f"- not fitted: {which}: {why}" for which, why in file["not_fitted"].items()]
        parts += ["", _table(("kind", "ruled by", "GPUs", *_ERRORS), classes)]
        parts.append(_table(_EXAMPLE, [_example_row(one) for one in file["examples"]]))
    parts += [
        "## Foretold by fits that have not seen them\n",
        _table(("expert exchange", *_ERRORS, "goal"), [_foretold_row(one) for one in found["foretold"]]),
    ]
    return "\n".join(parts)


_ERRORS = ("rows", "median", "p90", "ratio")
_EXAMPLE = ("kind", "GPUs", "size", "measured", "predicted", "error", "algorithm", "what")


def _errors(one: Mapping[str, Any]) -> tuple[str, ...]:
    if not one["rows"]:
        return "0", "", "", ""
    return f"{one['rows']}", f"{one['median']:.1%}", f"{one['p90']:.1%}", f"{one['ratio']:.2f}"


def _judged_rows(found: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for file in found["files"]:
        for one in file["judged"]:
            met = "met" if one["met"] else f"missed: {one['why_missed']}"
            fitted = f"{fitted_share(file):.0%}"
            yield file["file"], one["ruled"], *_errors(one), fitted, met if one["rows"] else ""


def _example_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        one["kind"],
        f"{one['gpus']}",
        show(one["size"], "size"),
        _time(one["measured"]),
        _time(one["predicted"]),
        f"{one['error']:+.0%}",
        one["choice"],
        one["what"],
    )


def _left_out_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    # Whole percents: a refit may differ in its last digit from computer to computer.
    pairs = (one["all_files"], one["without_it"], one["others_move"])
    shares = [pair[key] for pair in pairs for key in ("median", "p90")]
    return one["file"], *("" if share is None else f"{share:.0%}" for share in shares)


def _foretold_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    goal = "" if one["goal"] is None else "met" if one["kept"] else "missed"
    share = ("" if one[key] is None else f"{one[key]:.0%}" for key in ("median", "p90"))
    return one["name"], f"{one['rows']}", *share, f"{one['ratio']:.2f}", goal


def _printed_from(source: str) -> str:
    return f"Printed from `{source}` by `python docs/make.py`; do not edit it.\n"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def output_of(command: str, folder: Path) -> str:
    """What a command of ours prints.

    command  as typed, e.g. "clustersim run workloads/large_ep.toml"
    folder   where it runs; the examples are found from everywhere
    """
    arguments = [sys.executable, "-m", "clustersim.cli", *shlex.split(command)[1:]]
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True, check=True, encoding="utf-8")
    return done.stdout


def refreshed_readme(text: str, folder: Path) -> str:
    """The README with the output of its commands as it is now.

    folder   empty; the commands run in it one after the other
    """

    def fresh(found: re.Match[str]) -> str:
        printed = output_of(found["command"], folder)
        return f"$ {found['command']}\n{refreshed(found['output'], printed)}"

    return SHOWN.sub(fresh, text)


def refreshed(shown: str, printed: str) -> str:
    """The shown excerpt with the printed numbers: each line becomes the next one with the same label."""
    fresh = iter(printed.splitlines())
    return "".join(f"{_refreshed_line(line, fresh)}\n" for line in shown.splitlines())


def _refreshed_line(line: str, fresh: Iterator[str]) -> str:
    if line.strip() in ("", CUT):
        return line
    same = next((new for new in fresh if label(new) == label(line)), None)
    if same is None:
        raise SystemExit(f"README.md shows a line that is no longer printed: {line!r}")
    return line if timeless(line) == timeless(same) else same


def label(line: str) -> str:
    """What a line is about, whatever its numbers: the text up to the first gap, digits apart."""
    return re.sub(r"[\d.,]+", "#", re.split(r"  +", line.strip())[0])


def timeless(line: str) -> str:
    """The line without the time the simulation took, which is never the same twice."""
    return re.sub(r"  in [\d.,]+ \w+$", "", line)


def write(found: Mapping[str, str]) -> None:
    """Writes pages, given by their paths under docs/."""
    for name, text in found.items():
        path = ROOT / "docs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write(pages())
    with tempfile.TemporaryDirectory() as empty:
        readme = refreshed_readme(README.read_text(encoding="utf-8"), Path(empty))
    README.write_text(readme, encoding="utf-8")
