"""What people read: every number that matters, at any width, and no file steers the terminal."""

from __future__ import annotations

import io
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from synthetic import CLAIM, FACTS, tiny

from clustersim.analysis.summary import summarize
from clustersim.report.terminal import show
from clustersim.trace.record import Recorder

WHOLE = summarize(tiny(claimed=CLAIM, faults=True))


def console(width: int = 100, encoding: str = "utf-8", colours: bool = False) -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    return Console(
        file=file, width=width, force_terminal=colours, color_system="truecolor" if colours else None
    )


def printed(to: Console) -> str:
    file: Any = to.file
    content: bytes = file.buffer.getvalue()
    return content.decode(file.encoding)


def shown(summary: dict[str, Any], to: Console | None = None, **more: Any) -> str:
    to = to or console()
    show(summary, to, **more)
    return printed(to)


def test_the_page_says_what_the_run_found() -> None:
    page = shown(WHOLE, peers={"other": WHOLE}, path=Path("results/tiny-0123456789ab"))
    for said in (
        "tiny  seed 7  10 s simulated  10 operators  in 250 ms",
        "0.5 tokens/s  (output 0.5, input 0)",
        "Where the 4 s of a decode step go, mean over GPUs",
        "2 steps, 0.5 tokens/s; step 4 s; bounds: memory 1.5 s, network 500 ms, compute 100 ms",
        "combine of rank 0",
        "s0/gpu0->s0/nvswitch",
        "busiest rank 1.75 x the mean load (2.00 x at worst)",
        "rank 1: 90 B of 100 B: weights 60 B, kv 30 B",
        "claimed by a brochure",
        "measured 50.0%",
        "other: TPOT",
        "  - Faults were at work: slow_gpu at rank 1.",
        "Result: results/tiny-0123456789ab",
    ):
        assert said in page
    assert re.search(r"TPOT +1 s +4 s +4 x", page)
    assert re.search(r"attention +█{30} +1\.75 s +0 s +43\.8%", page)
    assert re.search(r"combine +█{9}░{8} +500 ms +500 ms +25\.0%", page)
    assert re.search(r"idle +1\.25 s +31\.2%", page)
    assert re.search(r"send \(transfer\) +beside +1\.25 s +250 ms", page)
    assert re.search(r"wait +0\.0% +10\.0% +20\.0%", page)


def test_dropped_choices_stand_beside_the_tokens_per_second() -> None:
    assert "dropped" not in shown(WHOLE)
    lossy = deepcopy(WHOLE)
    lossy["throughput"]["dropped_share"] = 0.041
    assert "0.5 tokens/s (4.1% of assignments dropped)  (output 0.5, input 0)" in shown(lossy)


def test_both_waits_in_a_queue_are_called_by_their_names() -> None:
    page = " ".join(shown(WHOLE).split())
    assert "queue wait on average: 462 ms for tokens still to come, 237 ms behind other work" in page
    slowest = "slowest is expert 1 of layer 0 on rank 1: 620 ms for tokens still to come, 200 ms behind other"
    assert f"{slowest} work, 840 ms in service" in page


def test_no_expert_is_called_the_slowest_where_all_are_alike() -> None:
    alike = deepcopy(WHOLE)
    alike["experts"]["slowest"]["over"] = 1.004
    assert "slowest is" not in shown(alike) and "queue wait on average" in shown(alike)


def test_the_bill_of_moving_experts_is_shown_where_there_is_one() -> None:
    page = shown(summarize(tiny(rebalances=True)))
    assert (
        "1 of 2 plans moved something: 2 copies, 8 B over links in 500 ms, stopped for 500 ms (5.0%)" in page
    )
    assert re.search(r"whole run +2\.00 x +- +1\.75 x", page)
    assert re.search(r"loads observed +1\.50 x +1\.00 x +-", page)
    assert re.search(r"loads after it +1\.75 x +- +1\.25 x", page)
    assert "estimated gain 230 ms, net of the stops -270 ms" in page
    assert "placed anew" not in shown(WHOLE)


def test_a_piped_page_has_no_colours_and_no_padding() -> None:
    page = shown(WHOLE)
    assert "\x1b" not in page
    assert all(line == line.rstrip() for line in page.split("\n"))
    assert "\x1b" in shown(WHOLE, console(colours=True))


@pytest.mark.parametrize("width", [80, 100])
def test_a_page_is_no_wider_than_the_terminal(width: int) -> None:
    page = shown(WHOLE, console(width), peers={"other": WHOLE})
    assert max(len(line) for line in page.split("\n")) <= width


def test_a_terminal_without_block_characters_gets_others() -> None:
    page = shown(WHOLE, console(encoding="ascii"))
    assert "# busy  . waiting" in page


def test_what_a_file_says_is_neither_markup_nor_an_escape_sequence() -> None:
    summary = deepcopy(WHOLE)
    summary["name"] = "[bold]x[/bold] [/] :smile:"
    summary["gpus"][0]["gpu"] = "[red]g"
    summary["gpus"][1]["waited_for"] = {"operator": "[/nonsense]", "rank": None}
    summary["links"][0]["link"] = "\x1b[2Ja\n->b"
    summary["notes"] = ["[link=x]note[/link]"]
    summary["claimed"]["source"] = "[blink]"
    page = shown(summary, peers={"[i]peer": WHOLE}, path=Path("[u]here"))
    for said in ("[bold]x[/bold] [/] :smile:", "[red]g", "[/nonsense]", r"\x1b[2Ja\n->b"):
        assert said in page
    for said in ("[link=x]note[/link]", "[blink]", "[i]peer", "[u]here"):
        assert said in page
    assert "\x1b" not in page


@pytest.mark.parametrize(
    "summary",
    [
        summarize(tiny(spans=False, experts=False, prices=False)),
        summarize(tiny(requests={"input_tokens": 5, "first_token": float("nan"), "output_tokens": 0})),
        summarize(Recorder().finish({**FACTS, "simulated_seconds": 0.0, "claimed": CLAIM})),
        summarize(tiny(prices=False)),
    ],
)
def test_what_is_missing_is_left_out(summary: dict[str, Any]) -> None:
    page = shown(summary, peers={"other": WHOLE, "failed": {"error": "x"}})
    assert page.startswith("tiny")
    assert "None" not in page and "nan" not in page


def test_shares_of_price_origins_are_percentages() -> None:
    page = shown(WHOLE)
    assert "  measured 50.0%, interpolated 30.0%, extrapolated 20.0%\n" in page
    assert "  by h100_sxm bf16 trtllm 100.0%\n" in page


def test_many_small_parts_are_added_up() -> None:
    summary = deepcopy(WHOLE)
    part = {"kind": "compute", "stream": "compute", "busy": 0.1, "wait": 0.0}
    summary["phases"]["decode"]["parts"] = [{**part, "operator": f"op{n}"} for n in range(15)]
    assert re.search(r"3 others +█+ +300 ms", shown(summary))


def test_a_failed_run_says_why() -> None:
    page = shown({"name": "tiny", "error": "does not [fit]"}, path=Path("results/x"))
    assert page == "tiny\n  failed: does not [fit]\n\nResult: results/x\n"
