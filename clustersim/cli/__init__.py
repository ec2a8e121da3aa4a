"""The command line: a thin layer over `study`. Results on standard output, talk on standard error.

Exit status: 0 done, 1 internal error or errors larger than `validate` states, 2 wrong input, 3 a run
that cannot end or a bound of `compare --fail-if` that is broken, 130 interrupted.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import click

from clustersim.cli.compare import compare as _compare
from clustersim.cli.compare import run_seeds as _run_seeds
from clustersim.cli.dag import dag as _dag
from clustersim.cli.options import JSON as _JSON
from clustersim.cli.options import SCENARIO as _SCENARIO
from clustersim.cli.options import SEED as _SEED
from clustersim.cli.options import SET as _SET
from clustersim.cli.output import print_json as _print_json
from clustersim.cli.output import print_page as _print_page
from clustersim.cli.output import print_text as _print
from clustersim.cli.output import progress as _progress
from clustersim.cli.output import warn as _warn
from clustersim.cli.rebalance import rebalance as _rebalance
from clustersim.cli.report import report as _report
from clustersim.cli.stress import stress as _stress
from clustersim.cli.trace import trace as _trace


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="clustersim")
def cli() -> None:
    """Simulate GPU clusters that serve Mixture-of-Experts models.

    \b
    clustersim preview workloads/large_ep.toml    what it is, without running
    clustersim run workloads/large_ep.toml        what it does, and why
    """


@cli.command()
@_SCENARIO
@_SET
@_SEED
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="The result folder itself.")
@_JSON
@click.option("--quiet", is_flag=True, help="Print nothing; the result folder says it all.")
@click.option("--alone", is_flag=True, help="Leave out the run that the scenario is to be set beside.")
@click.option(
    "--seeds", type=click.IntRange(2, 1000), metavar="N",
    help="Run it with N seeds, from its own on: means and percentiles get intervals.",
)  # fmt: skip
def run(
    file: Path, overrides: tuple[str, ...], seed: int | None, out: Path | None, as_json: bool, quiet: bool,
    alone: bool, seeds: int | None,
) -> None:  # fmt: skip
    """Simulate the scenario in FILE and leave a result folder.

    The folder is results/<name>-<hash> unless --out names another. It holds scenario.toml (every
    default written out), summary.json and trace/*.parquet, and appears whole or not at all.

    With --seeds it is results/<name>-<hash>-seeds<N>: no traces, but the summaries of all replications, and
    one with their means and 95 % intervals. They run on all cores, without what the scenario is to be set
    beside; after Ctrl-C the same command goes on.
    """
    if seeds:
        _run_seeds(file, overrides, seed, seeds, out, as_json, quiet)
        return
    from clustersim.errors import ClustersimError, StuckError
    from clustersim.study.run import load, peers, result_folder, run_scenario, save_failure, wait, with_beside

    scenario = load(file, overrides, seed)
    folder = result_folder(scenario, out)
    _warn(wait(scenario.network.fidelity), quiet)
    try:
        with _progress(quiet or as_json) as tell:
            result = run_scenario(scenario, str(file), tell, folder)
            if not alone:
                result = with_beside(result, str(file), tell)
    except StuckError as error:
        save_failure(scenario, folder, error)
        raise
    except ClustersimError:
        raise
    except Exception as error:
        save_failure(scenario, folder, error)
        raise
    result.save(folder)
    if as_json:
        _print_json(result.summary)
    elif not quiet:
        from clustersim.report.terminal import show

        others = peers(scenario, folder)
        _print_page(lambda console: show(result.summary, console, others, folder))


@cli.command()
@_SCENARIO
@_SET
@_JSON
def preview(file: Path, overrides: tuple[str, ...], as_json: bool) -> None:
    """Show what the scenario in FILE is, without running it.

    Parameters, memory per rank, groups, topology, operators per step, and the lower bounds of a step
    from FLOP, HBM bytes and link bytes.
    """
    from clustersim.study.preview import preview as look
    from clustersim.study.run import laid_out, read

    scenario = read(file, overrides)
    found = look(scenario, laid_out(scenario, str(file)))
    if as_json:
        _print_json(found)
        return
    from clustersim.report.preview import show_preview

    _print_page(lambda console: show_preview(found, console))


@cli.command()
@_SCENARIO
@_SET
@click.option(
    "--svg", type=click.Path(path_type=Path, dir_okay=False), metavar="DRAWING",
    help="Draw the machine into this file, too.",
)  # fmt: skip
@_JSON
def topology(file: Path, overrides: tuple[str, ...], svg: Path | None, as_json: bool) -> None:
    """Show and check the machine in FILE: a topology, or a scenario with one.

    Parts, links by tier, bisection, oversubscription, how far GPUs are apart, what is wrong with it, and
    on which single parts it depends. Exit status 2 where the file is wrong or some GPU cannot be reached.
    """
    from clustersim.report.topology import show_topology
    from clustersim.report.topology_svg import topology_svg
    from clustersim.study.topology import drawing, inspect, load_machine, save_drawing

    machine = load_machine(file, overrides)
    found = inspect(machine)
    if svg is not None:
        save_drawing(svg, topology_svg(found, drawing(machine)))
    if as_json:
        _print_json(found)
    else:
        _print_page(lambda console: show_topology(found, console))


@cli.command()
@click.argument("case", metavar="CASE_DIR", type=click.Path(path_type=Path))
@click.option(
    "--fidelity", type=click.Choice(["fluid", "chunked", "port_bound"]), default="fluid", show_default=True,
    metavar="NAME", help="The network model: fluid, chunked or port_bound.",
)  # fmt: skip
@click.option("--chunk", metavar="SIZE", default="256 KiB", show_default=True, help="Of the chunked model.")
@click.option(
    "--tolerance", type=click.FloatRange(min=0, max=0.5), default=0.0, show_default=True,
    help="Of the fluid model, as network.tolerance of a scenario: 0 is exact.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE",
    help="Write the times there, compressed if it ends in .gz; - is standard output.",
)  # fmt: skip
@_JSON
def network(case: Path, fidelity: str, chunk: str, tolerance: float, out: Path | None, as_json: bool) -> None:
    """Replay the traffic in CASE_DIR: when is each flow done?

    CASE_DIR holds links.csv (link_id,name,bw_GBps,lat_us; 1 GB/s is 1e9 B/s) and flows.csv
    (flow_id,src,dst,bytes,start_us,after,path), either with .gz; more columns do no harm. `path` lists the
    links a flow crosses and `after` the flows it waits for, as ids with semicolons between them. A flow is
    released at start_us, or when all it waits for are done, if that is later; the latencies of its path pass;
    then it shares its links with the others. The times written are flow_id,release_us,finish_us, in the
    order of flows.csv. Mistakes name the row, counted as lines of the file: the header is row 1.
    """
    from clustersim.errors import ClustersimError
    from clustersim.study.network import check_out, replay_case, summary, wait

    folder = case
    if not case.exists():
        # All of the simulation stands behind this one; a replay needs little of it.
        from clustersim.study.run import find

        folder = find(case)
    to_stdout = out is not None and str(out) == "-"
    if to_stdout and as_json:
        raise ClustersimError("--out - and --json: both want standard output; give --out a file")
    if out is not None and not to_stdout:
        check_out(out, folder)
    _warn(wait(fidelity))
    result = replay_case(folder, fidelity, chunk, tolerance)
    if out is not None and to_stdout:
        _print(result.csv().decode())
        return
    if out is not None:
        result.write(out)
    if as_json:
        _print_json(summary(result))
        return
    from clustersim.report.network import show_replay

    _print_page(lambda console: show_replay(summary(result), console, case, out))


@cli.command()
def schema() -> None:
    """Print the JSON Schema of scenario files, so that editors complete and check them."""
    from clustersim.study.preview import schema as scenario_schema

    _print_json(scenario_schema())


@cli.command()
@click.option(
    "--folder", type=click.Path(path_type=Path, file_okay=False), default=Path("results/seeds"),
    show_default=True, help="Where the summaries and their page lie.",
)  # fmt: skip
@click.option("--check", is_flag=True, help="Write nothing; fail if what lies there is stale.")
def examples(folder: Path, check: bool) -> None:
    """Run the permanent examples and write their summaries, found beside claimed."""
    from clustersim.errors import ResultError
    from clustersim.study.examples import differences, regenerate

    if check:
        stale = differences(folder)
        if stale:
            raise ResultError("stale: " + "; ".join(stale) + "; run `clustersim examples`")
    else:
        for path in regenerate(folder):
            click.echo(path, err=True)


@cli.command()
@click.argument(
    "part", type=click.Choice(["kernels", "network", "serving", "all"]), default="all", metavar="[PART]"
)
@_JSON
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False),
    help="Also write every row to this folder: predictions.parquet, and drawn: predictions.svg.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Leave out the fits without what is foretold.")
def validate(part: str, as_json: bool, out: Path | None, quick: bool) -> int:
    """Hold predictions against what was measured on real hardware.

    PART is kernels: times of single GPU kernels, each foretold by a fit that has not seen its shape; network:
    times of collectives and expert exchanges, file by file; serving: nothing yet; or all, the default.
    Exit status 1 if errors are larger than their goal, unless it is stated why, or if a file of the network
    that is left out moves the others too far. Kernels take some minutes, with --quick a few seconds: then
    goals are held against prices that have seen the calls, which checks the tables and is no forecast.
    """
    from clustersim.study.parts import save_part
    from clustersim.study.parts import validate as errors_of

    if out is not None:
        # Said before minutes of fitting.
        _check_folder(out)
    found = errors_of(part, not quick)
    if out is not None:
        save_part(part, out, not quick)
    if as_json:
        _print_json(found)
    else:
        from clustersim.report.parts import show_part

        _print_page(lambda console: show_part(part, found, console))
    return 0 if found["kept"] else 1


def _check_folder(folder: Path) -> None:
    from clustersim.errors import ClustersimError

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ClustersimError(f"--out {folder}: {error.strerror or error}") from error


@cli.command(context_settings={"ignore_unknown_options": True})
@click.argument("what", metavar="KERNEL|FILE")
@click.argument("sizes", metavar="[--SIZE VALUE]...", nargs=-1, type=click.UNPROCESSED)
@click.option(
    "--gpu", default="", metavar="NAME",
    help="GPU by any of its names, of a kernel several between commas; of a file, instead of its `gpu`.",
)  # fmt: skip
@click.option(
    "--library", default="auto", show_default=True, metavar="NAME",
    help="Whose kernels: trtllm, vllm, ...; auto is the file's `framework`, else the first of a fixed order "
    "whose kernel was measured on this GPU, TensorRT-LLM before others; not the quickest. vLLM's fp8_block "
    "products were timed with the host's launch of some 60 us in them.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path), metavar="FILE",
    help="Write the prices there as CSV, compressed if it ends in .gz; - is standard output, as of a file "
    "without --out.",
)  # fmt: skip
@click.option(
    "--skip", is_flag=True,
    help="Of a file, leave rows without a price that no kernel speaks about or whose GPU lacks the format.",
)  # fmt: skip
@_JSON
def price(
    what: str, sizes: tuple[str, ...], gpu: str, library: str, out: Path | None, skip: bool, as_json: bool
) -> None:
    """Say what kernels cost, and where each price comes from.

    \b
    clustersim price gemm --gpu h100_sxm --m 1,16,256 --n 4096 --k 7168 --dtype fp8
    clustersim price attention-decode --gpu b200 --batch 64 --kv-len 4096 --heads 32 --kv-heads 8
    clustersim price mla-decode --gpu h200 --batch 32 --kv-len 1024..65536 --heads 16
    clustersim price experts --gpu h100 --tokens 4096 --hidden 4096 --inter 14336 --experts 8 --top-k 2
    clustersim price norm --gpu a100 --tokens 512 --width 8192
    clustersim price lm-head --gpu h100 --tokens 64 --hidden 4096 --vocab 128256
    clustersim price rows.csv --out priced.csv

    A kernel is asked by its sizes: whole numbers, several between commas, or 1..64 for 1, 2, 4 and so on.
    Without sizes it says which it wants; docs/commands/price.md lists those of every kernel. --dtype is bf16,
    fp8, fp8_block, fp4, or w4a16 for fp4 weights that are multiplied as bf16; attention has --kv-dtype,
    prefills --prior for tokens whose keys and values are there already. The --tokens of expert layers are
    those of the whole group of --ep ranks; they have --tp, --distribution (balanced, powerlaw_a1.2) or,
    instead, --counts: tokens of each expert of the rank. Of several GPUs, those that lack the format are
    left out.

    Of a file, all rows and columns are kept and `seconds,origin` added. It may have any column form of the
    measured files, recognised by its columns, whatever it is called; measured columns need not be there, and
    others do no harm; - is standard input. Or it lists kernels of any kind: a column `kernel` with the name,
    and one for each size, called as the flag; cells of sizes that a kernel does not have stay empty.

    \b
    kernel,gpu,dtype,m,n,k,batch,kv_len,heads,kv_heads
    gemm,h100_sxm,fp8,16,4096,7168,,,,
    attention_decode,b200,,,,,64,4096,32,8

    Mistakes name the line, and then nothing is written. At most 2,000,000 rows are priced.
    """
    from clustersim.errors import ClustersimError
    from clustersim.study.price import check_library, kernel_asked

    if str(out) == "-" and as_json:
        raise ClustersimError("--out - and --json: both want standard output; give --out a file")
    check_library(library)
    kernel = kernel_asked(what)
    if kernel:
        if skip:
            raise ClustersimError("--skip: is for files; GPUs that lack the format are left out without it")
        _price_kernel(kernel, gpu, sizes, library, out, as_json)
    else:
        _price_file(Path(what), sizes, gpu, library, skip, out, as_json)


def _price_kernel(
    kernel: str, gpu: str, sizes: tuple[str, ...], library: str, out: Path | None, as_json: bool
) -> None:
    from clustersim.study import price_flags

    to_stdout = str(out) == "-"
    if out is not None and not to_stdout:
        price_flags.check_place(out)
    found = price_flags.price_flags(kernel, gpu, sizes, library)
    for why in found["left_out"]:
        _warn(f"left out: {why}")
    if to_stdout:
        _print(price_flags.to_csv(found).decode())
        return
    if out is not None:
        price_flags.write_text(out, price_flags.to_csv(found))
    if as_json:
        _print_json(found)
        return
    from clustersim.report.price import show_prices

    _print_page(lambda console: show_prices(found, console))


def _price_file(
    path: Path, sizes: tuple[str, ...], gpu: str, library: str, skip: bool, out: Path | None, as_json: bool
) -> None:
    from clustersim.errors import ClustersimError
    from clustersim.study import price_rows

    if sizes:
        raise ClustersimError(f"{sizes[0]}: the rows of {path} say their own sizes")
    out = None if str(out) == "-" else out
    if out is not None:
        price_rows.check_out(path, out)
    found = price_rows.price_file(path, gpu, library, skip)
    if out is None:
        if as_json:
            _print_json(price_rows.as_json(found, path))
        else:
            _print(found.csv().decode())
        return
    price_rows.write(found, out)
    said = price_rows.summary(found, path, out)
    if as_json:
        _print_json(said)
        return
    from clustersim.report.price import show_priced_file

    _print_page(lambda console: show_priced_file(said, console))


@cli.command()
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), default=Path("measured"), show_default=True,
    help="The folder of the CSV files.",
)  # fmt: skip
@click.option(
    "--kernel", "kernels", metavar="NAMES", default="",
    help="Only these, with commas between them: gemm, attention_prefill, attention_decode, mla_prefill, "
    "mla_decode, experts, elementwise.",
)  # fmt: skip
@click.option("--quick", is_flag=True, help="Few sizes of each kernel: minutes instead of an hour.")
@click.option("--model", metavar="NAME", help="Just the kernels and shapes of this model of the catalogue.")
@click.option("--tp", type=click.IntRange(min=1), default=1, help="With --model: its tensor parallelism.")
@click.option("--ep", type=click.IntRange(min=1), default=1, help="With --model: its expert parallelism.")
@click.option("--gpu", metavar="NAME", default="", help="Name in the rows, instead of the one recognised.")
@click.option("--device", type=click.IntRange(min=0), default=0, help="Which GPU, counted from 0.")
@click.option("--resume", is_flag=True, help="Keep the rows in the folder and measure what they lack.")
@click.option("--dry-run", is_flag=True, help="Say what would be measured; needs no GPU.")
@_JSON
def measure(
    out: Path, kernels: str, quick: bool, model: str | None, tp: int, ep: int, gpu: str, device: int,
    resume: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Time the kernels of a GPU of this machine and write calibration files.

    Needs an NVIDIA GPU and PyTorch: pip install 'clustersim[measure]'. The files have the columns of the
    measured ones that prices are fitted to: gemm.csv, attn_prefill.csv, attn_decode.csv, mla.csv,
    moe_kernels.csv and elementwise.csv. cases.csv tells what came of every case and how far its
    repetitions spread, machine.csv what it was measured on. A broken-off session leaves whole files, and
    --resume goes on from there.

    Inputs are random and cold in L2, calls are replayed from a CUDA graph (so that the launch of a kernel
    counts and the host does not), a row holds the median, and clocks are left as they are. Exit status 2
    without PyTorch or without a GPU; nothing is written then.
    """
    from clustersim.study.measure import gpu_name, summary
    from clustersim.study.measure import measure as time_all
    from clustersim.study.measure_plan import outline
    from clustersim.study.model_cases import wished

    cases = wished(kernels, quick, model, tp, ep)
    if dry_run:
        found = outline(cases)
    else:
        from clustersim.study.torch_timing import open_torch

        backend = open_torch(device)
        name, warning = gpu_name(backend.machine().device, gpu)
        _warn(warning)
        with _progress(as_json, "measuring") as tell:
            found = summary(time_all(cases, backend, out, name, resume, tell), out)
    if as_json:
        _print_json(found)
        return
    from clustersim.report.measured import show_measured

    _print_page(lambda console: show_measured(found, console))


@cli.group()
def gating() -> None:
    """Fit how popular experts are to measured counts, or show it for a scenario."""


@gating.command(name="fit")
@click.argument("counts", type=click.Path(path_type=Path))
@click.option("--top-k", type=click.IntRange(min=1), default=None, help="Experts of a token, if not told.")
@click.option("--only", metavar="TEXT", default="", help="Only measurements with this in their name.")
@click.option(
    "--measurement", metavar="NAME", default="",
    help="The one measurement of that name, or with these words in it.",
)  # fmt: skip
@click.option(
    "--out", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the [gating] table of a scenario there; of one measurement.",
)  # fmt: skip
@_JSON
def gating_fit(
    counts: Path, top_k: int | None, only: str, measurement: str, out: Path | None, as_json: bool
) -> int:
    """Fit a generator of expert loads to the measured ones in COUNTS, and print both.

    COUNTS is a CSV with layer,expert,count or layer_id,expert_id,count (and, for several measurements,
    model, dataset and topk), an npz or npy with expert ids [tokens, layers, top_k] or counts [layers,
    experts], or JSON lines with tokens_per_expert. Every layer gets its Gini coefficient, its busiest expert
    and how its curve is bent. Exit status 1 where a Gini coefficient is off by more than 0.02, a busiest
    expert by more than 10 %, or more than 10 % of the tokens are at another rank of popularity.
    """
    from clustersim.study.gating_fit import fit, read, summary, the_only, write

    chosen = read(counts, top_k or 0, only, measurement)
    if out is not None:
        the_only(chosen)
    fits = [fit(routing) for routing in chosen]
    if out is not None:
        write(fits[0], counts, out)
    found = summary(fits, counts)
    if as_json:
        _print_json(found)
    else:
        from clustersim.report.gating import show_fits

        _print_page(lambda console: show_fits(found, console))
    return 0 if all(one["kept"] for one in found["measurements"]) else 1


@gating.command(name="show")
@_SCENARIO
@_SET
@_SEED
@_JSON
def gating_show(file: Path, overrides: tuple[str, ...], seed: int | None, as_json: bool) -> None:
    """Show how popular experts are in the scenario in FILE: layer by layer, and as it moves."""
    from clustersim.study.gating_fit import look
    from clustersim.study.run import read

    found = look(read(file, overrides if seed is None else (*overrides, f"seed={seed}")))
    if as_json:
        _print_json(found)
        return
    from clustersim.report.gating import show_gating

    _print_page(lambda console: show_gating(found, console))


@cli.command()
@click.argument("section", required=False, default="", metavar="[SECTION]")
@click.argument("name", required=False, default="", metavar="[NAME]")
@_JSON
def catalogue(section: str, name: str, as_json: bool) -> None:
    """Show what the catalogue holds, and where each number comes from.

    SECTION is gpus, servers, models, network (fitted costs of exchanges) or calibration (measured tables);
    without it all are listed with their main figures and sources. NAME shows one entry whole: every number
    with its meaning and origin, guesses marked. GPUs are found by any name people give them.
    """
    from clustersim.study.catalogue import entry, listing

    found: Any = entry(section, name) if name else listing(section)
    if as_json:
        _print_json(found)
        return
    from clustersim.report.catalogue import show_entry, show_listing

    _print_page(lambda console: show_entry(found, console) if name else show_listing(found, console))


cli.add_command(_dag)
cli.add_command(_compare)
cli.add_command(_stress)
cli.add_command(_rebalance)
cli.add_command(_trace)
cli.add_command(_report)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs the command line and exits with its status."""
    sys.exit(_status(arguments))


def _status(arguments: list[str] | None) -> int:
    from clustersim.errors import ClustersimError, StuckError

    try:
        outcome = cli.main(args=arguments, standalone_mode=False)
        return outcome if isinstance(outcome, int) else 0
    except (click.exceptions.Abort, KeyboardInterrupt):
        return _say("interrupted", 130)
    except click.ClickException as error:
        error.show()
        return 2
    except StuckError as error:
        return _say(str(error), 3)
    except ClustersimError as error:
        return _say(str(error), 2)
    except Exception:
        traceback.print_exc()
        return _say("internal error: this is a fault of clustersim, please report it", 1)


def _say(text: str, status: int) -> int:
    click.echo(text, err=True)
    return status
