"""How long prices take: 100 000 calls of every kernel, and a file of 100 000 rows.

python tests/bench/kernel_pricing.py [--calls N]

Times are CPU seconds, the best of several. Beside them stands the time of a matrix product and of as many
exponentials in numpy on the same machine: the ratio to these says more than seconds of another machine.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np

from clustersim.physics.kernels import KERNELS, price_calls
from clustersim.spec.gpus import gpu_named
from clustersim.study.kernel_families import measured_rows
from clustersim.study.kernel_rows import Rows, groups
from clustersim.study.price_rows import price_file

GPU = "h100_sxm"
REPEATS = 5


def best(work: Callable[[], object]) -> float:
    """CPU seconds of the quickest of several."""
    times = []
    for _ in range(REPEATS):
        start = process_time()
        work()
        times.append(process_time() - start)
    return min(times)


def beside(calls: int) -> float:
    """CPU seconds of one pass of arithmetic in numpy over as many numbers: 100 exponentials of each."""
    values = np.random.default_rng(0).random(calls)
    return best(lambda: [np.exp(values) for _ in range(100)])


def of_calls(rows: Rows, calls: int) -> tuple[str, float]:
    """Format and CPU seconds of so many calls like the rows, each at a size of its own."""
    (_, form, _), chosen = groups(rows)[0]
    rng = np.random.default_rng(1)
    at = rng.choice(chosen, calls)
    columns = {name: values[at] for name, values in rows.columns.items()}
    for name in ("m", "tokens", "pairs", "context", "bytes"):
        if name in columns:
            columns[name] = np.ceil(columns[name] * rng.uniform(1.0, 2.0, calls))
    gpu = gpu_named(str(rows.gpu[chosen[0]]))
    kernel = KERNELS[rows.kernel]
    price_calls(kernel, gpu, form, columns)
    return form, best(lambda: price_calls(kernel, gpu, form, columns))


def of_file(rows: int) -> float:
    """CPU seconds of a CSV file of so many products, read, priced and written as text."""
    rng = np.random.default_rng(2)
    sizes = [2 ** rng.integers(low, 15, rows) for low in (0, 8, 8)]
    lines = (f"{GPU},bf16,{m},{n},{k}" for m, n, k in zip(*sizes, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.csv"
        path.write_text("\n".join(["gpu,dtype,m,n,k", *lines, ""]), encoding="utf-8")
        return best(lambda: price_file(path).csv())


def main(arguments: list[str]) -> int:
    """Prints the times as a table on standard error and as JSON on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100_000)
    calls = parser.parse_args(arguments).calls
    unit = beside(calls)
    print(f"{'100 numpy exponentials':24} {unit:8.4f} s", file=sys.stderr)
    found = {"calls": calls, "numpy": unit, "kernels": {}, "file": of_file(calls)}
    for rows in {rows.kernel: rows for rows in measured_rows()}.values():
        form, seconds = of_calls(rows, calls)
        found["kernels"][rows.kernel] = seconds
        print(f"{rows.kernel:24} {seconds:8.4f} s  {seconds / unit:6.2f} x  {form}", file=sys.stderr)
    print(f"{'file of products':24} {found['file']:8.4f} s  {found['file'] / unit:6.2f} x", file=sys.stderr)
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
