"""Prices by the command line: files of rows in every measured form, and kernels by their sizes."""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clustersim.cli import _status
from clustersim.errors import ClustersimError
from clustersim.physics.calibration import ORIGINS
from clustersim.physics.kernels import KERNELS
from clustersim.spec.gpus import gpu_named
from clustersim.study import price_rows
from clustersim.study.forms import TOLD, asked, forms_of, headers
from clustersim.study.kernel_families import READERS
from clustersim.study.measured import measured
from clustersim.study.price_flags import FLAGS, flags_of, price_flags
from clustersim.study.price_rows import SKIPPED, price_file

GEMMS = """gpu,dtype,m,n,k
H100-SXM-80GB,fp8,16,4096,7168
b200,bf16,1,512,512
A100-SXM-80GB,bf16,4096,4096,4096
"""


def some_rows(form: str, count: int = 60) -> dict[str, list[str]]:
    """Column → texts of some rows of a measured table, spread over it."""
    table = measured(form)
    rows = np.unique(np.linspace(0, len(table["source"]) - 1, count).astype(int))
    return {
        name: ["" if value != value else str(value) for value in column[rows].tolist()]
        for name, column in table.items()
    }


def as_csv(columns: dict[str, list[str]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue()


def written(folder: Path, text: str | bytes, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("form", READERS)
def test_rows_of_every_form_are_priced_in_order_without_their_measured_columns(
    form: str, tmp_path: Path
) -> None:
    whole = some_rows(form)
    bare = {name: texts for name, texts in whole.items() if name not in TOLD or name in ("gpu", "framework")}
    found = price_file(written(tmp_path, as_csv(bare), "by any name.csv"))
    rows = read(found.csv().decode())
    assert [{name: row[name] for name in bare} for row in rows] == read(as_csv(bare))
    assert all(float(row["seconds"]) > 0 and row["origin"] in ORIGINS for row in rows)
    assert [float(row["seconds"]) for row in rows] == found.seconds.tolist()


@pytest.mark.parametrize("form", READERS)
def test_what_was_measured_plays_no_part_in_a_price(form: str, tmp_path: Path) -> None:
    whole = some_rows(form)
    silly = {name: texts if name not in TIMES else ["no idea"] * len(texts) for name, texts in whole.items()}
    one, other = (price_file(written(tmp_path, as_csv(columns))) for columns in (whole, silly))
    assert one.seconds.tolist() == other.seconds.tolist()


TIMES = ("time_us", "gate_up_us", "down_us", "grouped_gemm_us", "tflops", "mfu", "up_mfu", "kv_GBps")


@pytest.mark.parametrize("form", READERS)
def test_the_price_of_a_row_depends_on_no_other_row(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, as_csv(some_rows(form)))
    together = price_file(path)
    monkeypatch.setattr(price_rows, "BLOCK", 7)
    apart = price_file(path)
    assert together.seconds.tolist() == pytest.approx(apart.seconds.tolist(), rel=1e-12)
    assert together.origin.tolist() == apart.origin.tolist()


@pytest.mark.parametrize("form", READERS)
def test_a_form_is_recognised_by_its_columns_in_any_order_among_others(form: str) -> None:
    header = [*reversed(asked(form)), "somebody's remark", "x"]
    assert form in forms_of(header)
    assert form in forms_of([*headers()[form], "more"])


def test_a_sum_of_two_kernels_says_what_each_takes(tmp_path: Path) -> None:
    form = "infersim_h800_grouped_gemm"
    if form not in READERS:
        pytest.skip("no family reads it")
    rows = read(price_file(written(tmp_path, as_csv(some_rows(form)))).csv().decode())
    for row in rows:
        both = float(row["seconds_gate_up"]) + float(row["seconds_down"])
        assert float(row["seconds"]) == pytest.approx(both, rel=1e-12)


def test_a_gpu_named_beside_the_file_prices_all_rows(tmp_path: Path) -> None:
    named = price_file(written(tmp_path, GEMMS), gpu="H200")
    without = re.sub(r"(?m)^[^,]*,", "", GEMMS)
    assert price_file(written(tmp_path, without), gpu="h200_sxm").seconds.tolist() == named.seconds.tolist()
    assert price_file(written(tmp_path, GEMMS)).seconds.tolist() != named.seconds.tolist()


def test_quoted_fields_odd_line_ends_and_a_mark_at_the_beginning_are_understood(tmp_path: Path) -> None:
    text = 'gpu,note,dtype,m,n,k\r\n"H100-SXM-80GB","say ""hm"", well",fp8,16,4096,7168\r\n'
    found = price_file(written(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    row = read(found.csv().decode())[0]
    assert row["note"] == 'say "hm", well' and float(row["seconds"]) > 0


WRONG = {
    "unknown GPU": (
        "gpu,dtype,m,n,k\nH100,bf16,1,1,1\nH10000,bf16,1,1,1\n",
        r"line 3: gpu = H10000 .*there are",
    ),
    "format the GPU lacks": (
        "gpu,dtype,m,n,k\nH100,fp8,16,1,1\nA100,bf16,1,1,1\nA100,fp8,16,1,1\n",
        r'line 4: a100_sxm does not compute in "fp8"; it has bf16',
    ),
    "negative m": ("gpu,dtype,m,n,k\nH100,bf16,-5,1,1\n", r"line 2: m = -5 is not a whole number"),
    "sizes without end": ("gpu,dtype,m,n,k\nH100,bf16,1,1,1\nH100,bf16,1e12,1e12,9\n", "line 3: would take"),
    "sizes of nothing": ("gpu,dtype,m,n,k\nH100,bf16,1e300,1,1\n", "line 2: m = 1e.300 is more than 1,099,"),
    "no number": ("gpu,dtype,m,n,k\nH100,bf16,many,1,1\n", r"line 2: m = many is not a number"),
    "a gap": ("gpu,dtype,m,n,k\nH100,bf16,1,1,1\nH100,bf16,,1,1\n", r"line 3: m = "),
    "unknown dtype": ("gpu,dtype,m,n,k\nH100,fp9,1,1,1\n", r'line 2: dtype = fp9 .*did you mean "fp8"'),
    "missing column": ("gpu,dtype,m,n\nH100,bf16,1,1\n", r'line 1: column "k" is missing'),
    "misspelt column": ("gpu,dtyp,m,n,k\nH100,bf16,1,1,1\n", r'"dtype" is missing .did you mean "dtyp"'),
    "no GPU": ("dtype,m,n,k\nbf16,1,1,1\n", r'"gpu" is missing.*--gpu'),
    "empty": ("", "is empty"),
    "header alone": ("gpu,dtype,m,n,k\n", "no row"),
    "ragged": (
        "gpu,dtype,m,n,k\nH100,bf16,1,1,1\nH100,bf16,1,1\n",
        r"row 3: has 4 fields, but the header has 5",
    ),
    "not UTF-8": (b"gpu,dtype,m,n,k,note\nH100,bf16,1,1,1,\xe9t\xe9\n", "row 2: is not text in UTF-8"),
    "UTF-16": ("gpu,dtype,m,n,k\nH100,bf16,1,1,1\n".encode("utf-16"), "rows.csv"),
    "columns of nothing": ("when,where\n1,2\n", "no column that is known"),
    "columns of too little": ("gpu,dtype,op\nH100,bf16,add\n", "no kernel"),
    "prices there already": ("gpu,dtype,m,n,k,seconds\nH100,bf16,1,1,1,2\n", 'column "seconds"'),
    "a column twice": ("gpu,dtype,m,n,k,m\nH100,bf16,1,1,1,1\n", "stands in it twice"),
    "empty lines count": ("gpu,dtype,m,n,k\n\nH100,bf16,1,1,1\n\n\nH100,bf16,0,1,1\n", r"line 6: m = 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_file_is_refused_with_its_line_and_nothing_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, said = WRONG[name]
    path, out = written(tmp_path, text), tmp_path / "out.csv"
    out.write_text("as it was")
    assert _status(["price", str(path), "--out", str(out)]) == 2
    streams = capsys.readouterr()
    assert str(path) in streams.err and re.search(said, streams.err), streams.err
    assert not streams.out and out.read_text() == "as it was"
    assert sorted(one.name for one in tmp_path.iterdir()) == ["out.csv", "rows.csv"]


def test_a_wrong_row_is_told_with_its_line_in_later_blocks_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_rows, "BLOCK", 3)
    path = written(tmp_path, "gpu,dtype,m,n,k\n" + "H100,bf16,1,8,8\n" * 10 + "H100,bf16,-1,8,8\n")
    with pytest.raises(ClustersimError, match="line 12: m = -1"):
        price_file(path)


def test_more_rows_than_memory_has_room_for_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(price_rows, "MOST_ROWS", 3)
    with pytest.raises(ClustersimError, match="at most 3 are allowed"):
        price_file(written(tmp_path, GEMMS + "H100,bf16,1,8,8\n"))


def test_rows_no_kernel_speaks_about_are_refused_or_left_without_a_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A reader that passes over a row: as those of mixed files do with kinds that no family has.
    readers = {**READERS, "gemm_trtllm": [lambda table, file: []]}
    monkeypatch.setattr("clustersim.study.kernel_families.READERS", readers)
    path = written(tmp_path, GEMMS.replace("gpu,", "framework,kernel_source,gpu,").replace("\n", "\na,b,", 3))
    with pytest.raises(
        ClustersimError, match=r"line 2: no kernel speaks about this row \(nor 2 more\).*--skip"
    ):
        price_file(path)
    rows = read(price_file(path, skip=True).csv().decode())
    assert [(row["seconds"], row["origin"]) for row in rows] == [("", SKIPPED)] * 3


def test_a_file_of_prices_is_replaced_whole_and_its_rows_never(tmp_path: Path) -> None:
    path, out = written(tmp_path, GEMMS), tmp_path / "out.csv"
    out.write_text("what was there\n" * 100)
    assert _status(["price", str(path), "--out", str(out)]) == 0
    assert out.read_text() == price_file(path).csv().decode()
    assert _status(["price", str(path), "--out", str(path)]) == 2
    assert path.read_text() == GEMMS


def test_prices_of_a_file_go_to_standard_output_as_csv_or_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path, GEMMS)
    assert _status(["price", str(path)]) == 0
    rows = read(capsys.readouterr().out)
    assert _status(["price", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [float(row["seconds"]) for row in rows] == found["seconds"]
    assert found["rows"] == 3 and found["kernels"] == {"gemm": 3}
    assert sum(one["share"] for one in found["origins"].values()) == pytest.approx(1)


# ---- by sizes -------------------------------------------------------------------------------------

#: Flag → a value that every kernel takes.
VALUES = {"counts": "12,0,7", "experts": "8", "heads": "16", "kv-heads": "8", "top-k": "2"}


def sizes(kernel: str) -> list[str]:
    wanted = [flag for flag in flags_of(kernel).wanted if flag != "counts"]
    words = [word for flag in wanted for word in (f"--{flag}", VALUES.get(flag, "128"))]
    return [*words, "--counts", "12,0,7"] if "counts" in flags_of(kernel).defaults else words


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_can_be_asked_by_its_sizes(kernel: str) -> None:
    found = price_flags(kernel.replace("_", "-"), "h100_sxm", sizes(kernel))["prices"]
    assert len(found) == 1 and found[0]["seconds"] >= found[0]["roofline"] >= 0 < found[0]["seconds"]


def test_the_table_of_flags_has_no_kernel_that_is_none() -> None:
    assert set(FLAGS) <= set(KERNELS)


#: Kernel → flags, and the same call as a row of a measured form.
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "gemm": ("--m 48 --n 4096 --k 7168 --dtype fp8", {"dtype": "fp8", "m": 48, "n": 4096, "k": 7168}),
    "attention-prefill": (
        "--batch 2 --isl 1000 --heads 32 --kv-heads 8 --kv-dtype fp8",
        {
            "attn_dtype": "bfloat16",
            "kv_cache_dtype": "fp8",
            "batch_size": 2,
            "isl": 1000,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
        },
    ),
    "attention-decode": (
        "--batch 2 --kv-len 1000 --heads 32 --kv-heads 8",
        {
            "attn_dtype": "bfloat16",
            "kv_cache_dtype": "bfloat16",
            "batch_size": 2,
            "kv_len": 1000,
            "num_heads": 32,
            "num_kv_heads": 8,
            "head_dim": 128,
        },
    ),
    "mla-decode": (
        "--batch 4 --kv-len 3000 --heads 16",
        {
            "scope": "kernel",
            "phase": "decode",
            "mla_dtype": "bfloat16",
            "kv_cache_dtype": "bfloat16",
            "num_heads": 16,
            "batch_size": 4,
            "seq_len": 3000,
        },
    ),
    "mla-prefill": (
        "--batch 4 --isl 3000 --heads 16",
        {
            "scope": "kernel",
            "phase": "prefill",
            "mla_dtype": "bfloat16",
            "kv_cache_dtype": "bfloat16",
            "num_heads": 16,
            "batch_size": 4,
            "seq_len": 3000,
        },
    ),
    "experts": (
        "--tokens 300 --hidden 2048 --inter 768 --experts 128 --top-k 8 --ep 4 --distribution powerlaw_a1.2",
        {
            "dtype": "bfloat16",
            "hidden_size": 2048,
            "inter_size": 768,
            "topk": 8,
            "num_experts": 128,
            "moe_tp": 1,
            "moe_ep": 4,
            "distribution": "powerlaw_a1.2",
            "num_tokens_global": 300,
        },
    ),
}


@pytest.mark.parametrize("kernel", SAME)
def test_a_call_costs_the_same_by_its_sizes_and_as_a_row(kernel: str, tmp_path: Path) -> None:
    flags, row = SAME[kernel]
    if kernel.replace("-", "_") not in KERNELS:
        pytest.skip("no family prices it")
    by_flags = price_flags(kernel, "H100", flags.split())["prices"][0]
    path = written(tmp_path, as_csv({name: [str(value)] for name, value in row.items()}))
    by_row = price_file(path, gpu="H100")
    assert by_flags["seconds"] == by_row.seconds[0]
    assert by_flags["origin"] == ORIGINS[by_row.origin[0]]


def test_several_values_give_every_combination() -> None:
    found = price_flags("gemm", "h100, a100", ["--m", "1,16..64,5", "--n=512", "--k", "512,1024"])
    asked_for = [(one["gpu"], one["flags"]["m"], one["flags"]["k"]) for one in found["prices"]]
    expected = [
        (gpu, m, k) for gpu in ("h100_sxm", "a100_sxm") for m in (1, 16, 32, 64, 5) for k in (512, 1024)
    ]
    assert asked_for == expected and found["varies"] == ["gpu", "m", "k"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("gemm --gpu h100 --m -1 --n 2 --k 3", "--m -1 is not a whole number from 1 on"),
        ("gemm --gpu h100 --m 1.5 --n 2 --k 3", "--m 1.5 is not a whole number"),
        ("gemm --gpu h100 --m 1 --n 2", "--k missing; it is asked by --m --n --k"),
        ("gemm --gpu h100 --mm 1 --n 2 --k 3", '"--mm" is no flag .*did you mean "m"'),
        ("gemm --gpu h100 --m", "--m has no value"),
        ("gemm --gpu h100 --m 64..2 --n 2 --k 3", "--m 64..2"),
        ("gemm --gpu h100 --m 1 --m 2 --n 2 --k 3", "twice"),
        ("gemm --gpu h100x --m 1 --n 2 --k 3", '"h100x" .*did you mean'),
        (
            "gemm --gpu a100 --m 16 --n 16 --k 16 --dtype fp8",
            'a100_sxm does not compute in "fp8"; it has bf16',
        ),
        ("gemm --gpu h100 --m 1 --n 2 --k 3 --dtype fp9", '"fp9" is not known .*did you mean "fp8"'),
        ("gemm --m 1 --n 2 --k 3", "--gpu missing"),
        ("gemm --gpu h100 --m 1..1e9 --n 1..1e9 --k 1..1e9", "these are 27,000 prices; at most 10,000"),
        ("gemm --gpu h100 --library trtlm --m 1 --n 2 --k 3", '"trtlm" is not known .*did you mean "trtllm"'),
        ("gem --gpu h100", '"gem" is no kernel .*did you mean "gemm"'),
        ("nothing.csv", "nothing.csv: cannot be read"),
    ],
)
def test_wrong_sizes_are_told_with_the_way_out(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _status(["price", *words.split()]) == 2
    streams = capsys.readouterr()
    assert not streams.out and re.search(said, streams.err), streams.err


def test_a_price_is_shown_with_its_origin_and_what_it_rests_on(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["price", "gemm", "--gpu", "h100", "--m", "4096", "--n", "4096", "--k", "7168", "--dtype", "fp8"]
    assert _status(words) == 0
    page = capsys.readouterr().out
    assert page.startswith("gemm on h100_sxm: ") and "roofline" in page and "gemm, h100_sxm, fp8," in page
    assert _status([*words, "--json"]) == 0
    one = json.loads(capsys.readouterr().out)["prices"][0]
    assert one["origin"] in ORIGINS and one["basis"]["relative"] is False


def test_a_gpu_nobody_timed_is_priced_through_its_relative_and_says_so(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu_named("h20").relative == "h100_sxm"
    assert _status(["price", "gemm", "--gpu", "h20,h100", "--m", "1,16", "--n", "4096", "--k", "7168"]) == 0
    page = capsys.readouterr().out
    assert "its own data sheet through what was measured of its relative" in page and "extrapolated" in page
